//! What the kernel keeps of a module's symbols (`struct mod_kallsyms`,
//! `include/linux/module.h`) and types (`struct btf_module`,
//! `kernel/bpf/btf.c`).

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{
    ModuleError, ModuleSymbolTable, Symbols, Types, module_symbols, module_types,
};

use super::{Module, ModuleModel};
use crate::linux::list::entries;
use crate::{Guest, TableError, layout};

layout! {
    /// `include/linux/module.h`
    struct SymbolTableLayout: "mod_kallsyms" {
        symbols: "symtab",
        count: "num_symtab",
        names: "strtab",
    } optional {
        kinds: "typetab",
    }
}

layout! {
    /// `kernel/bpf/btf.c`
    struct BtfModuleLayout: "btf_module" {
        list: "list",
        module: "module",
        btf: "btf",
    }
}

layout! {
    /// `kernel/bpf/btf.c`
    struct BtfLayout: "btf" {
        data: "data",
        length: "data_size",
    }
}

/// Why a module's symbols or types could not be had.
#[derive(Debug, thiserror::Error)]
pub enum KnowledgeError {
    /// The kernel's types lack something.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The way to them can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// They are damaged.
    #[error(transparent)]
    Module(#[from] ModuleError),
}

/// The module's symbols; none if the kernel keeps none of it.
///
/// # Errors
/// [`KnowledgeError`] if they can't be read.
pub fn symbols_of(
    guest: &Guest,
    table: &'static str,
    module: &Module,
) -> Result<Option<Symbols>, KnowledgeError> {
    let kallsyms = module.optional(module.model.layout.kallsyms.as_ref());
    let Some(kallsyms) = kallsyms.filter(|address| *address != 0) else {
        return Ok(None);
    };
    let kallsyms = VirtualAddress::new(kallsyms);
    let layout = guest.layout::<SymbolTableLayout>(table)?;
    let kinds = match &layout.kinds {
        Some(kinds) => Some(guest.pointer(kallsyms, kinds)?),
        None => None,
    };
    let symbol_table = ModuleSymbolTable {
        symbols: guest.pointer(kallsyms, &layout.symbols)?,
        count: guest.number(kallsyms, &layout.count)?,
        names: guest.pointer(kallsyms, &layout.names)?,
        kinds: kinds.filter(|kinds| !kinds.is_null()),
    };
    Ok(Some(module_symbols(guest.space(), &symbol_table)?))
}

/// The module's types on top of the kernel's; none if the kernel has none of
/// it, as before Linux 5.11.
///
/// # Errors
/// [`KnowledgeError`] if they can't be read.
pub fn types_of(
    guest: &Guest,
    table: &'static str,
    module: &Module,
) -> Result<Option<Types>, KnowledgeError> {
    let (Some(head), Ok(layout), Ok(btf)) = (
        guest.symbols().address("btf_modules"),
        guest.layout::<BtfModuleLayout>(table),
        guest.layout::<BtfLayout>(table),
    ) else {
        return Ok(None);
    };
    for entry in entries(guest, table, "btf_modules", head, layout.list.offset) {
        if guest.pointer(entry, &layout.module)? != module.address {
            continue;
        }
        let blob = guest.pointer(entry, &layout.btf)?;
        let data = guest.pointer(blob, &btf.data)?;
        let size = guest.number(blob, &btf.length)?;
        let types = module_types(guest.space(), data, size, guest.types(table)?)?;
        return Ok(Some(types));
    }
    Ok(None)
}

/// The loaded module of that name.
///
/// # Errors
/// [`TableError`] if the list of modules can't be found.
pub fn module_named(
    guest: &Guest,
    table: &'static str,
    name: &[u8],
) -> Result<Option<Module>, TableError> {
    // Resolved first, so that a kernel without modules says so.
    guest.layout::<ModuleModel>(table)?;
    Ok(super::modules(guest, table)?.find(|module| module.name == name))
}

//! What the kernel keeps of a module's symbols (`struct mod_kallsyms`,
//! `include/linux/module.h`) and types (`struct btf_module`,
//! `kernel/bpf/btf.c`).

use std::collections::HashMap;

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{
    ModuleError, ModuleSymbolTable, ProfileFrom, Symbols, Types, module_symbols, module_types,
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

layout! {
    /// `include/linux/module.h`
    struct ExportsLayout: "module" {
        symbols: "syms",
        count: "num_syms",
    }
}

layout! {
    /// `include/linux/export-internal.h`, with places relative to themselves
    /// (`HAVE_ARCH_PREL32_RELOCATIONS`, as on x86-64).
    struct ExportLayout: "kernel_symbol" {
        value: "value_offset",
        name: "name_offset",
    }
}

/// More symbols than this exports no module.
const MOST_EXPORTS: u64 = 1 << 16;
/// `KSYM_NAME_LEN` (`include/linux/kallsyms.h`).
const LONGEST_NAME: usize = 512;

/// What a module exports: names by address.
#[derive(Debug, Default)]
pub struct Exports(HashMap<u64, Vec<Vec<u8>>>);

impl Exports {
    /// Whether the symbol of that name and address is one of them.
    pub fn contains(&self, address: VirtualAddress, name: &str) -> bool {
        let names = self.0.get(&address.as_u64());
        names.is_some_and(|names| names.iter().any(|known| known == name.as_bytes()))
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
    /// A module's types refer to its kernel's by number, and those of a file
    /// have other numbers.
    #[error("they refer to the kernel's own types, in whose place an ISF file was given")]
    OtherTypes,
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

/// The symbols in the module's own list of exports, `syms`. They have
/// capital letters in `/proc/kallsyms`, all others small ones; kernels
/// that keep exports for modules under the GPL in a list of their own don't
/// look into that one (`is_exported`).
///
/// # Errors
/// [`KnowledgeError`] if they can't be read.
pub fn exports_of(
    guest: &Guest,
    table: &'static str,
    module: &Module,
) -> Result<Exports, KnowledgeError> {
    let layout = guest.layout::<ExportsLayout>(table)?;
    let entry = guest.layout::<ExportLayout>(table)?;
    let list = guest.pointer(module.address, &layout.symbols)?;
    let count = guest.number(module.address, &layout.count)?;
    let mut exports = Exports::default();
    for index in 0..count.min(MOST_EXPORTS) {
        let export = list.wrapping_add(index.wrapping_mul(entry.size));
        // Both are told by their distance from where that is written.
        let target = |offset| -> Result<VirtualAddress, ReadError> {
            let place = export.wrapping_add(offset);
            let distance = guest.space().read_u32(place)? as i32;
            let target = place.as_u64().wrapping_add_signed(distance.into());
            Ok(VirtualAddress::new(target))
        };
        let address = target(entry.value.offset)?.as_u64();
        let name = guest
            .space()
            .read_c_string(target(entry.name.offset)?, LONGEST_NAME)?;
        exports.0.entry(address).or_default().push(name);
    }
    Ok(exports)
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
        guest.address("btf_modules"),
        guest.layout::<BtfModuleLayout>(table),
        guest.layout::<BtfLayout>(table),
    ) else {
        return Ok(None);
    };
    for entry in entries(guest, table, "btf_modules", head, layout.list.offset) {
        if guest.pointer(entry, &layout.module)? != module.address {
            continue;
        }
        if guest.kernel().evidence.profile == ProfileFrom::Isf {
            return Err(KnowledgeError::OtherTypes);
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

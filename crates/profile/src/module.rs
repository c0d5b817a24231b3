//! Types and symbols of a loaded module, from where the kernel keeps them.
//!
//! Who calls knows the module's own structures: its BTF is at
//! `struct module`'s `btf_data` while it loads (5.11 and later) and at
//! `struct btf`'s `data`, in the list `btf_modules`, from then on; its symbols
//! are at `struct module`'s `kallsyms` (`struct mod_kallsyms`).

use secmon_memory::{AddressSpace, ReadError, VirtualAddress};

use crate::kallsyms::KallsymsError;
use crate::{BtfError, MAXIMUM_BTF_LENGTH, Symbols, Types};

/// More symbols than any module has: the largest graphics drivers have some
/// 60,000.
const MAXIMUM_MODULE_SYMBOLS: u64 = 1 << 19;
/// More than all names of one module.
const MAXIMUM_MODULE_STRINGS: u64 = 32 << 20;
/// The longest name (`KSYM_NAME_LEN`).
const MAXIMUM_NAME: u64 = 512;
/// Bytes of an `Elf64_Sym`.
const SYMBOL_LENGTH: usize = 24;

/// Why a module's types or symbols could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// They can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A length that no module has.
    #[error("{what} at {address} claims {length} entries or bytes, more than the {limit} accepted")]
    TooLong {
        /// `types`, `symbols` or `names`.
        what: &'static str,
        /// Where it starts.
        address: VirtualAddress,
        /// What it claims.
        length: u64,
        /// What is accepted.
        limit: u64,
    },
    /// The types contradict themselves.
    #[error("module types at {address}: {source}")]
    Btf {
        /// Where the blob starts.
        address: VirtualAddress,
        /// What is wrong with it.
        source: BtfError,
    },
    /// The symbols can't be kept.
    #[error(transparent)]
    Symbols(#[from] KallsymsError),
}

/// The types in the `size` bytes of BTF at `address`, on top of `kernel`'s.
///
/// # Errors
/// [`ModuleError`] if the blob can't be read or is damaged.
pub fn module_types(
    space: &AddressSpace,
    address: VirtualAddress,
    size: u64,
    kernel: &Types,
) -> Result<Types, ModuleError> {
    let limit = MAXIMUM_BTF_LENGTH as u64;
    if size > limit {
        return Err(ModuleError::TooLong {
            what: "types",
            address,
            length: size,
            limit,
        });
    }
    let mut bytes = vec![0; size as usize];
    space.read(address, &mut bytes)?;
    kernel
        .parse_module(bytes)
        .map_err(|source| ModuleError::Btf { address, source })
}

/// Where a module's symbols are: the members of `struct mod_kallsyms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleSymbolTable {
    /// `symtab`
    pub symbols: VirtualAddress,
    /// `num_symtab`
    pub count: u64,
    /// `strtab`
    pub names: VirtualAddress,
    /// `typetab`, from 5.2 on
    pub kinds: Option<VirtualAddress>,
}

/// The symbols of a module, in the order of its table, without those that
/// have no name.
///
/// # Errors
/// [`ModuleError`] if the table can't be read.
pub fn module_symbols(
    space: &AddressSpace,
    table: &ModuleSymbolTable,
) -> Result<Symbols, ModuleError> {
    let ModuleSymbolTable {
        symbols,
        count,
        names,
        kinds,
    } = *table;
    if count > MAXIMUM_MODULE_SYMBOLS {
        return Err(ModuleError::TooLong {
            what: "symbols",
            address: symbols,
            length: count,
            limit: MAXIMUM_MODULE_SYMBOLS,
        });
    }
    let mut bytes = vec![0; count as usize * SYMBOL_LENGTH];
    space.read(symbols, &mut bytes)?;
    let entries = bytes.as_chunks::<SYMBOL_LENGTH>().0;
    let last_name = entries.iter().map(name_offset).max().unwrap_or(0);
    let length = u64::from(last_name) + MAXIMUM_NAME;
    if length > MAXIMUM_MODULE_STRINGS {
        return Err(ModuleError::TooLong {
            what: "names",
            address: names,
            length,
            limit: MAXIMUM_MODULE_STRINGS,
        });
    }
    let text = read_what_is_there(space, names, length)?;
    let kinds = match kinds {
        Some(address) => {
            let mut bytes = vec![0; count as usize];
            space.read(address, &mut bytes)?;
            bytes
        }
        None => Vec::new(),
    };
    let list: Vec<(String, u64, char)> = entries
        .iter()
        .enumerate()
        .filter_map(|(number, entry)| {
            let name = text.get(name_offset(entry) as usize..)?;
            let name = &name[..memchr::memchr(0, name)?];
            let value = entry.last_chunk::<16>()?.first_chunk::<8>()?;
            let kind = kinds.get(number).map_or('?', |kind| char::from(*kind));
            let name = String::from_utf8_lossy(name).into_owned();
            (!name.is_empty()).then_some((name, u64::from_le_bytes(*value), kind))
        })
        .collect();
    Ok(Symbols::from_list(&list)?)
}

/// `st_name`
fn name_offset(entry: &[u8; SYMBOL_LENGTH]) -> u32 {
    entry
        .first_chunk::<4>()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Up to `length` bytes: the names end somewhere in their last page, and the
/// next may not be mapped.
fn read_what_is_there(
    space: &AddressSpace,
    address: VirtualAddress,
    length: u64,
) -> Result<Vec<u8>, ModuleError> {
    let mut bytes = vec![0; length as usize];
    if space.read(address, &mut bytes).is_ok() {
        return Ok(bytes);
    }
    let mut done = 0;
    while done < bytes.len() {
        let position = address.wrapping_add(done as u64);
        let left = (secmon_memory::PAGE_SIZE - position.page_offset()) as usize;
        let end = bytes.len().min(done + left);
        if let Err(error) = space.read(position, &mut bytes[done..end]) {
            if done == 0 {
                return Err(error.into());
            }
            bytes.truncate(done);
            break;
        }
        done = end;
    }
    Ok(bytes)
}

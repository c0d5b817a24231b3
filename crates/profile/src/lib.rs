//! Finds a kernel in physical memory and reads its symbols and types from
//! there.
#![forbid(unsafe_code)]

mod attempt;
mod cache;
mod crosscheck;
mod find;
mod image;
mod isf;
mod kallsyms;
mod kernel;
mod locate;
mod module;
mod notes;
mod profile;
mod rivals;
mod symbols;
mod tables;
mod types;

pub use cache::CacheOutcome;
pub use find::{Cache, FindError, FindOptions, Search, find};
pub use isf::{Isf, IsfError};
pub use kallsyms::KallsymsError;
pub use kernel::{
    Conflict, Evidence, Kernel, KernelImage, ProfileFrom, Subject, TablesFrom, VmcoreInfo,
};
pub use module::{ModuleError, ModuleSymbolTable, module_symbols, module_types};
pub use notes::build_ids;
pub use profile::{BuildId, Profile, ProfileError};
pub use symbols::{SymbolRef, Symbols};
pub use types::{
    BtfError, MAXIMUM_BTF_LENGTH, Member, NamedMember, NamedType, TypeError, TypeId, TypeKind,
    Types,
};

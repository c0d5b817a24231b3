//! Finds a kernel in physical memory and reads its symbols and types from
//! there.
#![forbid(unsafe_code)]

mod kallsyms;
mod kernel;
mod profile;
mod symbols;
mod types;

pub use kallsyms::KallsymsError;
pub use kernel::{
    Conflict, Evidence, Kernel, KernelImage, ProfileFrom, Subject, TablesFrom, VmcoreInfo,
};
pub use profile::{BuildId, Profile, ProfileError};
pub use symbols::{SymbolRef, Symbols};
pub use types::{
    BtfError, MAXIMUM_BTF_LENGTH, Member, NamedMember, NamedType, TypeError, TypeId, TypeKind,
    Types,
};

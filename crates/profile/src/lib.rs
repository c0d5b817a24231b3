//! Finds a Linux kernel in physical memory and reads its symbols and types
//! from there: no profile to give, no debug symbols to fetch.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use secmon_memory::PhysicalMemory;
//! use secmon_profile::{FindOptions, find};
//!
//! # fn example(memory: Arc<dyn PhysicalMemory>) -> Result<(), Box<dyn std::error::Error>> {
//! let kernel = find(&memory, &FindOptions::default())?;
//! let symbols = kernel.profile.symbols();
//! let types = kernel.profile.types()?;
//! let init_task = symbols.address("init_task").ok_or("no init_task")?;
//! let comm = types.member("task_struct", "comm")?;
//! let name = kernel.space.read_c_string(init_task.wrapping_add(comm.offset), 16)?;
//! assert_eq!(name, b"swapper/0");
//! # Ok(())
//! # }
//! ```
//!
//! [`find`](fn@find) goes from page tables to the kernel image to its symbol table to
//! the rest, and accepts each step only if it agrees with the ones before; what
//! contradicts them is in [`Kernel::conflicts`]. [`Symbols`] and [`Types`] answer
//! by name. Types come from the BTF that the kernel carries for its own use, or
//! from an ISF file ([`Isf`]); symbols from `kallsyms`.
//!
//! What a process or a socket is, this crate doesn't know, nor where memory
//! comes from. Nothing here depends on a kernel's version: layouts are told
//! apart by what is in memory.
//!
//! All that is read may be forged. Loops and allocations are bounded, nothing
//! recurses on what a guest controls, and a guest that is nothing but
//! forgeries costs seconds, not more.
#![forbid(unsafe_code)]

mod attempt;
mod cache;
mod crosscheck;
mod find;
mod image;
mod isf;
mod isf_export;
mod kallsyms;
mod kernel;
mod locate;
mod module;
mod notes;
mod part;
mod profile;
mod rivals;
mod symbols;
#[cfg(test)]
mod synthetic;
mod tables;
mod types;

pub use cache::CacheOutcome;
pub use find::{Cache, FindError, FindOptions, Search, find};
pub use isf::{Isf, IsfError};
pub use isf_export::{ExportError, write_isf};
pub use kallsyms::KallsymsError;
pub use kernel::{
    Conflict, Evidence, Kernel, KernelImage, ProfileFrom, RootFrom, Subject, TablesFrom, VmcoreInfo,
};
pub use module::{ModuleError, ModuleSymbolTable, module_symbols, module_types};
pub use notes::build_ids;
pub use profile::{BuildId, Profile, ProfileError};
pub use symbols::{SymbolRef, Symbols};
pub use types::{
    BtfError, MAXIMUM_BTF_LENGTH, Member, NamedMember, NamedType, TypeError, TypeId, TypeKind,
    Types,
};

/// Entries for fuzzing: parsers of bytes that nobody outside of this crate
/// calls.
#[doc(hidden)]
pub mod fuzzing {
    use std::sync::Arc;

    use crate::kallsyms::{MARKER_DISTANCE, Names, Tokens};

    /// Writes types as an ISF document has them.
    pub fn isf_types(types: &crate::Types) -> Vec<u8> {
        let mut text = b"{".to_vec();
        let export = crate::types::export::Export::new(types);
        if export.write_sections(&mut text).is_ok() {
            text.push(b'}');
        }
        text
    }

    /// Reads a file of the profile cache.
    pub fn cache_file(bytes: &[u8]) {
        let _ = crate::cache::Stored::decode(&Arc::new(bytes.to_vec().into()));
    }

    /// Reads symbol names: `bytes` holds the number of symbols, the token
    /// index, the token table of 1 KiB and the names.
    pub fn symbol_names(bytes: &[u8]) {
        let Some((count, rest)) = bytes.split_first_chunk::<2>() else {
            return;
        };
        let Some((index, rest)) = rest.split_first_chunk::<512>() else {
            return;
        };
        let (text, names) = rest.split_at(rest.len().min(1024));
        let mut places = [0; 256];
        for (place, bytes) in places.iter_mut().zip(index.as_chunks::<2>().0) {
            *place = u16::from_le_bytes(*bytes);
        }
        let Ok(tokens) = Tokens::parse(text.to_vec(), &places) else {
            return;
        };
        // The markers that the names ask for, so that they are accepted.
        let count = usize::from(u16::from_le_bytes(*count));
        let mut markers = Vec::new();
        let mut offset = 0;
        for number in 0..count {
            if number % MARKER_DISTANCE == 0 {
                markers.push(offset as u32);
            }
            match crate::kallsyms::name_tokens(names, offset) {
                Some(place) => offset = place.end,
                None => break,
            }
        }
        if let Ok(names) = Names::parse(names.to_vec(), count, markers, tokens) {
            let mut seen = 0;
            names.for_each(|_, _| seen += 1);
            assert_eq!(seen, count);
            if let Ok(slots) = crate::symbols::index(&names) {
                let mut name = Vec::new();
                names.get(count / 2, &mut name);
                let name = String::from_utf8_lossy(&name);
                let found = crate::symbols::numbers_of(&names, &slots, &name);
                assert!(found.iter().all(|number| *number < count));
            }
        }
    }
}

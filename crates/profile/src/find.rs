//! From physical memory to a kernel with its symbols and types.
//!
//! The order of the steps, and what each rests on:
//!
//! 1. page tables of the kernel's shape (`tables.rs`), which give the image;
//! 2. the symbol table inside the image (`locate.rs`), accepted only if it puts
//!    `_text` where the page tables do and `linux_banner` where a banner is;
//! 3. the kernel's own root by its symbol, accepted only if it shares entry 511
//!    with the tables of step 1;
//! 4. types, build id, direct map by symbols, each checked against a second
//!    sign: the blob's own header, VMCOREINFO, the page tables.
//!
//! What contradicts what was accepted becomes a [`Conflict`]. No step looks at
//! a version.

use std::path::PathBuf;
use std::sync::Arc;

use secmon_memory::{PhysicalAddress, PhysicalMemory, VirtualAddress};

use crate::attempt::Attempt;
use crate::kernel::note;
use crate::rivals;
use crate::tables::{self, Candidate};
use crate::{Conflict, Isf, IsfError, Kernel, Subject, TablesFrom};

/// How to look for a kernel.
#[derive(Clone, Debug, Default)]
pub struct FindOptions {
    /// Where profiles are kept.
    pub cache: Cache,
    /// An ISF file (JSON, maybe compressed with xz) made for the guest's
    /// kernel, to be used instead of the guest's own BTF, and of its symbol
    /// table if that can't be found.
    pub isf: Option<PathBuf>,
    /// Page-table roots known to be in use, such as the vCPUs' CR3.
    pub root_hints: Vec<PhysicalAddress>,
    /// How far to look for what contradicts the kernel that was found.
    pub search: Search,
}

/// Where profiles are kept from one run to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// In `secmon/profiles` in the user's cache folder.
    #[default]
    User,
    /// In this folder.
    Folder(PathBuf),
    /// Nowhere.
    Off,
}

/// How far to look for rivals of what was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Search {
    /// Low memory and the kernel's image. All of memory only if there is no
    /// kernel, or more than one.
    #[default]
    Quick,
    /// All of memory: page tables, symbol tables, types, banners and
    /// VMCOREINFO. It takes about a second for each GiB.
    Thorough,
}

/// Why no kernel was found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nothing looks like the page tables of a Linux kernel.
    #[error(
        "no page tables of an x86-64 Linux kernel in {bytes} bytes of memory: \
         is it a Linux guest that has booted, and the memory complete?"
    )]
    NoPageTables {
        /// The bytes searched.
        bytes: u64,
    },
    /// Page tables were found, but what they map holds no symbol table.
    #[error(
        "page tables at {root} map a kernel image at {base} (physical {physical}), \
         but no symbol table (kallsyms) is in it that fits; an ISF file could stand in"
    )]
    NoSymbols {
        /// The root of the tables.
        root: PhysicalAddress,
        /// The virtual start of what they map.
        base: VirtualAddress,
        /// The physical start of it.
        physical: PhysicalAddress,
    },
    /// The ISF file can't be used.
    #[error(transparent)]
    Isf(#[from] IsfError),
}

/// Finds the Linux kernel in `memory`.
///
/// # Errors
/// [`FindError`] says how far it came.
pub fn find(memory: &Arc<dyn PhysicalMemory>, options: &FindOptions) -> Result<Kernel, FindError> {
    let isf = match &options.isf {
        Some(path) => Some(Isf::read(path)?),
        None => None,
    };
    let mut candidates = tables::quick_candidates(&**memory, &options.root_hints);
    let mut attempts = attempt_all(memory, options, isf.as_ref(), &candidates)?;
    if attempts.len() != 1 || candidates.len() != 1 || options.search == Search::Thorough {
        // None, or more than one: how many roots lead to each decides.
        let all = tables::all_candidates(&**memory);
        let new: Vec<Candidate> = all
            .iter()
            .filter(|new| candidates.iter().all(|old| old.shared != new.shared))
            .cloned()
            .collect();
        attempts.extend(attempt_all(memory, options, isf.as_ref(), &new)?);
        for candidate in &mut candidates {
            let counted = all.iter().find(|other| other.shared == candidate.shared);
            candidate.votes = counted.map_or(candidate.votes, |other| other.votes);
        }
        candidates.extend(new);
        for (candidate, _) in &mut attempts {
            let counted = candidates.iter().find(|c| c.shared == candidate.shared);
            candidate.votes = counted.map_or(candidate.votes, |other| other.votes);
        }
    }
    // What a vCPU uses is believed before what most roots in memory say.
    attempts.sort_by_key(|(candidate, _)| {
        let hinted = matches!(candidate.from, TablesFrom::Hint(_));
        std::cmp::Reverse((hinted, candidate.votes))
    });
    let mut attempts = attempts.into_iter();
    let Some((chosen, mut kernel)) = attempts.next() else {
        return Err(match candidates.first() {
            None => FindError::NoPageTables {
                bytes: memory.size(),
            },
            Some(candidate) => FindError::NoSymbols {
                root: candidate.root,
                base: candidate.image.virtual_base,
                physical: candidate.image.physical_base,
            },
        });
    };
    let describe = |candidate: &Candidate, complete: bool| {
        format!(
            "{} page-table roots lead to {} image at {} (physical {})",
            candidate.votes,
            if complete { "a complete kernel" } else { "an" },
            candidate.image.virtual_base,
            candidate.image.physical_base,
        )
    };
    let complete: Vec<PhysicalAddress> = attempts.map(|(candidate, _)| candidate.shared).collect();
    for candidate in &candidates {
        if candidate.shared == chosen.shared {
            continue;
        }
        let why = match chosen.from {
            TablesFrom::Hint(root) => format!("a vCPU uses the root at {root}"),
            _ if complete.contains(&candidate.shared) => "more roots lead there".to_owned(),
            _ => "the other image holds no symbol table that fits".to_owned(),
        };
        let conflict = Conflict {
            what: Subject::PageTables,
            chosen: describe(&chosen, true),
            other: describe(candidate, complete.contains(&candidate.shared)),
            why,
        };
        note(&mut kernel.conflicts, conflict);
    }
    if options.search == Search::Thorough {
        rivals::search_all(memory, &mut kernel);
    }
    Ok(kernel)
}

fn attempt_all(
    memory: &Arc<dyn PhysicalMemory>,
    options: &FindOptions,
    isf: Option<&Isf>,
    candidates: &[Candidate],
) -> Result<Vec<(Candidate, Kernel)>, FindError> {
    let mut kernels = Vec::new();
    for candidate in candidates {
        let attempt = Attempt::new(memory, candidate);
        if let Some(kernel) = attempt.kernel(options, isf)? {
            kernels.push((candidate.clone(), kernel));
        }
    }
    Ok(kernels)
}

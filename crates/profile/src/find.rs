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
use crate::{Conflict, Isf, IsfError, Kernel, KernelImage, RootFrom, Subject, TablesFrom};

/// Candidates that are looked at in full, each for some 50 ms.
const MAXIMUM_ATTEMPTS: usize = 16;

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
    /// Images whose kernels run no more: a machine's reset leaves them in
    /// memory, with more page-table roots than a young kernel has. One of them
    /// is chosen only where there is no other, or a vCPU uses it.
    pub left_behind: Vec<KernelImage>,
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
    let mut search = tables::quick_candidates(&**memory, &options.root_hints);
    let mut attempts = Attempts {
        memory,
        options,
        isf: isf.as_ref(),
        kernels: Vec::new(),
        error: None,
    };
    if let [candidate] = &search.candidates[..] {
        attempts.attempt(candidate);
    }
    let agrees = |(_, kernel): &(_, Kernel)| {
        kernel.evidence.root == RootFrom::Symbol && !options.is_left_behind(&kernel.image)
    };
    if !attempts.kernels.iter().any(agrees) || options.search == Search::Thorough {
        // None, or more than one: how many roots lead to each decides.
        search = merged(search, tables::all_candidates(&**memory));
        for candidate in search.candidates.iter().take(MAXIMUM_ATTEMPTS) {
            attempts.attempt(candidate);
        }
        search.complete &= search.candidates.len() <= MAXIMUM_ATTEMPTS;
    }
    let Attempts { kernels, error, .. } = attempts;
    let images: Vec<KernelImage> = kernels.iter().map(|(_, kernel)| kernel.image).collect();
    let Some((chosen, mut kernel)) = choose(kernels, &search.candidates, options) else {
        return Err(match (error, search.candidates.first()) {
            (Some(error), _) => error.into(),
            (None, None) => FindError::NoPageTables {
                bytes: memory.size(),
            },
            (None, Some(candidate)) => FindError::NoSymbols {
                root: candidate.root,
                base: candidate.image.virtual_base,
                physical: candidate.image.physical_base,
            },
        });
    };
    report_others(&mut kernel.conflicts, &chosen, &search, &images, options);
    if options.search == Search::Thorough {
        rivals::search_all(memory, &mut kernel);
    }
    Ok(kernel)
}

impl FindOptions {
    fn is_left_behind(&self, image: &KernelImage) -> bool {
        self.left_behind.iter().any(|left| same_image(left, image))
    }
}

/// Whether two sets of tables map one kernel. They do if one is of the user
/// half with page-table isolation, or with five levels if one is an inner
/// table of the other.
fn same_image(a: &KernelImage, b: &KernelImage) -> bool {
    a.virtual_base == b.virtual_base && a.physical_base == b.physical_base
}

/// How many roots lead to an image, and whether a vCPU uses one of them.
fn weight(image: &KernelImage, candidates: &[Candidate]) -> (bool, usize) {
    let own = candidates
        .iter()
        .filter(|other| same_image(&other.image, image));
    own.fold((false, 0), |(hinted, votes), candidate| {
        let hint = matches!(candidate.from, TablesFrom::Hint(_));
        (hinted | hint, votes + candidate.votes)
    })
}

/// The kernel to believe in: the image that a vCPU uses, else one that is not
/// [left behind](FindOptions::left_behind), else the one that most roots lead
/// to; of several sets of tables that map it the one that
/// the kernel's own root belongs to.
fn choose(
    kernels: Vec<(PhysicalAddress, Kernel)>,
    candidates: &[Candidate],
    options: &FindOptions,
) -> Option<(Candidate, Kernel)> {
    kernels
        .into_iter()
        .filter_map(|(shared, kernel)| {
            let candidate = candidates.iter().find(|other| other.shared == shared)?;
            Some((candidate.clone(), kernel))
        })
        .min_by_key(|(candidate, kernel)| {
            let (hinted, votes) = weight(&candidate.image, candidates);
            std::cmp::Reverse((
                hinted,
                !options.is_left_behind(&candidate.image),
                votes,
                kernel.evidence.root == RootFrom::Symbol,
                candidate.votes,
            ))
        })
}

/// The candidates of two searches, the most credible first: what a vCPU uses
/// before what most roots in memory say.
fn merged(quick: tables::Search, all: tables::Search) -> tables::Search {
    let mut candidates = quick.candidates;
    for new in all.candidates {
        match candidates.iter_mut().find(|old| old.shared == new.shared) {
            Some(old) => old.votes = new.votes,
            None => candidates.push(new),
        }
    }
    candidates.sort_by_key(|candidate| {
        let hinted = matches!(candidate.from, TablesFrom::Hint(_));
        std::cmp::Reverse((hinted, candidate.votes))
    });
    tables::Search {
        candidates,
        complete: quick.complete && all.complete,
    }
}

/// Notes every candidate that maps another image than the chosen one;
/// `complete` are the images that hold a kernel.
fn report_others(
    conflicts: &mut Vec<Conflict>,
    chosen: &Candidate,
    search: &tables::Search,
    complete: &[KernelImage],
    options: &FindOptions,
) {
    let is_complete = |image: &KernelImage| complete.iter().any(|other| same_image(other, image));
    let describe = |image: &KernelImage| {
        let what = match is_complete(image) {
            true => "a complete kernel's",
            false => "an",
        };
        let (_, votes) = weight(image, &search.candidates);
        format!(
            "{votes} page-table roots that lead to {what} image at {} (physical {})",
            image.virtual_base, image.physical_base,
        )
    };
    let mut seen = vec![chosen.image];
    for candidate in &search.candidates {
        if seen.iter().any(|image| same_image(image, &candidate.image)) {
            continue;
        }
        seen.push(candidate.image);
        let why = match chosen.from {
            TablesFrom::Hint(root) => format!("a vCPU uses the root at {root}"),
            _ if options.is_left_behind(&candidate.image) => "the other runs no more".to_owned(),
            _ if is_complete(&candidate.image) => "more roots lead there".to_owned(),
            _ => "no symbol table that fits is in the other".to_owned(),
        };
        let conflict = Conflict {
            what: Subject::PageTables,
            chosen: describe(&chosen.image),
            other: describe(&candidate.image),
            why,
        };
        note(conflicts, conflict);
    }
    if !search.complete {
        let conflict = Conflict {
            what: Subject::PageTables,
            chosen: describe(&chosen.image),
            other: "more tables of a kernel's shape than were looked at".to_owned(),
            why: "no guest without forgeries has that many".to_owned(),
        };
        note(conflicts, conflict);
    }
}

/// The kernels that candidates lead to.
struct Attempts<'a> {
    memory: &'a Arc<dyn PhysicalMemory>,
    options: &'a FindOptions,
    isf: Option<&'a Isf>,
    /// By the frame that all their roots share.
    kernels: Vec<(PhysicalAddress, Kernel)>,
    /// Why the ISF file does not fit one of them.
    error: Option<IsfError>,
}

impl Attempts<'_> {
    fn attempt(&mut self, candidate: &Candidate) {
        let known = self
            .kernels
            .iter()
            .any(|(shared, _)| *shared == candidate.shared);
        if known {
            return;
        }
        match Attempt::new(self.memory, candidate).kernel(self.options, self.isf) {
            Ok(Some(kernel)) => self.kernels.push((candidate.shared, kernel)),
            Ok(None) => {}
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secmon_memory::PAGE_SIZE;

    use super::*;
    use crate::ProfileError;
    use crate::synthetic::{self, BANNER, BASE, IMAGE, Recipe};

    fn options() -> FindOptions {
        FindOptions {
            cache: Cache::Off,
            ..FindOptions::default()
        }
    }

    #[test]
    fn every_layout_is_found_by_its_data() {
        for recipe in Recipe::all() {
            let memory = synthetic::memory(recipe).shared();
            let kernel = find(&memory, &options()).unwrap_or_else(|error| {
                panic!("{recipe:?}: {error}");
            });
            assert_eq!(kernel.profile.banner(), BANNER, "{recipe:?}");
            assert_eq!(kernel.space.mode(), recipe.mode, "{recipe:?}");
            assert_eq!(kernel.image.virtual_base.as_u64(), BASE);
            assert_eq!(kernel.image.physical_base.as_u64(), IMAGE as u64);
            assert_eq!(kernel.image.slide, 0);
            assert_eq!(kernel.direct_map_slide, 0, "{recipe:?}");
            assert_eq!(kernel.conflicts, [], "{recipe:?}");
            assert_eq!(kernel.vmcoreinfo, None);
            let found: Vec<(String, char, u64)> = kernel
                .profile
                .symbols()
                .iter()
                .map(|symbol| (symbol.name.to_owned(), symbol.kind, symbol.address.as_u64()))
                .collect();
            assert_eq!(found, synthetic::symbols(recipe), "{recipe:?}");
            let types = kernel.profile.types().expect("types");
            assert_eq!(types.size_of("task_struct"), Ok(64));
            assert_eq!(
                kernel.profile.build_id(),
                crate::BuildId::new(&[0xab; 20]).as_ref()
            );
        }
    }

    #[test]
    fn without_types_the_rest_is_found() {
        let recipe = Recipe::default();
        let mut memory = synthetic::memory(recipe);
        let [_, _, types, _] = synthetic::interesting(recipe);
        memory.bytes[types].fill(0);
        let kernel = find(&memory.shared(), &options()).expect("a kernel");
        let error = kernel.profile.types().expect_err("no types");
        assert!(matches!(error, ProfileError::DamagedBtf { .. }), "{error}");
        assert!(kernel.profile.symbols().address("filler_77").is_some());
    }

    #[test]
    fn errors_say_how_far_it_came() {
        let recipe = Recipe::default();
        let mut memory = synthetic::memory(recipe);
        let [tables, symbols, ..] = synthetic::interesting(recipe);
        memory.bytes[symbols].fill(0);
        let error = find(&memory.shared(), &options()).map(|_| ());
        assert!(
            matches!(error, Err(FindError::NoSymbols { .. })),
            "{error:?}"
        );
        memory.bytes[tables].fill(0);
        let error = find(&memory.shared(), &options()).map(|_| ());
        assert!(
            matches!(error, Err(FindError::NoPageTables { .. })),
            "{error:?}"
        );
    }

    #[test]
    fn memory_full_of_tables_ends_in_time() {
        // Every page a root that leads to itself by all of its entries but
        // the present pages' frames differ: the worst there is to look into.
        let mut memory = synthetic::memory(Recipe::default());
        for (number, page) in memory
            .bytes
            .chunks_exact_mut(PAGE_SIZE as usize)
            .enumerate()
        {
            let next = (number as u64 * 7 + 1) % 6000;
            let entry = (next << 12 | 0x63).to_le_bytes();
            for slot in page.as_chunks_mut::<8>().0 {
                *slot = entry;
            }
        }
        let start = std::time::Instant::now();
        assert!(find(&memory.shared(), &options()).is_err());
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn damage_anywhere_is_survived(
            changes in proptest::collection::vec(
                (0_usize..4, any::<proptest::sample::Index>(), any::<u8>()), 1..24),
            layout in 0_usize..30,
            thorough in any::<bool>(),
        ) {
            let recipes: Vec<Recipe> = Recipe::all().collect();
            let recipe = recipes[layout % recipes.len()];
            let mut memory = synthetic::memory(recipe);
            let places = synthetic::interesting(recipe);
            for (place, index, byte) in changes {
                let place = places[place].clone();
                memory.bytes[place.start + index.index(place.len())] = byte;
            }
            let mut options = options();
            if thorough {
                options.search = Search::Thorough;
            }
            if let Ok(kernel) = find(&memory.shared(), &options) {
                prop_assert!(kernel.conflicts.len() < 200);
                let _ = kernel.profile.symbols().iter().count();
                let _ = kernel.profile.types().map(|types| types.iter().count());
            }
        }
    }
}

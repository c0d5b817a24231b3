//! Finds the kernel's page tables, and through them its image, in physical
//! memory.
//!
//! Every page-table root of Linux maps the kernel image in the same way: entry
//! 511 leads (with five levels through one more table) to `level3_kernel_pgt`,
//! whose entry 510 leads to `level2_kernel_pgt`, which maps the image, and
//! nothing else, in 2 MiB steps from 0xffffffff80000000 plus the KASLR slide
//! (`arch/x86/kernel/head_64.S`, `cleanup_highmap`). That is a shape that data
//! doesn't take by chance.
//!
//! The real-mode trampoline, somewhere below 1 MiB, holds such a root
//! (`setup_real_mode` copies entry 511 of `init_top_pgt` there), so that 256
//! pages are looked at first; all of memory only if they hold none.
//!
//! What is found here are candidates: who planted what is decided by looking
//! at the images they lead to.

use std::collections::HashMap;

use secmon_memory::{
    AddressSpace, PAGE_SIZE, PagingMode, PhysicalAddress, PhysicalMemory, VirtualAddress,
};

use crate::{KernelImage, TablesFrom};

/// Where the kernel's image map starts (`__START_KERNEL_map`).
pub(crate) const START_KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// The address a kernel is linked for: `__START_KERNEL` with the usual
/// `CONFIG_PHYSICAL_START` of 16 MiB.
pub(crate) const LINK_BASE: u64 = START_KERNEL_MAP + 0x0100_0000;
const LARGE_PAGE: u64 = 2 << 20;
/// A kernel's image has at least this many 2 MiB steps.
const MINIMUM_STEPS: usize = 4;
/// The end of real-mode memory.
const LOW_MEMORY_END: u64 = 1 << 20;
/// Bytes read at once where memory is not mapped.
const CHUNK: usize = 1 << 20;
/// A kernel's image has at most this many 2 MiB steps. A distribution's has
/// 20 to 40; the room for it ends at 512.
const MAXIMUM_STEPS: usize = 256;
/// Tables that are looked into for one search: a bound on its time, which a
/// guest without forgeries stays far below.
const MAXIMUM_TABLES: usize = 1 << 18;
/// Entries of tables that are looked into for the direct map.
const MAXIMUM_ENTRIES: usize = 1 << 20;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Page tables that map something of a kernel's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// A root whose upper end is the kernel's: the kernel's own, a process's
    /// or the trampoline's.
    pub root: PhysicalAddress,
    pub mode: PagingMode,
    /// The frame that entry 511 of every root leads to.
    pub shared: PhysicalAddress,
    pub image: KernelImage,
    pub from: TablesFrom,
    /// How many roots were seen that lead there.
    pub votes: usize,
}

/// What a search found.
pub(crate) struct Search {
    pub candidates: Vec<Candidate>,
    /// Whether everything was looked at: not if there was too much of what
    /// looks like a kernel's tables.
    pub complete: bool,
}

/// The candidates of `hints` and low memory.
pub(crate) fn quick_candidates(memory: &dyn PhysicalMemory, hints: &[PhysicalAddress]) -> Search {
    let mut candidates = Candidates::new(memory);
    for hint in hints {
        let given = PhysicalAddress::new(hint.as_u64() & FRAME);
        // With page-table isolation the user half of a pair of roots may be
        // in use; the kernel's half is the even page before it.
        let kernel_half = PhysicalAddress::new(given.as_u64() & !PAGE_SIZE);
        let known = candidates.found.len();
        candidates.look_at(kernel_half, TablesFrom::Hint(given));
        if candidates.found.len() == known {
            candidates.look_at(given, TablesFrom::Hint(given));
        }
    }
    for page in (0..LOW_MEMORY_END).step_by(PAGE_SIZE as usize) {
        let root = PhysicalAddress::new(page);
        candidates.look_at(root, TablesFrom::Trampoline(root));
    }
    candidates.finish()
}

/// The candidates of all of memory, those that most roots lead to first.
pub(crate) fn all_candidates(memory: &dyn PhysicalMemory) -> Search {
    let mut candidates = Candidates::new(memory);
    let mut buffer = Vec::new();
    for region in memory.populated() {
        let first = region.start.as_u64().next_multiple_of(PAGE_SIZE);
        let end = region.end().as_u64();
        if let Some(mapped) = memory.mapped() {
            for page in (first..end).step_by(PAGE_SIZE as usize) {
                let root = PhysicalAddress::new(page);
                if let Some(entry) = mapped.read_u64(root.wrapping_add(PAGE_SIZE - 8)) {
                    candidates.consider(root, entry, TablesFrom::Search);
                }
            }
            continue;
        }
        buffer.resize(CHUNK, 0);
        for chunk in (first..end).step_by(CHUNK) {
            let length = (end - chunk).min(CHUNK as u64) as usize;
            let whole = memory
                .read(PhysicalAddress::new(chunk), &mut buffer[..length])
                .is_ok();
            for (index, page) in buffer[..length].chunks_exact_mut(4096).enumerate() {
                let root = PhysicalAddress::new(chunk + index as u64 * PAGE_SIZE);
                // Where a chunk has a page that is left out, the others count.
                if !whole && memory.read(root, page).is_err() {
                    continue;
                }
                if let Some(bytes) = page.last_chunk::<8>() {
                    candidates.consider(root, u64::from_le_bytes(*bytes), TablesFrom::Search);
                }
            }
        }
    }
    let mut search = candidates.finish();
    search
        .candidates
        .sort_by_key(|candidate| std::cmp::Reverse(candidate.votes));
    search
}

struct Candidates<'a> {
    memory: &'a dyn PhysicalMemory,
    found: Vec<Candidate>,
    /// By frame of entry 511: which of `found` it is, or none.
    frames: HashMap<u64, Option<usize>>,
    end: u64,
    /// Tables that may still be looked into.
    budget: usize,
}

impl<'a> Candidates<'a> {
    fn new(memory: &'a dyn PhysicalMemory) -> Self {
        Self {
            memory,
            found: Vec::new(),
            frames: HashMap::new(),
            end: memory
                .regions()
                .last()
                .map_or(0, |region| region.end().as_u64()),
            budget: MAXIMUM_TABLES,
        }
    }

    fn finish(self) -> Search {
        Search {
            candidates: self.found,
            complete: self.budget > 0,
        }
    }

    fn look_at(&mut self, root: PhysicalAddress, from: TablesFrom) {
        if let Some(entry) = read_entry(self.memory, root, 511) {
            self.consider(root, entry, from);
        }
    }

    /// Follows `entry`, the last of the page at `root`.
    #[inline]
    fn consider(&mut self, root: PhysicalAddress, entry: u64, from: TablesFrom) {
        let frame = entry & FRAME;
        if entry & (PRESENT | LARGE | NO_EXECUTE) != PRESENT || frame >= self.end || frame == 0 {
            return;
        }
        if let Some(known) = self.frames.get(&frame) {
            if let Some(candidate) = known.and_then(|index| self.found.get_mut(index)) {
                candidate.votes += 1;
            }
            return;
        }
        if self.budget == 0 {
            return;
        }
        let shared = PhysicalAddress::new(frame);
        let image = kernel_image(self.memory, shared, &mut self.budget);
        let found = image.map(|(mode, image)| {
            self.found.push(Candidate {
                root,
                mode,
                shared,
                image,
                from,
                votes: 1,
            });
            self.found.len() - 1
        });
        self.frames.insert(frame, found);
    }
}

/// Entry `index` of the table at `table`.
pub(crate) fn read_entry(
    memory: &dyn PhysicalMemory,
    table: PhysicalAddress,
    index: u64,
) -> Option<u64> {
    let address = table.wrapping_add(index * 8);
    if let Some(mapped) = memory.mapped() {
        return mapped.read_u64(address);
    }
    let mut bytes = [0; 8];
    memory.read(address, &mut bytes).ok()?;
    Some(u64::from_le_bytes(bytes))
}

/// The table that an entry leads to.
fn next_table(entry: u64) -> Option<PhysicalAddress> {
    (entry & (PRESENT | LARGE) == PRESENT).then(|| PhysicalAddress::new(entry & FRAME))
}

/// The kernel image below the table that entry 511 of a root leads to.
fn kernel_image(
    memory: &dyn PhysicalMemory,
    shared: PhysicalAddress,
    budget: &mut usize,
) -> Option<(PagingMode, KernelImage)> {
    let below = |table, index| read_entry(memory, table, index).and_then(next_table);
    // With four levels it is `level3_kernel_pgt`.
    let directory = below(shared, 510);
    let image = directory.and_then(|directory| image_of(memory, directory, budget));
    if let Some(image) = image {
        return Some((PagingMode::FourLevel, image));
    }
    // With five it is `level4_kernel_pgt`.
    let directory = below(below(shared, 511)?, 510)?;
    let image = image_of(memory, directory, budget)?;
    Some((PagingMode::FiveLevel, image))
}

/// The image that a page directory of a kernel's shape maps: from the first
/// present entry on, all entries lead to one run of physical memory.
fn image_of(
    memory: &dyn PhysicalMemory,
    directory: PhysicalAddress,
    budget: &mut usize,
) -> Option<KernelImage> {
    *budget = budget.saturating_sub(1);
    let mut bytes = [0; 4096];
    memory.read(directory, &mut bytes).ok()?;
    let mut base = None;
    let mut steps = 0;
    let mut end = 0;
    for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
        let entry = u64::from_le_bytes(*entry);
        if entry & PRESENT == 0 {
            continue;
        }
        let physical = if entry & LARGE != 0 {
            // Bit 12 is the PAT bit here.
            entry & FRAME & !(LARGE_PAGE - 1)
        } else {
            // Split into 4 KiB pages, some of which may be unmapped.
            *budget = budget.saturating_sub(1);
            let table = PhysicalAddress::new(entry & FRAME);
            let mut entries = [0; 4096];
            memory.read(table, &mut entries).ok()?;
            let first = entries
                .as_chunks::<8>()
                .0
                .iter()
                .map(|entry| u64::from_le_bytes(*entry))
                .enumerate()
                .find(|(_, entry)| entry & PRESENT != 0);
            let Some((page, entry)) = first else {
                continue;
            };
            (entry & FRAME).wrapping_sub(page as u64 * PAGE_SIZE)
        };
        let (first, start) = *base.get_or_insert((index, physical));
        if physical != start.wrapping_add((index - first) as u64 * LARGE_PAGE) {
            // Without KASLR modules share this directory, above the image.
            if entry & LARGE == 0 && steps >= MINIMUM_STEPS {
                break;
            }
            return None;
        }
        steps += 1;
        end = index + 1;
        if end - first > MAXIMUM_STEPS {
            return None;
        }
    }
    let (first, start) = base?;
    let image = KernelImage {
        virtual_base: VirtualAddress::new(START_KERNEL_MAP + first as u64 * LARGE_PAGE),
        physical_base: PhysicalAddress::new(start),
        slide: (START_KERNEL_MAP + first as u64 * LARGE_PAGE).wrapping_sub(LINK_BASE),
        size: (end - first) as u64 * LARGE_PAGE,
    };
    let inside = memory
        .regions()
        .iter()
        .any(|region| region.contains(image.physical_base));
    (steps >= MINIMUM_STEPS && start % LARGE_PAGE == 0 && inside).then_some(image)
}

/// The pages of the image that look like the root of `candidate`'s tables:
/// entry 511 leads where all roots' do. The best first, by how much of the
/// upper half they map.
pub(crate) fn roots_in_image(
    memory: &dyn PhysicalMemory,
    candidate: &Candidate,
) -> Vec<PhysicalAddress> {
    let mut roots = Vec::new();
    for offset in (0..candidate.image.size).step_by(PAGE_SIZE as usize) {
        let page = candidate.image.physical_base.wrapping_add(offset);
        let Some(entry) = read_entry(memory, page, 511) else {
            continue;
        };
        if next_table(entry) != Some(candidate.shared) {
            continue;
        }
        let mut bytes = [0; 4096];
        if memory.read(page, &mut bytes).is_err() {
            continue;
        }
        let upper = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .skip(256)
            .filter(|entry| entry[0] & 1 != 0)
            .count();
        roots.push((upper, page));
    }
    roots.sort_by_key(|(upper, page)| (std::cmp::Reverse(*upper), *page));
    roots.into_iter().map(|(_, page)| page).collect()
}

/// Where the tables map all of physical memory, found by looking for a large
/// stretch of the upper half that leads to the image's own frames.
pub(crate) fn direct_map_by_search(
    space: &AddressSpace,
    image: &KernelImage,
) -> Option<VirtualAddress> {
    let memory = &**space.memory();
    let root = PhysicalAddress::new(space.root().as_u64() & FRAME);
    let (top_shift, sign) = match space.mode() {
        PagingMode::FourLevel => (39, 0xffff_0000_0000_0000_u64),
        PagingMode::FiveLevel => (48, 0xfe00_0000_0000_0000),
    };
    let mut budget = MAXIMUM_ENTRIES;
    // KASLR places the direct map at a multiple of 1 GiB.
    let gibibyte = image.physical_base.as_u64() >> 30;
    for top in 256..511 {
        let Some(table) = read_entry(memory, root, top).and_then(next_table) else {
            continue;
        };
        let high = sign | top << top_shift;
        let tables = match space.mode() {
            PagingMode::FourLevel => vec![(high, table)],
            PagingMode::FiveLevel => (0..512_u64)
                .filter_map(|index| {
                    let next = next_table(read_entry(memory, table, index)?)?;
                    Some((high | index << 39, next))
                })
                .collect(),
        };
        for (high, table) in tables {
            budget = budget.checked_sub(512)?;
            for index in 0..512 {
                let present = read_entry(memory, table, index).is_some_and(|e| e & PRESENT != 0);
                let Some(start) = (high | index << 30).checked_sub(gibibyte << 30) else {
                    continue;
                };
                if present && maps_image(space, VirtualAddress::new(start), image) {
                    return Some(VirtualAddress::new(start));
                }
            }
        }
    }
    None
}

/// Whether a direct map at `start` leads to the image where it should.
pub(crate) fn maps_image(space: &AddressSpace, start: VirtualAddress, image: &KernelImage) -> bool {
    // The image's data, not its text: the latter's alias may be unmapped.
    [image.size / 2, image.size - LARGE_PAGE, 0]
        .iter()
        .any(|offset| {
            let physical = image.physical_base.wrapping_add(*offset);
            space
                .translate(start.wrapping_add(physical.as_u64()))
                .is_ok_and(|translation| translation.physical == physical)
        })
}

/// Whether the page at `root` is a root that shares entry 511 with others.
pub(crate) fn leads_to(
    memory: &dyn PhysicalMemory,
    root: PhysicalAddress,
    shared: PhysicalAddress,
) -> bool {
    read_entry(memory, root, 511).and_then(next_table) == Some(shared)
}

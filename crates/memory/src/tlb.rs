//! A translation cache that several threads use without a lock.
//!
//! Each slot is two atomic words: the translation, and its tag exclusive-ored
//! with the translation. A slot that two threads wrote at once does not agree
//! with itself and reads as empty, so no lock and no ordering is needed.
//!
//! It never forgets by itself. For a static image it can't be stale; for a
//! live target it holds what the tables said when each address was first used,
//! so an [`AddressSpace`](crate::AddressSpace) has one there only when it was
//! asked for, and then maybe only for ranges whose translations stay.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{PageSize, PhysicalAddress, Translation, VirtualAddress};

/// Slots for 4 KiB pages.
const SMALL_SLOTS: usize = 1024;
/// Slots for 2 MiB pages and the 2 MiB parts of 1 GiB pages.
const LARGE_SLOTS: usize = 512;
const SMALL_SHIFT: u32 = 12;
const LARGE_SHIFT: u32 = 21;
/// Set in every valid slot: frame 0 is a translation, too.
const VALID: u64 = 1;

#[derive(Default)]
struct Slot {
    translation: AtomicU64,
    check: AtomicU64,
}

impl Slot {
    #[inline]
    fn get(&self, tag: u64) -> Option<u64> {
        let translation = self.translation.load(Relaxed);
        let valid = translation & VALID != 0 && self.check.load(Relaxed) ^ translation == tag;
        valid.then_some(translation & !VALID)
    }

    fn set(&self, tag: u64, frame: u64) {
        let translation = frame | VALID;
        self.translation.store(translation, Relaxed);
        self.check.store(translation ^ tag, Relaxed);
    }
}

/// The cache of one address space.
pub(crate) struct Tlb {
    small: Box<[Slot; SMALL_SLOTS]>,
    large: Box<[Slot; LARGE_SLOTS]>,
    /// What is remembered; all, if there are none.
    ranges: Box<[Range<VirtualAddress>]>,
}

/// Empty slots; boxed at once, as a debug build would make them on the stack.
fn slots<const COUNT: usize>() -> Box<[Slot; COUNT]> {
    let slots: Box<[Slot]> = std::iter::repeat_with(Slot::default).take(COUNT).collect();
    slots
        .try_into()
        .unwrap_or_else(|_| Box::new(std::array::from_fn(|_| Slot::default())))
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self::of_ranges(&[])
    }

    /// A cache that remembers translations in these ranges alone; in all of
    /// the space if there are none.
    pub(crate) fn of_ranges(ranges: &[Range<VirtualAddress>]) -> Self {
        Self {
            small: slots(),
            large: slots(),
            ranges: ranges.into(),
        }
    }

    /// The physical address, and the bytes left in the cached page from it on.
    #[inline]
    pub(crate) fn get(&self, address: VirtualAddress) -> Option<(PhysicalAddress, u64)> {
        let address = address.as_u64();
        let found = |frame, shift: u32| {
            let size = 1_u64 << shift;
            let offset = address & (size - 1);
            (PhysicalAddress::new(frame | offset), size - offset)
        };
        let tag = address >> LARGE_SHIFT;
        if let Some(frame) = self.large[tag as usize % LARGE_SLOTS].get(tag) {
            return Some(found(frame, LARGE_SHIFT));
        }
        let tag = address >> SMALL_SHIFT;
        let frame = self.small[tag as usize % SMALL_SLOTS].get(tag)?;
        Some(found(frame, SMALL_SHIFT))
    }

    /// Remembers a translation.
    pub(crate) fn set(&self, address: VirtualAddress, translation: &Translation) {
        // A large page may reach beyond a range: then it is not remembered.
        let size = translation.page_size.bytes().min(1 << LARGE_SHIFT);
        let start = VirtualAddress::new(address.as_u64() & !(size - 1));
        let last = start.wrapping_add(size - 1);
        let covers =
            |range: &Range<VirtualAddress>| range.contains(&start) && range.contains(&last);
        if !self.ranges.is_empty() && !self.ranges.iter().any(covers) {
            return;
        }
        let (slots, shift) = match translation.page_size {
            PageSize::Size4KiB => (&self.small[..], SMALL_SHIFT),
            PageSize::Size2MiB | PageSize::Size1GiB => (&self.large[..], LARGE_SHIFT),
        };
        let tag = address.as_u64() >> shift;
        let frame = translation.physical.as_u64() & !((1 << shift) - 1);
        slots[tag as usize % slots.len()].set(tag, frame);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rights;

    fn translation(physical: u64, page_size: PageSize) -> Translation {
        Translation {
            physical: PhysicalAddress::new(physical),
            page_size,
            rights: Rights {
                writable: false,
                user: false,
                executable: false,
            },
            entry: 0,
        }
    }

    #[test]
    fn remembers_its_ranges_alone() {
        let range = VirtualAddress::new(0x20_1000)..VirtualAddress::new(0x60_0000);
        let tlb = Tlb::of_ranges(std::slice::from_ref(&range));
        let large = [(0x20_2000, false), (0x40_2000, true), (0x60_2000, false)];
        for (address, kept) in large {
            let address = VirtualAddress::new(address);
            tlb.set(address, &translation(0x4000_2000, PageSize::Size2MiB));
            let found = kept.then_some((PhysicalAddress::new(0x4000_2000), 0x1f_e000));
            assert_eq!(tlb.get(address), found, "{address}");
        }
        let small = [(0x20_0ff8, false), (0x20_1ff8, true), (0x60_0ff8, false)];
        for (address, kept) in small {
            let address = VirtualAddress::new(address);
            tlb.set(address, &translation(0x7ff8, PageSize::Size4KiB));
            let found = kept.then_some((PhysicalAddress::new(0x7ff8), 8));
            assert_eq!(tlb.get(address), found, "{address}");
        }
    }
}

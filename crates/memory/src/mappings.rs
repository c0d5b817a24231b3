//! Everything that a page-table root maps in a range of addresses: whole
//! tables are read, not one address after the other.
//!
//! Tables may lead to each other in any way: how many are read is bounded, and
//! where the bound ends the walk, it says so.

use std::ops::Range;

use crate::paging::{self, FORMAT};
use crate::{
    AddressSpace, PageSize, PagingMode, PhysicalAddress, PhysicalReadError, Rights, TableLevel,
    VirtualAddress,
};

/// Bytes of a table: 512 entries of 8.
const TABLE_BYTES: usize = 4096;
/// Tables that are at work at one time, at most: one a level.
const LEVELS: usize = FORMAT.len();

/// One page, as the tables map it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedPage {
    /// Its first virtual address, which may lie before the range.
    pub address: VirtualAddress,
    /// Where that is in physical memory.
    pub physical: PhysicalAddress,
    /// Its size.
    pub size: PageSize,
    /// What may be done there, by all levels together.
    pub rights: Rights,
}

impl MappedPage {
    /// The address one past its last byte, saturating.
    pub fn end(&self) -> VirtualAddress {
        VirtualAddress::new(self.address.as_u64().saturating_add(self.size.bytes()))
    }
}

/// Why some of what is mapped was not told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingsError {
    /// More tables than the caller wanted to read.
    #[error("the page tables from {address} on were left: more than {limit} tables")]
    TooMany {
        /// The first address that was not looked at.
        address: VirtualAddress,
        /// The bound.
        limit: usize,
    },
    /// Tables that can't be read; all others were.
    #[error("{count} page tables can't be read, the first, a {level}, for {address}: {source}")]
    Unreadable {
        /// How many.
        count: usize,
        /// The level of the first of them.
        level: TableLevel,
        /// The first address that it maps.
        address: VirtualAddress,
        /// Why it can't be read.
        source: PhysicalReadError,
    },
}

/// A table at work.
struct Frame {
    entries: Box<[u8; TABLE_BYTES]>,
    next: usize,
    /// The address that its first entry maps.
    base: u64,
    allowed: u64,
    forbidden: u64,
}

impl Frame {
    fn empty() -> Self {
        Self {
            entries: Box::new([0; TABLE_BYTES]),
            next: 0,
            base: 0,
            allowed: 0,
            forbidden: 0,
        }
    }
}

impl AddressSpace {
    /// Gives `each` all pages that are mapped in `range`, by ascending address,
    /// reading no more than `limit` tables. Entries with reserved bits set map
    /// nothing.
    ///
    /// # Errors
    /// [`MappingsError`] if not all was told; what was is true.
    pub fn mapped_pages(
        &self,
        range: Range<VirtualAddress>,
        limit: usize,
        each: &mut dyn FnMut(MappedPage),
    ) -> Result<(), MappingsError> {
        let (first, end) = (range.start.as_u64(), range.end.as_u64());
        let formats = match self.mode() {
            PagingMode::FourLevel => &FORMAT[1..],
            PagingMode::FiveLevel => &FORMAT[..],
        };
        let mut frames: [Frame; LEVELS] = std::array::from_fn(|_| Frame::empty());
        let mut unreadable: Option<(usize, TableLevel, u64, PhysicalReadError)> = None;
        let mut read = 0_usize;
        let mut depth = 0_usize;
        let top = PhysicalAddress::new(self.root().as_u64() & paging::FRAME);
        let Some(format) = formats.first() else {
            return Ok(());
        };
        let mut enter = |frame: &mut Frame, level, table, base: u64| {
            if read >= limit {
                return Err(MappingsError::TooMany {
                    address: VirtualAddress::new(base.max(first)),
                    limit,
                });
            }
            read += 1;
            frame.base = base;
            frame.next = 0;
            match self.memory().read(table, frame.entries.as_mut_slice()) {
                Ok(()) => Ok(true),
                Err(source) => {
                    let known = unreadable.get_or_insert((0, level, base, source));
                    known.0 += 1;
                    Ok(false)
                }
            }
        };
        frames[0].allowed = paging::WRITABLE | paging::USER;
        if enter(&mut frames[0], format.level, top, 0)? {
            while let Some(format) = formats.get(depth) {
                let frame = &mut frames[depth];
                let index = frame.next;
                let covers = 1_u64 << format.shift;
                // The upper half of the top table maps negative addresses.
                let start = frame.base.wrapping_add(index as u64 * covers);
                let start = if depth == 0 {
                    canonical(start, self.mode())
                } else {
                    start
                };
                if index >= TABLE_BYTES / 8 || start >= end {
                    let Some(above) = depth.checked_sub(1) else {
                        break;
                    };
                    depth = above;
                    continue;
                }
                frame.next += 1;
                // Inclusive, as the last entry of all ends with 2^64 - 1.
                if start.wrapping_add(covers - 1) < first {
                    continue;
                }
                let entry = frame.entries.as_chunks::<8>().0.get(index);
                let entry = entry.map_or(0, |bytes| u64::from_le_bytes(*bytes));
                if entry & paging::PRESENT == 0 {
                    continue;
                }
                let allowed = frame.allowed & entry;
                let forbidden = frame.forbidden | entry;
                let leaf = format.level == TableLevel::Pt || entry & paging::LARGE != 0;
                if leaf {
                    if let Some((physical, size)) = paging::leaf(format, entry) {
                        each(MappedPage {
                            address: VirtualAddress::new(start),
                            physical,
                            size,
                            rights: paging::rights(allowed, forbidden),
                        });
                    }
                    continue;
                }
                let table = PhysicalAddress::new(entry & paging::FRAME);
                let (Some(below), Some(next)) = (formats.get(depth + 1), frames.get_mut(depth + 1))
                else {
                    continue;
                };
                next.allowed = allowed;
                next.forbidden = forbidden;
                if enter(next, below.level, table, start)? {
                    depth += 1;
                }
            }
        }
        match unreadable {
            Some((count, level, base, source)) => Err(MappingsError::Unreadable {
                count,
                level,
                address: VirtualAddress::new(base),
                source,
            }),
            None => Ok(()),
        }
    }
}

/// The address with the bits above the meaningful ones repeating the highest.
fn canonical(address: u64, mode: PagingMode) -> u64 {
    let unused = 64 - mode.address_bits();
    ((address << unused) as i64 >> unused) as u64
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::HeapMemory;

    const RIGHTS: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    const NO_EXECUTE: u64 = 1 << 63;

    fn space(entries: &[(u64, u64)]) -> AddressSpace {
        let mut bytes = vec![0; 0x6000];
        for (address, entry) in entries {
            let start = *address as usize;
            bytes[start..start + 8].copy_from_slice(&entry.to_le_bytes());
        }
        let parts = vec![(PhysicalAddress::new(0), bytes)];
        let memory = Arc::new(HeapMemory::new(parts).expect("one region"));
        AddressSpace::new(memory, PhysicalAddress::new(0x1000), PagingMode::FourLevel)
    }

    fn all(space: &AddressSpace, start: u64, limit: usize) -> (Vec<MappedPage>, bool) {
        let mut pages = Vec::new();
        let range = VirtualAddress::new(start)..VirtualAddress::new(u64::MAX);
        let outcome = space.mapped_pages(range, limit, &mut |page| pages.push(page));
        (pages, outcome.is_ok())
    }

    /// A large page and two small ones at the start of the upper half, and
    /// a small one at its end.
    fn tables() -> Vec<(u64, u64)> {
        vec![
            (0x1000 + 256 * 8, 0x2000 | RIGHTS),
            (0x1000 + 511 * 8, 0x2000 | 1),
            (0x2000, 0x3000 | RIGHTS),
            (0x2000 + 511 * 8, 0x3000 | RIGHTS),
            (0x3000, 0x20_0000 | LARGE | RIGHTS | NO_EXECUTE),
            // A reserved bit is set.
            (0x3008, 0x20_2000 | LARGE | RIGHTS),
            (0x3000 + 511 * 8, 0x4000 | RIGHTS),
            (0x4000 + 8, 0x5000 | RIGHTS),
            (0x4000 + 511 * 8, 0x5000 | 1),
        ]
    }

    #[test]
    fn gives_what_translation_gives() {
        let space = space(&tables());
        let (pages, complete) = all(&space, 1 << 63, 100);
        assert!(complete);
        // Both top entries lead to the same table, each twice to the next.
        assert_eq!(pages.len(), 12);
        assert!(pages.is_sorted_by_key(|page| page.address));
        assert_eq!(
            pages.last().map(|page| page.address.as_u64()),
            Some(u64::MAX - 0xfff)
        );
        for page in &pages {
            let found = space.translate(page.address).expect("mapped");
            assert_eq!(
                (found.physical, found.page_size, found.rights),
                (page.physical, page.size, page.rights)
            );
        }
        let (upper, _) = all(&space, u64::MAX - 0x1fff, 100);
        assert_eq!(upper.len(), 1);
    }

    #[test]
    fn tables_that_lead_to_themselves_end() {
        let mut entries = tables();
        entries.extend((0..512).map(|index| (0x3000 + index * 8, 0x3000 | RIGHTS)));
        let (_, complete) = all(&space(&entries), 1 << 63, 100);
        assert!(!complete);
    }

    #[test]
    fn unreadable_tables_are_told() {
        let mut entries = tables();
        entries.push((0x2008, 0x7777_0000 | RIGHTS));
        let (pages, complete) = all(&space(&entries), 1 << 63, 100);
        assert!(!complete);
        assert_eq!(pages.len(), 12);
    }
}

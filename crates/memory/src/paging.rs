//! The page-table format of x86-64 as data, and the walk over it.
//!
//! Source: Intel SDM volume 3, chapter "Paging", sections on 4-level and
//! 5-level paging; AMD APM volume 2, chapter 5.

use std::fmt;

use crate::{PhysicalAddress, VirtualAddress};

/// Whether page-map level 5 is in use (CR4.LA57).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// 48-bit virtual addresses.
    FourLevel,
    /// 57-bit virtual addresses.
    FiveLevel,
}

impl PagingMode {
    /// The meaningful bits of a virtual address: 48 or 57.
    pub const fn address_bits(self) -> u32 {
        match self {
            Self::FourLevel => 48,
            Self::FiveLevel => 57,
        }
    }

    /// Whether the bits above the meaningful ones repeat the highest of them.
    pub const fn is_canonical(self, address: VirtualAddress) -> bool {
        let unused = 64 - self.address_bits();
        ((address.as_u64() << unused) as i64 >> unused) as u64 == address.as_u64()
    }

    /// The table where a walk starts.
    pub const fn top_level(self) -> TableLevel {
        match self {
            Self::FourLevel => TableLevel::Pml4,
            Self::FiveLevel => TableLevel::Pml5,
        }
    }
}

/// A level of the page tables, by the hardware manuals' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableLevel {
    /// The page table: maps 4 KiB pages.
    Pt = 1,
    /// The page directory: maps 2 MiB pages or page tables.
    Pd = 2,
    /// The page-directory-pointer table: maps 1 GiB pages or page directories.
    Pdpt = 3,
    /// The page-map level 4.
    Pml4 = 4,
    /// The page-map level 5.
    Pml5 = 5,
}

impl TableLevel {
    /// The level that this one's entries lead to, `None` below the page table.
    pub const fn below(self) -> Option<Self> {
        match self {
            Self::Pml5 => Some(Self::Pml4),
            Self::Pml4 => Some(Self::Pdpt),
            Self::Pdpt => Some(Self::Pd),
            Self::Pd => Some(Self::Pt),
            Self::Pt => None,
        }
    }
}

/// What an entry of one level may be: a row of the format.
pub(crate) struct Format {
    pub(crate) level: TableLevel,
    /// The lowest virtual address bit that selects the entry.
    pub(crate) shift: u32,
    /// The page that a leaf of this level maps, if there may be one.
    page: Option<PageSize>,
}

/// The whole format, top level first.
pub(crate) const FORMAT: [Format; 5] = [
    Format {
        level: TableLevel::Pml5,
        shift: 48,
        page: None,
    },
    Format {
        level: TableLevel::Pml4,
        shift: 39,
        page: None,
    },
    Format {
        level: TableLevel::Pdpt,
        shift: 30,
        page: Some(PageSize::Size1GiB),
    },
    Format {
        level: TableLevel::Pd,
        shift: 21,
        page: Some(PageSize::Size2MiB),
    },
    Format {
        level: TableLevel::Pt,
        shift: 12,
        page: Some(PageSize::Size4KiB),
    },
];

pub(crate) const PRESENT: u64 = 1 << 0;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51 to 12: the frame of a table or 4 KiB page.
pub(crate) const FRAME: u64 = 0x000f_ffff_ffff_f000;

impl fmt::Display for TableLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pt => "PT",
            Self::Pd => "PD",
            Self::Pdpt => "PDPT",
            Self::Pml4 => "PML4",
            Self::Pml5 => "PML5",
        })
    }
}

/// The size of a mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB, from a page table.
    Size4KiB,
    /// 2 MiB, from a page directory.
    Size2MiB,
    /// 1 GiB, from a page-directory-pointer table.
    Size1GiB,
}

impl PageSize {
    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4KiB => 1 << 12,
            Self::Size2MiB => 1 << 21,
            Self::Size1GiB => 1 << 30,
        }
    }
}

/// What all entries on the way allow together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rights {
    /// Bit 1 was set in every entry.
    pub writable: bool,
    /// Bit 2 was set in every entry: user mode may use the page.
    pub user: bool,
    /// Bit 63 was clear in every entry.
    pub executable: bool,
}

/// Where a virtual address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Translation {
    /// The address's own physical address (not the page's).
    pub physical: PhysicalAddress,
    /// The size of the page that maps it.
    pub page_size: PageSize,
    /// What the page tables allow.
    pub rights: Rights,
    /// The leaf entry as it was read.
    pub entry: u64,
}

/// What a non-present entry says, as Linux on x86-64 writes them
/// (`arch/x86/include/asm/pgtable_64.h`, `pgtable-invert.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotPresent {
    /// All zero: never mapped.
    Zero,
    /// `PROT_NONE` or NUMA hinting: the page exists, the hardware must not
    /// use it. Linux marks it with bit 8 and, against L1TF, stores the frame
    /// inverted.
    ProtNone {
        /// The frame, turned back, plus the offset inside the page.
        physical: PhysicalAddress,
    },
    /// A swap or migration entry: type in bits 63-59, offset inverted in
    /// bits 58-9 and above.
    Swap {
        /// The swap type (its file's index, or one of the special types).
        kind: u8,
        /// The slot, in pages.
        offset: u64,
    },
}

impl NotPresent {
    /// Reads a non-present entry of `page` size for `address` as Linux means it.
    fn decode(entry: u64, address: VirtualAddress, page: Option<PageSize>) -> Self {
        const PROTNONE: u64 = 1 << 8;
        if entry == 0 {
            return Self::Zero;
        }
        if entry & PROTNONE != 0 {
            // pte_pfn() of an entry that is non-zero and not present inverts
            // the whole frame field.
            let size = page.unwrap_or(PageSize::Size4KiB).bytes();
            let frame = !entry & FRAME & !(size - 1);
            let physical = PhysicalAddress::new(frame | (address.as_u64() & (size - 1)));
            return Self::ProtNone { physical };
        }
        // __swp_type(): bits 63-59; __swp_offset(): ~entry << 5 >> 14.
        Self::Swap {
            kind: (entry >> 59) as u8,
            offset: (!entry << 5) >> 14,
        }
    }
}

/// Why an address could not be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TranslationError {
    /// The upper bits of the address are not a sign extension.
    #[error("{address} is not a canonical {bits}-bit address")]
    NonCanonical {
        /// The address asked for.
        address: VirtualAddress,
        /// 48 or 57.
        bits: u32,
    },
    /// An entry on the way has its present bit clear.
    #[error("{address} is not mapped: {level} entry at {entry_address} is {entry:#x}")]
    NotPresent {
        /// The address asked for.
        address: VirtualAddress,
        /// The table that holds the entry.
        level: TableLevel,
        /// Where the entry lies.
        entry_address: PhysicalAddress,
        /// The entry as it was read.
        entry: u64,
        /// What Linux means by it.
        meaning: NotPresent,
    },
    /// An entry that the hardware would fault on: a reserved bit is set.
    #[error(
        "{address}: reserved bits {bits:#x} set in {level} entry {entry:#x} at {entry_address}"
    )]
    ReservedBits {
        /// The address asked for.
        address: VirtualAddress,
        /// The table that holds the entry.
        level: TableLevel,
        /// Where the entry lies.
        entry_address: PhysicalAddress,
        /// The entry as it was read.
        entry: u64,
        /// Those of its bits that must be zero.
        bits: u64,
    },
    /// The table itself lies where no memory can be read.
    #[error("{address}: the {level} entry at physical address {entry_address} can't be read")]
    TableUnreadable {
        /// The address asked for.
        address: VirtualAddress,
        /// The table that holds the entry.
        level: TableLevel,
        /// Where the entry should lie.
        entry_address: PhysicalAddress,
    },
}

/// The bits of a leaf that must be zero and are not. In a large page's entry
/// bit 12 is the PAT bit, not address; the bits from 13 to the page's size are
/// reserved.
fn reserved(entry: u64, page_size: PageSize) -> u64 {
    entry & FRAME & (page_size.bytes() - 1) & !(1 << 12)
}

/// The page that a leaf of this level maps; none if the hardware would fault.
pub(crate) fn leaf(format: &Format, entry: u64) -> Option<(PhysicalAddress, PageSize)> {
    let size = format.page?;
    let frame = entry & FRAME & !(size.bytes() - 1);
    (reserved(entry, size) == 0).then_some((PhysicalAddress::new(frame), size))
}

/// The rights that all levels give together.
pub(crate) fn rights(allowed: u64, forbidden: u64) -> Rights {
    Rights {
        writable: allowed & WRITABLE != 0,
        user: allowed & USER != 0,
        executable: forbidden & NO_EXECUTE == 0,
    }
}

/// Walks the tables from `root` (bits 51 to 12 of it), reading each entry once
/// through `read`.
#[inline]
pub(crate) fn walk(
    root: PhysicalAddress,
    mode: PagingMode,
    address: VirtualAddress,
    mut read: impl FnMut(PhysicalAddress) -> Option<u64>,
) -> Result<Translation, TranslationError> {
    if !mode.is_canonical(address) {
        return Err(TranslationError::NonCanonical {
            address,
            bits: mode.address_bits(),
        });
    }
    let mut table = root.as_u64() & FRAME;
    let mut allowed = WRITABLE | USER;
    let mut forbidden = 0;
    let levels = match mode {
        PagingMode::FourLevel => &FORMAT[1..],
        PagingMode::FiveLevel => &FORMAT[..],
    };
    for Format { level, shift, page } in levels {
        let (level, page) = (*level, *page);
        let index = (address.as_u64() >> shift) & 0x1ff;
        let entry_address = PhysicalAddress::new(table + index * 8);
        let Some(entry) = read(entry_address) else {
            return Err(TranslationError::TableUnreadable {
                address,
                level,
                entry_address,
            });
        };
        if entry & PRESENT == 0 {
            let meaning = NotPresent::decode(entry, address, page);
            return Err(TranslationError::NotPresent {
                address,
                level,
                entry_address,
                entry,
                meaning,
            });
        }
        allowed &= entry;
        forbidden |= entry;
        let leaf = level == TableLevel::Pt || entry & LARGE != 0;
        if !leaf {
            table = entry & FRAME;
            continue;
        }
        let Some(page_size) = page else {
            let bits = LARGE;
            return Err(TranslationError::ReservedBits {
                address,
                level,
                entry_address,
                entry,
                bits,
            });
        };
        let offset_mask = page_size.bytes() - 1;
        let bits = reserved(entry, page_size);
        if bits != 0 {
            return Err(TranslationError::ReservedBits {
                address,
                level,
                entry_address,
                entry,
                bits,
            });
        }
        let frame = entry & FRAME & !offset_mask;
        return Ok(Translation {
            physical: PhysicalAddress::new(frame | (address.as_u64() & offset_mask)),
            page_size,
            rights: rights(allowed, forbidden),
            entry,
        });
    }
    unreachable!("a page-table entry is always a leaf")
}

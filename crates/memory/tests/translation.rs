//! The page walk over generated tables: every page size, both modes, every
//! kind of entry, and memory that is no page table at all.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use secmon_memory::{
    AddressSpace, HeapMemory, NotPresent, PageSize, PagingMode, PhysicalAddress, Rights,
    TableLevel, TranslationError, VirtualAddress,
};

const ROOT: u64 = 0x1000;
const LARGE: u64 = 1 << 7;

/// Page tables under construction: table address → its 512 entries.
struct Tables {
    mode: PagingMode,
    tables: BTreeMap<u64, Vec<u64>>,
}

impl Tables {
    fn new(mode: PagingMode) -> Self {
        Self {
            mode,
            tables: BTreeMap::from([(ROOT, vec![0; 512])]),
        }
    }

    fn shifts(&self) -> &'static [u32] {
        match self.mode {
            PagingMode::FourLevel => &[39, 30, 21, 12],
            PagingMode::FiveLevel => &[48, 39, 30, 21, 12],
        }
    }

    /// Writes `entry` where the leaf of a page of `size` belongs; false if a
    /// larger page or a table is there already.
    fn set_leaf(&mut self, address: u64, size: PageSize, entry: u64, table_bits: u64) -> bool {
        let leaf_shift = size.bytes().trailing_zeros();
        let mut table = ROOT;
        for shift in self.shifts() {
            let index = (address >> shift & 0x1ff) as usize;
            let next = ROOT + self.tables.len() as u64 * 0x1000;
            let slot = &mut self.tables.get_mut(&table).expect("a table")[index];
            if *shift == leaf_shift {
                if *slot != 0 {
                    return false;
                }
                *slot = entry;
                return true;
            }
            if *slot == 0 {
                *slot = next | table_bits | 1;
                self.tables.insert(next, vec![0; 512]);
                table = next;
            } else if *slot & 1 == 0 || *slot & LARGE != 0 {
                return false;
            } else {
                table = *slot & 0x000f_ffff_ffff_f000;
            }
        }
        unreachable!("a leaf shift is among the shifts")
    }

    fn space(&self) -> AddressSpace {
        let parts = self.tables.iter().map(|(address, entries)| {
            let bytes = entries
                .iter()
                .flat_map(|entry| entry.to_le_bytes())
                .collect();
            (PhysicalAddress::new(*address), bytes)
        });
        let memory = HeapMemory::new(parts.collect()).expect("tables do not overlap");
        // The lower 12 bits of a root are a PCID.
        AddressSpace::new(
            Arc::new(memory),
            PhysicalAddress::new(ROOT | 0x5a5),
            self.mode,
        )
    }
}

#[derive(Clone, Debug)]
struct Mapping {
    page: u64,
    size: PageSize,
    frame: u64,
    bits: u64,
    table_bits: u64,
    offset: u64,
}

fn mode() -> impl Strategy<Value = PagingMode> {
    prop_oneof![Just(PagingMode::FourLevel), Just(PagingMode::FiveLevel)]
}

fn size() -> impl Strategy<Value = PageSize> {
    prop_oneof![
        Just(PageSize::Size4KiB),
        Just(PageSize::Size2MiB),
        Just(PageSize::Size1GiB)
    ]
}

/// Leaf bits other than present and the frame: rights, PWT, PCD, accessed,
/// dirty, global, ignored bits, protection key, NX.
const FREE_BITS: u64 = 0xfff0_0000_0000_0f7e;

fn mapping() -> impl Strategy<Value = Mapping> {
    (
        any::<u64>(),
        size(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<u64>(),
        any::<bool>(),
    )
        .prop_map(|(page, size, frame, bits, table_bits, offset, near)| {
            let mask = size.bytes() - 1;
            // Half of the pages lie close together, so that tables are shared.
            let page = if near { page & 0x3fff_ffff } else { page };
            Mapping {
                page: page & !mask,
                size,
                frame: frame & 0x000f_ffff_ffff_f000 & !mask,
                bits: bits & FREE_BITS,
                table_bits: table_bits & 0xfff0_0000_0000_0f7e & !LARGE,
                offset: offset & mask,
            }
        })
}

fn canonical(mode: PagingMode, address: u64) -> u64 {
    let unused = 64 - mode.address_bits();
    ((address << unused) as i64 >> unused) as u64
}

proptest! {
    #[test]
    fn every_mapped_page_translates(
        mode in mode(),
        mappings in prop::collection::vec(mapping(), 1..24),
        pat in any::<bool>(),
    ) {
        let mut tables = Tables::new(mode);
        let mut placed = Vec::new();
        for mapping in mappings {
            let page = canonical(mode, mapping.page);
            // The PAT bit: 7 in a page table, 12 in the leaf of a large page.
            let (large, pat_bit) = match mapping.size {
                PageSize::Size4KiB => (0, 1 << 7),
                _ => (LARGE, 1 << 12),
            };
            let pat_bit = if pat { pat_bit } else { 0 };
            let entry = mapping.frame | mapping.bits | large | pat_bit | 1;
            if tables.set_leaf(page, mapping.size, entry, mapping.table_bits) {
                placed.push((page, mapping, entry));
            }
        }
        prop_assert!(!placed.is_empty());
        let space = tables.space();
        for (page, mapping, entry) in placed {
            let address = VirtualAddress::new(page | mapping.offset);
            let found = space.translate(address).expect("mapped");
            prop_assert_eq!(found.physical.as_u64(), mapping.frame | mapping.offset);
            prop_assert_eq!(found.page_size, mapping.size);
            prop_assert_eq!(found.entry, entry);
            let (steps, outcome) = space.trace(address);
            prop_assert_eq!(outcome, Ok(found));
            prop_assert_eq!(steps.first().map(|step| step.level), Some(mode.top_level()));
            prop_assert_eq!(steps.last().map(|step| step.entry), Some(entry));
            let levels = steps.windows(2).all(|pair| pair[0].level.below() == Some(pair[1].level));
            prop_assert!(levels);
            // Tables made for an earlier mapping may cut rights further.
            let leaf = Rights {
                writable: entry & 2 != 0,
                user: entry & 4 != 0,
                executable: entry >> 63 == 0,
            };
            prop_assert!(leaf.writable || !found.rights.writable);
            prop_assert!(leaf.user || !found.rights.user);
            prop_assert!(leaf.executable || !found.rights.executable);
        }
    }

    #[test]
    fn rights_are_what_all_levels_allow(
        mode in mode(), size in size(), table_bits in any::<u64>(), bits in any::<u64>(),
    ) {
        let (table_bits, bits) = (table_bits & FREE_BITS, bits & FREE_BITS);
        let mut tables = Tables::new(mode);
        let large = if size == PageSize::Size4KiB { 0 } else { LARGE };
        let address = canonical(mode, 0xffff_ffff_c000_0000);
        prop_assert!(tables.set_leaf(address, size, bits | large | 1, table_bits & !LARGE));
        let rights = tables.space().translate(VirtualAddress::new(address)).expect("mapped").rights;
        prop_assert_eq!(rights.writable, table_bits & bits & 2 != 0);
        prop_assert_eq!(rights.user, table_bits & bits & 4 != 0);
        prop_assert_eq!(rights.executable, (table_bits | bits) >> 63 == 0);
    }

    #[test]
    fn an_absent_entry_is_named(
        mode in mode(), size in size(), entry in any::<u64>(), address in any::<u64>(),
    ) {
        let entry = entry & !1;
        let address = VirtualAddress::new(canonical(mode, address));
        let mut tables = Tables::new(mode);
        prop_assert!(tables.set_leaf(address.as_u64(), size, entry, 0));
        let expected = match size {
            PageSize::Size4KiB => TableLevel::Pt,
            PageSize::Size2MiB => TableLevel::Pd,
            PageSize::Size1GiB => TableLevel::Pdpt,
        };
        match tables.space().translate(address) {
            Err(TranslationError::NotPresent { level, entry: found, address: asked, .. }) => {
                prop_assert_eq!((level, found, asked), (expected, entry, address));
            }
            other => prop_assert!(false, "{other:?}"),
        }
    }

    /// What Linux writes for PROT_NONE: not present, bit 8, frame inverted.
    #[test]
    fn prot_none_gives_its_frame(mode in mode(), frame in any::<u64>(), offset in 0..4096_u64) {
        let frame = frame & 0x000f_ffff_ffff_f000;
        let inverted = (!frame & 0x000f_ffff_ffff_f000) | 0x120;
        let page = canonical(mode, 0x7fff_1234_5000);
        let mut tables = Tables::new(mode);
        prop_assert!(tables.set_leaf(page, PageSize::Size4KiB, inverted, 6));
        match tables.space().translate(VirtualAddress::new(page | offset)) {
            Err(TranslationError::NotPresent {
                meaning: NotPresent::ProtNone { physical }, ..
            }) => prop_assert_eq!(physical.as_u64(), frame | offset),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    /// __swp_entry(type, offset) of arch/x86/include/asm/pgtable_64.h.
    #[test]
    fn swap_entries_give_type_and_slot(kind in 0..32_u64, slot in 0..(1_u64 << 50)) {
        let entry = (!slot << 14 >> 5) | (kind << 59);
        let mut tables = Tables::new(PagingMode::FourLevel);
        prop_assert!(tables.set_leaf(0x1000, PageSize::Size4KiB, entry & !0x1ff, 6));
        match tables.space().translate(VirtualAddress::new(0x1000)) {
            Err(TranslationError::NotPresent {
                meaning: NotPresent::Swap { kind: found, offset }, ..
            }) => prop_assert_eq!((u64::from(found), offset), (kind, slot)),
            Err(TranslationError::NotPresent { meaning: NotPresent::Zero, entry, .. }) => {
                prop_assert_eq!(entry & !0x1ff, 0);
            }
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn reserved_bits_of_large_pages_are_refused(
        mode in mode(), two_mebibytes in any::<bool>(), bit in 13..21_u32,
    ) {
        let size = if two_mebibytes { PageSize::Size2MiB } else { PageSize::Size1GiB };
        let mut tables = Tables::new(mode);
        prop_assert!(tables.set_leaf(0, size, LARGE | 1 | 1 << bit, 6));
        match tables.space().translate(VirtualAddress::new(0)) {
            Err(TranslationError::ReservedBits { bits, .. }) => prop_assert_eq!(bits, 1 << bit),
            other => prop_assert!(false, "{other:?}"),
        }
    }

    #[test]
    fn addresses_that_are_not_canonical_are_refused(mode in mode(), address in any::<u64>()) {
        let outcome = Tables::new(mode).space().translate(VirtualAddress::new(address));
        let refused = matches!(outcome, Err(TranslationError::NonCanonical { .. }));
        prop_assert_eq!(refused, canonical(mode, address) != address);
    }

    /// Bytes that are no page tables: an answer or an error, never a panic,
    /// and a read agrees with the translation.
    #[test]
    fn garbage_is_survived(
        mode in mode(),
        bytes in prop::collection::vec(any::<u8>(), 4096 * 3),
        small in any::<bool>(),
        addresses in prop::collection::vec(any::<u64>(), 16),
    ) {
        let mut bytes = bytes;
        if small {
            // Keep frames inside the memory, so that walks go deep.
            for entry in bytes.chunks_exact_mut(8) {
                entry[1] = 0x10 + (entry[1] & 0x20);
                entry[2..7].fill(0);
            }
        }
        let memory = HeapMemory::new(vec![(PhysicalAddress::new(0x1000), bytes)]).expect("one region");
        let space = AddressSpace::new(Arc::new(memory), PhysicalAddress::new(ROOT), mode);
        let cached = space.clone().with_tlb();
        for address in addresses {
            let address = VirtualAddress::new(canonical(mode, address));
            let plain = space.read_u64(address);
            prop_assert_eq!(&plain, &cached.read_u64(address));
            prop_assert_eq!(&plain, &cached.read_u64(address));
            prop_assert_eq!(&plain, &space.read_u64_batch(&[address])[0]);
        }
    }
}

#[test]
fn a_large_bit_above_the_pdpt_is_reserved() {
    for mode in [PagingMode::FourLevel, PagingMode::FiveLevel] {
        let entries = [LARGE | 1]
            .iter()
            .flat_map(|entry: &u64| entry.to_le_bytes())
            .collect();
        let memory =
            HeapMemory::new(vec![(PhysicalAddress::new(ROOT), entries)]).expect("one region");
        let space = AddressSpace::new(Arc::new(memory), PhysicalAddress::new(ROOT), mode);
        assert_eq!(
            space.translate(VirtualAddress::new(0)),
            Err(TranslationError::ReservedBits {
                address: VirtualAddress::new(0),
                level: mode.top_level(),
                entry_address: PhysicalAddress::new(ROOT),
                entry: LARGE | 1,
                bits: LARGE,
            })
        );
        // Memory ends after the first entry: the second can't be read.
        let second = VirtualAddress::new(match mode {
            PagingMode::FourLevel => 1 << 39,
            PagingMode::FiveLevel => 1 << 48,
        });
        assert_eq!(
            space.translate(second),
            Err(TranslationError::TableUnreadable {
                address: second,
                level: mode.top_level(),
                entry_address: PhysicalAddress::new(ROOT + 8),
            })
        );
    }
}

//! Lists, chains and red-black trees whose links hold anything: the walks end,
//! hand no node out twice, and stay inside their bound.
#![no_main]

use std::collections::HashSet;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use secmon_guest::Diagnostics;
use secmon_guest::linux::{list, rb_tree};
use secmon_memory::{AddressSpace, HeapMemory, PagingMode, PhysicalAddress, VirtualAddress};

/// Where the bytes of the input lie.
const BASE: u64 = 0xffff_8000_0000_0000;
const LIMIT: usize = 512;

/// A space with one 2 MiB page at `BASE`, which holds the input. Every other
/// word becomes an address inside it, as random words hardly ever are one.
fn space(data: &[u8]) -> Option<AddressSpace> {
    let table = |index: usize, entry: u64| {
        let mut bytes = vec![0; 4096];
        bytes[index * 8..index * 8 + 8].copy_from_slice(&entry.to_le_bytes());
        bytes
    };
    let mut page = Vec::with_capacity(data.len());
    for word in data.as_chunks::<8>().0 {
        let word = u64::from_le_bytes(*word);
        let word = if word & 1 == 0 {
            BASE | (word >> 1 & 0x7f8)
        } else {
            word
        };
        page.extend_from_slice(&word.to_le_bytes());
    }
    let memory = HeapMemory::new(vec![
        (PhysicalAddress::new(0x1000), table(256, 0x2003)),
        (PhysicalAddress::new(0x2000), table(0, 0x3003)),
        (PhysicalAddress::new(0x3000), table(0, 0x20_0083)),
        (PhysicalAddress::new(0x20_0000), page),
    ]);
    let root = PhysicalAddress::new(0x1000);
    Some(AddressSpace::new(
        Arc::new(memory.ok()?),
        root,
        PagingMode::FourLevel,
    ))
}

fuzz_target!(|data: &[u8]| {
    let Some(space) = space(data) else { return };
    let diagnostics = Diagnostics::default();
    let head = VirtualAddress::new(BASE);
    let mut seen = HashSet::new();
    for node in list::nodes(&space, &diagnostics, head, LIMIT).flatten() {
        assert!(node != head && seen.insert(node));
    }
    assert!(seen.len() <= LIMIT);
    let walk = rb_tree::nodes(&space, &diagnostics, head, LIMIT);
    let distinct: HashSet<_> = walk.items.iter().collect();
    assert!(distinct.len() == walk.items.len() && distinct.len() <= LIMIT);
});

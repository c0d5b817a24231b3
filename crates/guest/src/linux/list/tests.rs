//! Lists and chains over a small memory: sound, torn, wild and circular.

use super::chain::{ChainEnd, chain_nodes};
use super::*;
use crate::synthetic::Synthetic;
use proptest::prelude::*;
use std::collections::HashSet;

/// The address of the `index`-th of many nodes.
fn node(index: u64) -> VirtualAddress {
    Synthetic::at(0x4000 + index * 32)
}

fn address(index: u64) -> u64 {
    node(index).as_u64()
}

/// Writes 8 bytes at a virtual address, in memory as a change sees it.
fn write(bytes: &mut [u8], address: u64, value: u64) {
    let offset = (address - Synthetic::at(0).as_u64()) as usize;
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

/// Links these `list_head`s, the first of which is the head, to a ring.
fn link(memory: &Synthetic, nodes: &[u64]) {
    for (index, node) in nodes.iter().enumerate() {
        let next = nodes[(index + 1) % nodes.len()];
        memory.set(*node, next);
        memory.set(next + 8, *node);
    }
}

/// Links these `hlist_node`s behind the pointer that comes first, with this
/// end.
fn chain(memory: &Synthetic, nodes: &[u64], end: u64) {
    for pair in nodes.windows(2) {
        memory.set(pair[0], pair[1]);
        memory.set(pair[1] + 8, pair[0]);
    }
    if let Some(last) = nodes.last() {
        memory.set(*last, end);
    }
}

/// Lets `change` act on memory before each read outside of the page tables; it
/// is given the read's number.
fn on_read(memory: &Synthetic, mut change: impl FnMut(&mut Vec<u8>, u64) + Send + 'static) {
    let mut reads = 0;
    memory.on_read(move |bytes, address| {
        if address < crate::synthetic::SIZE {
            reads += 1;
            change(bytes, reads);
        }
    });
}

fn ring(memory: &Synthetic, indices: impl IntoIterator<Item = u64>) {
    let nodes: Vec<u64> = indices.into_iter().map(address).collect();
    link(memory, &nodes);
}

/// What a walk from node 0 gives, nodes by their index.
fn walk(memory: &Synthetic, limit: usize) -> (Vec<u64>, Vec<ListError>, u64) {
    let diagnostics = Diagnostics::default();
    let space = memory.space();
    let mut found = Vec::new();
    let mut errors = Vec::new();
    for item in nodes(&space, &diagnostics, node(0), limit) {
        match item {
            Ok(item) => found.push((item.as_u64() - address(0)) / 32),
            Err(error) => errors.push(error),
        }
    }
    (found, errors, diagnostics.torn_reads())
}

fn walk_chain(memory: &Synthetic, end: ChainEnd) -> (Vec<u64>, Vec<ListError>, u64) {
    let diagnostics = Diagnostics::default();
    let space = memory.space();
    let mut found = Vec::new();
    let mut errors = Vec::new();
    for item in chain_nodes(&space, &diagnostics, node(0), end, LIMIT) {
        match item {
            Ok(item) => found.push((item.as_u64() - address(0)) / 32),
            Err(error) => errors.push(error),
        }
    }
    (found, errors, diagnostics.torn_reads())
}

#[test]
fn walks_without_the_head() {
    let memory = Synthetic::new(Volatility::Static);
    ring(&memory, 0..5);
    assert_eq!(walk(&memory, LIMIT), (vec![1, 2, 3, 4], vec![], 0));
    ring(&memory, [0]);
    assert_eq!(walk(&memory, LIMIT), (vec![], vec![], 0));
}

#[test]
fn bounds_the_number_of_nodes() {
    let memory = Synthetic::new(Volatility::Static);
    ring(&memory, 0..9);
    let expected = vec![ListError::TooLong { limit: 3 }];
    assert_eq!(walk(&memory, 3), (vec![1, 2, 3], expected, 0));
}

#[test]
fn finishes_from_the_other_end() {
    for wild in [0, 0xdead_0000_0000_0100, address(2) + 1, u64::MAX - 7] {
        let memory = Synthetic::new(Volatility::Static);
        ring(&memory, 0..6);
        memory.set(address(2), wild);
        let (found, errors, _) = walk(&memory, LIMIT);
        assert_eq!(found, [1, 2, 5, 4, 3], "link {wild:#x}");
        assert_eq!(errors.len(), 2, "{errors:?}");
    }
}

#[test]
fn goes_on_behind_a_damaged_back_link() {
    let memory = Synthetic::new(Volatility::Static);
    ring(&memory, 0..6);
    memory.set(address(3) + 8, address(5));
    let (found, errors, _) = walk(&memory, LIMIT);
    assert_eq!(found, [1, 2, 3, 4, 5]);
    assert_eq!(errors.len(), 1);
    assert!(matches!(errors[0], ListError::Mismatch { .. }));
}

#[test]
fn takes_a_half_done_insertion_as_done() {
    // 2 was just linked behind 1; 3 does not know yet.
    let memory = Synthetic::new(Volatility::Static);
    ring(&memory, [0, 1, 2, 3]);
    memory.set(address(3) + 8, address(1));
    assert_eq!(walk(&memory, LIMIT), (vec![1, 2, 3], vec![], 1));
}

#[test]
fn ends_in_a_cycle() {
    let memory = Synthetic::new(Volatility::Static);
    ring(&memory, 0..6);
    memory.set(address(4), address(2));
    memory.set(address(2) + 8, address(4));
    let (mut found, errors, _) = walk(&memory, LIMIT);
    found.sort_unstable();
    assert_eq!(found, [1, 2, 3, 4, 5]);
    assert!(!errors.is_empty());
}

#[test]
fn steps_back_from_a_node_that_is_taken_out() {
    let memory = Synthetic::new(Volatility::Live);
    ring(&memory, 0..6);
    let mut done = false;
    on_read(&memory, move |bytes, read| {
        if read >= 4 && !done {
            done = true;
            // 2 goes away and its memory is used for something else.
            write(bytes, address(1), address(3));
            write(bytes, address(3) + 8, address(1));
            write(bytes, address(2), 0x1234);
            write(bytes, address(2) + 8, 0xdead_0000_0000_0122);
        }
    });
    let (found, errors, torn) = walk(&memory, LIMIT);
    assert_eq!(errors, []);
    assert_eq!(found, [1, 2, 3, 4, 5]);
    assert!(torn > 0);
}

#[test]
fn repeats_a_step_that_was_torn() {
    let memory = Synthetic::new(Volatility::Live);
    ring(&memory, 0..4);
    memory.set(address(2) + 8, address(3));
    on_read(&memory, |bytes, read| {
        if read == 12 {
            write(bytes, address(2) + 8, address(1));
        }
    });
    let (found, errors, torn) = walk(&memory, LIMIT);
    assert_eq!((found, errors), (vec![1, 2, 3], vec![]));
    assert!(torn > 0);
}

#[test]
fn chains() {
    let memory = Synthetic::new(Volatility::Static);
    chain(&memory, &[address(0), address(1), address(2)], 0);
    assert_eq!(walk_chain(&memory, ChainEnd::Null), (vec![1, 2], vec![], 0));
    chain(&memory, &[address(0), address(1), address(2)], 7 << 1 | 1);
    for end in [ChainEnd::Nulls(None), ChainEnd::Nulls(Some(7))] {
        assert_eq!(walk_chain(&memory, end), (vec![1, 2], vec![], 0));
    }
    let (found, errors, _) = walk_chain(&memory, ChainEnd::Nulls(Some(8)));
    assert_eq!(found, [1, 2]);
    assert!(matches!(
        errors[..],
        [ListError::OtherChain { found: 7, .. }]
    ));
    memory.set(address(2), address(1));
    let (found, errors, _) = walk_chain(&memory, ChainEnd::Null);
    assert_eq!((found, errors.len()), (vec![1, 2], 1));
    memory.set(address(0), 0);
    assert_eq!(walk_chain(&memory, ChainEnd::Null), (vec![], vec![], 0));
}

#[test]
fn a_chain_steps_back_from_a_node_that_is_taken_out() {
    let memory = Synthetic::new(Volatility::Live);
    chain(
        &memory,
        &[address(0), address(1), address(2), address(3)],
        0,
    );
    let mut done = false;
    on_read(&memory, move |bytes, read| {
        if read >= 5 && !done {
            done = true;
            write(bytes, address(1), address(3));
            write(bytes, address(3) + 8, address(1));
            write(bytes, address(2), 0x1234);
            write(bytes, address(2) + 8, 0xdead_0000_0000_0122);
        }
    });
    let (found, errors, torn) = walk_chain(&memory, ChainEnd::Null);
    assert_eq!((found, errors), (vec![1, 2, 3], vec![]));
    assert!(torn > 0);
}

proptest! {
    /// Whatever the links are: the walk ends, no node comes twice, the
    /// head never, and a walk without an error is the ring itself.
    #[test]
    fn any_links(
        links in prop::collection::vec((0_u64..24, 0_u64..24, 0_u8..12), 24),
        live: bool,
    ) {
        let volatility = if live { Volatility::Live } else { Volatility::Static };
        let memory = Synthetic::new(volatility);
        for (index, (next, back, kind)) in (0..).zip(&links) {
            let next = if *kind == 0 { u64::MAX } else { address(*next) };
            memory.set(address(index), next);
            memory.set(address(index) + 8, address(*back));
        }
        let (found, errors, _) = walk(&memory, LIMIT);
        let distinct: HashSet<_> = found.iter().collect();
        prop_assert_eq!(distinct.len(), found.len());
        prop_assert!(!found.contains(&0));
        if errors.is_empty() {
            let mut at = 0;
            for node in &found {
                prop_assert_eq!(links[at as usize].0, *node);
                at = *node;
            }
            prop_assert_eq!(links[at as usize].0, 0);
        }
        let (found, _, _) = walk_chain(&memory, ChainEnd::Null);
        let distinct: HashSet<_> = found.iter().collect();
        prop_assert_eq!(distinct.len(), found.len());
    }

    /// One damaged link in a sound ring: every node but those next to the
    /// damage is found, and the damage is said.
    #[test]
    fn one_damaged_link(
        count in 2_u64..40, at in 0_u64..40, back: bool, value: u64,
    ) {
        let memory = Synthetic::new(Volatility::Static);
        ring(&memory, 0..count);
        let at = at % count;
        let place = address(at) + if back { 8 } else { 0 };
        let right = if back { address((at + count - 1) % count) } else { address((at + 1) % count) };
        memory.set(place, value);
        let (mut found, errors, _) = walk(&memory, LIMIT);
        found.sort_unstable();
        prop_assert_eq!(found, (1..count).collect::<Vec<_>>());
        prop_assert_eq!(errors.is_empty(), value == right);
    }
}

//! Walks over maple trees (`include/linux/maple_tree.h`), which hold the
//! memory areas of a process since 6.1.
//!
//! A node has slots and, between them, pivots: slot `n` holds what stands at
//! the indices after pivot `n - 1` up to pivot `n`. A link to a node carries
//! the node's type in its low byte; nodes are aligned to 256 bytes.

use std::collections::HashSet;

use secmon_memory::{AddressSpace, VirtualAddress};
use secmon_profile::{TypeError, Types};

use super::list::is_kernel_address;
use super::tree::{TreeError, Walk, settle};
use crate::{Diagnostics, Guest, Layout, TableError, layout};

layout! {
    /// `include/linux/maple_tree.h`
    struct TreeLayout: "maple_tree" {
        root: "ma_root",
    }
}

layout! {
    /// `include/linux/maple_tree.h`: leaves and nodes over them.
    struct RangeLayout: "maple_range_64" {
        pivots: "pivot",
        slots: "slot",
        end: "meta.end",
    }
}

layout! {
    /// `include/linux/maple_tree.h`: nodes that know the gaps below them.
    struct GapRangeLayout: "maple_arange_64" {
        pivots: "pivot",
        slots: "slot",
        end: "meta.end",
    }
}

/// `MAPLE_NODE_MASK`: the bits of a link that are not the node's address.
const LINK_BITS: u64 = 255;
/// A node's size, and its alignment.
const NODE_SIZE: usize = 256;
/// `MAPLE_NODE_TYPE_SHIFT` and `MAPLE_NODE_TYPE_MASK`.
const TYPE_SHIFT: u32 = 3;
const TYPE_MASK: u64 = 0xf;
/// `XA_ZERO_ENTRY` as a word: reserved, reads as nothing.
const ZERO_ENTRY: u64 = 257 << 2 | 2;
/// Levels: `MAPLE_HEIGHT_MAX` is 31.
const DEPTH_LIMIT: usize = 31;

/// Where the members of one type of node lie; they fit into [`NODE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    pivots: usize,
    pivot_count: usize,
    slots: usize,
    end: usize,
    /// Whether `end` holds at all times, not only while there is room.
    end_is_kept: bool,
}

/// Where the members of the nodes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapleModel {
    root: u64,
    range: Shape,
    gap_range: Shape,
}

impl Layout for MapleModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let tree = TreeLayout::resolve(types)?;
        let range = RangeLayout::resolve(types)?;
        let gap_range = GapRangeLayout::resolve(types)?;
        // Offsets beyond a node read as nothing; see `word`.
        let place = |offset: u64| usize::try_from(offset).unwrap_or(NODE_SIZE);
        let count = |size: u64| place(size / 8).min(NODE_SIZE / 8);
        Ok(Self {
            root: tree.root.offset,
            range: Shape {
                pivots: place(range.pivots.offset),
                pivot_count: count(range.pivots.size),
                slots: place(range.slots.offset),
                end: place(range.end.offset),
                end_is_kept: false,
            },
            gap_range: Shape {
                pivots: place(gap_range.pivots.offset),
                pivot_count: count(gap_range.pivots.size),
                slots: place(gap_range.slots.offset),
                end: place(gap_range.end.offset),
                end_is_kept: true,
            },
        })
    }
}

/// An entry and the indices that it stands at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// The first index.
    pub first: u64,
    /// The last index.
    pub last: u64,
    /// The word that stands there: a pointer.
    pub word: u64,
}

/// `enum maple_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Leaf,
    Range,
    GapRange,
}

/// A link to a node.
#[derive(Clone, Copy, Debug)]
struct Link {
    node: VirtualAddress,
    kind: u64,
}

/// The node that the tree's root leads to, if it is a link (`xa_is_node`,
/// which `mte_mk_root()` marks it to be).
fn root_link(word: u64) -> Option<Link> {
    (word & 3 == 2).then(|| node_link(word)).flatten()
}

/// The node that a slot of a node which is no leaf leads to. Unlike the
/// root's, these links (`mt_mk_node()`) don't have the mark of a node.
fn node_link(word: u64) -> Option<Link> {
    (word > 4096).then(|| Link {
        node: VirtualAddress::new(word & !LINK_BITS),
        kind: (word >> TYPE_SHIFT) & TYPE_MASK,
    })
}

/// The word at `offset` of a node; 0 beyond it.
fn word(bytes: &[u8; NODE_SIZE], offset: usize) -> u64 {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// A copied node with the indices it covers.
struct Node {
    address: VirtualAddress,
    bytes: [u8; NODE_SIZE],
    kind: Kind,
    shape: Shape,
    last: u64,
    /// The last slot in use.
    end: usize,
    /// The next slot, and the first index it covers.
    next: usize,
    first: u64,
}

impl Node {
    /// The next slot: the indices it covers, and what it holds.
    fn take(&mut self) -> Option<Result<Range, TreeError>> {
        if self.next > self.end {
            return None;
        }
        let slot = self.next;
        let pivot = word(&self.bytes, self.shape.pivots + slot * 8);
        // The last slot in use reaches to the end of the node.
        let last = if slot == self.end { self.last } else { pivot };
        if last < self.first || last > self.last {
            self.next = usize::MAX;
            return Some(Err(TreeError::Shape {
                node: self.address,
                reason: "its pivots are not in order",
            }));
        }
        let range = Range {
            first: self.first,
            last,
            word: word(&self.bytes, self.shape.slots + slot * 8),
        };
        self.next += 1;
        match last.checked_add(1) {
            Some(first) if slot < self.end => self.first = first,
            _ => self.next = usize::MAX,
        }
        Some(Ok(range))
    }
}

impl MapleModel {
    /// Copies the node that `link` leads to; it covers `first` to `last`.
    fn node(
        &self,
        space: &AddressSpace,
        from: VirtualAddress,
        link: Link,
        first: u64,
        last: u64,
    ) -> Result<Node, TreeError> {
        let address = link.node;
        if !is_kernel_address(space, address) {
            return Err(TreeError::Wild {
                node: from,
                found: address,
            });
        }
        let (kind, shape) = match link.kind {
            1 => (Kind::Leaf, self.range),
            2 => (Kind::Range, self.range),
            3 => (Kind::GapRange, self.gap_range),
            _ => {
                return Err(TreeError::Shape {
                    node: address,
                    reason: "its type is none that a tree of ranges has",
                });
            }
        };
        let mut bytes = [0; NODE_SIZE];
        space
            .read(address, &mut bytes)
            .map_err(|source| TreeError::Read {
                node: address,
                source,
            })?;
        // ma_data_end(): the count of slots shares its place with the last
        // slot of a node without gaps, which is full if its last pivot is
        // set.
        let full = shape.pivot_count;
        let last_pivot = full
            .checked_sub(1)
            .map_or(0, |index| word(&bytes, shape.pivots + index * 8));
        let end = if shape.end_is_kept || last_pivot == 0 {
            usize::from(bytes.get(shape.end).copied().unwrap_or(0))
        } else if last_pivot == last {
            full.saturating_sub(1)
        } else {
            full
        };
        if end > full {
            return Err(TreeError::Shape {
                node: address,
                reason: "it has more slots in use than there are",
            });
        }
        Ok(Node {
            address,
            bytes,
            kind,
            shape,
            last,
            end,
            next: 0,
            first,
        })
    }

    /// The entries of the `struct maple_tree` at `tree`, by index, at most
    /// `limit`.
    pub fn entries(
        &self,
        space: &AddressSpace,
        diagnostics: &Diagnostics,
        tree: VirtualAddress,
        limit: usize,
    ) -> Walk<Range> {
        settle(space, diagnostics, || self.walk(space, tree, limit))
    }

    /// As [`entries`](Self::entries), once, whatever happens meanwhile.
    pub(crate) fn walk(
        &self,
        space: &AddressSpace,
        tree: VirtualAddress,
        limit: usize,
    ) -> Walk<Range> {
        let mut walk = Walk::default();
        let root = match space.read_u64(tree.wrapping_add(self.root)) {
            Ok(root) => root,
            Err(source) => {
                walk.fail(TreeError::Read { node: tree, source });
                return walk;
            }
        };
        let Some(first) = root_link(root) else {
            if root != 0 && root != ZERO_ENTRY {
                walk.items.push(Range {
                    first: 0,
                    last: 0,
                    word: root,
                });
            }
            return walk;
        };
        let mut seen = HashSet::new();
        let mut stack = Vec::new();
        match self.node(space, tree, first, 0, u64::MAX) {
            Ok(node) => {
                if word(&node.bytes, 0) & 1 == 0 {
                    walk.fail(TreeError::Parent {
                        node: tree,
                        child: first.node,
                        found: VirtualAddress::new(word(&node.bytes, 0)),
                    });
                }
                seen.insert(first.node);
                stack.push(node);
            }
            Err(error) => walk.fail(error),
        }
        while let Some(node) = stack.last_mut() {
            let range = match node.take() {
                Some(Ok(range)) => range,
                Some(Err(error)) => {
                    walk.fail(error);
                    continue;
                }
                None => {
                    stack.pop();
                    continue;
                }
            };
            if range.word == 0 || range.word == ZERO_ENTRY {
                continue;
            }
            if node.kind == Kind::Leaf {
                if walk.items.len() >= limit {
                    walk.fail(TreeError::TooLong { limit });
                    return walk;
                }
                walk.items.push(range);
                continue;
            }
            let from = node.address;
            let Some(link) = node_link(range.word) else {
                walk.fail(TreeError::Wild {
                    node: from,
                    found: VirtualAddress::new(range.word),
                });
                continue;
            };
            if !seen.insert(link.node) {
                walk.fail(TreeError::Twice { node: link.node });
                continue;
            }
            if stack.len() >= DEPTH_LIMIT {
                walk.fail(TreeError::TooDeep {
                    node: link.node,
                    limit: DEPTH_LIMIT,
                });
                continue;
            }
            match self.node(space, from, link, range.first, range.last) {
                Ok(child) => {
                    let parent = VirtualAddress::new(word(&child.bytes, 0) & !LINK_BITS);
                    if parent != from {
                        // A node that was replaced names itself. Its entries
                        // were the tree's a moment ago.
                        walk.fail(TreeError::Parent {
                            node: from,
                            child: link.node,
                            found: parent,
                        });
                    }
                    stack.push(child);
                }
                Err(error) => walk.fail(error),
            }
        }
        walk
    }
}

/// The entries of the `struct maple_tree` at `tree`.
///
/// # Errors
/// [`TableError`] if the kernel's types are not known or have no such trees.
pub fn entries(
    guest: &Guest,
    table: &'static str,
    tree: VirtualAddress,
    limit: usize,
) -> Result<Walk<Range>, TableError> {
    let model = guest.layout::<MapleModel>(table)?;
    Ok(model.entries(guest.space(), guest.diagnostics(), tree, limit))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secmon_memory::Volatility;

    use super::*;
    use crate::synthetic::{SIZE, Synthetic};

    /// As in all kernels so far.
    const MODEL: MapleModel = MapleModel {
        root: 8,
        range: Shape {
            pivots: 8,
            pivot_count: 15,
            slots: 128,
            end: 248,
            end_is_kept: false,
        },
        gap_range: Shape {
            pivots: 8,
            pivot_count: 9,
            slots: 80,
            end: 240,
            end_is_kept: true,
        },
    };
    const TREE: u64 = 0x100;
    const LEAF: u64 = 1;
    const GAP_RANGE: u64 = 3;

    fn node(number: u64) -> u64 {
        0x1000 + number * 256
    }

    /// `mt_mk_node()`
    fn child(number: u64, kind: u64) -> u64 {
        Synthetic::at(node(number)).as_u64() | kind << TYPE_SHIFT | 4
    }

    /// `mte_mk_root()` of it
    fn root(number: u64, kind: u64) -> u64 {
        child(number, kind) | 2
    }

    fn pointer(number: u64) -> u64 {
        Synthetic::at(0x8_0000 + number * 8).as_u64()
    }

    /// Writes a node with these (last index, word) slots.
    fn write_node(
        memory: &Synthetic,
        number: u64,
        shape: Shape,
        parent: u64,
        slots: &[(u64, u64)],
    ) {
        memory.write(node(number), &[0; NODE_SIZE]);
        memory.write_u64(node(number), parent);
        for (slot, (last, word)) in slots.iter().enumerate() {
            if slot < shape.pivot_count {
                memory.write_u64(node(number) + (shape.pivots + slot * 8) as u64, *last);
            }
            memory.write_u64(node(number) + (shape.slots + slot * 8) as u64, *word);
        }
        if shape.end_is_kept || slots.len() < shape.pivot_count {
            memory.write(node(number) + shape.end as u64, &[slots.len() as u8 - 1]);
        }
    }

    /// Two leaves under a node: one with room, one full.
    fn tree(volatility: Volatility) -> (Synthetic, Vec<Range>) {
        let memory = Synthetic::new(volatility);
        let mut expected = Vec::new();
        let mut slots = |base: u64, count: u64, last: u64| {
            let mut slots = Vec::new();
            for slot in 0..count {
                let first = base + slot * 10;
                let last = if slot + 1 == count { last } else { first + 9 };
                let word = if slot % 3 == 2 { 0 } else { pointer(first) };
                slots.push((last, word));
                if word != 0 {
                    expected.push(Range { first, last, word });
                }
            }
            slots
        };
        let first = slots(0, 5, 999);
        let second = slots(1000, 16, u64::MAX);
        let above = Synthetic::at(node(0)).as_u64();
        memory.write_u64(TREE + MODEL.root, root(0, GAP_RANGE));
        let links = [(999, child(1, LEAF)), (u64::MAX, child(2, LEAF))];
        let tree = Synthetic::at(TREE).as_u64();
        write_node(&memory, 0, MODEL.gap_range, tree | 1, &links);
        write_node(&memory, 1, MODEL.range, above | 6, &first);
        write_node(&memory, 2, MODEL.range, above | 6 | 1 << 3, &second);
        (memory, expected)
    }

    fn walked(memory: &Synthetic) -> Walk<Range> {
        let diagnostics = Diagnostics::default();
        MODEL.entries(&memory.space(), &diagnostics, Synthetic::at(TREE), 1000)
    }

    #[test]
    fn gives_entries_with_their_ranges() {
        for volatility in [Volatility::Live, Volatility::Static] {
            let (memory, expected) = tree(volatility);
            let walk = walked(&memory);
            assert_eq!(walk.items, expected);
            assert_eq!(walk.errors, []);
        }
    }

    #[test]
    fn a_leaf_that_ends_at_its_last_pivot_is_full() {
        let (memory, _) = tree(Volatility::Static);
        let slots: Vec<_> = (0..15).map(|slot| (slot * 10 + 9, pointer(slot))).collect();
        let above = Synthetic::at(node(0)).as_u64();
        memory.write_u64(node(0) + 8, 149);
        write_node(&memory, 1, MODEL.range, above | 6, &slots);
        let walk = walked(&memory);
        assert_eq!(walk.errors, []);
        assert_eq!(walk.items[14].last, 149);
        assert_eq!(walk.items[15].first, 150);
    }

    #[test]
    fn a_tree_of_one_entry_has_no_node() {
        let memory = Synthetic::new(Volatility::Static);
        assert_eq!(walked(&memory), Walk::default());
        memory.write_u64(TREE + MODEL.root, pointer(1));
        let only = Range {
            first: 0,
            last: 0,
            word: pointer(1),
        };
        assert_eq!(walked(&memory).items, [only]);
    }

    #[test]
    fn leaves_what_leads_nowhere() {
        let (memory, expected) = tree(Volatility::Static);
        memory.write_u64(node(0) + 80, child(0, GAP_RANGE));
        assert!(matches!(
            walked(&memory).errors[..],
            [TreeError::Twice { .. }]
        ));
        memory.write_u64(node(0) + 80, child(1, 7));
        assert!(matches!(
            walked(&memory).errors[..],
            [TreeError::Shape { .. }]
        ));
        memory.write_u64(node(0) + 80, 0x7fff_0000_000e);
        assert!(matches!(
            walked(&memory).errors[..],
            [TreeError::Wild { .. }]
        ));
        // A replaced node: told, and read.
        memory.write_u64(node(0) + 80, child(1, LEAF));
        memory.write_pointer(node(1), node(1));
        let walk = walked(&memory);
        assert_eq!(walk.items, expected);
        assert!(matches!(walk.errors[..], [TreeError::Parent { .. }]));
    }

    proptest! {
        /// Whatever the nodes hold: an end, bounded, ranges in order.
        #[test]
        fn any_damage_ends(
            damage in prop::collection::vec((0..3 * 256_u64, any::<u64>(), 0..4_u8), 1..64),
        ) {
            let (memory, _) = tree(Volatility::Static);
            for (place, value, kind) in damage {
                let value = match kind {
                    0 => value,
                    1 => value & 0xffff,
                    2 => child(value % 4, (value >> 8) % 4),
                    _ => Synthetic::at(value % SIZE).as_u64(),
                };
                memory.write_u64(node(0) + place / 8 * 8, value);
            }
            let walk = walked(&memory);
            prop_assert!(walk.items.len() <= 1000);
            for pair in walk.items.windows(2) {
                prop_assert!(pair[0].first <= pair[0].last && pair[0].last < pair[1].first);
            }
        }
    }
}

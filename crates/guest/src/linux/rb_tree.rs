//! Walks over red-black trees (`include/linux/rbtree.h`).

use std::collections::HashSet;

use secmon_memory::{AddressSpace, VirtualAddress};

use super::list::is_object_address;
use super::tree::{TreeError, Walk, settle};
use crate::Diagnostics;

/// `struct rb_node`: the parent with the colour in its low bits, then the
/// right and the left child; never changed since there is one.
const NODE_SIZE: usize = 24;
const COLOUR: u64 = 3;

/// A red-black tree of n nodes has at most 2·log2(n + 1) levels.
const DEPTH_LIMIT: usize = 128;

struct Node {
    parent: VirtualAddress,
    right: VirtualAddress,
    left: VirtualAddress,
}

fn read(space: &AddressSpace, node: VirtualAddress) -> Result<Node, TreeError> {
    let mut words = [[0; 8]; NODE_SIZE / 8];
    space
        .read(node, words.as_flattened_mut())
        .map_err(|source| TreeError::Read { node, source })?;
    let [parent, right, left] = words.map(u64::from_le_bytes);
    Ok(Node {
        parent: VirtualAddress::new(parent & !COLOUR),
        right: VirtualAddress::new(right),
        left: VirtualAddress::new(left),
    })
}

/// The nodes of the tree whose `struct rb_root` is at `root`, in order, at
/// most `limit`: addresses of the `rb_node`s embedded in its members. For an
/// `rb_root_cached` give its first member.
pub fn nodes(
    space: &AddressSpace,
    diagnostics: &Diagnostics,
    root: VirtualAddress,
    limit: usize,
) -> Walk<VirtualAddress> {
    settle(space, diagnostics, || walk(space, root, limit))
}

/// As [`nodes`], once, whatever happens meanwhile.
pub(crate) fn walk(
    space: &AddressSpace,
    root: VirtualAddress,
    limit: usize,
) -> Walk<VirtualAddress> {
    let mut walk = Walk::default();
    let mut seen = HashSet::new();
    // Nodes whose left side has been entered: the node and its right child.
    let mut stack: Vec<(VirtualAddress, VirtualAddress)> = Vec::new();
    let first = match space.read_pointer(root) {
        Ok(first) => first,
        Err(source) => {
            walk.fail(TreeError::Read { node: root, source });
            return walk;
        }
    };
    let mut parent = VirtualAddress::default();
    let mut child = first;
    loop {
        // Down to the left.
        while !child.is_null() {
            let from = if parent.is_null() { root } else { parent };
            match enter(space, &mut seen, from, child) {
                Ok(node) if stack.len() < DEPTH_LIMIT => {
                    if node.parent != parent {
                        // The link down is what counts; that the way back is
                        // another is told.
                        walk.fail(TreeError::Parent {
                            node: from,
                            child,
                            found: node.parent,
                        });
                    }
                    stack.push((child, node.right));
                    parent = child;
                    child = node.left;
                }
                Ok(_) => {
                    walk.fail(TreeError::TooDeep {
                        node: child,
                        limit: DEPTH_LIMIT,
                    });
                    break;
                }
                Err(error) => {
                    walk.fail(error);
                    break;
                }
            }
        }
        // The nearest node with its left side done; then its right side.
        let Some((node, right)) = stack.pop() else {
            return walk;
        };
        if walk.items.len() >= limit {
            walk.fail(TreeError::TooLong { limit });
            return walk;
        }
        walk.items.push(node);
        parent = node;
        child = right;
    }
}

/// Reads the node at `child`, to which `from` leads.
fn enter(
    space: &AddressSpace,
    seen: &mut HashSet<VirtualAddress>,
    from: VirtualAddress,
    child: VirtualAddress,
) -> Result<Node, TreeError> {
    if !is_object_address(space, child) {
        return Err(TreeError::Wild {
            node: from,
            found: child,
        });
    }
    let node = read(space, child)?;
    if !seen.insert(child) {
        return Err(TreeError::Twice { node: child });
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secmon_memory::Volatility;

    use super::*;
    use crate::synthetic::{SIZE, Synthetic};

    const ROOT: u64 = 0x100;

    fn node(index: u64) -> u64 {
        0x1000 + index * 64
    }

    /// A balanced tree of `first..last` under `parent`; its root's offset.
    fn build(memory: &Synthetic, parent: Option<u64>, first: u64, last: u64) -> Option<u64> {
        if first >= last {
            return None;
        }
        let middle = first.midpoint(last);
        let here = node(middle);
        let parent = parent.map_or(0, |parent| Synthetic::at(parent).as_u64());
        memory.write_u64(here, parent | (middle & 1));
        for (offset, range) in [(8, middle + 1..last), (16, first..middle)] {
            match build(memory, Some(here), range.start, range.end) {
                Some(child) => memory.write_pointer(here + offset, child),
                None => memory.write_u64(here + offset, 0),
            }
        }
        Some(here)
    }

    fn tree(count: u64, volatility: Volatility) -> Synthetic {
        let memory = Synthetic::new(volatility);
        if let Some(first) = build(&memory, None, 0, count) {
            memory.write_pointer(ROOT, first);
        }
        memory
    }

    fn walked(memory: &Synthetic, limit: usize) -> Walk<VirtualAddress> {
        let diagnostics = Diagnostics::default();
        nodes(&memory.space(), &diagnostics, Synthetic::at(ROOT), limit)
    }

    #[test]
    fn gives_all_nodes_in_order() {
        for count in [0, 1, 2, 3, 100, 1000] {
            let memory = tree(count, Volatility::Live);
            let walk = walked(&memory, 2000);
            let expected: Vec<_> = (0..count).map(|index| Synthetic::at(node(index))).collect();
            assert_eq!(walk.items, expected);
            assert_eq!(walk.errors, []);
        }
    }

    #[test]
    fn says_that_it_stopped_at_the_limit() {
        let walk = walked(&tree(10, Volatility::Static), 4);
        assert_eq!(walk.items.len(), 4);
        assert_eq!(walk.errors, [TreeError::TooLong { limit: 4 }]);
    }

    #[test]
    fn leaves_a_cycle() {
        let memory = tree(3, Volatility::Static);
        // The right child leads back to the root.
        memory.write_pointer(node(2) + 8, node(1));
        let walk = walked(&memory, 100);
        assert_eq!(walk.items.len(), 3);
        assert!(matches!(walk.errors[..], [TreeError::Twice { .. }]));
        // One node on both sides.
        let memory = tree(3, Volatility::Static);
        memory.write_pointer(node(1) + 8, node(0));
        let walk = walked(&memory, 100);
        assert_eq!(walk.items.len(), 2);
        assert!(matches!(walk.errors[..], [TreeError::Twice { .. }]));
    }

    #[test]
    fn follows_a_child_that_names_another_parent_and_says_so() {
        let memory = tree(7, Volatility::Static);
        memory.write_pointer(node(1), node(6));
        let walk = walked(&memory, 100);
        assert_eq!(walk.items.len(), 7);
        assert!(matches!(walk.errors[..], [TreeError::Parent { .. }]));
    }

    #[test]
    fn waits_for_a_rotation_to_end() {
        let memory = tree(3, Volatility::Live);
        let right = node(2);
        memory.write_pointer(right, 0x5000);
        let mut reads = 0;
        memory.on_read(move |bytes, _| {
            reads += 1;
            if reads == 100 {
                let parent = Synthetic::at(node(1)).as_u64();
                bytes[right as usize..][..8].copy_from_slice(&parent.to_le_bytes());
            }
        });
        let diagnostics = Diagnostics::default();
        let walk = nodes(&memory.space(), &diagnostics, Synthetic::at(ROOT), 100);
        assert_eq!(walk.items.len(), 3);
        assert_eq!(walk.errors, []);
        assert!(diagnostics.torn_reads() > 0);
    }

    proptest! {
        /// Whatever the memory holds: an end, bounded, without a node twice.
        #[test]
        fn any_damage_ends(
            damage in prop::collection::vec((0..4096_u64, any::<u64>(), any::<bool>()), 1..64),
        ) {
            let memory = tree(50, Volatility::Static);
            for (place, value, near) in damage {
                let value = if near {
                    Synthetic::at((value % SIZE) & !7).as_u64()
                } else {
                    value
                };
                memory.write_u64(node(0) + place / 8 * 8, value);
            }
            let walk = walked(&memory, 1000);
            let unique: HashSet<_> = walk.items.iter().collect();
            prop_assert_eq!(unique.len(), walk.items.len());
            prop_assert!(walk.items.len() <= 1000);
        }
    }
}

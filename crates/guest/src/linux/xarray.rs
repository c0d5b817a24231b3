//! Walks over xarrays (`include/linux/xarray.h`), which are also radix trees
//! and what lies under an IDR.
//!
//! Each entry is one word. Its low bits tell what it is: a pointer (two low
//! bits that are not `10`, so that a tagged pointer is one as well), a value
//! (bit 0), or, with `10`, something of the array's own: a node, or a mark
//! that another slot holds the entry.

use std::collections::HashSet;

use secmon_memory::{AddressSpace, ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use super::list::is_object_address;
use super::tree::{TreeError, Walk, settle};
use crate::{Diagnostics, Guest, Layout, TableError, layout};

layout! {
    /// `include/linux/xarray.h`
    struct XarrayLayout: "xarray" {
        head: "xa_head",
    }
}

layout! {
    /// `include/linux/xarray.h`
    struct NodeLayout: "xa_node" {
        shift: "shift",
        offset: "offset",
        parent: "parent",
        slots: "slots",
    }
}

layout! {
    /// `include/linux/idr.h`
    struct IdrLayout: "idr" {
        array: "idr_rt",
        base: "idr_base",
    }
}

/// Internal entries below this are marks, from here on they are nodes
/// (`xa_is_node`).
const FIRST_NODE: u64 = 4096;
/// `XA_ZERO_ENTRY`: reserved, reads as nothing.
const ZERO_ENTRY: u64 = 257;
/// Slots of a node, `XA_CHUNK_SIZE`; 16 in kernels built to be small.
const MOST_SLOTS: u64 = 64;
/// Levels that indices of 64 bits need, with 4 bits a level.
const DEPTH_LIMIT: usize = 16;

/// Where the members of the nodes lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XarrayModel {
    /// `xarray.xa_head`.
    head: u64,
    shift: u64,
    offset: u64,
    parent: u64,
    slots: u64,
    /// How many bits of the index a level takes.
    bits: u32,
}

impl Layout for XarrayModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let array = XarrayLayout::resolve(types)?;
        let node = NodeLayout::resolve(types)?;
        let count = (node.slots.size / 8).clamp(2, MOST_SLOTS);
        Ok(Self {
            head: array.head.offset,
            shift: node.shift.offset,
            offset: node.offset.offset,
            parent: node.parent.offset,
            slots: node.slots.offset,
            bits: count.ilog2(),
        })
    }
}

/// An entry and the first index that it stands at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The index.
    pub index: u64,
    /// The word: a pointer, perhaps with tag bits, or a value.
    pub word: u64,
}

impl Entry {
    /// The entry as a pointer with its tag bits cut off, unless it is a
    /// value.
    pub fn pointer(&self) -> Option<VirtualAddress> {
        (self.word & 1 == 0).then(|| VirtualAddress::new(self.word & !3))
    }

    /// The entry as a value (`xa_to_value`), unless it is a pointer. What is
    /// a pointer with tag 1 to its user is a value here.
    pub fn value(&self) -> Option<u64> {
        (self.word & 1 == 1).then_some(self.word >> 1)
    }
}

/// What a word in a slot is.
enum Slot {
    Empty,
    Node(VirtualAddress),
    /// The entry is in the slot with this number.
    Sibling(u64),
    Entry(u64),
}

fn classify(word: u64) -> Slot {
    if word == 0 {
        return Slot::Empty;
    }
    if word & 3 != 2 {
        return Slot::Entry(word);
    }
    if word > FIRST_NODE {
        return Slot::Node(VirtualAddress::new(word - 2));
    }
    match word >> 2 {
        number if number < MOST_SLOTS => Slot::Sibling(number),
        ZERO_ENTRY => Slot::Empty,
        // XA_RETRY_ENTRY and error numbers: what was here has moved.
        _ => Slot::Empty,
    }
}

/// A copied node.
struct Node {
    shift: u32,
    slots: [u64; MOST_SLOTS as usize],
}

impl XarrayModel {
    fn slot_count(&self) -> u64 {
        1 << self.bits
    }

    fn head(&self, space: &AddressSpace, array: VirtualAddress) -> Result<u64, TreeError> {
        space
            .read_u64(array.wrapping_add(self.head))
            .map_err(|source| TreeError::Read {
                node: array,
                source,
            })
    }

    /// Copies the node at `address`; `above` is its parent and its own place
    /// there, none for the first.
    fn node(
        &self,
        space: &AddressSpace,
        from: VirtualAddress,
        address: VirtualAddress,
        above: Option<(VirtualAddress, u32, u64)>,
    ) -> Result<Node, TreeError> {
        if !is_object_address(space, address) {
            return Err(TreeError::Wild {
                node: from,
                found: address,
            });
        }
        let read = |source: ReadError| TreeError::Read {
            node: address,
            source,
        };
        let shape = |reason| TreeError::Shape {
            node: address,
            reason,
        };
        let shift = u32::from(
            space
                .read_u8(address.wrapping_add(self.shift))
                .map_err(read)?,
        );
        let offset = space
            .read_u8(address.wrapping_add(self.offset))
            .map_err(read)?;
        let parent = space
            .read_pointer(address.wrapping_add(self.parent))
            .map_err(read)?;
        let mut words = [[0; 8]; MOST_SLOTS as usize];
        let count = self.slot_count() as usize;
        space
            .read(
                address.wrapping_add(self.slots),
                words[..count].as_flattened_mut(),
            )
            .map_err(read)?;
        if !shift.is_multiple_of(self.bits) || shift >= u64::BITS {
            return Err(shape("its shift is not that of a level"));
        }
        match above {
            Some((above, above_shift, place)) => {
                if parent != above {
                    return Err(TreeError::Parent {
                        node: above,
                        child: address,
                        found: parent,
                    });
                }
                if shift + self.bits != above_shift {
                    return Err(shape("it is not one level below its parent"));
                }
                if u64::from(offset) != place {
                    return Err(shape("it is not at its place in its parent"));
                }
            }
            None if !parent.is_null() => {
                return Err(TreeError::Parent {
                    node: from,
                    child: address,
                    found: parent,
                });
            }
            None => {}
        }
        Ok(Node {
            shift,
            slots: words.map(u64::from_le_bytes),
        })
    }

    /// The entries of the `struct xarray` at `array`, by index, at most
    /// `limit`. An entry that stands at several indices comes once, with the
    /// first.
    pub fn entries(
        &self,
        space: &AddressSpace,
        diagnostics: &Diagnostics,
        array: VirtualAddress,
        limit: usize,
    ) -> Walk<Entry> {
        settle(space, diagnostics, || self.walk(space, array, limit))
    }

    fn walk(&self, space: &AddressSpace, array: VirtualAddress, limit: usize) -> Walk<Entry> {
        let mut walk = Walk::default();
        let mut seen = HashSet::new();
        let first = match self.head(space, array).map(classify) {
            Ok(Slot::Node(first)) => first,
            Ok(Slot::Entry(word)) => {
                walk.items.push(Entry { index: 0, word });
                return walk;
            }
            Ok(Slot::Empty | Slot::Sibling(_)) => return walk,
            Err(error) => {
                walk.fail(error);
                return walk;
            }
        };
        // The nodes on the way: address, copy, index of its first slot, and
        // the next slot.
        let mut stack: Vec<(VirtualAddress, Node, u64, u64)> = Vec::new();
        match self.node(space, array, first, None) {
            Ok(node) => {
                seen.insert(first);
                stack.push((first, node, 0, 0));
            }
            Err(error) => walk.fail(error),
        }
        let count = self.slot_count();
        while let Some((address, node, base, next)) = stack.last_mut() {
            let place = *next;
            if place >= count {
                stack.pop();
                continue;
            }
            *next += 1;
            let index = base.wrapping_add(place << node.shift);
            let word = node.slots.get(place as usize).copied().unwrap_or(0);
            match classify(word) {
                Slot::Empty | Slot::Sibling(_) => {}
                Slot::Entry(word) => {
                    if walk.items.len() >= limit {
                        walk.fail(TreeError::TooLong { limit });
                        return walk;
                    }
                    walk.items.push(Entry { index, word });
                }
                Slot::Node(child) => {
                    let (address, shift) = (*address, node.shift);
                    if stack.len() >= DEPTH_LIMIT {
                        walk.fail(TreeError::TooDeep {
                            node: address,
                            limit: DEPTH_LIMIT,
                        });
                        continue;
                    }
                    if !seen.insert(child) {
                        walk.fail(TreeError::Twice { node: child });
                        continue;
                    }
                    match self.node(space, address, child, Some((address, shift, place))) {
                        Ok(copy) => stack.push((child, copy, index, 0)),
                        Err(error) => walk.fail(error),
                    }
                }
            }
        }
        walk
    }

    /// The entry at `index` of the `struct xarray` at `array`, as `xa_load`
    /// finds it.
    ///
    /// # Errors
    /// [`TreeError`] if the way there is damaged.
    pub fn load(
        &self,
        space: &AddressSpace,
        array: VirtualAddress,
        index: u64,
    ) -> Result<Option<Entry>, TreeError> {
        let mut word = self.head(space, array)?;
        let mut from = array;
        let mut above = None;
        for _ in 0..=DEPTH_LIMIT {
            let address = match classify(word) {
                Slot::Entry(word) => {
                    let covers = above.is_some() || index == 0;
                    return Ok(covers.then_some(Entry { index, word }));
                }
                Slot::Empty | Slot::Sibling(_) => return Ok(None),
                Slot::Node(address) => address,
            };
            let node = self.node(space, from, address, above)?;
            let place = index >> node.shift;
            if above.is_none() && place >= self.slot_count() {
                return Ok(None);
            }
            let mut place = place & (self.slot_count() - 1);
            word = node.slots.get(place as usize).copied().unwrap_or(0);
            if let Slot::Sibling(canonical) = classify(word) {
                place = canonical;
                word = node.slots.get(place as usize).copied().unwrap_or(0);
            }
            from = address;
            above = Some((address, node.shift, place));
        }
        Err(TreeError::TooDeep {
            node: from,
            limit: DEPTH_LIMIT,
        })
    }
}

/// The entries of the `struct xarray` at `array`.
///
/// # Errors
/// [`TableError`] if the kernel's types are not known.
pub fn entries(
    guest: &Guest,
    table: &'static str,
    array: VirtualAddress,
    limit: usize,
) -> Result<Walk<Entry>, TableError> {
    let model = guest.layout::<XarrayModel>(table)?;
    Ok(model.entries(guest.space(), guest.diagnostics(), array, limit))
}

/// The ids and entries of the `struct idr` at `idr`.
///
/// # Errors
/// [`TableError`] if the kernel's types are not known.
pub fn idr_entries(
    guest: &Guest,
    table: &'static str,
    idr: VirtualAddress,
    limit: usize,
) -> Result<Walk<Entry>, TableError> {
    let layout = guest.layout::<IdrLayout>(table)?;
    let read = |source| TableError::Read {
        table,
        what: "idr.idr_base",
        source,
    };
    let base = guest.number(idr, &layout.base).map_err(read)?;
    let mut walk = entries(guest, table, idr.wrapping_add(layout.array.offset), limit)?;
    for entry in &mut walk.items {
        entry.index = entry.index.wrapping_add(base);
    }
    Ok(walk)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secmon_memory::Volatility;

    use super::*;
    use crate::synthetic::{SIZE, Synthetic};

    /// As in a usual kernel.
    const MODEL: XarrayModel = XarrayModel {
        head: 8,
        shift: 0,
        offset: 1,
        parent: 8,
        slots: 40,
        bits: 6,
    };
    const ARRAY: u64 = 0x100;

    fn node(number: u64) -> u64 {
        0x1000 + number * 1024
    }

    fn write_node(memory: &Synthetic, number: u64, shift: u8, place: u8, parent: Option<u64>) {
        memory.write(node(number), &[shift, place]);
        let parent = parent.map_or(0, |parent| Synthetic::at(node(parent)).as_u64());
        memory.write_u64(node(number) + MODEL.parent, parent);
    }

    fn write_slot(memory: &Synthetic, number: u64, place: u64, word: u64) {
        memory.write_u64(node(number) + MODEL.slots + place * 8, word);
    }

    fn node_entry(number: u64) -> u64 {
        Synthetic::at(node(number)).as_u64() + 2
    }

    fn pointer(number: u64) -> u64 {
        Synthetic::at(0x8_0000 + number * 8).as_u64()
    }

    /// Entries at 0, 5, 6 and 7 (one of two slots), 70 and 128 to 191.
    fn array(volatility: Volatility) -> Synthetic {
        let memory = Synthetic::new(volatility);
        memory.write_u64(ARRAY + MODEL.head, node_entry(0));
        write_node(&memory, 0, 6, 0, None);
        write_node(&memory, 1, 0, 0, Some(0));
        write_node(&memory, 2, 0, 1, Some(0));
        write_slot(&memory, 0, 0, node_entry(1));
        write_slot(&memory, 0, 1, node_entry(2));
        write_slot(&memory, 0, 2, pointer(128));
        write_slot(&memory, 1, 0, (7 << 1) | 1);
        write_slot(&memory, 1, 5, pointer(5) | 1 << 1 | 1);
        write_slot(&memory, 1, 6, pointer(6));
        write_slot(&memory, 1, 7, 6 << 2 | 2);
        write_slot(&memory, 1, 8, ZERO_ENTRY << 2 | 2);
        write_slot(&memory, 2, 6, pointer(70));
        memory
    }

    fn walked(memory: &Synthetic) -> Walk<Entry> {
        let diagnostics = Diagnostics::default();
        MODEL.entries(&memory.space(), &diagnostics, Synthetic::at(ARRAY), 1000)
    }

    fn load(memory: &Synthetic, index: u64) -> Option<u64> {
        MODEL
            .load(&memory.space(), Synthetic::at(ARRAY), index)
            .expect("sound array")
            .map(|entry| entry.word)
    }

    #[test]
    fn gives_entries_by_index() {
        for volatility in [Volatility::Live, Volatility::Static] {
            let walk = walked(&array(volatility));
            let indices: Vec<_> = walk.items.iter().map(|entry| entry.index).collect();
            assert_eq!(indices, [0, 5, 6, 70, 128]);
            assert_eq!(walk.items[0].value(), Some(7));
            assert_eq!(
                walk.items[2].pointer().map(VirtualAddress::as_u64),
                Some(pointer(6))
            );
            assert_eq!(walk.errors, []);
        }
    }

    #[test]
    fn loads_single_entries() {
        let memory = array(Volatility::Static);
        assert_eq!(load(&memory, 6), Some(pointer(6)));
        assert_eq!(load(&memory, 7), Some(pointer(6)));
        assert_eq!(load(&memory, 8), None);
        assert_eq!(load(&memory, 70), Some(pointer(70)));
        assert_eq!(load(&memory, 150), Some(pointer(128)));
        assert_eq!(load(&memory, 192), None);
        assert_eq!(load(&memory, 4096 + 6), None);
        assert_eq!(load(&memory, u64::MAX), None);
    }

    #[test]
    fn an_array_of_one_entry_has_no_node() {
        let memory = Synthetic::new(Volatility::Static);
        assert_eq!(walked(&memory).items, []);
        memory.write_u64(ARRAY + MODEL.head, pointer(3));
        let entry = Entry {
            index: 0,
            word: pointer(3),
        };
        assert_eq!(walked(&memory).items, [entry]);
        assert_eq!(load(&memory, 0), Some(pointer(3)));
        assert_eq!(load(&memory, 1), None);
    }

    #[test]
    fn leaves_what_leads_nowhere() {
        let memory = array(Volatility::Static);
        write_slot(&memory, 0, 0, node_entry(0));
        let walk = walked(&memory);
        assert_eq!(walk.items.len(), 2);
        assert!(matches!(walk.errors[..], [TreeError::Twice { .. }]));
        write_slot(&memory, 0, 0, 0x7fff_0000_0002);
        assert!(matches!(
            walked(&memory).errors[..],
            [TreeError::Wild { .. }]
        ));
        write_slot(&memory, 0, 0, node_entry(2));
        assert!(matches!(walked(&memory).errors[0], TreeError::Shape { .. }));
    }

    proptest! {
        /// Whatever the nodes hold: an end, bounded, no panic.
        #[test]
        fn any_damage_ends(
            damage in prop::collection::vec(
                (0..3 * 1024_u64, any::<u64>(), 0..4_u8), 1..64),
            index in any::<u64>(),
        ) {
            let memory = array(Volatility::Static);
            for (place, value, kind) in damage {
                let value = match kind {
                    0 => value,
                    1 => value & 0xffff,
                    2 => node_entry(value % 4),
                    _ => Synthetic::at(value % SIZE).as_u64(),
                };
                memory.write_u64(node(0) + place / 8 * 8, value);
            }
            prop_assert!(walked(&memory).items.len() <= 1000);
            let _ = MODEL.load(&memory.space(), Synthetic::at(ARRAY), index);
        }
    }
}

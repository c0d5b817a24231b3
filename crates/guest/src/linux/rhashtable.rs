//! Resizable hash tables (`struct rhashtable`, `lib/rhashtable.c`).
//!
//! A table has a current array of buckets and, while it is being resized, the
//! array that follows; members are in either. Chains end with an odd value.
//! Lowest bits of a bucket's pointer are its lock.

use std::collections::HashSet;

use secmon_memory::{AddressSpace, ReadError, VirtualAddress};

use crate::linux::list::is_object_address;
use crate::{Diagnostic, Diagnostics, Guest, TableError, layout};

/// More buckets than this are in no table that is walked here.
const MOST_BUCKETS: u64 = 1 << 22;
/// More members than this are in no table.
const MOST_MEMBERS: usize = 1 << 22;
/// So many diagnostics of one array, and it is none: the rest is given up.
const MOST_BROKEN: u64 = 256;
/// A table is resized once at a time; a second may already wait.
const MOST_ARRAYS: usize = 4;
/// Bucket pointers that are read at once.
const CHUNK: u64 = 512;
/// The two lowest bits of a bucket's pointer: which of them is the lock
/// differs between kernels.
const LOCK_BITS: u64 = 3;
/// A nested array has pages of pointers, of at most this many levels.
const MOST_LEVELS: u32 = 4;

layout! {
    /// `include/linux/rhashtable-types.h`
    struct HashTableLayout: "rhashtable" {
        table: "tbl",
    }
}

layout! {
    /// `include/linux/rhashtable.h`
    struct BucketTableLayout: "bucket_table" {
        count: "size",
        nest: "nest",
        future: "future_tbl",
        buckets: "buckets",
    }
}

/// The members of the table at `address`: the addresses of the structures
/// whose `rhash_head` lies `offset` bytes inside them. What is wrong in it
/// becomes a diagnostic of `table` about `subject`.
///
/// # Errors
/// [`TableError`] if the kernel's types lack hash tables.
pub fn members(
    guest: &Guest,
    table: &'static str,
    subject: &str,
    address: VirtualAddress,
    offset: u64,
) -> Result<Vec<VirtualAddress>, TableError> {
    let hash_table = guest.layout::<HashTableLayout>(table)?;
    let layout = guest.layout::<BucketTableLayout>(table)?;
    let mut walk = Walk {
        space: guest.space(),
        diagnostics: guest.diagnostics(),
        table,
        subject,
        offset,
        seen: HashSet::new(),
        found: Vec::new(),
    };
    let mut arrays = HashSet::new();
    let mut next = guest.pointer(address, &hash_table.table);
    loop {
        match next {
            Ok(array) if array.is_null() => break,
            Ok(array)
                if is_object_address(guest.space(), array)
                    && arrays.len() < MOST_ARRAYS
                    && arrays.insert(array) =>
            {
                let outcome = guest.number(array, &layout.count).and_then(|count| {
                    let nest = guest.number(array, &layout.nest)? as u32;
                    walk.array(array.wrapping_add(layout.buckets.offset), count, nest)
                });
                if let Err(error) = outcome {
                    walk.complain(array, error.to_string());
                }
                next = guest.pointer(array, &layout.future);
            }
            Ok(array) => {
                walk.complain(address, format!("{array} is no array of buckets"));
                break;
            }
            Err(error) => {
                walk.complain(address, error.to_string());
                break;
            }
        }
    }
    Ok(walk.found)
}

struct Walk<'w> {
    space: &'w AddressSpace,
    diagnostics: &'w Diagnostics,
    table: &'static str,
    subject: &'w str,
    offset: u64,
    seen: HashSet<VirtualAddress>,
    found: Vec<VirtualAddress>,
}

impl Walk<'_> {
    fn complain(&self, address: VirtualAddress, reason: String) {
        self.diagnostics.record(Diagnostic {
            table: self.table,
            subject: self.subject.to_owned(),
            address: Some(address),
            reason,
        });
    }

    /// Walks an array of `count` buckets at `buckets`.
    fn array(&mut self, buckets: VirtualAddress, count: u64, nest: u32) -> Result<(), ReadError> {
        if count > MOST_BUCKETS || !count.is_power_of_two() {
            self.complain(buckets, format!("{count} is no number of buckets"));
            return Ok(());
        }
        if nest == 0 {
            return self.buckets(buckets, count);
        }
        // Made without enough memory for one array: `buckets` is one pointer
        // to a page of pointers to pages, of which the last hold buckets. Each
        // page stands for 9 bits of the bucket's number, the first for `nest`.
        let mut left = count.trailing_zeros().saturating_sub(nest);
        let mut pages = vec![(self.space.read_pointer(buckets)?, 1_u64 << nest.min(9))];
        for _ in 0..MOST_LEVELS {
            if left == 0 {
                break;
            }
            let mut below = Vec::new();
            for (page, entries) in pages {
                for index in 0..entries {
                    let pointer = self.space.read_pointer(page.wrapping_add(index * 8))?;
                    if is_object_address(self.space, pointer) {
                        below.push((pointer, 1_u64 << left.min(9)));
                    }
                    if below.len() as u64 > MOST_BUCKETS {
                        self.complain(buckets, "too many nested buckets".to_owned());
                        return Ok(());
                    }
                }
            }
            left = left.saturating_sub(9);
            pages = below;
        }
        for (page, entries) in pages {
            self.buckets(page, entries)?;
        }
        Ok(())
    }

    /// Walks the chains of `count` buckets from `first` on.
    fn buckets(&mut self, first: VirtualAddress, count: u64) -> Result<(), ReadError> {
        let mut bytes = vec![0; (CHUNK * 8) as usize];
        let before = self.diagnostics.recorded();
        let mut index = 0;
        while index < count {
            if self.diagnostics.recorded().saturating_sub(before) > MOST_BROKEN {
                self.complain(
                    first,
                    format!("given up after {index} of {count} buckets: the rest is not shown"),
                );
                return Ok(());
            }
            let now = CHUNK.min(count - index);
            let part = bytes.get_mut(..(now * 8) as usize).unwrap_or_default();
            self.space.read(first.wrapping_add(index * 8), part)?;
            let heads: Vec<u64> = part
                .chunks_exact(8)
                .filter_map(|head| head.try_into().ok().map(u64::from_le_bytes))
                .collect();
            for head in heads {
                self.chain(VirtualAddress::new(head & !LOCK_BITS));
            }
            index += now;
        }
        Ok(())
    }

    fn chain(&mut self, head: VirtualAddress) {
        let mut node = head;
        while !node.is_null() && node.as_u64() & 1 == 0 {
            if !is_object_address(self.space, node) {
                self.complain(node, "a chain leads where no member can be".to_owned());
                return;
            }
            if !self.seen.insert(node) {
                return;
            }
            if self.found.len() >= MOST_MEMBERS {
                self.complain(node, format!("more than {MOST_MEMBERS} members"));
                return;
            }
            let next = match self.space.read_pointer(node) {
                Ok(next) => next,
                Err(error) => {
                    self.complain(node, error.to_string());
                    return;
                }
            };
            self.found.push(node.wrapping_sub(self.offset));
            node = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use secmon_memory::Volatility;

    use super::*;
    use crate::synthetic::{self, Synthetic};

    /// Buckets at 64 KiB, members from 128 KiB on, 16 bytes before their nodes.
    const BASE: u64 = synthetic::BASE.as_u64();
    const BUCKETS: u64 = BASE + 0x10000;
    const MEMBERS: u64 = BASE + 0x20000;
    const OFFSET: u64 = 16;
    /// What ends a chain: any odd value.
    const END: u64 = 1;

    fn node(number: u64) -> u64 {
        MEMBERS + number * 64 + OFFSET
    }

    fn member(number: u64) -> VirtualAddress {
        VirtualAddress::new(node(number) - OFFSET)
    }

    fn walk(memory: &Synthetic, count: u64, nest: u32) -> (Vec<VirtualAddress>, usize) {
        let (space, diagnostics) = (memory.space(), Diagnostics::default());
        let mut walk = Walk {
            space: &space,
            diagnostics: &diagnostics,
            table: "test",
            subject: "test",
            offset: OFFSET,
            seen: HashSet::new(),
            found: Vec::new(),
        };
        walk.array(VirtualAddress::new(BUCKETS), count, nest)
            .expect("readable");
        let found = walk.found;
        (found, diagnostics.list().len())
    }

    #[test]
    fn walks_chains_whether_their_buckets_are_locked_or_not() {
        let memory = Synthetic::new(Volatility::Static);
        // Two members behind a locked bucket, one behind a free one; the
        // others are empty, as null and as an end mark.
        memory.set(BUCKETS + 8, node(0) | 1);
        memory.set(node(0), node(1));
        memory.set(node(1), END);
        memory.set(BUCKETS + 16, node(2));
        memory.set(node(2), (BUCKETS + 16) | END);
        assert_eq!(
            walk(&memory, 4, 0),
            (vec![member(0), member(1), member(2)], 0)
        );
    }

    #[test]
    fn walks_nested_arrays() {
        let memory = Synthetic::new(Volatility::Static);
        // 4096 buckets: a page of 8 pointers to pages of 512 buckets.
        let (top, page) = (BASE + 0x30000, BASE + 0x31000);
        memory.set(BUCKETS, top);
        memory.set(top + 5 * 8, page);
        memory.set(page + 511 * 8, node(0));
        memory.set(node(0), END);
        assert_eq!(walk(&memory, 4096, 3), (vec![member(0)], 0));
    }

    #[test]
    fn damage_ends_a_chain_not_the_walk() {
        let memory = Synthetic::new(Volatility::Static);
        memory.set(BUCKETS, node(0));
        memory.set(node(0), 0x1234_5678);
        memory.set(BUCKETS + 8, node(1));
        memory.set(node(1), node(1));
        memory.set(BUCKETS + 16, node(2));
        memory.set(node(2), END);
        let (found, complaints) = walk(&memory, 4, 0);
        assert_eq!(found, [member(0), member(1), member(2)]);
        assert_eq!(complaints, 1);
        assert_eq!(walk(&memory, 3, 0), (Vec::new(), 1));
    }
}

//! Resizable hash tables (`struct rhashtable`, `lib/rhashtable.c`).
//!
//! A table has a current array of buckets and, while it is being resized, the
//! array that follows; members are in either. Chains end with an odd value.
//! Lowest bits of a bucket's pointer are its lock.

use std::collections::HashSet;

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::is_object_address;
use crate::{Diagnostic, Guest, TableError, layout};

/// More buckets than this are in no table that is walked here.
const MOST_BUCKETS: u64 = 1 << 22;
/// More members than this are in no table.
const MOST_MEMBERS: usize = 1 << 22;
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
        guest,
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
                if let Err(error) = walk.array(&layout, array) {
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
    guest: &'w Guest,
    table: &'static str,
    subject: &'w str,
    offset: u64,
    seen: HashSet<VirtualAddress>,
    found: Vec<VirtualAddress>,
}

impl Walk<'_> {
    fn complain(&self, address: VirtualAddress, reason: String) {
        self.guest.diagnostics().record(Diagnostic {
            table: self.table,
            subject: self.subject.to_owned(),
            address: Some(address),
            reason,
        });
    }

    fn array(
        &mut self,
        layout: &BucketTableLayout,
        array: VirtualAddress,
    ) -> Result<(), ReadError> {
        let count = self.guest.number(array, &layout.count)?;
        let nest = self.guest.number(array, &layout.nest)? as u32;
        if count > MOST_BUCKETS || !count.is_power_of_two() {
            self.complain(array, format!("{count} is no number of buckets"));
            return Ok(());
        }
        let buckets = array.wrapping_add(layout.buckets.offset);
        if nest == 0 {
            return self.buckets(buckets, count);
        }
        // Made without enough memory for one array: `buckets` is one pointer
        // to a page of pointers to pages, of which the last hold buckets. Each
        // page stands for 9 bits of the bucket's number, the first for `nest`.
        let mut left = count.trailing_zeros().saturating_sub(nest);
        let mut pages = vec![(
            self.guest.space().read_pointer(buckets)?,
            1_u64 << nest.min(9),
        )];
        for _ in 0..MOST_LEVELS {
            if left == 0 {
                break;
            }
            let mut below = Vec::new();
            for (page, entries) in pages {
                for index in 0..entries {
                    let pointer = self
                        .guest
                        .space()
                        .read_pointer(page.wrapping_add(index * 8))?;
                    if is_object_address(self.guest.space(), pointer) {
                        below.push((pointer, 1_u64 << left.min(9)));
                    }
                    if below.len() as u64 > MOST_BUCKETS {
                        self.complain(array, "too many nested buckets".to_owned());
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
        let mut index = 0;
        while index < count {
            let now = CHUNK.min(count - index);
            let part = bytes.get_mut(..(now * 8) as usize).unwrap_or_default();
            self.guest
                .space()
                .read(first.wrapping_add(index * 8), part)?;
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
            if !is_object_address(self.guest.space(), node) {
                // An empty bucket of old kernels points at itself.
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
            let next = match self.guest.space().read_pointer(node) {
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

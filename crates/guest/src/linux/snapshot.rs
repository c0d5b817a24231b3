//! Copies of the parts of a large structure that are of interest.
//!
//! A `task_struct` has ten thousand bytes of which some hundred are read.
//! [`Spans`] joins members that lie close together into runs; one read a run
//! is faster than one a member, and faster than reading all. A copy that is
//! taken once is also one version of the truth: what is validated is what is
//! used.

use std::cell::RefCell;

use secmon_memory::{AddressSpace, ReadError, VirtualAddress};
use secmon_profile::Member;

use crate::extract;

/// Members that are no further apart than this share a run.
const GAP: u64 = 64;
/// No member is copied beyond this many bytes, whatever the types say.
const LONGEST_MEMBER: u64 = 512;
/// No member is copied that lies beyond this, whatever the types say: no
/// structure is that long.
const LARGEST_OFFSET: u64 = 1 << 20;
/// Copies that are no longer are made without an allocation.
const INLINE: usize = 256;

thread_local! {
    /// Memory of copies that are not needed any more, for the next ones.
    static SPARE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// How many copies' memory is kept for the next ones: a listing drops each row
/// before it makes the next.
const MOST_SPARE: usize = 8;
/// Runs start and end at multiples of this many bytes.
const SLOT: u64 = 8;

/// A run of bytes of the structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    length: usize,
}

/// Which runs of a structure are copied.
#[derive(Clone, Debug, Default)]
pub struct Spans {
    spans: Vec<Span>,
    size: usize,
    /// For each 8 bytes of the structure, one more than the number of the 8
    /// bytes of the copy where they are; 0 if they are not copied.
    slots: Vec<u32>,
}

impl Spans {
    /// The runs that cover these members.
    pub fn covering<'m>(members: impl IntoIterator<Item = &'m Member>) -> Self {
        let mut ranges: Vec<(u64, u64)> = members
            .into_iter()
            .filter(|member| member.offset < LARGEST_OFFSET)
            .map(|member| {
                let end = member.offset + member.size.clamp(1, LONGEST_MEMBER);
                (member.offset / SLOT * SLOT, end.next_multiple_of(SLOT))
            })
            .collect();
        ranges.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges {
            match joined.last_mut() {
                Some(last) if start <= last.1 + GAP => last.1 = last.1.max(end),
                _ => joined.push((start, end)),
            }
        }
        let mut result = Self::default();
        for (start, end) in joined {
            let length = (end - start) as usize;
            result.spans.push(Span {
                offset: start,
                length,
            });
            let mut slot = (result.size as u64 / SLOT) as u32;
            result.slots.resize((start / SLOT) as usize, 0);
            result.slots.resize_with((end / SLOT) as usize, || {
                slot += 1;
                slot
            });
            result.size += length;
        }
        result
    }

    /// Copies the runs of the structure at `base`.
    ///
    /// # Errors
    /// [`ReadError`] for the first run that can't be read.
    pub fn read(&self, space: &AddressSpace, base: VirtualAddress) -> Result<Snapshot, ReadError> {
        let spare = SPARE.try_with(|spare| {
            let mut spare = spare.try_borrow_mut().ok()?;
            let fits = spare.iter().rposition(|bytes| bytes.len() == self.size);
            fits.map(|index| spare.swap_remove(index))
        });
        let bytes = spare.ok().flatten();
        let mut snapshot = Snapshot {
            bytes: bytes.unwrap_or_else(|| vec![0; self.size].into()),
        };
        self.fill(space, base, &mut snapshot.bytes)?;
        Ok(snapshot)
    }

    /// Copies the runs of the structure at `base` and gives them to `parse`,
    /// without an allocation if they are short.
    ///
    /// # Errors
    /// [`ReadError`] for the first run that can't be read.
    pub fn with<T>(
        &self,
        space: &AddressSpace,
        base: VirtualAddress,
        parse: impl FnOnce(&Self, &[u8]) -> T,
    ) -> Result<T, ReadError> {
        let mut inline = [0; INLINE];
        if let Some(bytes) = inline.get_mut(..self.size) {
            self.fill(space, base, bytes)?;
            return Ok(parse(self, bytes));
        }
        let copy = self.read(space, base)?;
        Ok(parse(self, &copy.bytes))
    }

    fn fill(
        &self,
        space: &AddressSpace,
        base: VirtualAddress,
        bytes: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut rest = bytes;
        for span in &self.spans {
            let (now, later) = rest.split_at_mut(span.length);
            space.read(base.wrapping_add(span.offset), now)?;
            rest = later;
        }
        Ok(())
    }

    /// The bytes of the copy that belong to `size` bytes at `offset` of the
    /// structure; none if they were not copied.
    #[inline]
    pub fn bytes<'s, C>(&self, copy: &'s C, offset: u64, size: u64) -> Option<&'s [u8]>
    where
        C: AsRef<[u8]> + ?Sized,
    {
        let start = self.place(offset)?;
        let inside = offset % SLOT;
        if inside + size > SLOT {
            let last = offset.checked_add(size.checked_sub(1)?)?;
            if self.place(last)?.wrapping_sub(start) != last - offset {
                return None;
            }
        }
        copy.as_ref().get(start as usize..)?.get(..size as usize)
    }

    /// Where the byte at `offset` of the structure is in the copy.
    #[inline(always)]
    fn place(&self, offset: u64) -> Option<u64> {
        let slot = *self.slots.get((offset / SLOT) as usize)?;
        Some(u64::from(slot.checked_sub(1)?) * SLOT + offset % SLOT)
    }

    /// The member's bytes.
    pub fn member<'s, C>(&self, copy: &'s C, member: &Member) -> &'s [u8]
    where
        C: AsRef<[u8]> + ?Sized,
    {
        self.bytes(copy, member.offset, member.size.clamp(1, LONGEST_MEMBER))
            .unwrap_or_default()
    }

    /// The member as a number, as [`Guest::number`](crate::Guest::number)
    /// reads it; 0 if it was not copied.
    #[inline]
    pub fn number<C: AsRef<[u8]> + ?Sized>(&self, copy: &C, member: &Member) -> u64 {
        // A run covers whole slots, so what does not cross one is in one run.
        let inside = member.offset % SLOT;
        if member.bit_size == 0 && inside + member.size <= SLOT && matches!(member.size, 4 | 8) {
            let word = self.word(copy, member.offset - inside) >> (inside * 8);
            return match (member.size, member.signed) {
                (8, _) => word,
                (_, false) => u64::from(word as u32),
                (_, true) => i64::from(word as i32) as u64,
            };
        }
        self.any_number(copy.as_ref(), member)
    }

    #[cold]
    fn any_number(&self, copy: &[u8], member: &Member) -> u64 {
        let bytes = self.bytes(copy, member.offset, member.size.clamp(1, 8));
        let mut raw = [0; 8];
        let bytes = bytes.unwrap_or_default();
        for (to, from) in raw.iter_mut().zip(bytes) {
            *to = *from;
        }
        extract(member, u64::from_le_bytes(raw))
    }

    /// The 8 bytes at `offset` as a number; 0 if they were not copied.
    #[inline]
    pub fn word<C: AsRef<[u8]> + ?Sized>(&self, copy: &C, offset: u64) -> u64 {
        if !offset.is_multiple_of(SLOT) {
            let bytes = self.bytes(copy, offset, 8);
            let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
            return bytes.map_or(0, u64::from_le_bytes);
        }
        let copied = self.place(offset).and_then(|start| {
            let bytes = copy.as_ref().get(start as usize..)?;
            bytes.first_chunk().copied()
        });
        copied.map_or(0, u64::from_le_bytes)
    }

    /// The member as a pointer; null if it was not copied.
    #[inline]
    pub fn pointer<C: AsRef<[u8]> + ?Sized>(&self, copy: &C, member: &Member) -> VirtualAddress {
        VirtualAddress::new(self.word(copy, member.offset))
    }
}

/// The bytes of one structure that [`Spans::read`] copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    bytes: Box<[u8]>,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // What is not kept is freed, also while the thread ends.
        let _ = SPARE.try_with(|spare| {
            if let Ok(mut spare) = spare.try_borrow_mut()
                && spare.len() < MOST_SPARE
            {
                spare.push(bytes);
            }
        });
    }
}

impl AsRef<[u8]> for Snapshot {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member(offset: u64, size: u64) -> Member {
        Member {
            offset,
            size,
            bit_offset: 0,
            bit_size: 0,
            signed: false,
            count: None,
            type_name: String::new(),
            pointer: false,
        }
    }

    fn copy(bytes: Vec<u8>) -> Snapshot {
        Snapshot {
            bytes: bytes.into(),
        }
    }

    #[test]
    fn joins_what_is_close_and_finds_it_again() {
        let members = [
            member(5000, 8),
            member(0, 4),
            member(64, 16),
            member(u64::MAX - 2, 8),
        ];
        let spans = Spans::covering(&members);
        assert_eq!(spans.spans.len(), 2);
        assert_eq!(spans.slots.len(), 626);
        assert_eq!(spans.size, 88);
        let snapshot = copy((0..88).collect());
        assert_eq!(spans.number(&snapshot, &members[1]), 0x0302_0100);
        assert_eq!(spans.member(&snapshot, &members[2])[0], 64);
        assert_eq!(
            spans.pointer(&snapshot, &members[0]).as_u64(),
            0x5756_5554_5352_5150
        );
        assert_eq!(spans.number(&snapshot, &member(6, 4)), 0x0908_0706);
        assert_eq!(spans.number(&snapshot, &member(79, 2)), 0);
        assert_eq!(spans.number(&snapshot, &member(100, 8)), 0);
        assert_eq!(spans.number(&snapshot, &members[3]), 0);
    }

    proptest! {
        /// Each member that was asked for is found where it was.
        #[test]
        fn finds_every_member(places in prop::collection::vec((0_u64..3000, 1_u64..40), 1..20)) {
            let members: Vec<Member> = places.iter().map(|(at, size)| member(*at, *size)).collect();
            let spans = Spans::covering(&members);
            let structure: Vec<u8> = (0..4096_u32).map(|byte| ((byte * 7) >> 3) as u8).collect();
            let mut bytes = Vec::new();
            for span in &spans.spans {
                let start = span.offset as usize;
                bytes.extend_from_slice(&structure[start..start + span.length]);
            }
            let snapshot = copy(bytes);
            for member in &members {
                let start = member.offset as usize;
                let expected = &structure[start..start + member.size as usize];
                prop_assert_eq!(spans.member(&snapshot, member), expected);
            }
            prop_assert_eq!(spans.bytes(&snapshot, u64::MAX, 8), None);
            prop_assert_eq!(spans.bytes(&snapshot, 4000, 8), None);
        }
    }
}

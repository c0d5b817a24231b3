//! Copies of the parts of a large structure that are of interest.
//!
//! A `task_struct` has ten thousand bytes of which some hundred are read.
//! [`Spans`] joins members that lie close together into runs; one read a run
//! is faster than one a member, and faster than reading all. A copy that is
//! taken once is also one version of the truth: what is validated is what is
//! used.

use secmon_memory::{AddressSpace, ReadError, VirtualAddress};
use secmon_profile::Member;

use crate::extract;

/// Members that are no further apart than this share a run.
const GAP: u64 = 192;
/// No member is copied beyond this many bytes, whatever the types say.
const LONGEST_MEMBER: u64 = 512;
/// No member is copied that lies beyond this, whatever the types say: no
/// structure is that long.
const LARGEST_OFFSET: u64 = 1 << 20;
/// Runs start and end at multiples of this many bytes.
const SLOT: u64 = 8;

/// A run of bytes of the structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    offset: u64,
    length: usize,
}

/// Which runs of a structure are copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
        let mut bytes = vec![0; self.size].into_boxed_slice();
        let mut rest = &mut bytes[..];
        for span in &self.spans {
            let (now, later) = rest.split_at_mut(span.length);
            space.read(base.wrapping_add(span.offset), now)?;
            rest = later;
        }
        Ok(Snapshot(bytes))
    }

    /// The bytes of the copy that belong to `size` bytes at `offset` of the
    /// structure; none if they were not copied.
    #[inline]
    pub fn bytes<'s>(&self, snapshot: &'s Snapshot, offset: u64, size: u64) -> Option<&'s [u8]> {
        let slot = |offset: u64| {
            let slot = *self.slots.get(usize::try_from(offset / SLOT).ok()?)?;
            u64::from(slot).checked_sub(1)
        };
        let last = offset.checked_add(size.checked_sub(1)?)?;
        let start = slot(offset)?;
        if slot(last)?.wrapping_sub(start) != last / SLOT - offset / SLOT {
            return None;
        }
        let start = (start * SLOT + offset % SLOT) as usize;
        snapshot.0.get(start..start + size as usize)
    }

    /// The member's bytes.
    pub fn member<'s>(&self, snapshot: &'s Snapshot, member: &Member) -> &'s [u8] {
        self.bytes(
            snapshot,
            member.offset,
            member.size.clamp(1, LONGEST_MEMBER),
        )
        .unwrap_or_default()
    }

    /// The member as a number, as [`Guest::number`](crate::Guest::number)
    /// reads it; 0 if it was not copied.
    pub fn number(&self, snapshot: &Snapshot, member: &Member) -> u64 {
        self.bytes(snapshot, member.offset, member.size.clamp(1, 8))
            .map_or(0, |bytes| {
                let mut raw = [0; 8];
                raw[..bytes.len()].copy_from_slice(bytes);
                extract(member, u64::from_le_bytes(raw))
            })
    }

    /// The member as a pointer; null if it was not copied.
    pub fn pointer(&self, snapshot: &Snapshot, member: &Member) -> VirtualAddress {
        VirtualAddress::new(
            self.bytes(snapshot, member.offset, 8)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u64::from_le_bytes),
        )
    }
}

/// The bytes of one structure that [`Spans::read`] copied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(Box<[u8]>);

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
        let snapshot = Snapshot((0..88).collect());
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
            let mut copy = Vec::new();
            for span in &spans.spans {
                let start = span.offset as usize;
                copy.extend_from_slice(&structure[start..start + span.length]);
            }
            let snapshot = Snapshot(copy.into());
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

//! Members of one structure, copied together: one read instead of many, and
//! one moment instead of many while a guest runs.

use secmon_memory::{AddressSpace, ReadError, VirtualAddress};
use secmon_profile::Member;

use crate::extract;

/// Bytes kept without an allocation: enough for what tables need of most
/// structures.
const INLINE: usize = 256;

/// The longest span; offsets come from the guest, so they may be anything.
const LIMIT: u64 = 1 << 16;

/// The bytes of a structure from the first to the last member of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    start: u64,
    length: u64,
}

impl Span {
    /// The span of these members.
    pub fn of<'a>(members: impl IntoIterator<Item = &'a Member>) -> Self {
        let mut start = u64::MAX;
        let mut end = 0;
        for member in members {
            start = start.min(member.offset);
            end = end.max(member.offset.saturating_add(width(member)));
        }
        let start = start.min(end);
        Self {
            start,
            length: end - start,
        }
    }

    /// Copies the span of the structure at `base`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory; [`ReadError::Wrap`] as well if the span is
    /// longer than any structure is (64 KiB).
    #[inline]
    pub fn read(&self, space: &AddressSpace, base: VirtualAddress) -> Result<Copied, ReadError> {
        let address = base.wrapping_add(self.start);
        let length = self.length;
        if length > LIMIT {
            return Err(ReadError::Wrap { address, length });
        }
        let length = length as usize;
        let bytes = if length <= INLINE {
            let mut bytes = [0; INLINE];
            space.read(address, &mut bytes[..length])?;
            Bytes::Inline(bytes, length)
        } else {
            let mut bytes = vec![0; length];
            space.read(address, &mut bytes)?;
            Bytes::Heap(bytes)
        };
        let start = self.start;
        Ok(Copied { start, bytes })
    }
}

/// The bytes that a member's value needs.
fn width(member: &Member) -> u64 {
    member.size.clamp(1, 8)
}

#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "the large one is the usual one")]
enum Bytes {
    Inline([u8; INLINE], usize),
    Heap(Vec<u8>),
}

/// A copied [`Span`].
#[derive(Clone)]
pub struct Copied {
    start: u64,
    bytes: Bytes,
}

impl PartialEq for Copied {
    fn eq(&self, other: &Self) -> bool {
        self.start == other.start && self.bytes() == other.bytes()
    }
}

impl Eq for Copied {}

impl Copied {
    /// The bytes that were copied.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Inline(bytes, length) => bytes.get(..*length).unwrap_or(bytes),
            Bytes::Heap(bytes) => bytes,
        }
    }

    /// The member's value as [`Guest::number`](crate::Guest::number) gives
    /// it, or `None` if the member is not in the span.
    #[inline]
    pub fn get(&self, member: &Member) -> Option<u64> {
        let offset = usize::try_from(member.offset.checked_sub(self.start)?).ok()?;
        let size = width(member) as usize;
        let source = self.bytes().get(offset..)?.get(..size)?;
        let mut raw = [0; 8];
        raw.get_mut(..size)?.copy_from_slice(source);
        Some(extract(member, u64::from_le_bytes(raw)))
    }

    /// The member's value; 0 if it is not in the span, which then was made of
    /// other members than are asked for.
    #[inline]
    pub fn number(&self, member: &Member) -> u64 {
        let value = self.get(member);
        debug_assert!(value.is_some(), "{member:?} lies outside of its span");
        value.unwrap_or(0)
    }

    /// The member's value as a pointer.
    #[inline]
    pub fn pointer(&self, member: &Member) -> VirtualAddress {
        VirtualAddress::new(self.number(member))
    }

    /// The value of a member that not every kernel has.
    #[inline]
    pub fn optional(&self, member: Option<&Member>) -> Option<u64> {
        member.map(|member| self.number(member))
    }
}

//! Parts of one copy of guest memory.

use std::ops::{Deref, Range};
use std::sync::Arc;

use secmon_memory::Buffer;

/// A run of bytes of a buffer that several share.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

impl Part {
    /// The bytes of `range`; none if it lies outside of the buffer.
    pub(crate) fn new(buffer: &Arc<Buffer>, range: Range<usize>) -> Self {
        let range = match buffer.get(range.clone()) {
            Some(_) => range,
            None => 0..0,
        };
        Self {
            buffer: buffer.clone(),
            range,
        }
    }

    /// Takes the other's memory in place of its own if the bytes are the same.
    pub(crate) fn share(&mut self, other: &Self) {
        if **self == **other {
            *self = other.clone();
        }
    }

    /// Forgets the bytes from `length` on, if there are any.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.range.end = self.range.end.min(self.range.start.saturating_add(length));
    }
}

impl Deref for Part {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // In bounds by construction.
        self.buffer.get(self.range.clone()).unwrap_or_default()
    }
}

impl From<Vec<u8>> for Part {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self {
            buffer: Arc::new(bytes.into()),
            range,
        }
    }
}

/// Little-endian integers of 4 bytes, as they were read.
#[derive(Clone, Debug)]
pub(crate) struct Words(Part);

impl Words {
    /// As [`Part::share`].
    pub(crate) fn share(&mut self, other: &Self) {
        self.0.share(&other.0);
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len() / 4
    }

    /// The one at `index`.
    #[inline]
    pub(crate) fn get(&self, index: usize) -> Option<u32> {
        let bytes = self.0.as_chunks::<4>().0.get(index)?;
        Some(u32::from_le_bytes(*bytes))
    }

    /// All of them, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        let words = self.0.as_chunks::<4>().0.iter();
        words.map(|bytes| u32::from_le_bytes(*bytes))
    }

    /// The bytes that they are.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Part> for Words {
    fn from(part: Part) -> Self {
        Self(part)
    }
}

impl From<Vec<u32>> for Words {
    fn from(words: Vec<u32>) -> Self {
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        Self(bytes.into())
    }
}

impl PartialEq for Words {
    fn eq(&self, other: &Self) -> bool {
        *self.0 == *other.0
    }
}

impl Eq for Words {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_inside_of_their_buffer() {
        let buffer = Arc::new(Buffer::from(vec![1, 2, 3, 4, 5]));
        assert_eq!(*Part::new(&buffer, 1..4), [2, 3, 4]);
        for bad in [3..6, 7..9, Range { start: 3, end: 2 }] {
            assert!(Part::new(&buffer, bad).is_empty());
        }
        let mut part = Part::new(&buffer, 1..5);
        part.truncate(9);
        assert_eq!(part.len(), 4);
        part.truncate(1);
        assert_eq!(*part, [2]);
    }

    #[test]
    fn words_are_little_endian() {
        let words = Words::from(vec![1, 0x0203_0405]);
        assert_eq!(words.bytes(), [1, 0, 0, 0, 5, 4, 3, 2]);
        assert_eq!(
            (words.len(), words.get(1), words.get(2)),
            (2, Some(0x0203_0405), None)
        );
        assert_eq!(words.iter().sum::<u32>(), 0x0203_0406);
    }
}

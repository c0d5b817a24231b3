//! Private memory for copies of megabytes.
//!
//! A fresh page of 4 KiB costs the host about as much as filling it a few
//! times over, so a copy of some megabytes into ordinary heap memory is mostly
//! page faults. Here the host is asked for huge pages; where it has none, the
//! memory is ordinary.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// The huge page of x86-64.
const HUGE: usize = 2 << 20;
/// From this many bytes on a huge page costs less than the small ones.
const WORTH: usize = 512 << 10;

/// Bytes of this process alone, zeroed at first.
pub struct Buffer {
    bytes: Bytes,
    length: usize,
}

enum Bytes {
    Heap(Vec<u8>),
    Pages(memmap2::MmapMut),
}

impl Buffer {
    /// `length` zero bytes.
    pub fn zeroed(length: usize) -> Self {
        let pages = match length {
            WORTH.. => pages(length),
            _ => None,
        };
        Self {
            bytes: pages.map_or_else(|| Bytes::Heap(vec![0; length]), Bytes::Pages),
            length,
        }
    }

    /// Forgets the bytes from `length` on, if there are any.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
}

/// Memory that the host was asked to back with huge pages; `None` if there is
/// none to be had.
fn pages(length: usize) -> Option<memmap2::MmapMut> {
    // Some hosts align a mapping to huge pages only if it is made of them. Of
    // the last one, memory is taken only as it is touched.
    let mapped = length.checked_next_multiple_of(HUGE)?;
    let pages = memmap2::MmapMut::map_anon(mapped).ok()?;
    #[cfg(target_os = "linux")]
    {
        let worth = length.checked_add(HUGE - WORTH)? / HUGE * HUGE;
        // Without huge pages it is slower, and nothing else.
        let _ = pages.advise_range(memmap2::Advice::HugePage, 0, worth);
    }
    Some(pages)
}

impl Deref for Buffer {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        let bytes = match &self.bytes {
            Bytes::Heap(bytes) => bytes.as_slice(),
            Bytes::Pages(pages) => pages,
        };
        // Never longer than the memory; see `zeroed` and `truncate`.
        bytes.get(..self.length).unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = match &mut self.bytes {
            Bytes::Heap(bytes) => bytes.as_mut_slice(),
            Bytes::Pages(pages) => pages,
        };
        bytes.get_mut(..self.length).unwrap_or_default()
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            length: bytes.len(),
            bytes: Bytes::Heap(bytes),
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_zero_and_keeps_what_is_written() {
        for length in [0, 1, 4096, WORTH - 1, WORTH, HUGE, 3 * HUGE + 5] {
            let mut buffer = Buffer::zeroed(length);
            assert_eq!(buffer.len(), length);
            assert!(buffer.iter().all(|byte| *byte == 0), "{length}");
            for (index, byte) in buffer.iter_mut().enumerate() {
                *byte = (index / 7) as u8;
            }
            let expected: Vec<u8> = (0..length).map(|index| (index / 7) as u8).collect();
            assert!(*buffer == *expected, "{length}");
            buffer.truncate(length / 2);
            assert!(*buffer == expected[..length / 2], "{length}");
            buffer.truncate(length);
            assert_eq!(buffer.len(), length / 2);
        }
    }

    #[test]
    fn takes_bytes_over() {
        let buffer = Buffer::from(vec![1, 2, 3]);
        assert_eq!(*buffer, [1, 2, 3]);
        assert_eq!(format!("{buffer:?}"), "3 bytes");
    }
}

//! The flattened format: a dump that was written to a pipe, so that its parts
//! come in the order of writing, each behind a header with its offset. QEMU
//! writes its compressed dumps so, `makedumpfile -F` anything.
//!
//! Source: makedumpfile `makedumpfile.h` (`makedumpfile_header`,
//! `makedumpfile_data_header`); numbers are big-endian.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::RangeInclusive;

use super::bytes::ImageBytes;
use super::{ImageError, ImageFormat, ImageNote};

/// The first bytes of a flattened file.
pub(crate) const SIGNATURE: &[u8; 16] = b"makedumpfile\0\0\0\0";
/// Bytes that the file's header takes.
const HEADER_SIZE: u64 = 4096;
/// Bytes of a part's header: its offset, its length.
const PART_HEADER_SIZE: u64 = 16;
/// The most parts: QEMU writes parts of 16 KiB, makedumpfile larger ones. A
/// small file may have some small parts, a large one no more than one for each
/// 2 KiB of it.
const MAX_PARTS: RangeInclusive<u64> = 0x1_0000..=0x20_0000;
const LEAST_PART: u64 = 2048;
/// The most parts if some write over others, as makedumpfile's headers do.
const MAX_OVERLAPPING_PARTS: usize = 1 << 18;

/// A run of the unfolded file and where it is in the flattened one.
#[derive(Clone, Copy, Debug)]
struct Part {
    offset: u64,
    length: u64,
    position: u64,
}

/// What a flattened file unfolds to.
#[derive(Debug)]
pub(crate) struct Flattened<B> {
    inner: B,
    /// Sorted, disjoint.
    parts: Vec<Part>,
    length: u64,
    /// Whether the end mark was there; then what no part fills is zero, as it
    /// would be in a file written with seeks.
    complete: bool,
}

/// Reads the header of a part: `None` at the end mark.
fn parse_part_header(bytes: [u8; PART_HEADER_SIZE as usize]) -> Result<Option<(u64, u64)>, String> {
    let value = u128::from_be_bytes(bytes);
    let (offset, length) = ((value >> 64) as u64 as i64, value as u64 as i64);
    if offset == -1 && length == -1 {
        return Ok(None);
    }
    match (u64::try_from(offset), u64::try_from(length)) {
        (Ok(offset), Ok(length)) if offset.checked_add(length).is_some_and(|end| end < 1 << 56) => {
            Ok(Some((offset, length)))
        }
        _ => Err(format!("a part of {length} bytes at offset {offset}")),
    }
}

impl<B: ImageBytes> Flattened<B> {
    /// Indexes the parts of `inner`, which starts with [`SIGNATURE`]. A note is
    /// added if the stream ends early.
    pub(crate) fn open(inner: B, notes: &mut Vec<ImageNote>) -> Result<Self, ImageError> {
        let mut header = [0; 32];
        inner.read(0, &mut header, "flattened file header")?;
        let kind_and_version = header
            .get(16..32)
            .and_then(|bytes| <[u8; 16]>::try_from(bytes).ok())
            .map(u128::from_be_bytes);
        if kind_and_version != Some(1 << 64 | 1) {
            return Err(ImageError::Unsupported {
                what: "a flattened file whose type and version are not 1".to_owned(),
                advice: "unfold it with `makedumpfile -R`",
            });
        }
        let limit = (inner.len() / LEAST_PART).clamp(*MAX_PARTS.start(), *MAX_PARTS.end());
        let mut parts = Vec::new();
        let mut position = HEADER_SIZE;
        let mut length = 0;
        let complete = loop {
            let mut header = [0; PART_HEADER_SIZE as usize];
            match inner.read(position, &mut header, "header of a flattened part") {
                Ok(()) => {}
                Err(ImageError::Truncated { .. }) => break false,
                Err(error) => return Err(error),
            }
            let (offset, stated) = match parse_part_header(header) {
                Ok(Some(part)) => part,
                Ok(None) => break true,
                Err(what) => {
                    notes.push(ImageNote::Damaged {
                        offset: position,
                        what,
                    });
                    break false;
                }
            };
            position += PART_HEADER_SIZE;
            let available = stated.min(inner.len().saturating_sub(position));
            if available > 0 {
                if parts.len() as u64 == limit {
                    return Err(too_many(limit));
                }
                parts.push(Part {
                    offset,
                    length: available,
                    position,
                });
                length = length.max(offset + available);
            }
            if available < stated {
                break false;
            }
            position += stated;
        };
        if parts.is_empty() {
            return Err(ImageError::Damaged {
                format: ImageFormat::Kdump,
                offset: HEADER_SIZE,
                what: "a flattened file without parts".to_owned(),
            });
        }
        if !complete {
            notes.push(ImageNote::Damaged {
                offset: position,
                what: "the flattened file has no end mark: it is cut".to_owned(),
            });
        }
        parts.shrink_to_fit();
        Ok(Self {
            inner,
            parts: in_order(parts)?,
            length,
            complete,
        })
    }
}

/// Sorts the parts; what a later one writes over an earlier one counts, as it
/// would in a file.
fn in_order(parts: Vec<Part>) -> Result<Vec<Part>, ImageError> {
    let mut sorted = parts;
    sorted.sort_by_key(|part| part.offset);
    let overlap = sorted.windows(2).any(|pair| match pair {
        [first, second] => first.offset + first.length > second.offset,
        _ => false,
    });
    if !overlap {
        return Ok(sorted);
    }
    if sorted.len() > MAX_OVERLAPPING_PARTS {
        return Err(too_many(MAX_OVERLAPPING_PARTS as u64));
    }
    sorted.sort_by_key(|part| part.position);
    let mut written: BTreeMap<u64, Part> = BTreeMap::new();
    for part in sorted {
        let end = part.offset + part.length;
        // What starts inside of the new part goes, but for a rest behind it;
        // one that starts before it is cut there.
        let inside: Vec<u64> = written.range(part.offset..end).map(|(at, _)| *at).collect();
        for at in inside {
            if let Some(old) = written.remove(&at) {
                keep_tail(&mut written, old, end);
            }
        }
        if let Some((_, before)) = written.range_mut(..part.offset).next_back()
            && before.offset + before.length > part.offset
        {
            let old = *before;
            before.length = part.offset - before.offset;
            keep_tail(&mut written, old, end);
        }
        written.insert(part.offset, part);
    }
    Ok(written.into_values().collect())
}

fn too_many(limit: u64) -> ImageError {
    ImageError::TooMany {
        what: "flattened parts; unfold it with `makedumpfile -R`",
        limit,
    }
}

/// Puts back what of `old` lies from `end` on.
fn keep_tail(written: &mut BTreeMap<u64, Part>, old: Part, end: u64) {
    let old_end = old.offset + old.length;
    if old_end > end {
        let cut = end - old.offset;
        written.insert(
            end,
            Part {
                offset: end,
                length: old.length - cut,
                position: old.position + cut,
            },
        );
    }
}

impl<B: ImageBytes> ImageBytes for Flattened<B> {
    fn len(&self) -> u64 {
        self.length
    }

    fn as_file(&self) -> Option<&File> {
        None
    }

    fn read(&self, offset: u64, buffer: &mut [u8], what: &'static str) -> Result<(), ImageError> {
        self.read_with(offset, buffer, what, self.complete)
    }

    fn read_padded(
        &self,
        offset: u64,
        buffer: &mut [u8],
        what: &'static str,
    ) -> Result<(), ImageError> {
        self.read_with(offset, buffer, what, true)
    }
}

impl<B: ImageBytes> Flattened<B> {
    /// Reads; what no part fills is zero if `gaps_are_zero`, else an error.
    fn read_with(
        &self,
        offset: u64,
        buffer: &mut [u8],
        what: &'static str,
        gaps_are_zero: bool,
    ) -> Result<(), ImageError> {
        self.check(offset, buffer.len(), what)?;
        let mut position = offset;
        let mut rest = buffer;
        let mut index = self
            .parts
            .partition_point(|part| part.offset + part.length <= position);
        while !rest.is_empty() {
            let next = self.parts.get(index);
            let gap = next.map_or(u64::MAX, |part| part.offset.saturating_sub(position));
            if gap > 0 {
                if !gaps_are_zero {
                    return Err(ImageError::Truncated {
                        what,
                        offset: position,
                        needed: position + rest.len() as u64,
                        available: position,
                    });
                }
                let count = rest.len().min(usize::try_from(gap).unwrap_or(usize::MAX));
                let (now, later) = rest.split_at_mut(count);
                now.fill(0);
                position += count as u64;
                rest = later;
                continue;
            }
            let Some(part) = next else { break };
            let inside = position - part.offset;
            let left = usize::try_from(part.length - inside).unwrap_or(usize::MAX);
            let count = rest.len().min(left);
            let (now, later) = rest.split_at_mut(count);
            self.inner.read(part.position + inside, now, what)?;
            position += count as u64;
            rest = later;
            index += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes in memory, for the parsers' tests.
    #[derive(Debug)]
    struct Slice(Vec<u8>);

    impl ImageBytes for Slice {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }

        fn as_file(&self) -> Option<&File> {
            None
        }

        fn read(
            &self,
            offset: u64,
            buffer: &mut [u8],
            what: &'static str,
        ) -> Result<(), ImageError> {
            self.check(offset, buffer.len(), what)?;
            let start = offset as usize;
            buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
            Ok(())
        }
    }

    fn flatten(writes: &[(u64, Vec<u8>)], end: bool) -> Vec<u8> {
        let mut file = SIGNATURE.to_vec();
        file.extend_from_slice(&1u64.to_be_bytes());
        file.extend_from_slice(&1u64.to_be_bytes());
        file.resize(HEADER_SIZE as usize, 0);
        for (offset, bytes) in writes {
            file.extend_from_slice(&offset.to_be_bytes());
            file.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
            file.extend_from_slice(bytes);
        }
        if end {
            file.extend_from_slice(&[0xff; 16]);
        }
        file
    }

    proptest! {
        /// Any writes, overlapping or not, read back as they would from a file.
        #[test]
        fn unfolds_as_a_file_would(
            writes in prop::collection::vec(
                (0u64..400, prop::collection::vec(any::<u8>(), 1..120)), 1..24),
            reads in prop::collection::vec((0usize..500, 0usize..200), 1..20),
        ) {
            let mut expected = Vec::new();
            for (offset, bytes) in &writes {
                let end = *offset as usize + bytes.len();
                if expected.len() < end {
                    expected.resize(end, 0u8);
                }
                expected[*offset as usize..end].copy_from_slice(bytes);
            }
            let mut notes = Vec::new();
            let file = Flattened::open(Slice(flatten(&writes, true)), &mut notes)
                .expect("a whole file");
            prop_assert_eq!(file.len(), expected.len() as u64);
            prop_assert!(notes.is_empty());
            for (offset, length) in reads {
                let read = file.read_vec(offset as u64, length, "test");
                match expected.get(offset..offset + length) {
                    Some(bytes) => prop_assert_eq!(read.expect("inside"), bytes),
                    None => prop_assert!(read.is_err()),
                }
            }
        }

        /// A cut file says so, and reads never invent bytes.
        #[test]
        fn a_cut_file_says_so(
            writes in prop::collection::vec(
                (0u64..400, prop::collection::vec(1u8..=255, 1..120)), 1..12),
            cut in 0.0f64..1.0,
        ) {
            let whole = flatten(&writes, true);
            let kept = ((whole.len() - 1) as f64 * cut) as usize;
            let mut notes = Vec::new();
            if let Ok(file) = Flattened::open(Slice(whole[..kept].to_vec()), &mut notes) {
                prop_assert!(!notes.is_empty());
                for offset in 0..file.len() {
                    if let Ok(byte) = file.read_vec(offset, 1, "test") {
                        prop_assert_ne!(byte[0], 0);
                    }
                }
            }
        }

        /// Arbitrary bytes behind the signature never panic.
        #[test]
        fn survives_anything(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut file = flatten(&[], false);
            file.extend_from_slice(&bytes);
            let mut notes = Vec::new();
            if let Ok(file) = Flattened::open(Slice(file), &mut notes) {
                let _ = file.read_vec(0, 64, "test");
            }
        }
    }
}

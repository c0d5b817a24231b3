//! AVML, version 2: LiME-like ranges, each compressed as a snappy stream.
//!
//! A header of 32 bytes, the stream, then the stream's size in 8 bytes.
//! Opening reads the stream's chunk headers, not the chunks; a chunk, at most
//! 64 KiB of memory, is decoded when it is read. Sources: AVML
//! `src/image.rs`; snappy `framing_format.txt`.

use std::fmt;
use std::sync::Arc;

use secmon_memory::{MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility};

use super::bytes::ImageBytes;
use super::lime::{HEADER_SIZE, RangeHeader};
use super::page_cache::{Cached, PageCache};
use super::pieces::{join_regions, missing_reason, whole_pages};
use super::{Image, ImageError, ImageFormat, ImageHints, ImageNote, ImageOptions};

/// "AVML" in the file.
const MAGIC: u32 = 0x4c4d_5641;
/// The first chunk of each stream.
const STREAM_IDENTIFIER: &[u8; 10] = b"\xff\x06\x00\x00sNaPpY";
/// The most bytes that a chunk may decode to, by the framing format.
const MAX_CHUNK: usize = 1 << 16;
/// The most bytes that a chunk may take in the file: snappy's own bound for
/// data that does not compress (`snap::raw::max_compress_len`).
const MAX_COMPRESSED: u32 = 32 + MAX_CHUNK as u32 + MAX_CHUNK as u32 / 6;
/// The most chunks: 64 GiB of memory in chunks of full size.
const MAX_CHUNKS: usize = 1 << 20;
/// AVML's `MAX_BLOCK_SIZE`: it divides memory into ranges of this size and
/// leaves out those that hold only zeros.
const BLOCK: u64 = 16 << 20;
const LEFT_OUT: &str = "AVML leaves out 16 MiB that hold only zeros, and there is such a gap";
const CUT: &str = "the file ends before it";

/// A chunk of a stream.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    /// The physical address of its first byte.
    start: u64,
    /// The file offset of its data, behind the checksum.
    position: u64,
    /// Bytes in the file; the highest bit says that they are compressed.
    size: u32,
    /// Bytes of memory.
    length: u32,
}

const COMPRESSED: u32 = 1 << 31;

/// What a chunk header announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkHeader {
    /// Data: its bytes in the file (without checksum) and in memory.
    Data {
        compressed: bool,
        size: u32,
        length: u32,
    },
    /// Something without data, of so many bytes behind the header.
    Skip(u32),
}

/// Reads a chunk header and, of a compressed chunk, the length that its data
/// starts with: `bytes` are the chunk's first 13, fewer at the end of the file.
fn parse_chunk(bytes: &[u8]) -> Result<ChunkHeader, String> {
    let [kind, low, middle, high, rest @ ..] = bytes else {
        return Err("the file ends inside of a chunk header".to_owned());
    };
    let size = u32::from_le_bytes([*low, *middle, *high, 0]);
    match kind {
        0x00 | 0x01 => {
            let compressed = *kind == 0;
            let size = size
                .checked_sub(4)
                .ok_or_else(|| format!("a chunk of {size} bytes"))?;
            let length = if compressed {
                let data = rest.get(4..).unwrap_or_default();
                snap::raw::decompress_len(data).map_err(|error| format!("a chunk: {error}"))?
            } else {
                size as usize
            };
            match u32::try_from(length) {
                Ok(length @ 1..) if length as usize <= MAX_CHUNK && size <= MAX_COMPRESSED => {
                    Ok(ChunkHeader::Data {
                        compressed,
                        size,
                        length,
                    })
                }
                _ => Err(format!("a chunk of {size} bytes that decodes to {length}")),
            }
        }
        0x80..=0xff => Ok(ChunkHeader::Skip(size)),
        _ => Err(format!("a chunk of unknown kind {kind:#x}")),
    }
}

/// What opening collects.
#[derive(Default)]
struct Index {
    chunks: Vec<Chunk>,
    ranges: Vec<MemoryRegion>,
    missing: Vec<(MemoryRegion, &'static str)>,
    skipped: usize,
}

impl Index {
    /// Walks the stream at `position`, which holds `length` bytes of memory
    /// from `start` on; gives the offset behind it, or what ended it early.
    fn walk(
        &mut self,
        file: &dyn ImageBytes,
        mut position: u64,
        start: u64,
        length: u64,
    ) -> Result<Result<u64, (u64, String)>, ImageError> {
        let mut identifier = [0; STREAM_IDENTIFIER.len()];
        match file.read(position, &mut identifier, "snappy stream") {
            Ok(()) if &identifier == STREAM_IDENTIFIER => {}
            Ok(()) => return Ok(Err((position, "no snappy stream".to_owned()))),
            Err(ImageError::Truncated { .. }) => return Ok(Err((position, CUT.to_owned()))),
            Err(error) => return Err(error),
        }
        position += STREAM_IDENTIFIER.len() as u64;
        let mut done = 0;
        while done < length {
            let mut head = [0; 13];
            let there = file.len().saturating_sub(position).min(13) as usize;
            let Some(head) = head.get_mut(..there) else {
                break;
            };
            file.read(position, head, "snappy chunk header")?;
            let header = match parse_chunk(head) {
                Ok(header) => header,
                Err(what) => return Ok(Err((position, what))),
            };
            let (compressed, size, bytes) = match header {
                ChunkHeader::Skip(size) => {
                    self.skipped += 1;
                    if self.skipped > MAX_CHUNKS {
                        return Err(ImageError::TooMany {
                            what: "snappy chunks without data",
                            limit: MAX_CHUNKS as u64,
                        });
                    }
                    position += 4 + u64::from(size);
                    continue;
                }
                ChunkHeader::Data {
                    compressed,
                    size,
                    length,
                } => (compressed, size, length),
            };
            if done + u64::from(bytes) > length {
                return Ok(Err((
                    position,
                    "a chunk past the end of its range".to_owned(),
                )));
            }
            let data = position + 8;
            if data + u64::from(size) > file.len() {
                return Ok(Err((position, CUT.to_owned())));
            }
            if self.chunks.len() == MAX_CHUNKS {
                return Err(ImageError::TooMany {
                    what: "snappy chunks",
                    limit: MAX_CHUNKS as u64,
                });
            }
            self.chunks.push(Chunk {
                start: start + done,
                position: data,
                size: size | if compressed { COMPRESSED } else { 0 },
                length: bytes,
            });
            done += u64::from(bytes);
            position = data + u64::from(size);
        }
        Ok(Ok(position))
    }

    /// The memory that chunks were found for, from `from` on in the list.
    fn length_since(&self, from: usize) -> u64 {
        let chunks = self.chunks.get(from..).unwrap_or_default();
        chunks.iter().map(|chunk| u64::from(chunk.length)).sum()
    }
}

pub(crate) fn open(
    file: &Arc<dyn ImageBytes>,
    options: &ImageOptions<'_>,
    mut notes: Vec<ImageNote>,
) -> Result<Image, ImageError> {
    let mut index = Index::default();
    let mut position = 0;
    while position < file.len() {
        let range = match RangeHeader::read(file.as_ref(), position) {
            Ok(header) => header.length(MAGIC, 2).map(|length| (header.start, length)),
            Err(ImageError::Truncated { .. }) if position > 0 => {
                Err("the file ends inside of a range header".to_owned())
            }
            Err(error) => return Err(error),
        };
        let (start, length) = match range {
            Ok(range) => range,
            Err(what) if position > 0 => {
                notes.push(ImageNote::Damaged {
                    offset: position,
                    what,
                });
                break;
            }
            Err(what) => {
                return Err(ImageError::Damaged {
                    format: ImageFormat::Avml,
                    offset: position,
                    what,
                });
            }
        };
        let stream = position + HEADER_SIZE;
        let before = index.chunks.len();
        let walked = index.walk(file.as_ref(), stream, start, length)?;
        index
            .ranges
            .push(MemoryRegion::new(PhysicalAddress::new(start), length));
        match walked {
            Ok(end) => {
                let mut size = [0; 8];
                let stated = file
                    .read(end, &mut size, "size of a stream")
                    .map(|()| u64::from_le_bytes(size));
                if !matches!(stated, Ok(size) if size == end - stream) {
                    notes.push(ImageNote::Damaged {
                        offset: end,
                        what: "the size of a stream is not what is stated behind it".to_owned(),
                    });
                }
                position = end + 8;
            }
            Err((offset, what)) => {
                // Where the next range starts is not known.
                let done = index.length_since(before);
                let region = MemoryRegion::new(PhysicalAddress::new(start + done), length - done);
                let reason = if what == CUT {
                    CUT
                } else {
                    "what should hold it in the file is damaged"
                };
                index.missing.push((region, reason));
                notes.push(ImageNote::Missing { region, reason });
                notes.push(ImageNote::Damaged { offset, what });
                break;
            }
        }
    }
    if index.chunks.is_empty() {
        return Err(ImageError::Damaged {
            format: ImageFormat::Avml,
            offset: HEADER_SIZE,
            what: "no snappy chunk that holds memory".to_owned(),
        });
    }
    Ok(Image {
        memory: Arc::new(AvmlMemory::new(file, index, options.cache_size, &mut notes)),
        format: ImageFormat::Avml,
        notes,
        hints: ImageHints::default(),
    })
}

/// The gaps that AVML leaves where 16 MiB hold only zeros: between a range of
/// that size and another in the same raster.
fn left_out(ranges: &[MemoryRegion]) -> Vec<(MemoryRegion, &'static str)> {
    let mut gaps = Vec::new();
    for pair in ranges.windows(2) {
        if let [first, second] = pair
            && first.length == BLOCK
            && second.start > first.end()
            && (second.start.as_u64() - first.start.as_u64()).is_multiple_of(BLOCK)
        {
            let length = second.start.as_u64() - first.end().as_u64();
            gaps.push((MemoryRegion::new(first.end(), length), LEFT_OUT));
        }
    }
    gaps
}

/// The memory of an AVML image.
struct AvmlMemory {
    bytes: Arc<dyn ImageBytes>,
    /// By address, disjoint.
    chunks: Vec<Chunk>,
    missing: Vec<(MemoryRegion, &'static str)>,
    regions: Vec<MemoryRegion>,
    cache: PageCache,
}

impl fmt::Debug for AvmlMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AvmlMemory")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl AvmlMemory {
    fn new(
        bytes: &Arc<dyn ImageBytes>,
        index: Index,
        cache_size: usize,
        notes: &mut Vec<ImageNote>,
    ) -> Self {
        let Index {
            mut chunks,
            mut ranges,
            mut missing,
            skipped: _,
        } = index;
        chunks.sort_by_key(|chunk| chunk.start);
        let mut end = 0;
        let mut overlaps = 0;
        chunks.retain(|chunk| {
            let keep = chunk.start >= end;
            if keep {
                end = chunk.start + u64::from(chunk.length);
            } else {
                overlaps += 1;
            }
            keep
        });
        chunks.shrink_to_fit();
        if overlaps > 0 {
            notes.push(ImageNote::Skipped {
                count: overlaps,
                what: "chunks of memory that is in the file twice",
            });
        }
        ranges.sort();
        missing.extend(left_out(&ranges));
        missing.sort();
        Self {
            bytes: Arc::clone(bytes),
            chunks,
            missing,
            regions: join_regions(ranges),
            cache: PageCache::new(cache_size / MAX_CHUNK),
        }
    }

    /// The chunk that holds `address`, and its number.
    fn chunk(&self, address: u64) -> Option<(u64, Chunk)> {
        let after = self.chunks.partition_point(|chunk| chunk.start <= address);
        let number = after.checked_sub(1)?;
        let chunk = self.chunks.get(number)?;
        (address - chunk.start < u64::from(chunk.length)).then_some((number as u64, *chunk))
    }

    fn decode(&self, chunk: Chunk) -> Result<Cached, PhysicalReadError> {
        let address = PhysicalAddress::new(chunk.start);
        let corrupt = |reason| PhysicalReadError::Corrupt { address, reason };
        let failed = |error| match error {
            ImageError::Truncated { .. } => PhysicalReadError::Excluded {
                address,
                reason: CUT,
            },
            other => PhysicalReadError::Host {
                address,
                reason: other.to_string(),
            },
        };
        // The checksum is in the 4 bytes before the data.
        let size = (chunk.size & !COMPRESSED) as usize + 4;
        let mut data = self
            .bytes
            .read_vec(chunk.position - 4, size, "snappy chunk")
            .map_err(failed)?;
        let stored = data.split_off(4).into_boxed_slice();
        let stated = <[u8; 4]>::try_from(data.as_slice()).map_or(0, u32::from_le_bytes);
        let memory = if chunk.size & COMPRESSED == 0 {
            stored
        } else {
            let mut memory = vec![0; chunk.length as usize].into_boxed_slice();
            let count = snap::raw::Decoder::new()
                .decompress(&stored, &mut memory)
                .map_err(|error| corrupt(format!("snappy: {error}")))?;
            if count != memory.len() {
                return Err(corrupt(format!("{count} bytes, not {}", memory.len())));
            }
            memory
        };
        let found = mask(crc32c::crc32c(&memory));
        if found != stated {
            return Err(corrupt(format!(
                "its checksum is {found:#010x}, stated is {stated:#010x}"
            )));
        }
        Ok(Cached::new(memory))
    }
}

/// The framing format's masked checksum.
fn mask(checksum: u32) -> u32 {
    checksum.rotate_right(15).wrapping_add(0xa282_ead8)
}

impl PhysicalMemory for AvmlMemory {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        Volatility::Static
    }

    fn populated(&self) -> Vec<MemoryRegion> {
        let chunks = self.chunks.iter().map(|chunk| {
            MemoryRegion::new(PhysicalAddress::new(chunk.start), u64::from(chunk.length))
        });
        whole_pages(join_regions(chunks.collect()))
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let mut position = address;
        let mut rest = buffer;
        while !rest.is_empty() {
            let absent = || match missing_reason(&self.missing, position) {
                Some(reason) => PhysicalReadError::Excluded {
                    address: position,
                    reason,
                },
                None => PhysicalReadError::Hole { address: position },
            };
            let (number, chunk) = self.chunk(position.as_u64()).ok_or_else(absent)?;
            let inside = (position.as_u64() - chunk.start) as usize;
            let count = rest.len().min(chunk.length as usize - inside);
            let (now, later) = rest.split_at_mut(count);
            let whole = match self.cache.with(number, |bytes| bytes.copy_to(inside, now)) {
                Some(whole) => whole,
                None => {
                    let bytes = self.decode(chunk)?;
                    let whole = bytes.copy_to(inside, now);
                    self.cache.insert(number, bytes);
                    whole
                }
            };
            if !whole {
                return Err(absent());
            }
            position = position.wrapping_add(count as u64);
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn knows_the_kinds_of_chunks() {
        // 5 bytes uncompressed, with a checksum before them.
        let stored = [1, 9, 0, 0, 1, 2, 3, 4, b'h', b'e', b'l', b'l', b'o'];
        assert_eq!(
            parse_chunk(&stored),
            Ok(ChunkHeader::Data {
                compressed: false,
                size: 5,
                length: 5
            })
        );
        // A compressed chunk whose data says 65536.
        let full = [0, 20, 0, 0, 0, 0, 0, 0, 0x80, 0x80, 4, 0, 0];
        assert_eq!(
            parse_chunk(&full),
            Ok(ChunkHeader::Data {
                compressed: true,
                size: 16,
                length: 65536
            })
        );
        // One more is too much, as is a chunk without room for its checksum.
        assert!(parse_chunk(&[0, 20, 0, 0, 0, 0, 0, 0, 0x81, 0x80, 4, 0, 0]).is_err());
        assert!(parse_chunk(&[1, 3, 0, 0, 0, 0, 0]).is_err());
        assert!(parse_chunk(&[1, 4, 0, 0, 0, 0, 0, 0]).is_err());
        assert_eq!(
            parse_chunk(&[0xfe, 1, 2, 3]),
            Ok(ChunkHeader::Skip(0x03_0201))
        );
        assert!(parse_chunk(&[2, 4, 0, 0]).is_err());
        assert!(parse_chunk(&[0, 4]).is_err());
    }

    #[test]
    fn sees_which_gaps_were_zeros() {
        let range = |start, length| MemoryRegion::new(PhysicalAddress::new(start), length);
        let gaps = left_out(&[
            range(0, 0x9f000),
            range(0x10_0000, BLOCK),
            range(0x10_0000 + 3 * BLOCK, BLOCK),
            range(0x1_0000_0000, BLOCK),
        ]);
        assert_eq!(
            gaps,
            [(range(0x10_0000 + BLOCK, 2 * BLOCK), LEFT_OUT)],
            "neither the gap below 1 MiB nor the one below 4 GiB is in the raster"
        );
    }

    proptest! {
        #[test]
        fn survives_any_chunk(bytes in prop::collection::vec(any::<u8>(), 0..14)) {
            if let Ok(ChunkHeader::Data { length, .. }) = parse_chunk(&bytes) {
                prop_assert!(length as usize <= MAX_CHUNK);
            }
        }
    }
}

//! The pages of a kdump-compressed file: which are in it, where, and the
//! memory made of them.

use std::fmt;
use std::sync::{Arc, OnceLock};

use secmon_memory::{
    MemoryRegion, PAGE_SIZE, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility,
};

use super::bytes::ImageBytes;
use super::decompress::{Compression, decompress};
use super::kdump::KdumpHeader;
use super::page_cache::{Cached, PageCache};
use super::pieces::MAX_PIECES;
use super::{ImageError, ImageFormat, ImageNote};

/// Bytes of one chunk of a bitmap; it stands for 32,768 pages, 128 MiB.
const CHUNK: usize = 4096;
const CHUNK_FRAMES: u64 = 8 * CHUNK as u64;
/// Bytes of a bitmap that are read at once.
const BATCH: usize = 32 * CHUNK;
/// The most chunks that are neither all ones nor all zeros: 16 MiB of them.
const MAX_MIXED_CHUNKS: usize = 4096;
/// Bytes of `page_desc`.
const DESCRIPTOR_SIZE: u64 = 24;
/// Descriptors that are read and cached together.
const DESCRIPTORS_AT_ONCE: u64 = 128;
/// Marks the cache's keys of descriptors; frames are below 2^34.
const DESCRIPTOR_KEY: u64 = 1 << 63;

/// Which page frames are in the file, and how many are before each.
pub(crate) struct PageIndex {
    chunks: Vec<Chunk>,
    pages: u64,
}

struct Chunk {
    /// Pages in the file before this chunk's.
    before: u64,
    bits: Bits,
}

enum Bits {
    Zeros,
    Ones,
    Mixed(Box<[u8; CHUNK]>),
}

impl PageIndex {
    /// Reads the bitmaps; gives the index of the pages in the file, and the
    /// regions of RAM, in the file or not.
    pub(crate) fn read(
        bytes: &dyn ImageBytes,
        header: &KdumpHeader,
    ) -> Result<(Self, Vec<MemoryRegion>), ImageError> {
        let all_bytes = u64::from(header.bitmap_blocks) * PAGE_SIZE;
        let needed = header.frames.div_ceil(8);
        // Very old dumps have one bitmap, all others two of equal size.
        let two = all_bytes / 2 >= needed;
        if all_bytes < needed {
            return Err(ImageError::Damaged {
                format: ImageFormat::Kdump,
                offset: 0,
                what: format!(
                    "bitmaps of {all_bytes} bytes for {} page frames",
                    header.frames
                ),
            });
        }
        let ram_offset = header.bitmap_offset();
        let file_offset = if two {
            ram_offset + all_bytes / 2
        } else {
            ram_offset
        };
        let chunk_count = header.frames.div_ceil(CHUNK_FRAMES);
        let mut chunks = Vec::new();
        let mut regions = Regions::default();
        let (mut pages, mut mixed) = (0, 0);
        let (mut in_file_bytes, mut in_ram_bytes) = (vec![0; BATCH], vec![0; BATCH]);
        for number in 0..chunk_count {
            let start = number * CHUNK as u64;
            let inside = (start % BATCH as u64) as usize;
            if inside == 0 {
                let length = (needed - start).min(BATCH as u64) as usize;
                read_bitmap(bytes, file_offset + start, &mut in_file_bytes, length)?;
                read_bitmap(bytes, ram_offset + start, &mut in_ram_bytes, length)?;
            }
            let mut in_file = chunk_at(&in_file_bytes, inside);
            let mut in_ram = chunk_at(&in_ram_bytes, inside);
            let first = number * CHUNK_FRAMES;
            let frames = (header.frames - first).min(CHUNK_FRAMES);
            if frames < CHUNK_FRAMES {
                clear_from(&mut in_file, frames);
                clear_from(&mut in_ram, frames);
            }
            let count = count_ones(&in_file);
            if count > 0 {
                for (ram, file) in in_ram.iter_mut().zip(&in_file) {
                    *ram |= file;
                }
            }
            regions.add(first, &in_ram)?;
            let bits = match count {
                0 => Bits::Zeros,
                CHUNK_FRAMES => Bits::Ones,
                _ => {
                    mixed += 1;
                    if mixed > MAX_MIXED_CHUNKS {
                        return Err(ImageError::TooMany {
                            what: "partly filled stretches of memory",
                            limit: MAX_MIXED_CHUNKS as u64,
                        });
                    }
                    Bits::Mixed(Box::new(in_file))
                }
            };
            chunks.push(Chunk {
                before: pages,
                bits,
            });
            pages += count;
        }
        Ok((Self { chunks, pages }, regions.finish()?))
    }

    /// The number of pages in the file.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// The runs of pages that are in the file.
    fn runs(&self) -> Result<Vec<MemoryRegion>, ImageError> {
        let mut runs = Regions::default();
        for (number, chunk) in self.chunks.iter().enumerate() {
            let first = number as u64 * CHUNK_FRAMES;
            match &chunk.bits {
                Bits::Zeros => {}
                Bits::Ones => runs.extend(first, CHUNK_FRAMES)?,
                Bits::Mixed(bits) => runs.add(first, bits)?,
            }
        }
        runs.finish()
    }

    /// How many pages below `frame` are in the file, and whether it is itself.
    fn rank(&self, frame: u64) -> (u64, bool) {
        let chunk = usize::try_from(frame / CHUNK_FRAMES)
            .ok()
            .and_then(|index| self.chunks.get(index));
        let Some(chunk) = chunk else {
            return (self.pages, false);
        };
        let inside = frame % CHUNK_FRAMES;
        match &chunk.bits {
            Bits::Zeros => (chunk.before, false),
            Bits::Ones => (chunk.before + inside, true),
            Bits::Mixed(bits) => {
                let byte_index = (inside / 8) as usize;
                let (below, from) = bits.split_at(byte_index);
                let byte = from.first().copied().unwrap_or(0);
                let bit = inside % 8;
                let rest = byte & ((1u8 << bit) - 1);
                (
                    chunk.before + count_ones(below) + u64::from(rest.count_ones()),
                    byte >> bit & 1 == 1,
                )
            }
        }
    }
}

/// Reads `length` bytes of a bitmap; the rest of `buffer` holds what it held.
fn read_bitmap(
    bytes: &dyn ImageBytes,
    offset: u64,
    buffer: &mut [u8],
    length: usize,
) -> Result<(), ImageError> {
    match buffer.get_mut(..length) {
        Some(buffer) => bytes.read(offset, buffer, "kdump bitmap"),
        None => Ok(()),
    }
}

/// The chunk at `offset`.
fn chunk_at(bytes: &[u8], offset: usize) -> [u8; CHUNK] {
    let chunk = bytes.get(offset..).and_then(<[u8]>::first_chunk);
    chunk.copied().unwrap_or([0; CHUNK])
}

/// Clears the bits from number `from` on: those past the last frame.
fn clear_from(bits: &mut [u8], from: u64) {
    for (index, byte) in bits.iter_mut().enumerate().skip((from / 8) as usize) {
        let first = index as u64 * 8;
        if first >= from {
            *byte = 0;
        } else {
            *byte &= (1u8 << (from - first)) - 1;
        }
    }
}

fn count_ones(bits: &[u8]) -> u64 {
    let (words, rest) = bits.as_chunks::<8>();
    let words: u64 = words
        .iter()
        .map(|word| u64::from(u64::from_le_bytes(*word).count_ones()))
        .sum();
    words
        + rest
            .iter()
            .map(|byte| u64::from(byte.count_ones()))
            .sum::<u64>()
}

/// Collects runs of set bits.
#[derive(Default)]
struct Regions {
    regions: Vec<MemoryRegion>,
    /// Start and end of the run that may go on, in frames.
    open: Option<(u64, u64)>,
}

impl Regions {
    /// Adds the frames whose bits are set; the first bit is frame `first`.
    fn add(&mut self, first: u64, bits: &[u8; CHUNK]) -> Result<(), ImageError> {
        match count_ones(bits) {
            0 => return Ok(()),
            CHUNK_FRAMES => return self.extend(first, CHUNK_FRAMES),
            _ => {}
        }
        for (index, byte) in bits.iter().enumerate() {
            let frame = first + index as u64 * 8;
            match byte {
                0 => {}
                0xff => self.extend(frame, 8)?,
                _ => {
                    for bit in 0..8 {
                        if byte >> bit & 1 == 1 {
                            self.extend(frame + bit, 1)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn extend(&mut self, frame: u64, count: u64) -> Result<(), ImageError> {
        match &mut self.open {
            Some((_, end)) if *end == frame => *end += count,
            open => {
                let done = open.replace((frame, frame + count));
                self.close(done)?;
            }
        }
        Ok(())
    }

    fn close(&mut self, run: Option<(u64, u64)>) -> Result<(), ImageError> {
        if let Some((start, end)) = run {
            if self.regions.len() == MAX_PIECES {
                return Err(ImageError::TooMany {
                    what: "separate pieces of memory",
                    limit: MAX_PIECES as u64,
                });
            }
            self.regions.push(MemoryRegion::new(
                PhysicalAddress::new(start * PAGE_SIZE),
                (end - start) * PAGE_SIZE,
            ));
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<MemoryRegion>, ImageError> {
        let last = self.open.take();
        self.close(last)?;
        Ok(self.regions)
    }
}

/// `page_desc`: where a page is in the file and how it is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    offset: u64,
    size: u32,
    flags: u32,
}

impl Descriptor {
    fn parse(bytes: [u8; 16]) -> Self {
        let value = u128::from_le_bytes(bytes);
        Self {
            offset: value as u64,
            size: (value >> 64) as u32,
            flags: (value >> 96) as u32,
        }
    }
}

/// The memory of a kdump-compressed file.
pub(crate) struct KdumpMemory {
    bytes: Arc<dyn ImageBytes>,
    header: KdumpHeader,
    index: PageIndex,
    /// Pages in the bitmap before those of this part of a split dump.
    split_before: u64,
    regions: Vec<MemoryRegion>,
    cache: PageCache,
    /// A descriptor whose page is zeros: writers let all zero pages share one.
    zeros: OnceLock<Descriptor>,
}

impl fmt::Debug for KdumpMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KdumpMemory")
            .field("header", &self.header)
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl KdumpMemory {
    pub(crate) fn new(
        bytes: Arc<dyn ImageBytes>,
        header: KdumpHeader,
        index: PageIndex,
        regions: Vec<MemoryRegion>,
        cache_size: usize,
    ) -> Self {
        let split_before = header.split.map_or(0, |(start, _)| index.rank(start).0);
        Self {
            bytes,
            header,
            index,
            split_before,
            regions,
            cache: PageCache::new(cache_size / PAGE_SIZE as usize),
            zeros: OnceLock::new(),
        }
    }

    /// What to tell about a file that ends before its last page. Writers put
    /// descriptors and pages down in order, so the last one tells.
    pub(crate) fn check_end(&self) -> Option<ImageNote> {
        let end = self
            .header
            .split
            .map_or(self.index.pages, |(_, end)| self.index.rank(end).0);
        let last = end.checked_sub(self.split_before)?.checked_sub(1)?;
        let what = match self.descriptor(last) {
            Err(ImageError::Truncated { .. }) => "the page descriptors are not all there",
            Ok(last) if last.offset.saturating_add(u64::from(last.size)) > self.bytes.len() => {
                "the pages are not all there"
            }
            Ok(_) => return None,
            Err(_) => "the last page descriptor can't be read",
        };
        Some(ImageNote::Damaged {
            offset: self.bytes.len(),
            what: format!("{what}: the file is cut"),
        })
    }

    /// The descriptor with this number.
    fn descriptor(&self, number: u64) -> Result<Descriptor, ImageError> {
        const WHAT: &str = "page descriptor";
        let group = number / DESCRIPTORS_AT_ONCE;
        let inside = (number % DESCRIPTORS_AT_ONCE * DESCRIPTOR_SIZE) as usize;
        let key = DESCRIPTOR_KEY | group;
        let mut bytes = [0; 16];
        if self
            .cache
            .with(key, |group| group.copy_to(inside, &mut bytes))
            == Some(true)
        {
            return Ok(Descriptor::parse(bytes));
        }
        let group_size = DESCRIPTORS_AT_ONCE * DESCRIPTOR_SIZE;
        let start = self.header.descriptors_offset() + group * group_size;
        match self.bytes.read_vec(start, group_size as usize, WHAT) {
            Ok(group) => {
                let group = Cached::new(group.into());
                let whole = group.copy_to(inside, &mut bytes);
                debug_assert!(whole);
                self.cache.insert(key, group);
            }
            // The last group, and those of a cut file, are shorter.
            Err(_) => self.bytes.read(start + inside as u64, &mut bytes, WHAT)?,
        }
        Ok(Descriptor::parse(bytes))
    }

    /// Decodes the page of `frame`.
    fn decode(&self, frame: u64) -> Result<Cached, PhysicalReadError> {
        let address = PhysicalAddress::new(frame * PAGE_SIZE);
        let excluded = |reason| PhysicalReadError::Excluded { address, reason };
        let corrupt = |reason| PhysicalReadError::Corrupt { address, reason };
        let (rank, present) = self.index.rank(frame);
        if !present {
            if self.header.excludes_zero_pages_only() {
                return Ok(Cached::Zeros);
            }
            return Err(excluded("its writer left it out"));
        }
        if let Some((start, end)) = self.header.split
            && !(start..end).contains(&frame)
        {
            return Err(excluded("another file of the split dump has it"));
        }
        let failed = |error| match error {
            ImageError::Truncated { .. } => excluded("the file ends before it"),
            other => PhysicalReadError::Host {
                address,
                reason: other.to_string(),
            },
        };
        let number = rank.saturating_sub(self.split_before);
        let descriptor = self.descriptor(number).map_err(failed)?;
        if self.zeros.get() == Some(&descriptor) {
            return Ok(Cached::Zeros);
        }
        if descriptor.offset == 0 {
            return Err(excluded("its writer did not come to it"));
        }
        if descriptor.size == 0 || u64::from(descriptor.size) > PAGE_SIZE {
            return Err(corrupt(format!(
                "it has {} bytes in the file",
                descriptor.size
            )));
        }
        let compression = Compression::from_flags(descriptor.flags)
            .ok_or_else(|| corrupt(format!("unknown compression {:#x}", descriptor.flags)))?;
        let mut compressed = [0; PAGE_SIZE as usize];
        let Some(compressed) = compressed.get_mut(..descriptor.size as usize) else {
            return Err(corrupt("its size".to_owned()));
        };
        self.bytes
            .read(descriptor.offset, compressed, "page")
            .map_err(failed)?;
        let mut page = vec![0; PAGE_SIZE as usize].into_boxed_slice();
        decompress(compression, compressed, &mut page).map_err(corrupt)?;
        let page = Cached::new(page);
        if matches!(page, Cached::Zeros) {
            // The first one found stays.
            let _ = self.zeros.set(descriptor);
        }
        Ok(page)
    }
}

impl PhysicalMemory for KdumpMemory {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        Volatility::Static
    }

    fn populated(&self) -> Vec<MemoryRegion> {
        // Too many runs are no error: then all of memory is looked at.
        self.index.runs().unwrap_or_else(|_| self.regions.clone())
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let mut position = address;
        let mut rest = buffer;
        while !rest.is_empty() {
            let hole = PhysicalReadError::Hole { address: position };
            let after = self
                .regions
                .partition_point(|region| region.start <= position);
            let region = after.checked_sub(1).and_then(|at| self.regions.get(at));
            if !region.is_some_and(|region| region.contains(position)) {
                return Err(hole);
            }
            let frame = position.as_u64() / PAGE_SIZE;
            let inside = position.page_offset() as usize;
            let count = rest.len().min(PAGE_SIZE as usize - inside);
            let (now, later) = rest.split_at_mut(count);
            let whole = match self.cache.with(frame, |page| page.copy_to(inside, now)) {
                Some(whole) => whole,
                None => {
                    let page = self.decode(frame)?;
                    let whole = page.copy_to(inside, now);
                    self.cache.insert(frame, page);
                    whole
                }
            };
            if !whole {
                return Err(hole);
            }
            // A region may reach the end of the address space, never past it.
            position = position.wrapping_add(count as u64);
            rest = later;
        }
        Ok(())
    }
}

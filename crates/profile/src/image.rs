//! The kernel's image as bytes: it lies in one run of physical memory.

use std::ops::Range;
use std::sync::Arc;

use memchr::memmem::Finder;
use secmon_memory::{
    AddressSpace, Buffer, PAGE_SIZE, PhysicalAddress, PhysicalMemory, PhysicalReadError,
    VirtualAddress,
};

use crate::KernelImage;
use crate::part::Part;

/// Bytes searched at once: they stay in the processor's cache.
const CHUNK: usize = 256 << 10;
/// Matches of one pattern that are looked at. A kernel has about ten.
pub(crate) const MAXIMUM_MATCHES: usize = 4096;

/// Reads the image by offset from `_text` or by virtual address.
#[derive(Clone, Copy)]
pub(crate) struct Image<'a> {
    memory: &'a dyn PhysicalMemory,
    place: KernelImage,
}

impl<'a> Image<'a> {
    pub(crate) fn new(memory: &'a dyn PhysicalMemory, place: KernelImage) -> Self {
        Self { memory, place }
    }

    /// Bytes from `_text` to the end.
    pub(crate) fn size(&self) -> u64 {
        self.place.size
    }

    /// All offsets.
    pub(crate) fn all(&self) -> Range<u64> {
        0..self.place.size
    }

    /// The run-time address of `offset`.
    pub(crate) fn address(&self, offset: u64) -> VirtualAddress {
        self.place.virtual_base.wrapping_add(offset)
    }

    /// The offset of a run-time address in the image.
    pub(crate) fn offset(&self, address: VirtualAddress) -> Option<u64> {
        let offset = address
            .as_u64()
            .checked_sub(self.place.virtual_base.as_u64())?;
        (offset < self.place.size).then_some(offset)
    }

    /// The physical address of `offset`.
    pub(crate) fn physical(&self, offset: u64) -> PhysicalAddress {
        self.place.physical_base.wrapping_add(offset)
    }

    /// Copies the bytes from `offset` on.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.place.size) {
            let address = self.physical(offset);
            return Err(PhysicalReadError::Hole { address });
        }
        self.memory.read(self.physical(offset), buffer)
    }

    /// The bytes of `range`, in a buffer of their own.
    pub(crate) fn bytes(&self, range: Range<u64>) -> Option<Vec<u8>> {
        let length = range.end.checked_sub(range.start)?;
        if range.end > self.place.size {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(length).ok()?];
        self.read(range.start, &mut bytes).ok()?;
        Some(bytes)
    }

    /// The bytes of `range`, for a copy of megabytes.
    pub(crate) fn buffer(&self, range: Range<u64>) -> Option<Buffer> {
        let length = range.end.checked_sub(range.start)?;
        if range.end > self.place.size {
            return None;
        }
        let mut bytes = Buffer::zeroed(usize::try_from(length).ok()?);
        self.read(range.start, &mut bytes).ok()?;
        Some(bytes)
    }

    /// The bytes of several ranges, in one buffer for all.
    pub(crate) fn parts<const COUNT: usize>(
        &self,
        ranges: &[Range<u64>; COUNT],
    ) -> Option<[Part; COUNT]> {
        let mut total = 0_usize;
        let mut places = ranges.each_ref().map(|_| 0..0);
        for (range, place) in ranges.iter().zip(&mut places) {
            let length = range.end.checked_sub(range.start)?;
            if range.end > self.place.size {
                return None;
            }
            let end = total.checked_add(usize::try_from(length).ok()?)?;
            *place = total..end;
            total = end;
        }
        let mut buffer = Buffer::zeroed(total);
        for (range, place) in ranges.iter().zip(&places) {
            self.read(range.start, buffer.get_mut(place.clone())?)
                .ok()?;
        }
        let buffer = Arc::new(buffer);
        Some(places.map(|place| Part::new(&buffer, place)))
    }

    /// The 8-byte integer at a run-time address.
    pub(crate) fn read_u64(&self, address: VirtualAddress) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(self.offset(address)?, &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// The string at `offset`, up to its zero byte or `limit` bytes.
    pub(crate) fn string(&self, offset: u64, limit: usize) -> Option<Vec<u8>> {
        let left = self.place.size.checked_sub(offset)?;
        let mut bytes = vec![0; limit.min(left as usize)];
        self.read(offset, &mut bytes).ok()?;
        let end = memchr::memchr(0, &bytes).unwrap_or(bytes.len());
        bytes.truncate(end);
        Some(bytes)
    }

    /// The parts of the image that the tables of `space` map for data. All of
    /// it, if they map everything executable, as before init's end.
    pub(crate) fn data(&self, space: &AddressSpace) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut offset = 0;
        while offset < self.place.size {
            let mut step = PAGE_SIZE;
            if let Ok(translation) = space.translate(self.address(offset)) {
                let size = translation.page_size.bytes();
                step = size - (self.address(offset).as_u64() & (size - 1));
                if !translation.rights.executable && translation.physical == self.physical(offset) {
                    let end = (offset + step).min(self.place.size);
                    match ranges.last_mut() {
                        Some(last) if last.end == offset => last.end = end,
                        _ => ranges.push(offset..end),
                    }
                }
            }
            offset += step;
        }
        if ranges.is_empty() {
            ranges.push(0..self.place.size);
        }
        ranges
    }

    /// Where each of `patterns` occurs in `ranges`, the first
    /// [`MAXIMUM_MATCHES`] of each.
    pub(crate) fn search<const COUNT: usize>(
        &self,
        ranges: &[Range<u64>],
        patterns: [&[u8]; COUNT],
    ) -> [Vec<u64>; COUNT] {
        let finders = patterns.map(Finder::new);
        let overlap = patterns.iter().map(|pattern| pattern.len()).max();
        let overlap = overlap.unwrap_or(0).max(1) - 1;
        let mut found = patterns.map(|_| Vec::new());
        let mut buffer = vec![0; CHUNK];
        for range in ranges {
            let mut start = range.start;
            while start < range.end {
                let length = (range.end - start).min(CHUNK as u64) as usize;
                let chunk = &mut buffer[..length];
                let advance = match length {
                    CHUNK => CHUNK - overlap,
                    _ => length,
                };
                if self.read(start, chunk).is_err() {
                    // A page is left out of this chunk; the others count.
                    self.read_pages(start, chunk);
                }
                for ((finder, pattern), found) in finders.iter().zip(patterns).zip(&mut found) {
                    for position in finder.find_iter(chunk) {
                        // What lies wholly in the overlap comes again.
                        let again = length == CHUNK && position >= advance;
                        if !again && !pattern.is_empty() && found.len() < MAXIMUM_MATCHES {
                            found.push(start + position as u64);
                        }
                    }
                }
                start += advance as u64;
            }
        }
        found
    }

    /// Reads page by page; zeroes stand for pages that can't be read.
    fn read_pages(&self, start: u64, chunk: &mut [u8]) {
        let mut done = 0;
        while done < chunk.len() {
            let offset = start + done as u64;
            let left = (PAGE_SIZE - self.physical(offset).page_offset()) as usize;
            let end = chunk.len().min(done + left);
            let page = &mut chunk[done..end];
            if self.read(offset, page).is_err() {
                page.fill(0);
            }
            done = end;
        }
    }
}

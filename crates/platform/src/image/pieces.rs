//! Which guest memory lies where in a file, as the mapped formats say it, and
//! the memory made of it.

use secmon_memory::{
    MappedMemory, MemoryRegion, PAGE_SIZE, PhysicalAddress, PhysicalMemory, PhysicalReadError,
    Volatility,
};
use std::sync::Arc;

use super::bytes::ImageBytes;
use super::{ImageError, ImageNote};
use crate::shared::SharedRam;

/// The most separate pieces of memory that one image may have.
pub(crate) const MAX_PIECES: usize = 1 << 18;
/// The most notes of one kind that are listed one by one.
const MAX_NOTES: usize = 64;
/// The end of x86-64's physical addresses.
pub(crate) const PHYSICAL_END: u64 = 1 << 52;

/// A run of guest memory and where its bytes are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) offset: u64,
}

impl Piece {
    /// Whether an address that lies in both has the same bytes in both.
    fn same_bytes(&self, other: &Self) -> bool {
        self.offset.wrapping_sub(self.start) == other.offset.wrapping_sub(other.start)
    }

    fn region(&self) -> MemoryRegion {
        MemoryRegion::new(PhysicalAddress::new(self.start), self.length)
    }
}

/// Collects pieces in any order and merges them.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    pieces: Vec<Piece>,
    missing: Vec<(MemoryRegion, &'static str)>,
    sorted_until: usize,
    notes: Vec<ImageNote>,
    overlaps_left_out: u64,
}

impl Pieces {
    /// Adds a piece; the part of it past `file_length` is recorded as missing.
    /// The caller has checked that it is not empty and ends below
    /// [`PHYSICAL_END`].
    pub(crate) fn push(&mut self, piece: Piece, file_length: u64) -> Result<(), ImageError> {
        let available = file_length.saturating_sub(piece.offset).min(piece.length);
        if available < piece.length {
            self.push_missing(
                MemoryRegion::new(
                    PhysicalAddress::new(piece.start + available),
                    piece.length - available,
                ),
                "the file ends before it",
            )?;
        }
        if available > 0 {
            self.pieces.push(Piece {
                length: available,
                ..piece
            });
        }
        if self.pieces.len() - self.sorted_until >= MAX_PIECES {
            self.merge();
            if self.pieces.len() > MAX_PIECES {
                return Err(ImageError::TooMany {
                    what: "separate pieces of memory",
                    limit: MAX_PIECES as u64,
                });
            }
        }
        Ok(())
    }

    /// Records memory that the image says exists and has no bytes for.
    pub(crate) fn push_missing(
        &mut self,
        region: MemoryRegion,
        reason: &'static str,
    ) -> Result<(), ImageError> {
        if self.missing.len() >= MAX_PIECES {
            return Err(ImageError::TooMany {
                what: "pieces of missing memory",
                limit: MAX_PIECES as u64,
            });
        }
        self.missing.push((region, reason));
        Ok(())
    }

    /// Whether there is no byte of memory in the file.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Sorts the pieces and merges those that continue or repeat each other
    /// in memory and file alike (QEMU's paging dumps name the same bytes once
    /// for each virtual address). Where two differ the one that starts lower
    /// stays whole.
    fn merge(&mut self) {
        self.pieces
            .sort_by_key(|piece| (piece.start, piece.offset, piece.length));
        let mut merged: Vec<Piece> = Vec::with_capacity(self.pieces.len().min(1024));
        for mut piece in self.pieces.drain(..) {
            if let Some(last) = merged.last_mut() {
                let end = last.start + last.length;
                if piece.start < end && (piece.start < last.start || !last.same_bytes(&piece)) {
                    let twice = (end - piece.start).min(piece.length);
                    if self.notes.len() < MAX_NOTES {
                        self.notes.push(ImageNote::Overlap {
                            region: MemoryRegion::new(PhysicalAddress::new(piece.start), twice),
                        });
                    } else {
                        self.overlaps_left_out += 1;
                    }
                    if twice == piece.length {
                        continue;
                    }
                    piece.start += twice;
                    piece.offset += twice;
                    piece.length -= twice;
                }
                // Now it starts no lower than the last one.
                if piece.start <= end && last.same_bytes(&piece) {
                    let new_end = end.max(piece.start + piece.length);
                    last.length = new_end - last.start;
                    continue;
                }
            }
            merged.push(piece);
        }
        self.sorted_until = merged.len();
        self.pieces = merged;
    }

    /// The merged pieces, the missing memory that no piece covers, and what is
    /// to be told about both.
    pub(crate) fn finish(
        mut self,
    ) -> (
        Vec<Piece>,
        Vec<(MemoryRegion, &'static str)>,
        Vec<ImageNote>,
    ) {
        self.merge();
        let mut notes = self.notes;
        if self.overlaps_left_out > 0 {
            notes.push(ImageNote::Skipped {
                count: self.overlaps_left_out,
                what: "more notes of memory that is in the file twice",
            });
        }
        let missing = subtract(self.missing, &self.pieces);
        for (region, reason) in missing.iter().take(MAX_NOTES) {
            notes.push(ImageNote::Missing {
                region: *region,
                reason,
            });
        }
        if missing.len() > MAX_NOTES {
            notes.push(ImageNote::Skipped {
                count: (missing.len() - MAX_NOTES) as u64,
                what: "more notes of missing memory",
            });
        }
        (self.pieces, missing, notes)
    }
}

/// What of `missing` is covered neither by `pieces` (sorted, disjoint) nor by
/// an earlier missing run; sorted and disjoint.
fn subtract(
    mut missing: Vec<(MemoryRegion, &'static str)>,
    pieces: &[Piece],
) -> Vec<(MemoryRegion, &'static str)> {
    missing.sort();
    let mut left: Vec<(MemoryRegion, &'static str)> = Vec::new();
    let mut done = 0;
    for (region, reason) in missing {
        let mut start = region.start.as_u64().max(done);
        let end = region.end().as_u64();
        done = done.max(end);
        let mut index = pieces.partition_point(|piece| piece.start + piece.length <= start);
        while start < end {
            let next = pieces.get(index);
            let gap_end = next.map_or(end, |piece| piece.start.min(end));
            if gap_end > start {
                let length = gap_end - start;
                match left.last_mut() {
                    Some((last, why)) if last.end().as_u64() == start && *why == reason => {
                        last.length += length;
                    }
                    _ => left.push((
                        MemoryRegion::new(PhysicalAddress::new(start), length),
                        reason,
                    )),
                }
            }
            let Some(piece) = next else { break };
            start = piece.start + piece.length;
            index += 1;
        }
    }
    left
}

/// The memory of an image whose bytes are the guest's, uncompressed.
pub(crate) fn memory_of(
    file: &Arc<dyn ImageBytes>,
    pieces: &[Piece],
    missing: Vec<(MemoryRegion, &'static str)>,
    volatility: Volatility,
) -> Result<Arc<dyn PhysicalMemory>, ImageError> {
    let Some(mappable) = file.as_file() else {
        return Ok(Arc::new(HoledMemory::new(
            ReadPieces::new(Arc::clone(file), pieces),
            missing,
        )));
    };
    let layout: Vec<(MemoryRegion, u64)> = pieces
        .iter()
        .map(|piece| (piece.region(), piece.offset))
        .collect();
    let mapped = MappedMemory::map_file(mappable, &layout, volatility)?;
    let present = MappedFile {
        mapped,
        file: Arc::clone(file),
        layout,
    };
    if missing.is_empty() {
        return Ok(Arc::new(present));
    }
    Ok(Arc::new(HoledMemory::new(present, missing)))
}

/// A mapped image that knows which parts of its file are holes: those of a
/// sparse file need not be looked at.
struct MappedFile {
    mapped: MappedMemory,
    file: Arc<dyn ImageBytes>,
    layout: Vec<(MemoryRegion, u64)>,
}

impl PhysicalMemory for MappedFile {
    fn regions(&self) -> &[MemoryRegion] {
        self.mapped.regions()
    }

    fn volatility(&self) -> Volatility {
        self.mapped.volatility()
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        self.mapped.read(address, buffer)
    }

    fn mapped(&self) -> Option<&MappedMemory> {
        Some(&self.mapped)
    }

    fn populated(&self) -> Vec<MemoryRegion> {
        let Some(file) = self.file.as_file() else {
            return self.regions().to_vec();
        };
        let mut found = Vec::new();
        for (region, offset) in &self.layout {
            if SharedRam::populated_of(file, *region, *offset, &mut found).is_err() {
                // A file system that does not tell.
                return self.regions().to_vec();
            }
        }
        whole_pages(found)
    }
}

/// Extends regions to whole pages and joins what then touches: offsets in a
/// file need not be multiples of the page size.
pub(crate) fn whole_pages(mut regions: Vec<MemoryRegion>) -> Vec<MemoryRegion> {
    for region in &mut regions {
        let end = region.end().as_u64().next_multiple_of(PAGE_SIZE);
        let start = region.start.page();
        *region = MemoryRegion::new(start, end - start.as_u64());
    }
    join_regions(regions)
}

/// Pieces that are read and not mapped: those of a flattened file.
struct ReadPieces {
    bytes: Arc<dyn ImageBytes>,
    pieces: Vec<Piece>,
    regions: Vec<MemoryRegion>,
}

impl ReadPieces {
    /// `pieces` are sorted and disjoint.
    fn new(bytes: Arc<dyn ImageBytes>, pieces: &[Piece]) -> Self {
        Self {
            bytes,
            pieces: pieces.to_vec(),
            regions: pieces.iter().map(Piece::region).collect(),
        }
    }
}

impl PhysicalMemory for ReadPieces {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        Volatility::Static
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let mut position = address;
        let mut rest = buffer;
        while !rest.is_empty() {
            let after = self
                .pieces
                .partition_point(|piece| piece.start <= position.as_u64());
            let piece = after.checked_sub(1).and_then(|at| self.pieces.get(at));
            let Some(piece) = piece.filter(|piece| piece.region().contains(position)) else {
                return Err(PhysicalReadError::Hole { address: position });
            };
            let inside = position.as_u64() - piece.start;
            let left = usize::try_from(piece.length - inside).unwrap_or(usize::MAX);
            let count = rest.len().min(left);
            let (now, later) = rest.split_at_mut(count);
            self.bytes
                .read(piece.offset + inside, now, "memory")
                .map_err(|error| match error {
                    ImageError::Truncated { .. } => PhysicalReadError::Excluded {
                        address: position,
                        reason: "the file ends before it",
                    },
                    other => PhysicalReadError::Host {
                        address: position,
                        reason: other.to_string(),
                    },
                })?;
            position = position.wrapping_add(count as u64);
            rest = later;
        }
        Ok(())
    }
}

/// Memory of which the image says that more existed.
struct HoledMemory<M> {
    present: M,
    missing: Vec<(MemoryRegion, &'static str)>,
    regions: Vec<MemoryRegion>,
}

impl<M: PhysicalMemory> HoledMemory<M> {
    fn new(present: M, missing: Vec<(MemoryRegion, &'static str)>) -> Self {
        let missing_regions = missing.iter().map(|(region, _)| *region);
        let all = present.regions().iter().copied().chain(missing_regions);
        let regions = join_regions(all.collect());
        Self {
            present,
            missing,
            regions,
        }
    }
}

/// Sorts regions and joins those that touch or overlap.
pub(crate) fn join_regions(mut regions: Vec<MemoryRegion>) -> Vec<MemoryRegion> {
    regions.sort();
    let mut joined: Vec<MemoryRegion> = Vec::new();
    for region in regions {
        match joined.last_mut() {
            Some(last) if region.start <= last.end() => {
                let end = last.end().max(region.end());
                last.length = end.as_u64() - last.start.as_u64();
            }
            _ => joined.push(region),
        }
    }
    joined
}

/// Why `address` is missing, if the image said that memory was there.
pub(crate) fn missing_reason(
    missing: &[(MemoryRegion, &'static str)],
    address: PhysicalAddress,
) -> Option<&'static str> {
    let index = missing.partition_point(|(region, _)| region.start <= address);
    let (region, reason) = missing.get(index.checked_sub(1)?)?;
    region.contains(address).then_some(*reason)
}

impl<M: PhysicalMemory> PhysicalMemory for HoledMemory<M> {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        self.present.volatility()
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        self.present
            .read(address, buffer)
            .map_err(|error| match error {
                PhysicalReadError::Hole { address } => {
                    match missing_reason(&self.missing, address) {
                        Some(reason) => PhysicalReadError::Excluded { address, reason },
                        None => PhysicalReadError::Hole { address },
                    }
                }
                other => other,
            })
    }

    fn mapped(&self) -> Option<&MappedMemory> {
        self.present.mapped()
    }

    fn populated(&self) -> Vec<MemoryRegion> {
        self.present.populated()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn regions(list: &[(u64, u64)]) -> Vec<MemoryRegion> {
        list.iter()
            .map(|(start, length)| MemoryRegion::new(PhysicalAddress::new(*start), *length))
            .collect()
    }

    #[test]
    fn whole_pages_cover_and_do_not_touch() {
        let found = whole_pages(regions(&[(0x10, 0x20), (0x1001, 0xfff), (0x5fff, 2)]));
        assert_eq!(found, regions(&[(0, 0x2000), (0x5000, 0x2000)]));
    }

    proptest! {
        /// Each address is read from a piece that was given for it, from the
        /// one that starts lowest where there are several; what is missing is
        /// in none.
        #[test]
        fn pieces_merge_to_what_they_say(
            given in prop::collection::vec((0u64..300, 1u64..80, 0u64..4), 1..20),
            absent in prop::collection::vec((0u64..400, 1u64..60), 0..6),
            file_length in 100u64..900,
        ) {
            let mut pieces = Pieces::default();
            let mut expected: Vec<Option<Vec<u64>>> = vec![None; 500];
            let mut stated = vec![false; 500];
            for (start, length, shift) in &given {
                let offset = start + shift * 100;
                pieces
                    .push(Piece { start: *start, length: *length, offset }, file_length)
                    .expect("few pieces");
                for inside in 0..*length {
                    stated[(start + inside) as usize] = true;
                    if offset + inside < file_length {
                        expected[(start + inside) as usize]
                            .get_or_insert_default()
                            .push(offset + inside);
                    }
                }
            }
            for (start, length) in &absent {
                let region = MemoryRegion::new(PhysicalAddress::new(*start), *length);
                pieces.push_missing(region, "test").expect("few pieces");
                for address in *start..start + length {
                    stated[address as usize] = true;
                }
            }
            let (merged, missing, notes) = pieces.finish();
            for pair in merged.windows(2) {
                prop_assert!(pair[0].start + pair[0].length <= pair[1].start);
            }
            for pair in missing.windows(2) {
                prop_assert!(pair[0].0.end() <= pair[1].0.start);
            }
            let mut contradiction = false;
            for (address, expected) in expected.iter().enumerate() {
                let address = address as u64;
                let piece = merged
                    .iter()
                    .find(|piece| piece.region().contains(PhysicalAddress::new(address)));
                let reason = missing_reason(&missing, PhysicalAddress::new(address));
                match (piece, expected) {
                    (Some(piece), Some(offsets)) => {
                        let offset = piece.offset + (address - piece.start);
                        prop_assert!(offsets.contains(&offset));
                        contradiction |= offsets.iter().any(|other| *other != offset);
                        prop_assert_eq!(reason, None);
                    }
                    (None, None) => {
                        prop_assert_eq!(reason.is_some(), stated[address as usize]);
                    }
                    other => prop_assert!(false, "{:?}", other),
                }
            }
            let told = notes.iter().any(|note| matches!(note, ImageNote::Overlap { .. }));
            prop_assert_eq!(told, contradiction);
        }
    }
}

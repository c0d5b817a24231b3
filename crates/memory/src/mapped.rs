//! Physical memory that is mapped into this process: a RAM file of a running
//! QEMU, an image, a PCI BAR.

use std::fs::File;
use std::sync::Arc;

use crate::{
    LayoutError, MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError, VolatileBytes,
    Volatility,
};

/// Where a region lies in the mapping.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u64,
    length: u64,
    offset: u64,
}

/// A read-only shared mapping and the guest physical addresses of its parts.
///
/// Cloning is cheap: the mapping is shared and unmapped with the last clone.
#[derive(Clone)]
pub struct MappedMemory {
    mapping: Arc<Mapping>,
    pieces: Arc<[Piece]>,
    regions: Arc<[MemoryRegion]>,
    volatility: Volatility,
}

/// The mapping itself; it is never turned into a slice, see [`VolatileBytes`].
struct Mapping(memmap2::MmapRaw);

impl Mapping {
    fn bytes(&self) -> VolatileBytes<'_> {
        // SAFETY: the mapping is readable for its whole length until `self`
        // is dropped, which the returned lifetime can't outlive.
        unsafe { VolatileBytes::new(self.0.as_ptr(), self.0.len()) }
    }
}

/// Why a file could not be mapped as physical memory.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The host refused to map it.
    #[error("mapping the memory file: {0}")]
    Host(#[from] std::io::Error),
    /// The layout does not fit the file or itself.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl MappedMemory {
    /// Maps `file` read-only; `layout` says which region lies at which offset
    /// of the file. Regions may be given in any order.
    ///
    /// # Errors
    /// [`MapError`] if the host refuses, or if regions overlap or lie outside
    /// of the file.
    pub fn map_file(
        file: &File,
        layout: &[(MemoryRegion, u64)],
        volatility: Volatility,
    ) -> Result<Self, MapError> {
        let mapping = memmap2::MmapOptions::new().map_raw_read_only(file)?;
        let available = mapping.len() as u64;
        let mut layout = layout.to_vec();
        layout.sort_by_key(|(region, _)| region.start);
        for (region, offset) in &layout {
            let start = region.start;
            if region.length == 0 {
                return Err(LayoutError::Empty(start).into());
            }
            if start
                .checked_add(region.length)
                .is_none_or(|end| end.as_u64() > 1 << 52)
            {
                return Err(LayoutError::TooHigh(start).into());
            }
            let needed = offset.saturating_add(region.length);
            if needed > available {
                return Err(LayoutError::OutOfBounds {
                    start,
                    needed,
                    available,
                }
                .into());
            }
        }
        for pair in layout.windows(2) {
            if pair[0].0.end() > pair[1].0.start {
                return Err(LayoutError::Overlap(pair[0].0.start, pair[1].0.start).into());
            }
        }
        let pieces = layout
            .iter()
            .map(|(region, offset)| Piece {
                start: region.start.as_u64(),
                length: region.length,
                offset: *offset,
            })
            .collect();
        let regions = layout.iter().map(|(region, _)| *region).collect();
        Ok(Self {
            mapping: Arc::new(Mapping(mapping)),
            pieces,
            regions,
            volatility,
        })
    }

    /// The piece that holds `address`.
    #[inline]
    fn piece(&self, address: u64) -> Option<Piece> {
        if self.pieces.len() <= 4 {
            return self
                .pieces
                .iter()
                .find(|piece| address.wrapping_sub(piece.start) < piece.length)
                .copied();
        }
        let index = self.pieces.partition_point(|piece| piece.start <= address);
        let piece = *self.pieces.get(index.checked_sub(1)?)?;
        (address - piece.start < piece.length).then_some(piece)
    }

    /// The 8-byte integer at `address`, which must not straddle two regions.
    #[inline]
    pub fn read_u64(&self, address: PhysicalAddress) -> Option<u64> {
        let piece = self.piece(address.as_u64())?;
        let inside = address.as_u64() - piece.start;
        if piece.length - inside < 8 {
            return None;
        }
        self.mapping
            .bytes()
            .read_u64((piece.offset + inside) as usize)
    }

    /// Copies the bytes from `address` on if all of them are in one region;
    /// false (and nothing copied) if they are not.
    #[inline]
    pub(crate) fn read_within(&self, address: PhysicalAddress, buffer: &mut [u8]) -> bool {
        let Some(piece) = self.piece(address.as_u64()) else {
            return false;
        };
        let inside = address.as_u64() - piece.start;
        piece.length - inside >= buffer.len() as u64
            && self
                .mapping
                .bytes()
                .copy_to((piece.offset + inside) as usize, buffer)
    }

    /// The bytes from `address` to the end of its region.
    pub fn bytes_from(&self, address: PhysicalAddress) -> Option<VolatileBytes<'_>> {
        let piece = self.piece(address.as_u64())?;
        let inside = address.as_u64() - piece.start;
        let offset = usize::try_from(piece.offset + inside).ok()?;
        let length = usize::try_from(piece.length - inside).ok()?;
        self.mapping.bytes().part(offset, length)
    }

    /// Asks the processor to fetch the cache line at `address`; no effect on
    /// what is read, and none at all if there is no memory.
    #[inline]
    pub fn prefetch(&self, address: PhysicalAddress) {
        if let Some(piece) = self.piece(address.as_u64()) {
            let inside = address.as_u64() - piece.start;
            self.mapping
                .bytes()
                .prefetch((piece.offset + inside) as usize);
        }
    }
}

impl PhysicalMemory for MappedMemory {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        self.volatility
    }

    #[inline]
    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let mut position = address.as_u64();
        let mut rest = buffer;
        while !rest.is_empty() {
            let hole = PhysicalReadError::Hole {
                address: PhysicalAddress::new(position),
            };
            let Some(piece) = self.piece(position) else {
                return Err(hole);
            };
            let inside = position - piece.start;
            let count = rest
                .len()
                .min((piece.length - inside).min(usize::MAX as u64) as usize);
            let (now, later) = rest.split_at_mut(count);
            if !self
                .mapping
                .bytes()
                .copy_to((piece.offset + inside) as usize, now)
            {
                return Err(hole);
            }
            position = position.wrapping_add(count as u64);
            rest = later;
        }
        Ok(())
    }

    fn mapped(&self) -> Option<&MappedMemory> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(length: usize) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let bytes: Vec<u8> = (0..length).map(|index| (index / 8) as u8).collect();
        file.write_all(&bytes).expect("written");
        file
    }

    fn region(start: u64, length: u64) -> MemoryRegion {
        MemoryRegion::new(PhysicalAddress::new(start), length)
    }

    /// RAM below and above a hole, more pieces than the linear search takes.
    fn pieces(count: u64) -> Vec<(MemoryRegion, u64)> {
        (0..count)
            .rev()
            .map(|index| (region(index * 0x2000, 0x1000), index * 0x1000))
            .collect()
    }

    #[test]
    fn finds_every_piece_and_no_hole() {
        for count in [1, 2, 4, 5, 9] {
            let file = file(count as usize * 0x1000);
            let memory = MappedMemory::map_file(&file, &pieces(count), Volatility::Static)
                .expect("a sound layout");
            assert_eq!(memory.size(), count * 0x1000);
            for index in 0..count {
                let address = PhysicalAddress::new(index * 0x2000 + 0x810);
                let expected = (((index * 0x1000 + 0x810) / 8) as u8).into();
                assert_eq!(
                    memory.read_u64(address).map(|value| value & 0xff),
                    Some(expected)
                );
                let mut bytes = [0; 16];
                memory.read(address, &mut bytes).expect("inside");
                assert_eq!(u64::from(bytes[0]), expected);
                let hole = PhysicalAddress::new(index * 0x2000 + 0x1000);
                assert_eq!(memory.read_u64(hole), None);
                assert_eq!(memory.read_u64(hole.wrapping_sub(4)), None);
                assert_eq!(
                    memory.read(hole.wrapping_sub(4), &mut bytes),
                    Err(PhysicalReadError::Hole { address: hole })
                );
                assert!(memory.bytes_from(hole).is_none());
                memory.prefetch(hole);
            }
        }
    }

    #[test]
    fn a_write_by_somebody_else_is_seen() {
        use std::os::unix::fs::FileExt;
        let file = file(0x1000);
        let memory = MappedMemory::map_file(&file, &[(region(0, 0x1000), 0)], Volatility::Live)
            .expect("maps");
        file.write_all_at(&[0xee; 8], 0x100).expect("written");
        assert_eq!(
            memory.read_u64(PhysicalAddress::new(0x100)),
            Some(0xeeee_eeee_eeee_eeee)
        );
    }

    #[test]
    fn refuses_layouts_that_do_not_fit() {
        let file = file(0x2000);
        let refused = |layout: &[(MemoryRegion, u64)]| match MappedMemory::map_file(
            &file,
            layout,
            Volatility::Static,
        ) {
            Err(MapError::Layout(error)) => error,
            Err(MapError::Host(error)) => panic!("{error}"),
            Ok(_) => panic!("accepted"),
        };
        assert!(matches!(
            refused(&[(region(0, 0), 0)]),
            LayoutError::Empty(_)
        ));
        assert!(matches!(
            refused(&[(region(0, 0x3000), 0)]),
            LayoutError::OutOfBounds { .. }
        ));
        assert!(matches!(
            refused(&[(region(0, 0x1000), u64::MAX)]),
            LayoutError::OutOfBounds { .. }
        ));
        assert!(matches!(
            refused(&[(region(u64::MAX, 2), 0)]),
            LayoutError::TooHigh(_)
        ));
        assert!(matches!(
            refused(&[(region(0x800, 0x1000), 0), (region(0, 0x1000), 0)]),
            LayoutError::Overlap(..)
        ));
    }
}

//! Physical memory in buffers of this process: decoded images, and memories
//! made up by tests.

use crate::Volatility;
use crate::{LayoutError, MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError};

/// Static memory in heap buffers, one a region.
#[derive(Debug, Default)]
pub struct HeapMemory {
    regions: Vec<MemoryRegion>,
    buffers: Vec<Vec<u8>>,
}

impl HeapMemory {
    /// The memory with these bytes at these addresses, in any order.
    ///
    /// # Errors
    /// [`LayoutError`] if a buffer is empty, too high, or overlaps another.
    pub fn new(mut parts: Vec<(PhysicalAddress, Vec<u8>)>) -> Result<Self, LayoutError> {
        parts.sort_by_key(|(start, _)| *start);
        let mut memory = Self::default();
        for (start, bytes) in parts {
            let region = MemoryRegion::new(start, bytes.len() as u64);
            region.check()?;
            if let Some(last) = memory.regions.last()
                && last.end() > start
            {
                return Err(LayoutError::Overlap(last.start, start));
            }
            memory.regions.push(region);
            memory.buffers.push(bytes);
        }
        Ok(memory)
    }
}

impl PhysicalMemory for HeapMemory {
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
            let hole = PhysicalReadError::Hole { address: position };
            let after = self
                .regions
                .partition_point(|region| region.start <= position);
            let index = after.checked_sub(1).ok_or_else(|| hole.clone())?;
            let inside = position.as_u64() - self.regions[index].start.as_u64();
            let bytes = usize::try_from(inside)
                .ok()
                .and_then(|inside| self.buffers[index].get(inside..))
                .filter(|bytes| !bytes.is_empty())
                .ok_or(hole)?;
            let count = bytes.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&bytes[..count]);
            position = position.wrapping_add(count as u64);
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_across_touching_regions_and_names_holes() {
        let at = PhysicalAddress::new;
        let memory = HeapMemory::new(vec![
            (at(0x2004), vec![5, 6]),
            (at(0x2000), vec![1, 2, 3, 4]),
        ])
        .expect("disjoint");
        let mut bytes = [0; 5];
        assert_eq!(memory.read(at(0x2001), &mut bytes), Ok(()));
        assert_eq!(bytes, [2, 3, 4, 5, 6]);
        assert_eq!(
            memory.read(at(0x2002), &mut bytes),
            Err(PhysicalReadError::Hole {
                address: at(0x2006)
            })
        );
        assert_eq!(
            memory.read(at(0), &mut bytes),
            Err(PhysicalReadError::Hole { address: at(0) })
        );
        assert_eq!(
            memory.read(at(u64::MAX), &mut bytes),
            Err(PhysicalReadError::Hole {
                address: at(u64::MAX)
            })
        );
    }

    #[test]
    fn refuses_impossible_layouts() {
        let at = PhysicalAddress::new;
        assert_eq!(
            HeapMemory::new(vec![(at(0), vec![])]).err(),
            Some(LayoutError::Empty(at(0)))
        );
        assert_eq!(
            HeapMemory::new(vec![(at(0), vec![0; 8]), (at(4), vec![0])]).err(),
            Some(LayoutError::Overlap(at(0), at(4)))
        );
        assert_eq!(
            HeapMemory::new(vec![(at(u64::MAX), vec![0])]).err(),
            Some(LayoutError::TooHigh(at(u64::MAX)))
        );
    }
}

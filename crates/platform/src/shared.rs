//! RAM of a running machine that is a file shared with it: a memfd, a file of
//! tmpfs, of hugetlbfs or of a disk.
//!
//! It is mapped, which is the fastest way to single values. But touching a
//! page of a mapped memfd or tmpfs file that was never written makes the host
//! allocate it: a look at all of a large, mostly unused guest through the
//! mapping would take that much of the host's memory, for good. So long runs
//! are read from the file, where what was never written reads as zeros and
//! stays unallocated, and [`PhysicalMemory::populated`] says what is worth
//! looking at.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use secmon_memory::{
    MapError, MappedMemory, MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError,
    Volatility,
};

/// Reads of at least this many bytes go to the file.
const LONG_READ: usize = 64 << 10;

/// The most separate parts of a region that are told apart.
const MAX_PARTS: usize = 1 << 16;

/// A live RAM file: mapped for single values, read as a file for long runs, so
/// that looking at memory never makes the host allocate much of it.
pub struct SharedRam {
    mapped: MappedMemory,
    layout: Vec<(MemoryRegion, u64)>,
    file: File,
    /// Held while the file's position is used.
    position: Mutex<()>,
}

impl SharedRam {
    /// Maps `file` read-only; `layout` says which region lies at which offset
    /// of it.
    ///
    /// # Errors
    /// As [`MappedMemory::map_file`].
    pub fn map(file: File, layout: &[(MemoryRegion, u64)]) -> Result<Self, MapError> {
        let mapped = MappedMemory::map_file(&file, layout, Volatility::Live)?;
        let mut layout = layout.to_vec();
        layout.sort_by_key(|(region, _)| region.start);
        Ok(Self {
            mapped,
            layout,
            file,
            position: Mutex::new(()),
        })
    }

    /// Reads a run that lies in one region from the file.
    fn read_file(
        &self,
        address: PhysicalAddress,
        buffer: &mut [u8],
    ) -> Option<std::io::Result<()>> {
        let (region, offset) = self
            .layout
            .iter()
            .find(|(region, _)| region.contains(address))?;
        let inside = address.as_u64() - region.start.as_u64();
        if (buffer.len() as u64) > region.length - inside {
            return None;
        }
        Some(self.file.read_exact_at(buffer, offset + inside))
    }

    /// Appends the parts of a region that the file has data for.
    pub(crate) fn populated_of(
        file: &File,
        region: MemoryRegion,
        offset: u64,
        found: &mut Vec<MemoryRegion>,
    ) -> Result<(), Errno> {
        let end = offset + region.length;
        let mut position = offset;
        for _ in 0..MAX_PARTS {
            let data = match rustix::fs::seek(file, SeekFrom::Data(position)) {
                Ok(data) if data < end => data,
                // Nothing up to the end.
                Ok(_) | Err(Errno::NXIO) => return Ok(()),
                Err(error) => return Err(error),
            };
            let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(end);
            if hole <= data {
                return Err(Errno::INVAL);
            }
            let start = region.start.wrapping_add(data - offset);
            found.push(MemoryRegion::new(start, hole - data));
            position = hole;
        }
        Err(Errno::TOOBIG)
    }
}

impl PhysicalMemory for SharedRam {
    fn regions(&self) -> &[MemoryRegion] {
        self.mapped.regions()
    }

    fn volatility(&self) -> Volatility {
        Volatility::Live
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        if buffer.len() >= LONG_READ
            && let Some(outcome) = self.read_file(address, buffer)
        {
            return outcome.map_err(|error| PhysicalReadError::Host {
                address,
                reason: format!("the RAM file: {error}"),
            });
        }
        self.mapped.read(address, buffer)
    }

    fn mapped(&self) -> Option<&MappedMemory> {
        Some(&self.mapped)
    }

    fn populated(&self) -> Vec<MemoryRegion> {
        let _position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for (region, offset) in &self.layout {
            if Self::populated_of(&self.file, *region, *offset, &mut found).is_err() {
                // A file system that does not tell.
                return self.regions().to_vec();
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A memfd of 64 MiB that was written in two places, as 48 MiB from 0 and
    /// 16 MiB from 4 GiB.
    fn shared() -> (File, SharedRam) {
        let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(64 * MIB).expect("a size");
        file.write_all_at(&[1; 8], 5 * MIB + 16).expect("a write");
        file.write_all_at(&[2; 8], 48 * MIB).expect("a write");
        let region = |start, length| MemoryRegion::new(PhysicalAddress::new(start), length);
        let layout = [
            (region(4096 * MIB, 16 * MIB), 48 * MIB),
            (region(0, 48 * MIB), 0),
        ];
        let clone = file.try_clone().expect("a clone");
        (file, SharedRam::map(clone, &layout).expect("a mapping"))
    }

    #[test]
    fn a_look_at_all_of_it_allocates_nothing() {
        let (file, ram) = shared();
        let before = file.metadata().expect("metadata").blocks();
        let mut populated = Vec::new();
        let mut buffer = vec![0; 256 << 10];
        for region in ram.regions() {
            for chunk in (0..region.length).step_by(buffer.len()) {
                let address = region.start.wrapping_add(chunk);
                ram.read(address, &mut buffer).expect("memory");
                if buffer.iter().any(|byte| *byte != 0) {
                    populated.push(address.as_u64());
                }
            }
        }
        assert_eq!(populated, [5 * MIB, 4096 * MIB]);
        assert_eq!(file.metadata().expect("metadata").blocks(), before);
        // A short read goes through the mapping, and does allocate.
        ram.read(PhysicalAddress::new(20 * MIB), &mut [0; 8])
            .expect("memory");
        assert!(file.metadata().expect("metadata").blocks() > before);
    }

    #[test]
    fn what_was_written_is_populated() {
        let (file, ram) = shared();
        let populated = |ram: &SharedRam| -> Vec<(u64, u64)> {
            let regions = ram.populated().into_iter();
            regions
                .map(|region| (region.start.as_u64(), region.length))
                .collect()
        };
        assert_eq!(populated(&ram), [(5 * MIB, 4096), (4096 * MIB, 4096)]);
        file.write_all_at(&[3], 5 * MIB + 4096).expect("a write");
        file.write_all_at(&[3], 48 * MIB - 1).expect("a write");
        let expected = [(5 * MIB, 8192), (48 * MIB - 4096, 4096), (4096 * MIB, 4096)];
        assert_eq!(populated(&ram), expected);
    }

    #[test]
    fn holes_are_exact_in_long_reads_too() {
        let (file, ram) = shared();
        let mut buffer = vec![0; LONG_READ];
        let address = PhysicalAddress::new(48 * MIB - 4096);
        assert_eq!(
            ram.read(address, &mut buffer),
            Err(PhysicalReadError::Hole {
                address: PhysicalAddress::new(48 * MIB)
            })
        );
        file.set_len(8 * MIB).expect("cut");
        let address = PhysicalAddress::new(16 * MIB);
        let outcome = ram.read(address, &mut buffer);
        assert!(matches!(outcome, Err(PhysicalReadError::Host { .. })));
    }
}

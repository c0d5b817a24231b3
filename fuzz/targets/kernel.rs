//! A whole memory that anybody may have written: a kernel is found in it, or
//! not.
//!
//! The input is a list of changes to empty memory: a page number, an offset
//! in the page, and up to 15 bytes there. Numbers are small, so that tables
//! come to lead to each other.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use secmon_memory::{MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility};
use secmon_profile::{Cache, FindOptions, Search, find};

const SIZE: usize = 24 << 20;

struct Memory {
    regions: [MemoryRegion; 1],
    bytes: Vec<u8>,
}

impl PhysicalMemory for Memory {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        Volatility::Static
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let hole = PhysicalReadError::Hole { address };
        let start = usize::try_from(address.as_u64()).map_err(|_| hole.clone())?;
        let end = start.checked_add(buffer.len()).ok_or(hole.clone())?;
        buffer.copy_from_slice(self.bytes.get(start..end).ok_or(hole)?);
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    let mut bytes = vec![0; SIZE];
    // The shape of a kernel's tables to begin with, mapping memory from
    // 2 MiB on: a root at 0x1000, the others after it.
    let mut entry = |table: usize, index: usize, value: u64| {
        let place = table * 4096 + index * 8;
        bytes[place..place + 8].copy_from_slice(&value.to_le_bytes());
    };
    entry(1, 511, 0x2063);
    entry(2, 510, 0x3063);
    for step in 0..10 {
        entry(
            3,
            8 + step,
            (2 << 20) * (step as u64 + 1) | 0x8000_0000_0000_01e1,
        );
    }
    let mut rest = input;
    while let [page, high, low, length, after @ ..] = rest {
        let offset = usize::from(*high & 15) << 8 | usize::from(*low);
        let page = match high >> 4 {
            // The tables, or somewhere in the image.
            0..8 => usize::from(*page & 15),
            other => 512 + usize::from(*page) + usize::from(other) * 256,
        };
        let count = usize::from(*length & 15).min(after.len());
        let place = (page * 4096 + offset).min(SIZE - 16);
        bytes[place..place + count].copy_from_slice(&after[..count]);
        rest = &after[count..];
    }
    let memory: Arc<dyn PhysicalMemory> = Arc::new(Memory {
        regions: [MemoryRegion::new(PhysicalAddress::new(0), SIZE as u64)],
        bytes,
    });
    let options = FindOptions {
        cache: Cache::Off,
        search: Search::Thorough,
        ..FindOptions::default()
    };
    let _ = find(&memory, &options);
});

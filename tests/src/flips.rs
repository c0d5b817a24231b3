//! Memories that record what is read from them, and memories with flipped
//! bits.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use secmon_memory::{MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility};

/// Bytes of the unit in which reads are recorded.
pub const LINE: u64 = 64;

/// Another memory, and which of its lines have been read.
pub struct RecordingMemory {
    base: Arc<dyn PhysicalMemory>,
    lines: Mutex<HashSet<u64>>,
}

impl RecordingMemory {
    /// Records reads of `base`.
    pub fn new(base: Arc<dyn PhysicalMemory>) -> Self {
        Self {
            base,
            lines: Mutex::default(),
        }
    }

    /// The addresses of the lines read since the last call.
    pub fn take(&self) -> HashSet<u64> {
        std::mem::take(&mut *self.lines.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PhysicalMemory for RecordingMemory {
    fn regions(&self) -> &[MemoryRegion] {
        self.base.regions()
    }

    fn volatility(&self) -> Volatility {
        self.base.volatility()
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let first = address.as_u64() / LINE;
        let last = address
            .as_u64()
            .saturating_add(buffer.len() as u64)
            .saturating_sub(1)
            / LINE;
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend((first..=last).map(|line| line * LINE));
        drop(lines);
        self.base.read(address, buffer)
    }
}

/// Another memory with some of its bits flipped.
pub struct FlippedMemory {
    base: Arc<dyn PhysicalMemory>,
    /// Byte addresses and what is exclusive-ored into them.
    flips: Vec<(u64, u8)>,
}

impl FlippedMemory {
    /// `base` with these bytes changed by exclusive or.
    pub fn new(base: Arc<dyn PhysicalMemory>, flips: Vec<(u64, u8)>) -> Self {
        Self { base, flips }
    }
}

impl PhysicalMemory for FlippedMemory {
    fn regions(&self) -> &[MemoryRegion] {
        self.base.regions()
    }

    fn volatility(&self) -> Volatility {
        self.base.volatility()
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        self.base.read(address, buffer)?;
        for (flipped, mask) in &self.flips {
            let offset = flipped.wrapping_sub(address.as_u64());
            if let Some(byte) = usize::try_from(offset)
                .ok()
                .and_then(|at| buffer.get_mut(at))
            {
                *byte ^= mask;
            }
        }
        Ok(())
    }
}

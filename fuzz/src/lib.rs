//! What several fuzz targets need of a guest.
#![forbid(unsafe_code)]

use secmon_reference::{Patches, Running};

/// A running kernel whose memory repeats the input.
pub struct Repeating<'b>(pub &'b [u8]);

impl Running for Repeating<'_> {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let start = address as usize % self.0.len().max(1);
        let mut from = self.0.iter().cycle().skip(start);
        bytes.fill_with(|| from.next().copied().unwrap_or(0));
        !self.0.is_empty()
    }

    fn symbol(&self, name: &'static str) -> Option<u64> {
        let text = 0xffff_ffff_8100_0000_u64;
        self.0
            .get(name.len())
            .map(|byte| text + u64::from(*byte) * 16)
    }

    fn name_at(&self, _: u64) -> Option<&str> {
        None
    }

    fn has_feature(&self, number: u16) -> bool {
        number % 2 == 0
    }

    fn alternative_size(&self) -> usize {
        self.0.first().map_or(12, |byte| usize::from(byte % 16))
    }
}

impl Patches for Repeating<'_> {
    fn is_tracer(&self, target: u64) -> bool {
        target % 2 == 0
    }

    fn is_trace_function(&self, target: u64) -> bool {
        target % 2 == 0
    }

    fn is_indirect_thunk(&self, target: u64) -> bool {
        target % 2 == 0
    }

    fn is_code(&self, target: u64) -> bool {
        target % 2 == 0
    }

    fn probed(&self, address: u64) -> Option<u8> {
        (address % 7 == 0).then_some(0x55)
    }

    fn is_probe_slot(&self, target: u64) -> bool {
        target % 2 == 0
    }

    fn trampoline(&self, address: u64) -> Option<(u64, u64)> {
        Some((address & !7, address))
    }
}

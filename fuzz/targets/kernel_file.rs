//! A kernel's own file: any bytes must be taken apart or refused, and what was
//! taken apart be patched and compared without an end in sight being lost.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_reference::{Expected, Kernel, KernelFile, Patches, Running};

/// A running kernel whose memory repeats the file's bytes.
struct Repeating<'b>(&'b [u8]);

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

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = KernelFile::parse(bytes) else {
        return;
    };
    let repeating = Repeating(bytes);
    let kernel = Kernel {
        running: &repeating,
        patches: &repeating,
    };
    for slide in [0, 0x1000] {
        if let Ok(expected) = Expected::new(&file, slide, &repeating) {
            let _ = expected.compare(kernel);
        }
    }
});

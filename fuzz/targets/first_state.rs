//! The first state of a kernel: what is kept of one must be read or refused, and
//! any memory be taken and compared.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_reference::{BootId, Expected, FirstState, Kernel, Patches, Piece, Running, fuzzing};

/// A running kernel whose memory repeats the input.
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

const TEXT: u64 = 0xffff_ffff_8100_0000;

fuzz_target!(|bytes: &[u8]| {
    fuzzing::first_state(bytes);
    let repeating = Repeating(bytes);
    let kernel = Kernel {
        running: &repeating,
        patches: &repeating,
    };
    let pieces = [Piece {
        name: ".text",
        range: TEXT..TEXT + 0x2000,
    }];
    let traced = bytes.iter().map(|byte| TEXT + u64::from(*byte) * 8);
    let probes = bytes.iter().map(|byte| (TEXT + u64::from(*byte), *byte));
    let state = FirstState::take(kernel, None, 1, &pieces, traced.collect(), probes);
    let Some(state) = state else {
        return;
    };
    let boot = BootId::of(&[1]);
    assert_eq!(FirstState::decode(&state.encode(boot), boot), Ok(state.clone()));
    let _ = Expected::of_first_state(state, kernel).compare(kernel);
});

//! The first state of a kernel: what is kept of one must be read or refused, and
//! any memory be taken and compared.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_fuzz::Repeating;
use secmon_reference::{BootId, Expected, FirstState, Kernel, Piece, fuzzing};

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
    assert_eq!(
        FirstState::decode(&state.encode(boot), boot),
        Ok(state.clone())
    );
    let _ = Expected::of_first_state(state, kernel).compare(kernel);
});

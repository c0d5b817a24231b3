//! A kernel's own file: any bytes must be taken apart or refused, and what was
//! taken apart be patched and compared without an end in sight being lost.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_fuzz::Repeating;
use secmon_reference::{Expected, Kernel, KernelFile};

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

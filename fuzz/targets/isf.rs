//! An ISF file: any bytes must be read or refused.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use secmon_profile::Isf;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(isf) = Isf::parse(Path::new("fuzzed"), bytes) {
        for named in isf.types().iter().take(64) {
            let _ = isf.types().members_of(named.id);
            let _ = isf.types().size_of(&named.name);
        }
    }
});

//! What else comes from a guest's memory or from the cache on the way to a
//! profile: notes, VMCOREINFO, symbol names, cache files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_profile::{VmcoreInfo, build_ids, fuzzing};

fuzz_target!(|bytes: &[u8]| {
    let _ = build_ids(bytes);
    let _ = VmcoreInfo::parse(bytes);
    fuzzing::symbol_names(bytes);
    fuzzing::cache_file(bytes);
});

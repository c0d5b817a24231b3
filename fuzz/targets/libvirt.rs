//! Domain definitions of libvirt that are changed to share a guest's RAM.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_monitor::launch::libvirt::convert;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(conversion) = convert(text) else {
        return;
    };
    if conversion.changes.is_empty() {
        assert_eq!(conversion.xml, text);
    }
    // What was changed needs no change.
    let again = convert(&conversion.xml).expect("it was converted");
    assert_eq!(again.xml, conversion.xml);
});

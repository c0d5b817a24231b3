//! What a target's QEMU says of its network.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_gate::network;

fuzz_target!(|text: &str| {
    let devices = network::devices(text);
    assert!(devices.len() <= text.lines().count());
    for device in &devices {
        assert!(text.contains(device.as_str()) && !device.contains('\n'));
    }
});

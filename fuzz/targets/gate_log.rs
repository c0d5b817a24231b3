//! Logs of the gate as somebody may have changed them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_gate::log::verify_text;
use secmon_gate::protocol::LogHead;

fuzz_target!(|data: &[u8]| {
    let report = verify_text(data, None);
    // A head that was not written is never found.
    let other = LogHead {
        sequence: report.head.as_ref().map_or(1, |head| head.sequence),
        hash: "0".repeat(64),
    };
    let compared = verify_text(data, Some(&other));
    let same = report
        .head
        .as_ref()
        .is_some_and(|head| head.hash == other.hash);
    assert!(same || !compared.faults.is_empty());
});

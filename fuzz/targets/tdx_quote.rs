//! Quotes of Intel TDX, and collateral, as somebody may have made them.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use secmon_confidential::tdx::{Collateral, Expectation, collateral, verify};

static COLLATERAL: LazyLock<Collateral> = LazyLock::new(|| {
    let json = include_bytes!("../../crates/confidential/tests/data/tdx/tdx_quote_collateral.json");
    collateral(json).expect("collateral")
});

fuzz_target!(|data: &[u8]| {
    let _ = collateral(data);
    // No measurement is allowed, so that nothing can be trusted.
    let expected = Expectation {
        now: 1_750_809_600,
        ..Expectation::default()
    };
    if let Ok(verdict) = verify(data, &COLLATERAL, &expected) {
        assert!(!verdict.is_trusted());
    }
});

//! Reports of AMD SEV-SNP, and certificates, as somebody may have made them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_confidential::snp::{Certificates, Expectation, Report, verify};

const VCEK: &[u8] = include_bytes!("../../crates/confidential/tests/data/snp/vcek_milan.der");

fuzz_target!(|data: &[u8]| {
    let _ = Certificates::read([data]);
    let certificates = Certificates::read([VCEK]).expect("certificates");
    // No measurement is allowed, so that nothing can be trusted.
    let expected = Expectation {
        now: 1_717_200_000,
        ..Expectation::default()
    };
    let mut report = data.to_vec();
    report.resize(0x4a0, 0);
    for bytes in [data, &report] {
        let verdict = verify(bytes, &certificates, &expected);
        assert_eq!(verdict.is_ok(), Report::parse(bytes).is_ok());
        assert!(
            verdict.is_ok_and(|verdict| !verdict.is_trusted()) || Report::parse(bytes).is_err()
        );
    }
});

//! Genuine reports and quotes (tests/data/README.md), judged as they are and
//! with each of their bytes changed.

use proptest::prelude::*;
use secmon_confidential::{Hexadecimal, snp, tdx};

const REPORT: &str = include_str!("data/snp/report_milan.hex");
const VCEK: &[u8] = include_bytes!("data/snp/vcek_milan.der");
const OTHER_VCEK: &[u8] = include_bytes!("data/snp/vcek_turin.der");
/// 2024-06-01, when the certificates were valid.
const SNP_TIME: u64 = 1_717_200_000;

fn report() -> Vec<u8> {
    let digits = REPORT.trim().as_bytes().chunks(2);
    digits
        .map(|pair| {
            let text = std::str::from_utf8(pair).expect("ASCII");
            u8::from_str_radix(text, 16).expect("digits")
        })
        .collect()
}

/// What the genuine report says, demanded of it.
fn expectation() -> snp::Expectation {
    let report = snp::Report::parse(&report()).expect("a report");
    snp::Expectation {
        measurements: vec![report.measurement],
        report_data: Some(report.report_data),
        least: report.reported_tcb,
        smt: snp::Smt::Allowed,
        now: SNP_TIME,
    }
}

fn judge(bytes: &[u8], expected: &snp::Expectation) -> Vec<snp::Difference> {
    let certificates = snp::Certificates::read([VCEK]).expect("certificates");
    let verdict = snp::verify(bytes, &certificates, expected).expect("a report");
    assert_eq!(verdict.is_trusted(), verdict.differences.is_empty());
    verdict.differences
}

#[test]
fn a_genuine_snp_report_is_trusted() {
    assert_eq!(judge(&report(), &expectation()), []);
    let report = snp::Report::parse(&report()).expect("a report");
    assert_eq!((report.version, report.policy), (2, 0x3_0000));
    let versions = "bootloader=3,tee=0,snp=8,microcode=115";
    assert_eq!(report.reported_tcb.to_string(), versions);
    assert_eq!(report.launch_tcb.to_string(), versions);
}

#[test]
fn what_is_not_as_expected_is_told() {
    use snp::Difference;
    let usual = expectation();
    let one = |changed: snp::Expectation| {
        let mut differences = judge(&report(), &changed);
        assert_eq!(differences.len(), 1, "{differences:?}");
        let difference = differences.remove(0);
        assert!(!difference.to_string().is_empty());
        difference
    };
    let other = Hexadecimal([7; 48]);
    let measurements = vec![other];
    assert!(matches!(
        one(snp::Expectation { measurements, ..usual.clone() }),
        Difference::Measurement { allowed, .. } if allowed == [other]
    ));
    let report_data = Some(Hexadecimal(secmon_confidential::report_data(
        &[1; 32], &[2; 32],
    )));
    assert!(matches!(
        one(snp::Expectation {
            report_data,
            ..usual.clone()
        }),
        Difference::ReportData { .. }
    ));
    let mut least = usual.least;
    least.microcode += 1;
    assert!(matches!(
        one(snp::Expectation {
            least,
            ..usual.clone()
        }),
        Difference::TcbTooOld {
            part: snp::TcbPart::Microcode,
            ..
        }
    ));
    // All three of the chain.
    let differences = judge(&report(), &snp::Expectation { now: 1, ..usual });
    assert_eq!(differences.len(), 3);
    for difference in differences {
        assert!(matches!(difference, Difference::CertificateTime { .. }));
    }
}

#[test]
fn another_chips_certificate_does_not_serve() {
    let certificates = snp::Certificates::read([OTHER_VCEK]).expect("certificates");
    let expected = snp::Expectation {
        now: SNP_TIME,
        ..expectation()
    };
    let verdict = snp::verify(&report(), &certificates, &expected).expect("a report");
    let told = |wanted: fn(&snp::Difference) -> bool| verdict.differences.iter().any(wanted);
    assert!(told(|one| matches!(one, snp::Difference::ReportSignature)));
    assert!(told(|one| matches!(one, snp::Difference::OtherChip { .. })));
}

/// Policies that no report with a right signature could be had for: what is
/// told of them beside the signature.
#[test]
fn weak_policies_are_told() {
    let cases: [(usize, u8, snp::PolicyRule); 3] = [
        (0x0a, 1 << 3, snp::PolicyRule::Debug),
        (0x0a, 1 << 2, snp::PolicyRule::MigrationAgent),
        (0x0a, 1, snp::PolicyRule::Smt),
    ];
    for (at, bit, wanted) in cases {
        let mut bytes = report();
        bytes[at] |= bit;
        let smt = snp::Smt::Forbidden;
        let differences = judge(
            &bytes,
            &snp::Expectation {
                smt,
                ..expectation()
            },
        );
        assert!(
            differences
                .iter()
                .any(|one| matches!(one, snp::Difference::Policy { rule, .. } if *rule == wanted)),
            "{wanted:?}: {differences:?}"
        );
    }
}

/// Every byte of a report counts: those that are signed, the signature, and
/// those behind it, which must be zero.
#[test]
fn no_changed_snp_report_is_accepted() {
    let (genuine, expected) = (report(), expectation());
    let certificates = snp::Certificates::read([VCEK]).expect("certificates");
    for at in 0..genuine.len() {
        let mut bytes = genuine.clone();
        bytes[at] ^= 1 << (at % 8);
        if let Ok(verdict) = snp::verify(&bytes, &certificates, &expected) {
            assert!(!verdict.is_trusted(), "byte {at:#x}");
        }
    }
    for length in [0, 1, 0x2a0, 0x49f] {
        assert!(snp::verify(&genuine[..length], &certificates, &expected).is_err());
    }
}

const QUOTE: &[u8] = include_bytes!("data/tdx/tdx_quote");
const COLLATERAL: &[u8] = include_bytes!("data/tdx/tdx_quote_collateral.json");
const TDX_TIME: u64 = 1750809600;

fn of_quote(quote: &[u8], collateral: &[u8], now: u64) -> (tdx::Collateral, tdx::Expectation) {
    let collateral = tdx::collateral(collateral).expect("collateral");
    let nothing = tdx::Expectation {
        now,
        ..tdx::Expectation::default()
    };
    let verdict = tdx::verify(quote, &collateral, &nothing).expect("a quote");
    let report = verdict.report;
    let expected = tdx::Expectation {
        measurements: vec![report.measurement],
        registers: report.registers.map(Some),
        report_data: Some(report.report_data),
        accepted: Vec::new(),
        now,
    };
    (collateral, expected)
}

#[test]
fn genuine_tdx_quotes_of_sound_platforms_are_trusted() {
    let newer = (
        include_bytes!("data/tdx/tdx_quote_td15ex").as_slice(),
        include_bytes!("data/tdx/tdx_quote_td15ex_collateral.json").as_slice(),
        1791590400,
    );
    for (quote, collateral, now) in [(QUOTE, COLLATERAL, TDX_TIME), newer] {
        let (collateral, expected) = of_quote(quote, collateral, now);
        let verdict = tdx::verify(quote, &collateral, &expected).expect("a quote");
        assert_eq!(verdict.differences, []);
        assert_eq!(verdict.status.as_deref(), Some("UpToDate"));
    }
}

/// Its firmware is older than any that Intel still lists.
#[test]
fn a_genuine_tdx_quote_of_an_outdated_platform_is_not() {
    let quote = include_bytes!("data/tdx/tdx_quote_outdated");
    let collateral = include_bytes!("data/tdx/tdx_quote_outdated_collateral.json");
    let (collateral, expected) = of_quote(quote, collateral, 1771545600);
    let verdict = tdx::verify(quote, &collateral, &expected).expect("a quote");
    let [tdx::Difference::NotProved { reason, .. }] = &verdict.differences[..] else {
        panic!("{:?}", verdict.differences);
    };
    assert!(reason.contains("TCB level"), "{reason}");
}

#[test]
fn what_a_quote_does_not_say_is_told() {
    let (collateral, usual) = of_quote(QUOTE, COLLATERAL, TDX_TIME);
    let judge = |expected: &tdx::Expectation| {
        let verdict = tdx::verify(QUOTE, &collateral, expected).expect("a quote");
        let [difference] = &verdict.differences[..] else {
            panic!("{:?}", verdict.differences);
        };
        difference.clone()
    };
    let other = Hexadecimal([7; 48]);
    let measurements = vec![other];
    assert!(matches!(
        judge(&tdx::Expectation {
            measurements,
            ..usual.clone()
        }),
        tdx::Difference::Measurement { .. }
    ));
    for index in 0..4 {
        let mut expected = usual.clone();
        expected.registers[index] = Some(other);
        assert!(matches!(
            judge(&expected),
            tdx::Difference::Register { index: told, .. } if told == index
        ));
    }
    let report_data = Some(Hexadecimal([7; 64]));
    assert!(matches!(
        judge(&tdx::Expectation {
            report_data,
            ..usual.clone()
        }),
        tdx::Difference::ReportData { .. }
    ));
    assert!(matches!(
        judge(&tdx::Expectation {
            now: 4_000_000_000,
            ..usual
        }),
        tdx::Difference::NotProved { .. }
    ));
}

/// Where a quote of version 4 has its parts: the header and the report, their
/// signature and key, the quoting enclave's report, its signature and what it
/// authenticates.
const SIGNED: [std::ops::Range<usize>; 3] = [0..632, 636..764, 770..1252];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_changed_tdx_quote_is_accepted(part in 0..SIGNED.len(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let (collateral, expected) = of_quote(QUOTE, COLLATERAL, TDX_TIME);
        let range = SIGNED[part].clone();
        let mut bytes = QUOTE.to_vec();
        bytes[range.start + at.index(range.len())] ^= 1 << bit;
        if let Ok(verdict) = tdx::verify(&bytes, &collateral, &expected) {
            prop_assert!(!verdict.is_trusted());
        }
    }

    #[test]
    fn damaged_evidence_ends_in_words(changes in prop::collection::vec((0..QUOTE.len(), any::<u8>()), 1..16), length in 0..=QUOTE.len()) {
        let (collateral, expected) = of_quote(QUOTE, COLLATERAL, TDX_TIME);
        let mut bytes = QUOTE.to_vec();
        for (at, value) in changes {
            bytes[at] = value;
        }
        bytes.truncate(length);
        let _ = tdx::verify(&bytes, &collateral, &expected);
    }
}

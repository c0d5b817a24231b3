//! Reading and judging a report.

use serde::Serialize;

use super::{Certificates, Difference, Expectation, Key, PolicyRule, Smt, Tcb, TcbPart};
use crate::Hexadecimal;

/// The bytes of a report.
pub(super) const LENGTH: usize = 0x4a0;
/// Of which so many are signed.
const SIGNED: usize = 0x2a0;
/// ECDSA on P-384 with SHA-384.
const ECDSA_P384_SHA384: u32 = 1;

/// Why bytes are no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// Another length.
    #[error(
        "{bytes} bytes; a report has {LENGTH} (without the header that /dev/sev-guest puts before it)"
    )]
    Length {
        /// How many.
        bytes: usize,
    },
    /// A version of the format that is not known.
    #[error("it is of the unknown version {version}; 2 to 5 are understood")]
    Version {
        /// The version.
        version: u32,
    },
    /// Another algorithm.
    #[error("it is signed by the unknown algorithm {algorithm}")]
    Algorithm {
        /// Its number.
        algorithm: u32,
    },
}

/// What a report says, as far as it is judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The version of its format.
    pub version: u32,
    /// The guest's policy.
    pub policy: u64,
    /// The privilege level from which it was asked for.
    pub privilege_level: u32,
    /// The launch measurement.
    pub measurement: Hexadecimal<48>,
    /// What the guest put in.
    pub report_data: Hexadecimal<64>,
    /// What the host put in at the launch.
    pub host_data: Hexadecimal<32>,
    /// The firmware that the signing key stands for.
    pub reported_tcb: Tcb,
    /// The firmware below which the platform can't go back.
    pub committed_tcb: Tcb,
    /// The firmware at the guest's launch.
    pub launch_tcb: Tcb,
    /// The chip, unless it is masked: then zero.
    pub chip: Hexadecimal<64>,
    /// Whether the host runs two threads a core.
    pub host_threads: bool,
    #[serde(skip)]
    signing_key: u32,
}

impl Report {
    /// Reads a report. What it says is nobody's word before it is verified.
    ///
    /// # Errors
    /// If the bytes are no report whose signature could be checked.
    pub fn parse(bytes: &[u8]) -> Result<Self, ReportError> {
        if bytes.len() != LENGTH {
            return Err(ReportError::Length { bytes: bytes.len() });
        }
        let fields = Fields(bytes);
        let version = u32::from_le_bytes(fields.at(0));
        if !(2..=5).contains(&version) {
            return Err(ReportError::Version { version });
        }
        let algorithm = u32::from_le_bytes(fields.at(0x34));
        if algorithm != ECDSA_P384_SHA384 {
            return Err(ReportError::Algorithm { algorithm });
        }
        let chip: [u8; 64] = fields.at(0x1a0);
        let [family] = fields.at(0x188);
        // Version 2 does not name the processor; a Turin's number is shorter.
        let newer = match version {
            2 => is_short(&chip),
            _ => family >= TURIN,
        };
        let tcb = |at| tcb(fields.at(at), newer);
        Ok(Self {
            version,
            policy: u64::from_le_bytes(fields.at(0x08)),
            privilege_level: u32::from_le_bytes(fields.at(0x30)),
            measurement: Hexadecimal(fields.at(0x90)),
            report_data: Hexadecimal(fields.at(0x50)),
            host_data: Hexadecimal(fields.at(0xc0)),
            reported_tcb: tcb(0x180),
            committed_tcb: tcb(0x1e0),
            launch_tcb: tcb(0x1f0),
            chip: Hexadecimal(chip),
            host_threads: u64::from_le_bytes(fields.at(0x40)) & 1 == 1,
            signing_key: u32::from_le_bytes(fields.at(0x48)) >> 2 & 7,
        })
    }

    /// What the report says of its key, in words.
    fn key_words(&self) -> String {
        match self.key() {
            Ok(key) => key.to_string(),
            Err(7) => "nobody".to_owned(),
            Err(other) => format!("a key of the unknown kind {other}"),
        }
    }

    fn key(&self) -> Result<Key, u32> {
        match self.signing_key {
            0 => Ok(Key::Vcek),
            1 => Ok(Key::Vlek),
            other => Err(other),
        }
    }
}

/// The family of Turin's processors.
const TURIN: u8 = 26;

/// The bytes of a report, whose length was checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    /// The field at an offset within the report.
    fn at<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = self.0.get(at..).and_then(<[u8]>::first_chunk);
        field.copied().unwrap_or([0; N])
    }
}

/// Whether a chip's number fills only its first 8 bytes.
fn is_short(chip: &[u8; 64]) -> bool {
    let (first, rest) = chip.split_at(8);
    first.iter().any(|byte| *byte != 0) && rest.iter().all(|byte| *byte == 0)
}

/// Versions as they stand in a report: 56860, table 3.
fn tcb(bytes: [u8; 8], newer: bool) -> Tcb {
    let [first, second, third, fourth, _, _, seventh, microcode] = bytes;
    if newer {
        return Tcb {
            fmc: Some(first),
            bootloader: second,
            tee: third,
            snp: fourth,
            microcode,
        };
    }
    Tcb {
        fmc: None,
        bootloader: first,
        tee: second,
        snp: seventh,
        microcode,
    }
}

/// How a report was judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What it says. Of value only if it is trusted.
    pub report: Report,
    /// Who signed it.
    pub key: Key,
    /// What is not as expected: the report is trusted if there is nothing.
    pub differences: Vec<Difference>,
}

impl Verdict {
    /// Whether all is as expected.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Judges a report.
///
/// # Errors
/// If the bytes are no report.
pub fn verify(
    bytes: &[u8],
    certificates: &Certificates,
    expected: &Expectation,
) -> Result<Verdict, ReportError> {
    let report = Report::parse(bytes)?;
    let mut differences = certificates.differences(expected.now);
    if report.key() != Ok(certificates.key()) {
        differences.push(Difference::OtherKey {
            report: report.key_words(),
            certificate: certificates.key(),
        });
    }
    let signed = bytes.get(..SIGNED).zip(signature(bytes));
    if !signed.is_some_and(|(message, signature)| certificates.signed(message, &signature)) {
        differences.push(Difference::ReportSignature);
    }
    of_platform(&report, certificates, expected, &mut differences);
    of_guest(&report, expected, &mut differences);
    Ok(Verdict {
        report,
        key: certificates.key(),
        differences,
    })
}

/// The signature as two big-endian numbers of 48 bytes; none if the report
/// has them longer, or anything behind them.
fn signature(bytes: &[u8]) -> Option<[u8; 96]> {
    /// Each number has 72 bytes, the least significant one first.
    const NUMBER: usize = 72;
    const USED: usize = 48;
    let rest = bytes.get(SIGNED..LENGTH)?;
    let (first, rest) = rest.split_at_checked(NUMBER)?;
    let (second, rest) = rest.split_at_checked(NUMBER)?;
    let mut signature = [0; 2 * USED];
    for (number, place) in [first, second].iter().zip(signature.chunks_mut(USED)) {
        let (used, above) = number.split_at_checked(USED)?;
        if above.iter().any(|byte| *byte != 0) {
            return None;
        }
        for (byte, place) in used.iter().rev().zip(place) {
            *place = *byte;
        }
    }
    rest.iter().all(|byte| *byte == 0).then_some(signature)
}

fn of_platform(
    report: &Report,
    certificates: &Certificates,
    expected: &Expectation,
    differences: &mut Vec<Difference>,
) {
    let found = parts(&report.reported_tcb);
    if let Some(certified) = certificates.tcb() {
        for ((part, report), (_, certificate)) in found.into_iter().zip(parts(&certified)) {
            if report != certificate {
                differences.push(Difference::OtherTcb {
                    part,
                    report,
                    certificate,
                });
            }
        }
    }
    if certificates.key() == Key::Vcek {
        let chip = report.chip.0;
        let certified = certificates.chip().unwrap_or_default();
        let same = chip.starts_with(certified)
            && !certified.is_empty()
            && chip.iter().skip(certified.len()).all(|byte| *byte == 0);
        if !same {
            differences.push(Difference::OtherChip {
                report: report.chip.to_string(),
                certificate: certified.iter().map(|byte| format!("{byte:02x}")).collect(),
            });
        }
    }
    for tcb in [&report.reported_tcb, &report.launch_tcb] {
        for ((part, found), (_, least)) in parts(tcb).into_iter().zip(parts(&expected.least)) {
            let difference = Difference::TcbTooOld { part, least, found };
            if found < least && !differences.contains(&difference) {
                differences.push(difference);
            }
        }
    }
    if expected.smt == Smt::Forbidden && report.host_threads {
        differences.push(Difference::HostThreads { smt: expected.smt });
    }
}

fn parts(tcb: &Tcb) -> [(TcbPart, u8); 5] {
    [
        (TcbPart::Fmc, tcb.fmc.unwrap_or_default()),
        (TcbPart::Bootloader, tcb.bootloader),
        (TcbPart::Tee, tcb.tee),
        (TcbPart::Snp, tcb.snp),
        (TcbPart::Microcode, tcb.microcode),
    ]
}

fn of_guest(report: &Report, expected: &Expectation, differences: &mut Vec<Difference>) {
    let policy = report.policy;
    let mut rule = |bit: u32, rule| {
        if policy >> bit & 1 == 1 {
            differences.push(Difference::Policy { rule, policy });
        }
    };
    // Bits of the policy: 56860, table 9.
    rule(19, PolicyRule::Debug);
    rule(18, PolicyRule::MigrationAgent);
    if expected.smt == Smt::Forbidden {
        rule(16, PolicyRule::Smt);
    }
    if report.privilege_level != 0 {
        differences.push(Difference::PrivilegeLevel {
            found: report.privilege_level,
        });
    }
    if let Some(data) = expected
        .report_data
        .filter(|data| *data != report.report_data)
    {
        differences.push(Difference::ReportData {
            expected: data,
            found: report.report_data,
        });
    }
    if !expected.measurements.contains(&report.measurement) {
        differences.push(Difference::Measurement {
            allowed: expected.measurements.clone(),
            found: report.measurement,
        });
    }
}

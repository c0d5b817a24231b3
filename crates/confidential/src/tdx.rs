//! Intel TDX: quotes.
//!
//! A quote is a trust domain's report, signed by Intel's quoting enclave on
//! the same platform. The crate `dcap-qvl` checks the chain from there to
//! Intel's root, with collateral (certificates, revocation lists, the levels of
//! the platform's firmware) that the caller has fetched: nothing is asked over
//! a network here. What the quote says is compared with what was expected.

use dcap_qvl::quote::{Quote, Report as QuoteReport, TDAttributes, TDReport10};
use dcap_qvl::verify::QuoteVerifier;
pub use dcap_qvl::{QuoteCollateralV3 as Collateral, TcbStatus};
use serde::Serialize;

use crate::Hexadecimal;

/// The largest quote.
const MAX_QUOTE: usize = 64 << 10;
/// The largest collateral.
const MAX_COLLATERAL: usize = 4 << 20;

/// Why evidence can't be judged.
#[derive(Debug, thiserror::Error)]
pub enum QuoteError {
    /// Too large.
    #[error("{what} of {bytes} bytes, at most {limit} are read")]
    TooLarge {
        /// Which.
        what: &'static str,
        /// How many.
        bytes: usize,
        /// The bound.
        limit: usize,
    },
    /// Not a quote.
    #[error("the quote can't be read: {reason}")]
    Malformed {
        /// The parser's reason.
        reason: String,
    },
    /// Not a trust domain's.
    #[error("the quote is an SGX enclave's, not a trust domain's")]
    NotTdx,
    /// Not collateral.
    #[error(
        "the collateral can't be read: {0}; JSON with tcb_info, qe_identity, the chains and the revocation lists is needed, as `dcap-qvl` and Intel's PCS have it"
    )]
    Collateral(serde_json::Error),
}

/// What a quote must say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expectation {
    /// The measurements of the initial memory (MRTD) that are allowed.
    pub measurements: Vec<Hexadecimal<48>>,
    /// The run-time registers (RTMR 0 to 3); those without a value are not
    /// looked at.
    pub registers: [Option<Hexadecimal<48>>; 4],
    /// What the guest must have put in: [`report_data`](crate::report_data).
    pub report_data: Option<Hexadecimal<64>>,
    /// States of the platform's firmware that are accepted beside `UpToDate`.
    pub accepted: Vec<String>,
    /// Seconds since 1970-01-01T00:00:00Z: when collateral must be valid.
    pub now: u64,
}

/// A reason not to trust a quote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Difference {
    /// The chain from the quote to Intel's root does not hold.
    #[error(
        "the quote is not proved to be a genuine platform's at {now} (seconds since 1970): {reason}"
    )]
    NotProved {
        /// The step that failed.
        reason: String,
        /// The time it was judged for.
        now: u64,
    },
    /// The platform's firmware.
    #[error(
        "the platform's firmware is {status}, only {accepted} is accepted{}",
        advisory_words(advisories)
    )]
    Firmware {
        /// Its state, by Intel's words.
        status: String,
        /// What is accepted.
        accepted: String,
        /// Intel's advisories about it.
        advisories: Vec<String>,
    },
    /// The host can look into it.
    #[error(
        "the trust domain runs under debugging (attributes {attributes:#x}): the host can read and change it"
    )]
    Debug {
        /// Its attributes.
        attributes: u64,
    },
    /// It can be moved.
    #[error("the trust domain can be migrated (attributes {attributes:#x})")]
    Migratable {
        /// Its attributes.
        attributes: u64,
    },
    /// Another initial memory.
    #[error("the initial memory measures {found} (MRTD), which is none of the {} allowed: another firmware", allowed.len())]
    Measurement {
        /// What is allowed.
        allowed: Vec<Hexadecimal<48>>,
        /// What the quote says.
        found: Hexadecimal<48>,
    },
    /// A run-time register.
    #[error("run-time register {index} holds {found}, {expected} is expected: {}", register_words(*index))]
    Register {
        /// Which, 0 to 3.
        index: usize,
        /// What is expected.
        expected: Hexadecimal<48>,
        /// What the quote says.
        found: Hexadecimal<48>,
    },
    /// Another question, or another channel.
    #[error(
        "the quote holds the data {found}, {expected} is expected: it answers another question or was made for another channel"
    )]
    ReportData {
        /// From nonce and channel key.
        expected: Hexadecimal<64>,
        /// What the quote says.
        found: Hexadecimal<64>,
    },
}

fn advisory_words(advisories: &[String]) -> String {
    match advisories {
        [] => String::new(),
        some => format!(" ({})", some.join(", ")),
    }
}

/// What OVMF and Linux measure into a register.
fn register_words(index: usize) -> &'static str {
    match index {
        0 => "another configuration of the firmware or the machine",
        1 => "another kernel or boot loader",
        2 => "another command line or initial file system",
        _ => "something else was measured while it ran",
    }
}

/// What a quote says, as far as it is judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The version of the quote's format.
    pub version: u16,
    /// The trust domain's attributes.
    pub attributes: u64,
    /// MRTD.
    pub measurement: Hexadecimal<48>,
    /// RTMR 0 to 3.
    pub registers: [Hexadecimal<48>; 4],
    /// What the guest put in.
    pub report_data: Hexadecimal<64>,
}

/// How a quote was judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// What it says. Of value only if it is trusted.
    pub report: Report,
    /// The state of the platform's firmware, if the chain holds.
    pub status: Option<String>,
    /// Intel's advisories about it.
    pub advisories: Vec<String>,
    /// What is not as expected: the quote is trusted if there is nothing.
    pub differences: Vec<Difference>,
}

impl Verdict {
    /// Whether all is as expected.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Reads collateral: the JSON of `dcap-qvl`.
///
/// # Errors
/// If it is none.
pub fn collateral(json: &[u8]) -> Result<Collateral, QuoteError> {
    if json.len() > MAX_COLLATERAL {
        return Err(QuoteError::TooLarge {
            what: "collateral",
            bytes: json.len(),
            limit: MAX_COLLATERAL,
        });
    }
    serde_json::from_slice(json).map_err(QuoteError::Collateral)
}

/// Judges a quote.
///
/// # Errors
/// If the bytes are no quote of a trust domain.
pub fn verify(
    bytes: &[u8],
    collateral: &Collateral,
    expected: &Expectation,
) -> Result<Verdict, QuoteError> {
    let report = parse(bytes)?;
    let mut differences = Vec::new();
    let (mut status, mut advisories) = (None, Vec::new());
    // Debugging is told by a difference of its own.
    let verifier = QuoteVerifier::new_prod().allow_debug(true);
    match verifier.verify(bytes, collateral, expected.now) {
        Ok(verified) => {
            differences.extend(of_firmware(
                &verified.status,
                &verified.advisory_ids,
                &expected.accepted,
            ));
            (status, advisories) = (Some(verified.status), verified.advisory_ids);
        }
        Err(error) => differences.push(Difference::NotProved {
            reason: format!("{error:#}"),
            now: expected.now,
        }),
    }
    compare(&report, expected, &mut differences);
    Ok(Verdict {
        report,
        status,
        advisories,
        differences,
    })
}

/// Whether the platform's firmware is in a state that is accepted.
fn of_firmware(status: &str, advisories: &[String], accepted: &[String]) -> Option<Difference> {
    let up_to_date = TcbStatus::UpToDate.to_string();
    if status == up_to_date || accepted.iter().any(|one| one == status) {
        return None;
    }
    let others = accepted.iter().map(String::as_str);
    let accepted: Vec<&str> = std::iter::once(up_to_date.as_str()).chain(others).collect();
    Some(Difference::Firmware {
        status: status.to_owned(),
        accepted: accepted.join(" or "),
        advisories: advisories.to_vec(),
    })
}

fn parse(bytes: &[u8]) -> Result<Report, QuoteError> {
    if bytes.len() > MAX_QUOTE {
        return Err(QuoteError::TooLarge {
            what: "a quote",
            bytes: bytes.len(),
            limit: MAX_QUOTE,
        });
    }
    let quote = Quote::parse(bytes).map_err(|error| QuoteError::Malformed {
        reason: format!("{error:#}"),
    })?;
    let report: &TDReport10 = match &quote.report {
        QuoteReport::SgxEnclave(_) => return Err(QuoteError::NotTdx),
        report => report.as_td10().ok_or(QuoteError::NotTdx)?,
    };
    Ok(Report {
        version: quote.header.version,
        attributes: u64::from_le_bytes(report.td_attributes),
        measurement: Hexadecimal(report.mr_td),
        registers: [
            Hexadecimal(report.rt_mr0),
            Hexadecimal(report.rt_mr1),
            Hexadecimal(report.rt_mr2),
            Hexadecimal(report.rt_mr3),
        ],
        report_data: Hexadecimal(report.report_data),
    })
}

fn compare(report: &Report, expected: &Expectation, differences: &mut Vec<Difference>) {
    let attributes = report.attributes;
    if let Ok(parsed) = TDAttributes::parse(attributes.to_le_bytes()) {
        if parsed.tud != 0 {
            differences.push(Difference::Debug { attributes });
        }
        if parsed.sec.migratable {
            differences.push(Difference::Migratable { attributes });
        }
    }
    if !expected.measurements.contains(&report.measurement) {
        differences.push(Difference::Measurement {
            allowed: expected.measurements.clone(),
            found: report.measurement,
        });
    }
    let registers = expected.registers.iter().zip(&report.registers);
    for (index, (expected, found)) in registers.enumerate() {
        if let Some(expected) = expected.filter(|expected| expected != found) {
            differences.push(Difference::Register {
                index,
                expected,
                found: *found,
            });
        }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firmware_in_another_state_is_told_unless_accepted() {
        let advisories = ["INTEL-SA-1".to_owned()];
        let accepted = ["SWHardeningNeeded".to_owned()];
        assert_eq!(of_firmware("UpToDate", &[], &[]), None);
        assert_eq!(of_firmware("SWHardeningNeeded", &[], &accepted), None);
        let told = of_firmware("OutOfDate", &advisories, &accepted).expect("a difference");
        assert_eq!(
            told.to_string(),
            "the platform's firmware is OutOfDate, only UpToDate or SWHardeningNeeded is accepted (INTEL-SA-1)"
        );
    }
}

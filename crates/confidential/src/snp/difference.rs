//! What a report is not as it should be.

use serde::Serialize;

use super::{Key, Smt};
use crate::Hexadecimal;

/// A reason not to trust a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Difference {
    /// No certificate of the issuer was given or is built in.
    #[error(
        "no certificate of {issuer}, which certifies {subject}, was given, and it is none of AMD's roots (Milan, Genoa, Turin)"
    )]
    UnknownIssuer {
        /// The certificate.
        subject: String,
        /// Who it names.
        issuer: String,
    },
    /// A certificate's signature is wrong.
    #[error("the certificate of {subject} is not signed by {issuer}")]
    CertificateSignature {
        /// The certificate.
        subject: String,
        /// Whose key should have signed it.
        issuer: String,
    },
    /// A certificate is not valid at that time.
    #[error(
        "the certificate of {subject} is valid from {from} to {until}, not at {now} (seconds since 1970)"
    )]
    CertificateTime {
        /// The certificate.
        subject: String,
        /// Its first second.
        from: u64,
        /// Its last.
        until: u64,
        /// When it should have been valid.
        now: u64,
    },
    /// The report is signed by another kind of key than is certified.
    #[error(
        "the report says that it is signed by {report}, the certificate given is of {certificate}"
    )]
    OtherKey {
        /// What the report says.
        report: String,
        /// What was given.
        certificate: Key,
    },
    /// The report's signature is wrong.
    #[error(
        "the report is not signed by the certified key: a byte of it was changed, or it comes from another processor"
    )]
    ReportSignature,
    /// The report and the certificate are of different firmware.
    #[error(
        "{part} of the platform is of version {report} in the report and {certificate} in the certificate: the certificate is that of another state of this platform"
    )]
    OtherTcb {
        /// Which part.
        part: TcbPart,
        /// What the report says.
        report: u8,
        /// What the certificate says.
        certificate: u8,
    },
    /// The report comes from another chip than is certified.
    #[error("the report comes from the chip {report}, the certificate is of {certificate}")]
    OtherChip {
        /// What the report says.
        report: String,
        /// What the certificate says.
        certificate: String,
    },
    /// Firmware is too old.
    #[error("{part} of the platform is of version {found}, at least {least} is demanded")]
    TcbTooOld {
        /// Which part.
        part: TcbPart,
        /// The least version.
        least: u8,
        /// What the report says.
        found: u8,
    },
    /// The policy under which the guest was launched allows too much.
    #[error("the guest's policy {policy:#x} {rule}")]
    Policy {
        /// The rule.
        rule: PolicyRule,
        /// The policy.
        policy: u64,
    },
    /// The host's processor runs two threads a core.
    #[error("the host runs two threads a core, which is forbidden here (--smt {smt:?})")]
    HostThreads {
        /// What was demanded.
        smt: Smt,
    },
    /// The report was asked for by software of a lower privilege.
    #[error(
        "the report was asked for from privilege level {found}, only level 0 is the kernel that was measured"
    )]
    PrivilegeLevel {
        /// The level.
        found: u32,
    },
    /// Another question, or another channel.
    #[error(
        "the report holds the data {found}, {expected} is expected: it answers another question or was made for another channel"
    )]
    ReportData {
        /// From nonce and channel key.
        expected: Hexadecimal<64>,
        /// What the report says.
        found: Hexadecimal<64>,
    },
    /// Something else was launched.
    #[error("the guest was launched with the measurement {found}, which is of none of the {} allowed: another firmware, kernel, initial file system or command line, or another number or model of processors", allowed.len())]
    Measurement {
        /// What is allowed.
        allowed: Vec<Hexadecimal<48>>,
        /// What the report says.
        found: Hexadecimal<48>,
    },
}

/// A part of a platform's firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TcbPart {
    /// The FMC.
    Fmc,
    /// The boot loader of the security processor.
    Bootloader,
    /// Its operating system.
    Tee,
    /// The SEV-SNP firmware.
    Snp,
    /// The microcode.
    Microcode,
}

impl std::fmt::Display for TcbPart {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Fmc => "the FMC",
            Self::Bootloader => "the boot loader",
            Self::Tee => "the security processor's system",
            Self::Snp => "the SEV-SNP firmware",
            Self::Microcode => "the microcode",
        })
    }
}

/// What a policy must not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyRule {
    /// The host may read and write the guest.
    Debug,
    /// A migration agent may move it, and so holds its keys.
    MigrationAgent,
    /// Two threads of a core may be another's.
    Smt,
}

impl std::fmt::Display for PolicyRule {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Debug => "allows debugging: the host can read and change the guest",
            Self::MigrationAgent => {
                "allows a migration agent, which could move the guest to where it is not protected"
            }
            Self::Smt => "allows two threads a core, which is forbidden here",
        })
    }
}

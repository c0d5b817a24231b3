//! What a report is compared with.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::Hexadecimal;

/// Versions of the parts of a platform's firmware.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Tcb {
    /// Of the FMC, from Turin on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fmc: Option<u8>,
    /// Of the security processor's boot loader.
    pub bootloader: u8,
    /// Of its operating system.
    pub tee: u8,
    /// Of the SEV-SNP firmware.
    pub snp: u8,
    /// Of the microcode.
    pub microcode: u8,
}

/// Why a text is no set of versions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{part:?} is no version of a part: write PART=NUMBER,…, the parts are fmc, bootloader, tee, snp and microcode, each at most once and up to 255"
)]
pub struct TcbError {
    /// What is wrong.
    pub part: String,
}

impl FromStr for Tcb {
    type Err = TcbError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut tcb = Self::default();
        let mut given = Vec::new();
        for part in text.split(',') {
            let wrong = || TcbError {
                part: part.to_owned(),
            };
            let (name, number) = part.split_once('=').ok_or_else(wrong)?;
            let number: u8 = number.parse().map_err(|_| wrong())?;
            if given.contains(&name) {
                return Err(wrong());
            }
            given.push(name);
            match name {
                "fmc" => tcb.fmc = Some(number),
                "bootloader" => tcb.bootloader = number,
                "tee" => tcb.tee = number,
                "snp" => tcb.snp = number,
                "microcode" => tcb.microcode = number,
                _ => return Err(wrong()),
            }
        }
        Ok(tcb)
    }
}

impl fmt::Display for Tcb {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(fmc) = self.fmc {
            write!(formatter, "fmc={fmc},")?;
        }
        let Self {
            bootloader,
            tee,
            snp,
            microcode,
            ..
        } = self;
        write!(
            formatter,
            "bootloader={bootloader},tee={tee},snp={snp},microcode={microcode}"
        )
    }
}

/// Whether a guest may run on hosts whose cores run two threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Smt {
    /// It may.
    #[default]
    Allowed,
    /// It must not.
    Forbidden,
}

/// What a report must say. Debugging and migration agents are never allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expectation {
    /// The launch measurements of the builds that are allowed.
    pub measurements: Vec<Hexadecimal<48>>,
    /// What the guest must have put in: [`report_data`](crate::report_data).
    pub report_data: Option<Hexadecimal<64>>,
    /// The least versions of the platform's firmware.
    pub least: Tcb,
    /// Whether two threads a core are allowed.
    pub smt: Smt,
    /// Seconds since 1970-01-01T00:00:00Z: when certificates must be valid.
    pub now: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_shown() {
        let tcb: Tcb = "snp=8,microcode=115,bootloader=3"
            .parse()
            .expect("versions");
        assert_eq!(tcb.to_string(), "bootloader=3,tee=0,snp=8,microcode=115");
        assert_eq!(tcb.to_string().parse(), Ok(tcb));
        for wrong in ["", "snp", "snp=256", "snp=-1", "snp=1,snp=2", "firmware=1"] {
            assert!(wrong.parse::<Tcb>().is_err(), "{wrong}");
        }
    }
}

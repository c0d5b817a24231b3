//! `secmon verify snp`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use secmon_confidential::snp::{self, Certificates, Expectation, Smt};

use super::arguments::SnpArguments;
use crate::arguments::Format;

pub fn verify(arguments: &SnpArguments, format: Format) -> Result<ExitCode> {
    let report = super::read(&arguments.report)?;
    let mut files = Vec::new();
    for path in &arguments.certificates {
        files.push(super::read(path)?);
    }
    let certificates =
        Certificates::read(files.iter().map(Vec::as_slice)).context("the certificates")?;
    let expected = Expectation {
        measurements: arguments.measurement.clone(),
        report_data: arguments.binding.expected()?,
        least: arguments.least_tcb.unwrap_or_default(),
        smt: if arguments.no_smt {
            Smt::Forbidden
        } else {
            Smt::Allowed
        },
        now: super::time(arguments.at)?,
    };
    let verdict = snp::verify(&report, &certificates, &expected)
        .with_context(|| format!("the report {}", arguments.report.display()))?;
    let said = &verdict.report;
    let facts = [
        ("measurement", said.measurement.to_string()),
        ("report data", said.report_data.to_string()),
        ("policy", format!("{:#x}", said.policy)),
        ("firmware", said.reported_tcb.to_string()),
        ("chip", said.chip.to_string()),
        ("signed by", verdict.key.to_string()),
    ];
    let mut not_checked = vec!["whether AMD has revoked a certificate: its lists are not fetched"];
    if expected.report_data.is_none() {
        not_checked.push("for whom and when the report was made (--unbound)");
    }
    if arguments.least_tcb.is_none() {
        not_checked.push("how old the platform's firmware is (--least-tcb)");
    }
    super::show(format, &verdict, &verdict.differences, &facts, &not_checked)
}

//! `secmon verify tdx`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use secmon_confidential::tdx::{self, Expectation};

use super::arguments::TdxArguments;
use crate::arguments::Format;

pub fn verify(arguments: &TdxArguments, format: Format) -> Result<ExitCode> {
    let quote = super::read(&arguments.quote)?;
    let collateral = super::read(&arguments.collateral)?;
    let collateral =
        tdx::collateral(&collateral).with_context(|| arguments.collateral.display().to_string())?;
    let TdxArguments {
        rtmr0,
        rtmr1,
        rtmr2,
        rtmr3,
        ..
    } = arguments;
    let expected = Expectation {
        measurements: arguments.mrtd.clone(),
        registers: [*rtmr0, *rtmr1, *rtmr2, *rtmr3],
        report_data: arguments.binding.expected()?,
        accepted: arguments.accept.clone(),
        now: super::time(arguments.at)?,
    };
    let verdict = tdx::verify(&quote, &collateral, &expected)
        .with_context(|| format!("the quote {}", arguments.quote.display()))?;
    let said = &verdict.report;
    let mut facts = vec![
        ("mrtd", said.measurement.to_string()),
        ("report data", said.report_data.to_string()),
        ("attributes", format!("{:#x}", said.attributes)),
    ];
    for (name, value) in ["rtmr0", "rtmr1", "rtmr2", "rtmr3"]
        .into_iter()
        .zip(said.registers)
    {
        facts.push((name, value.to_string()));
    }
    if let Some(status) = &verdict.status {
        facts.push(("firmware", status.clone()));
    }
    let mut not_checked = Vec::new();
    if expected.report_data.is_none() {
        not_checked.push("for whom and when the quote was made (--unbound)");
    }
    if expected.registers.iter().any(Option::is_none) {
        not_checked.push("run-time registers that were not given (--rtmr0 to --rtmr3)");
    }
    super::show(format, &verdict, &verdict.differences, &facts, &not_checked)
}

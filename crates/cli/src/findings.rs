//! What is said after a table: what could not be read, and whether that is
//! an error.

use std::fmt::Write;

use anyhow::{Result, bail};
use secmon_guest::{Diagnostic, Guest};

use crate::query::{Outcome, Query};
use crate::report::Reporter;

/// How many diagnostics are said unless all are asked for.
const SAID: usize = 3;

/// What could not be read on the way, whoever says so.
#[derive(Debug, Default)]
pub struct Told {
    /// A line for each of those that are known.
    pub lines: Vec<String>,
    /// How many there are.
    pub total: u64,
    /// Reads that were made again because the guest changed meanwhile.
    pub torn_reads: u64,
}

impl From<&Guest> for Told {
    fn from(guest: &Guest) -> Self {
        let diagnostics = guest.diagnostics();
        let list = diagnostics.list();
        Self {
            total: list.len() as u64 + diagnostics.dropped(),
            lines: list.iter().map(describe).collect(),
            torn_reads: diagnostics.torn_reads(),
        }
    }
}

/// Tells what a listing lacks.
///
/// # Errors
/// If the table could not be made, if it is empty for what could not be read,
/// or, when `strict`, if anything at all could not be read.
pub fn report(
    told: &Told,
    query: &Query,
    outcome: Outcome,
    strict: bool,
    reporter: Reporter,
) -> Result<()> {
    let summary = &outcome.summary;
    if summary.rows_with_unreadable > 0 {
        let mut columns = String::new();
        for (column, count) in &summary.unreadable {
            let comma = if columns.is_empty() { "" } else { ", " };
            // Writing to a string does not fail.
            let _ = write!(columns, "{comma}{column} {count}");
        }
        reporter.warn(format_args!(
            "{} could not be read in {} ({columns}); --format json says why",
            counted(
                summary.unreadable.iter().map(|(_, count)| count).sum(),
                "value"
            ),
            counted(summary.rows_with_unreadable, "row"),
        ));
    }
    if outcome.undecided > 0 {
        reporter.warn(format_args!(
            "{} left out because what --filter looks at could not be read in them",
            counted(outcome.undecided, "row")
        ));
    }
    if let Some(error) = outcome.error {
        tell_diagnostics(told, reporter);
        return Err(error);
    }
    if query.table().name() == "diagnostics" {
        // Its rows are what would be told.
        if strict && summary.rows > 0 {
            bail!("not everything could be read (--strict), see the rows");
        }
        return Ok(());
    }
    let total = tell_diagnostics(told, reporter);
    if summary.rows == 0 && total > 0 {
        bail!("nothing could be listed, see the warnings");
    }
    if summary.rows == 0 && !query.pids().is_empty() {
        let pids: Vec<String> = query.pids().iter().map(u64::to_string).collect();
        reporter.warn(format_args!("no row for process {}", pids.join(", ")));
    }
    if strict && (total > 0 || summary.rows_with_unreadable > 0 || outcome.undecided > 0) {
        bail!("not everything could be read (--strict), see the warnings");
    }
    Ok(())
}

/// Says what could not be read, and how much that is.
fn tell_diagnostics(told: &Told, reporter: Reporter) -> u64 {
    let Told {
        lines,
        total,
        torn_reads,
    } = told;
    if *total > 0 {
        reporter.warn(format_args!(
            "this listing may be incomplete: {} could not be read or did not agree",
            counted(*total, "thing")
        ));
        let said = if reporter.verbose { lines.len() } else { SAID };
        for line in lines.iter().take(said) {
            reporter.warn(line);
        }
        if *total > said as u64 {
            reporter.warn(format_args!(
                "{} more: -v says all that are kept, and so does `secmon diagnostics`",
                total - said as u64
            ));
        }
    }
    if *torn_reads > 0 {
        reporter.note(format_args!(
            "{} while the guest changed what was read, and made again",
            counted(*torn_reads, "read")
        ));
    }
    *total
}

fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

fn describe(diagnostic: &Diagnostic) -> String {
    let Diagnostic {
        table,
        subject,
        address,
        reason,
    } = diagnostic;
    match address {
        Some(address) => format!("{table}: {subject} at {address}: {reason}"),
        None => format!("{table}: {subject}: {reason}"),
    }
}

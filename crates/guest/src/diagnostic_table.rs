//! The table `diagnostics`: what could not be read of a guest, and why.

use std::collections::HashSet;
use std::ops::ControlFlow;

use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Request, Selection, Shown, TableError, TableOf, Value,
    tables,
};

const TABLE: &str = "diagnostics";

/// The most cells of one column that are listed one by one.
const CELLS: u64 = 100;

const fn column(
    name: &'static str,
    kind: Kind,
    meaning: &'static str,
    value: fn(&Guest, &Diagnostic) -> Value,
) -> Column<Diagnostic> {
    Column {
        name,
        kind,
        cost: Cost::UserPages,
        shown: Shown::Always,
        meaning,
        value,
    }
}

/// The table `diagnostics`.
pub static DIAGNOSTICS: TableOf<Diagnostic> = TableOf {
    name: TABLE,
    aliases: &[],
    meaning: "What could not be read of this guest and why: reads all other tables in full. A \
              last row counts reads that were torn, that is changed by the guest meanwhile, and \
              made again.",
    columns: &[
        column(
            "table",
            Kind::Text,
            "The table in question.",
            |_, diagnostic| diagnostic.table.into(),
        ),
        column(
            "subject",
            Kind::Text,
            "What was read, by kernel names, or the row and column that lack a value.",
            |_, diagnostic| diagnostic.subject.clone().into(),
        ),
        column(
            "address",
            Kind::Address,
            "The kernel address in question; null where there is none.",
            |_, diagnostic| diagnostic.address.into(),
        ),
        column(
            "reason",
            Kind::Text,
            "What happened, and what it means for the table.",
            |_, diagnostic| diagnostic.reason.clone().into(),
        ),
    ],
    items: diagnostics,
};

fn diagnostics(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Diagnostic>,
) -> Result<(), TableError> {
    let mut cells = Vec::new();
    for table in tables().iter().filter(|table| table.name() != TABLE) {
        let columns = table.columns();
        let mut missing = vec![0_u64; columns.len()];
        let request = Request {
            columns: None,
            selection: selection.clone(),
        };
        let outcome = table.read(guest, &request, &mut |row| {
            for ((info, value), missing) in columns.iter().zip(&row.values).zip(&mut missing) {
                let Value::Unreadable(reason) = value else {
                    continue;
                };
                *missing += 1;
                if *missing > CELLS {
                    continue;
                }
                let address = columns.iter().zip(&row.values).find_map(|(info, value)| {
                    match (info.name, value) {
                        ("address", Value::Address(address)) => Some(*address),
                        _ => None,
                    }
                });
                // The first column is what a row is known by.
                let row = match (columns.first(), row.values.first()) {
                    (Some(first), Some(value)) if first.name != info.name => {
                        format!("{} of {} {value}", info.name, first.name)
                    }
                    _ => info.name.to_owned(),
                };
                cells.push(Diagnostic {
                    table: table.name(),
                    subject: row,
                    address: address.map(secmon_memory::VirtualAddress::new),
                    reason: reason.to_string(),
                });
            }
            ControlFlow::Continue(())
        });
        for (info, missing) in columns.iter().zip(missing) {
            if missing > CELLS {
                cells.push(Diagnostic {
                    table: table.name(),
                    subject: info.name.to_owned(),
                    address: None,
                    reason: format!("{} more rows lack this value", missing - CELLS),
                });
            }
        }
        if let Err(error) = outcome {
            cells.push(Diagnostic {
                table: table.name(),
                subject: "the whole table".into(),
                address: None,
                reason: error.to_string(),
            });
        }
    }
    let mut known = HashSet::new();
    let all = guest.diagnostics().list().into_iter().chain(cells);
    for diagnostic in all.chain(counts(guest)) {
        if known.insert(diagnostic.clone()) && sink(diagnostic).is_break() {
            break;
        }
    }
    Ok(())
}

/// The counters as rows.
fn counts(guest: &Guest) -> impl Iterator<Item = Diagnostic> {
    let dropped = guest.diagnostics().dropped();
    let torn = guest.diagnostics().torn_reads();
    let row = |subject: &str, reason: String| Diagnostic {
        table: TABLE,
        subject: subject.to_owned(),
        address: None,
        reason,
    };
    let dropped =
        (dropped > 0).then(|| row("further diagnostics", format!("{dropped} were not kept")));
    let torn = (torn > 0).then(|| {
        row(
            "torn reads",
            format!("{torn} reads changed while they were made and were made again"),
        )
    });
    dropped.into_iter().chain(torn)
}

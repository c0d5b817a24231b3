//! Answers one request about a target.

use std::ops::ControlFlow;

use secmon_guest::{Guest, Request as Rows, Selection, Table};
use secmon_memory::{PAGE_SIZE, TableLevel, VirtualAddress};

use super::credit::Permit;
use super::place::{self, Found};
use crate::protocol::{
    Cell, ColumnDescription, DiagnosticEntry, End, Place, Query, Refusal, Reply, Scalar,
    TableDescription, WalkEnd, WalkEntry,
};

/// A message of rows is sent once it has about so many bytes.
const BATCH_BYTES: usize = 48 << 10;
/// Or so many rows.
const BATCH_ROWS: usize = 512;
/// Bytes of memory in one message.
const PIECE: usize = 64 << 10;
/// The most diagnostics that are sent for a request; all are counted.
const MAX_DIAGNOSTICS: usize = 64;
/// The most addresses of one request.
const MAX_PLACES: usize = 64;

/// Where an answer goes.
pub(super) trait Sink {
    /// Waits until one message of rows or bytes may be sent.
    fn permit(&self) -> Permit;
    /// Sends a message.
    fn send(&self, reply: &Reply) -> Result<(), Unsent>;
}

/// Why a message was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsent {
    /// The session is over.
    Over,
    /// It is larger than a message may be.
    TooLarge,
}

/// A query that was checked.
pub(super) struct Checked {
    table: &'static dyn Table,
    request: Rows,
    limit: u64,
}

/// Checks a query against the tables.
pub(super) fn check(query: &Query) -> Result<Checked, Refusal> {
    let table = secmon_guest::table(&query.table).ok_or_else(|| Refusal::UnknownTable {
        name: query.table.clone(),
    })?;
    let known = table.columns();
    let columns = match &query.columns {
        None => None,
        Some(names) if names.len() > 4 * known.len() => {
            return Err(Refusal::TooMuch {
                what: format!("{} columns", names.len()),
            });
        }
        Some(names) => Some(
            names
                .iter()
                .map(|name| {
                    known
                        .iter()
                        .position(|column| column.name == name)
                        .ok_or_else(|| Refusal::UnknownColumn {
                            table: table.name().to_owned(),
                            column: name.clone(),
                        })
                })
                .collect::<Result<Vec<usize>, Refusal>>()?,
        ),
    };
    Ok(Checked {
        table,
        request: Rows {
            columns,
            selection: Selection {
                pids: query.pids.clone(),
                all_namespaces: query.all_namespaces,
                ..Selection::default()
            },
        },
        limit: query.limit.unwrap_or(u64::MAX),
    })
}

/// Sends the rows of a query and what could not be read for it.
pub(super) fn rows(id: u32, query: &Checked, guest: &Guest, sink: &dyn Sink) -> End {
    let mut batch = Batch {
        id,
        rows: Vec::new(),
        bytes: 0,
        sent: 0,
        too_large: false,
        sink,
    };
    let mut left = query.limit;
    let mut read = Ok(());
    if left > 0 {
        read = query.table.read(guest, &query.request, &mut |row| {
            left = left.saturating_sub(1);
            let cells = row.values.iter().map(Cell::from).collect();
            match batch.push(cells) {
                ControlFlow::Continue(()) if left > 0 => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            }
        });
    }
    let _ = batch.flush();
    let Batch {
        sent, too_large, ..
    } = batch;
    let mut end = diagnose(id, guest, sink);
    end.sent = sent;
    end.error = match read {
        Err(error) => Some(error.to_string()),
        Ok(()) if too_large => Some(format!(
            "the listing ended after {sent} rows: what follows is larger than a message may be; \
             ask for fewer columns"
        )),
        Ok(()) => None,
    };
    end
}

/// Sends the diagnostics; gives their numbers.
fn diagnose(id: u32, guest: &Guest, sink: &dyn Sink) -> End {
    let diagnostics = guest.diagnostics();
    let list = diagnostics.list();
    let total = (list.len() as u64).saturating_add(diagnostics.dropped());
    let entries: Vec<DiagnosticEntry> = list
        .into_iter()
        .take(MAX_DIAGNOSTICS)
        .map(|diagnostic| DiagnosticEntry {
            table: diagnostic.table.to_owned(),
            subject: diagnostic.subject,
            address: diagnostic.address.map(VirtualAddress::as_u64),
            reason: diagnostic.reason,
        })
        .collect();
    if !entries.is_empty() {
        let _ = sink.send(&Reply::Diagnostics { id, entries });
    }
    End {
        diagnostics: total,
        torn_reads: diagnostics.torn_reads(),
        ..End::default()
    }
}

/// Rows on their way.
struct Batch<'a> {
    id: u32,
    rows: Vec<Vec<Cell>>,
    bytes: usize,
    sent: u64,
    /// Whether rows were too large to be sent.
    too_large: bool,
    sink: &'a dyn Sink,
}

impl Batch<'_> {
    fn push(&mut self, row: Vec<Cell>) -> ControlFlow<()> {
        self.bytes = self.bytes.saturating_add(row.iter().map(weight).sum());
        self.rows.push(row);
        if self.bytes >= BATCH_BYTES || self.rows.len() >= BATCH_ROWS {
            self.flush()
        } else {
            ControlFlow::Continue(())
        }
    }

    fn flush(&mut self) -> ControlFlow<()> {
        if self.rows.is_empty() {
            return ControlFlow::Continue(());
        }
        let rows = std::mem::take(&mut self.rows);
        self.bytes = 0;
        if self.sink.permit() == Permit::Stop {
            return ControlFlow::Break(());
        }
        let count = rows.len() as u64;
        match self.sink.send(&Reply::Rows { id: self.id, rows }) {
            Ok(()) => {
                self.sent = self.sent.saturating_add(count);
                ControlFlow::Continue(())
            }
            Err(unsent) => {
                self.too_large = unsent == Unsent::TooLarge;
                ControlFlow::Break(())
            }
        }
    }
}

/// About how many bytes a cell takes.
fn weight(cell: &Cell) -> usize {
    let of = |scalar: &Scalar| match scalar {
        Scalar::Text(bytes) => bytes.len().saturating_add(4),
        Scalar::Unreadable(reason) => reason.len().saturating_add(4),
        _ => 12,
    };
    match cell {
        Cell::One(scalar) => of(scalar),
        Cell::List(scalars) => scalars.iter().map(of).fold(4, usize::saturating_add),
    }
}

/// Sends bytes of memory, up to the first page that can't be read.
pub(super) fn bytes(id: u32, found: &Found, length: u64, sink: &dyn Sink) -> End {
    let mut end = End::default();
    let mut piece = Vec::with_capacity(PIECE);
    let mut start = found.start();
    let mut next = found.start();
    loop {
        let done = end.sent.saturating_add(piece.len() as u64);
        let left = length.saturating_sub(done);
        if left == 0 || piece.len() >= PIECE || end.error.is_some() {
            if !piece.is_empty() {
                if sink.permit() == Permit::Stop {
                    break;
                }
                let count = piece.len() as u64;
                let bytes = std::mem::replace(&mut piece, Vec::with_capacity(PIECE));
                let reply = Reply::Bytes {
                    id,
                    address: start,
                    bytes,
                };
                if sink.send(&reply).is_err() {
                    break;
                }
                end.sent = end.sent.saturating_add(count);
                start = next;
            }
            if left == 0 || end.error.is_some() {
                break;
            }
            continue;
        }
        let in_page = PAGE_SIZE - next % PAGE_SIZE;
        let count = usize::try_from(in_page.min(left)).unwrap_or(PIECE);
        let before = piece.len();
        piece.resize(before.saturating_add(count), 0);
        let read = found.read(next, piece.get_mut(before..).unwrap_or_default());
        match (read, next.checked_add(count as u64)) {
            (Ok(()), Some(after)) => next = after,
            (Ok(()), None) => {
                end.error = Some("the end of the address space is reached".to_owned());
            }
            (Err(reason), _) => {
                piece.truncate(before);
                end.error = Some(format!("reading stopped at {next:#x}: {reason}"));
            }
        }
    }
    end
}

/// Sends the walk of each address.
pub(super) fn walks(
    id: u32,
    guest: &Guest,
    places: &[Place],
    sink: &dyn Sink,
) -> Result<End, Refusal> {
    if places.len() > MAX_PLACES {
        return Err(Refusal::TooMuch {
            what: format!("{} addresses, at most {MAX_PLACES}", places.len()),
        });
    }
    let mut found = Vec::new();
    for place in places {
        match place::find(guest, place)? {
            Found::Virtual(space, address) => found.push((space, address)),
            Found::Physical(_, address) => {
                return Err(Refusal::NoPlace {
                    reason: format!("{address:#x} is a physical address already"),
                });
            }
        }
    }
    let mut end = End::default();
    for (space, address) in found {
        let (steps, outcome) = space.trace(VirtualAddress::new(address));
        let walk = Reply::Walk {
            id,
            address,
            entries: steps
                .iter()
                .map(|step| WalkEntry {
                    level: level(step.level),
                    address: step.entry_address.as_u64(),
                    entry: step.entry,
                })
                .collect(),
            end: outcome
                .map(|found| WalkEnd {
                    physical: found.physical.as_u64(),
                    page_size: found.page_size.bytes(),
                    writable: found.rights.writable,
                    user: found.rights.user,
                    executable: found.rights.executable,
                })
                .map_err(|error| error.to_string()),
        };
        if sink.send(&walk).is_err() {
            break;
        }
        end.sent = end.sent.saturating_add(1);
    }
    Ok(end)
}

fn level(level: TableLevel) -> u8 {
    match level {
        TableLevel::Pml5 => 5,
        TableLevel::Pml4 => 4,
        TableLevel::Pdpt => 3,
        TableLevel::Pd => 2,
        TableLevel::Pt => 1,
    }
}

/// All tables, as they are told.
pub(super) fn tables() -> Vec<TableDescription> {
    secmon_guest::tables()
        .iter()
        .map(|table| TableDescription {
            name: table.name().to_owned(),
            meaning: table.meaning().to_owned(),
            columns: table
                .columns()
                .iter()
                .map(|column| ColumnDescription {
                    name: column.name.to_owned(),
                    kind: format!("{:?}", column.kind).to_lowercase(),
                })
                .collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(table: &str, columns: &[&str]) -> Query {
        Query {
            target: "web1".into(),
            table: table.into(),
            columns: Some(columns.iter().map(ToString::to_string).collect()),
            pids: None,
            all_namespaces: false,
            limit: None,
            credit: 1,
            pause: crate::protocol::Pause::None,
        }
    }

    #[test]
    fn queries_are_checked_before_anything_is_read() {
        let checked = check(&query("ps", &["comm", "pid"])).map_err(|e| e.to_string());
        let checked = checked.expect("a query");
        assert_eq!(checked.table.name(), "processes");
        assert_eq!(
            checked.request.columns.map(|columns| columns.len()),
            Some(2)
        );
        let refused = |table, columns: &[&str]| match check(&query(table, columns)) {
            Err(refusal) => refusal.to_string(),
            Ok(_) => panic!("{table} {columns:?} was not refused"),
        };
        assert!(refused("nothing", &[]).contains("nothing"));
        assert!(refused("ps", &["colour"]).contains("colour"));
        assert!(refused("ps", &["pid"; 1000]).contains("1000"));
    }

    /// Takes messages of a few rows.
    #[derive(Default)]
    struct Small(std::cell::RefCell<Vec<usize>>);

    impl Sink for Small {
        fn permit(&self) -> Permit {
            Permit::Send
        }

        fn send(&self, reply: &Reply) -> Result<(), Unsent> {
            match reply {
                Reply::Rows { rows, .. }
                    if rows.iter().flatten().map(weight).sum::<usize>() < 100_000 =>
                {
                    self.0.borrow_mut().push(rows.len());
                    Ok(())
                }
                _ => Err(Unsent::TooLarge),
            }
        }
    }

    #[test]
    fn rows_go_in_pieces_and_one_too_large_is_no_silent_end() {
        let sink = Small::default();
        let mut batch = Batch {
            id: 1,
            rows: Vec::new(),
            bytes: 0,
            sent: 0,
            too_large: false,
            sink: &sink,
        };
        let row = |length| vec![Cell::One(Scalar::Text(vec![b'x'; length]))];
        for _ in 0..BATCH_ROWS + 1 {
            assert!(batch.push(row(1)).is_continue());
        }
        assert!(batch.push(row(BATCH_BYTES)).is_continue());
        assert_eq!(*sink.0.borrow(), [BATCH_ROWS, 2]);
        assert!(batch.push(row(1 << 20)).is_break());
        assert!(batch.too_large && batch.sent == BATCH_ROWS as u64 + 2);
    }

    #[test]
    fn every_table_is_told() {
        let tables = tables();
        assert_eq!(tables.len(), secmon_guest::tables().len());
        assert!(tables.iter().all(|table| !table.columns.is_empty()));
    }
}

//! Reads a guest table the way the user asked: columns, filters, order, limit.

use std::io;
use std::ops::ControlFlow;

use anyhow::{Result, bail};
use secmon_guest::{Guest, Request, RowSink, Selection, Table, Value};

use crate::arguments::{Format, RowOptions};
use crate::columns;
use crate::filter::{Filter, Order, Verdict};
use crate::output::{Rows, Style, Summary};

/// What is to be read and shown, checked against the table before any memory
/// is looked at.
pub struct Query {
    table: &'static dyn Table,
    format: Format,
    header: bool,
    /// Columns to read: those to show first, then those only judged by.
    read: Vec<usize>,
    shown: usize,
    filters: Vec<(usize, Filter)>,
    order: Option<(usize, Order)>,
    limit: u64,
    selection: Selection,
}

/// What came out.
pub struct Outcome {
    /// What was written.
    pub summary: Summary,
    /// Rows left out because a filter's column could not be read.
    pub undecided: u64,
    /// Why the table could not be made, or made to its end.
    pub error: Option<anyhow::Error>,
}

/// Gives the rows of a request to a sink until it breaks.
pub type Source<'a> = dyn FnMut(&Request, &mut RowSink<'_>) -> Result<()> + 'a;

impl Query {
    /// Checks the options against the table's columns.
    pub fn new(table: &'static dyn Table, format: Format, options: &RowOptions) -> Result<Self> {
        if format == Format::Markdown {
            bail!("--format markdown is for `secmon tables` only");
        }
        let known = table.columns();
        let in_table =
            |error| anyhow::Error::from(error).context(format!("table {}", table.name()));
        let mut read = columns::choose(&known, &options.columns, format)
            .map_err(|error| in_table(error.into()))?;
        let shown = read.len();
        let mut position = |column: usize| {
            read.iter()
                .position(|index| *index == column)
                .unwrap_or_else(|| {
                    read.push(column);
                    read.len() - 1
                })
        };
        let mut filters = Vec::new();
        for text in &options.filters {
            let filter = Filter::parse(text, &known).map_err(in_table)?;
            filters.push((position(filter.column), filter));
        }
        let order = match &options.sort {
            Some(text) => {
                let order = Order::parse(text, &known).map_err(in_table)?;
                Some((position(order.column), order))
            }
            None => None,
        };
        if !options.pid.is_empty() && !known.iter().any(|column| column.name == "pid") {
            bail!(
                "--pid says nothing about table {}: it has no column `pid`",
                table.name()
            );
        }
        Ok(Self {
            table,
            format,
            header: !options.no_header,
            read,
            shown,
            filters,
            order,
            limit: options.limit.unwrap_or(u64::MAX),
            selection: Selection {
                pids: (!options.pid.is_empty()).then(|| options.pid.clone()),
                all_namespaces: options.all_namespaces,
                ..Selection::default()
            },
        })
    }

    /// Reads the table from the guest itself and writes its rows.
    ///
    /// # Errors
    /// Those of the output. What is wrong with the guest is in the outcome:
    /// the rows before it are written.
    pub fn run(&self, guest: &Guest, out: impl io::Write, style: Style) -> io::Result<Outcome> {
        let mut read = |request: &Request, sink: &mut RowSink<'_>| {
            Ok(self.table.read(guest, request, sink)?)
        };
        self.run_from(&mut read, out, style)
    }

    /// Takes the table's rows from `source`, which can be somebody who was
    /// asked for them, and writes them.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_from(
        &self,
        source: &mut Source<'_>,
        out: impl io::Write,
        style: Style,
    ) -> io::Result<Outcome> {
        let known = self.table.columns();
        let heading = self.read[..self.shown]
            .iter()
            .filter_map(|index| known.get(*index).copied())
            .collect();
        let style = Style {
            header: self.header,
            ..style
        };
        let mut rows = Rows::new(out, heading, self.format, style)?;
        let mut outcome = Outcome {
            summary: Summary::default(),
            undecided: 0,
            error: None,
        };
        let mut held: Vec<Vec<Value>> = Vec::new();
        let mut failed = Ok(());
        let mut left = self.limit;
        let request = Request {
            columns: Some(self.read.clone()),
            selection: self.selection.clone(),
        };
        if left > 0 {
            let read = source(&request, &mut |row| {
                match self.judge(&row.values) {
                    Verdict::Fits => {}
                    Verdict::Differs => return ControlFlow::Continue(()),
                    Verdict::Unknown => {
                        outcome.undecided += 1;
                        return ControlFlow::Continue(());
                    }
                }
                if self.order.is_some() {
                    held.push(std::mem::take(&mut row.values));
                    return ControlFlow::Continue(());
                }
                failed = rows.row(row.values.get(..self.shown).unwrap_or(&row.values));
                left -= 1;
                if failed.is_err() || left == 0 {
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            });
            outcome.error = read.err();
        }
        failed?;
        if let Some((position, order)) = &self.order {
            held.sort_by(|a, b| match (a.get(*position), b.get(*position)) {
                (Some(a), Some(b)) => order.compare(a, b),
                _ => std::cmp::Ordering::Equal,
            });
            for values in held
                .iter()
                .take(usize::try_from(left).unwrap_or(usize::MAX))
            {
                rows.row(values.get(..self.shown).unwrap_or(values))?;
            }
        }
        outcome.summary = rows.finish()?;
        Ok(outcome)
    }

    /// The table that is read.
    pub fn table(&self) -> &'static dyn Table {
        self.table
    }

    /// How many rows suffice, if each that is read is shown.
    pub fn enough(&self) -> Option<u64> {
        let all_shown = self.filters.is_empty() && self.order.is_none();
        (all_shown && self.limit < u64::MAX).then_some(self.limit)
    }

    /// The processes asked for by number.
    pub fn pids(&self) -> &[u64] {
        self.selection.pids.as_deref().unwrap_or_default()
    }

    fn judge(&self, values: &[Value]) -> Verdict {
        let mut verdict = Verdict::Fits;
        for (position, filter) in &self.filters {
            match values.get(*position).map(|value| filter.judge(value)) {
                Some(Verdict::Fits) => {}
                Some(Verdict::Differs) | None => return Verdict::Differs,
                Some(Verdict::Unknown) => verdict = Verdict::Unknown,
            }
        }
        verdict
    }
}

//! Rows as aligned columns.

use std::fmt::Write as _;
use std::io::{self, Write};

use secmon_guest::{ColumnInfo, Kind, TrustLevel, Value};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::escape;

/// Columns are as wide as the widest of this many first rows; later ones are
/// written as they come, so that a table of any length needs bounded memory.
const MEASURED: usize = 4096;

/// The least width that a column is cut down to.
const LEAST: usize = 8;

const GAP: &str = "  ";
const BOLD: &str = "\x1b[1m";
const YELLOW: &str = "\x1b[33m";
const PLAIN: &str = "\x1b[0m";

/// How a terminal, or what stands in its place, shows a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// The columns there are on a terminal; nothing is cut where it is `None`.
    pub width: Option<usize>,
    /// Whether colours may be used.
    pub color: bool,
    /// Whether there is a header.
    pub header: bool,
    /// How well what the rows say was protected, where they are about a guest:
    /// each row of JSON and CSV says it, and a terminal after the last row.
    pub trust: Option<TrustLevel>,
}

/// Cells as text, back to back in one string.
#[derive(Debug, Default)]
struct Cells {
    text: String,
    /// Of each cell: where it ends in `text`, and its width on a terminal.
    ends: Vec<(usize, usize)>,
}

impl Cells {
    fn push(&mut self, value: &Value) {
        let start = self.text.len();
        push_value(&mut self.text, value);
        self.finish(start);
    }

    fn finish(&mut self, start: usize) {
        let cell = &self.text[start..];
        let width = if cell.is_ascii() {
            cell.len()
        } else {
            cell.width()
        };
        self.ends.push((self.text.len(), width));
    }

    fn iter(&self) -> impl Iterator<Item = (&str, usize)> {
        let mut start = 0;
        self.ends.iter().map(move |(end, width)| {
            let cell = &self.text[start..*end];
            start = *end;
            (cell, *width)
        })
    }
}

/// Appends a value as one line of harmless text; list items that hold a space
/// or a quote, or nothing, stand in quotes.
pub fn push_value(out: &mut String, value: &Value) {
    match value {
        Value::Text(text) => escape::push_text(out, text),
        Value::List(values) => {
            for (index, value) in values.iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                let start = out.len();
                push_value(out, value);
                let item = &out[start..];
                if item.is_empty() || item.contains([' ', '\'', '"']) {
                    let quoted = format!("'{}'", item.replace('\'', "'\\''"));
                    out.truncate(start);
                    out.push_str(&quoted);
                }
            }
        }
        other => {
            let _ = write!(out, "{other}");
        }
    }
}

/// A table that is being written.
pub struct Table {
    columns: Vec<ColumnInfo>,
    style: Style,
    held: Cells,
    rows: usize,
    widths: Option<Vec<usize>>,
    line: String,
}

impl Table {
    /// A table of these columns.
    pub fn new(columns: Vec<ColumnInfo>, style: Style) -> Self {
        Self {
            columns,
            style,
            held: Cells::default(),
            rows: 0,
            widths: None,
            line: String::new(),
        }
    }

    /// Takes one row; writes once enough are known to align them.
    pub fn row(&mut self, out: &mut impl Write, values: &[Value]) -> io::Result<()> {
        for value in values {
            self.held.push(value);
        }
        self.rows += 1;
        if self.widths.is_some() || self.rows >= MEASURED {
            self.flush(out)?;
        }
        Ok(())
    }

    /// Writes what is still held, and the header if there was no row at all.
    pub fn flush(&mut self, out: &mut impl Write) -> io::Result<()> {
        let held = std::mem::take(&mut self.held);
        let widths = match self.widths.take() {
            Some(widths) => widths,
            None => {
                let widths = self.measure(&held);
                if self.style.header {
                    self.header(out, &widths)?;
                }
                widths
            }
        };
        let per_row = self.columns.len().max(1);
        for (index, (cell, width)) in held.iter().enumerate() {
            let column = index % per_row;
            let known = self.columns.get(column).map(|column| column.kind);
            let wanted = widths.get(column).copied().unwrap_or(width);
            let color = if cell == "?" { Some(YELLOW) } else { None };
            self.cell(cell, width, wanted, known, column, color);
            if column + 1 == per_row {
                self.end_line(out)?;
            }
        }
        self.widths = Some(widths);
        Ok(())
    }

    fn header(&mut self, out: &mut impl Write, widths: &[usize]) -> io::Result<()> {
        for (index, wanted) in widths.iter().enumerate() {
            let column = self.columns[index];
            let name = column.name.to_ascii_uppercase();
            let kind = Some(column.kind);
            self.cell(&name, name.width(), *wanted, kind, index, Some(BOLD));
        }
        self.end_line(out)
    }

    fn end_line(&mut self, out: &mut impl Write) -> io::Result<()> {
        self.line.truncate(self.line.trim_end_matches(' ').len());
        self.line.push('\n');
        out.write_all(self.line.as_bytes())?;
        self.line.clear();
        Ok(())
    }

    /// Appends a cell to the line: numbers to the right, all else to the left,
    /// cut to the wanted width where there is a terminal.
    fn cell(
        &mut self,
        cell: &str,
        width: usize,
        wanted: usize,
        kind: Option<Kind>,
        index: usize,
        color: Option<&str>,
    ) {
        if index > 0 {
            self.line.push_str(GAP);
        }
        let cut = self.style.width.is_some() && width > wanted;
        let padding = wanted.saturating_sub(width);
        let right = matches!(kind, Some(Kind::Unsigned | Kind::Signed));
        let pad = |line: &mut String| line.extend(std::iter::repeat_n(' ', padding));
        if right {
            pad(&mut self.line);
        }
        let color = color.filter(|_| self.style.color);
        self.line.push_str(color.unwrap_or_default());
        if cut {
            let mut left = wanted.saturating_sub(1);
            for c in cell.chars() {
                let needed = c.width().unwrap_or(0);
                if needed > left {
                    break;
                }
                left -= needed;
                self.line.push(c);
            }
            self.line.push('…');
            // A wide character may have left one column over.
            self.line.extend(std::iter::repeat_n(' ', left));
        } else {
            self.line.push_str(cell);
        }
        if color.is_some() {
            self.line.push_str(PLAIN);
        }
        if !right && index + 1 < self.columns.len() {
            pad(&mut self.line);
        }
    }

    /// The width of each column, cut down until all fit the terminal.
    fn measure(&self, held: &Cells) -> Vec<usize> {
        let mut widths: Vec<usize> = self
            .columns
            .iter()
            .map(|column| {
                if self.style.header {
                    column.name.width()
                } else {
                    1
                }
            })
            .collect();
        let per_row = widths.len().max(1);
        for (index, (_, width)) in held.iter().enumerate() {
            if let Some(widest) = widths.get_mut(index % per_row) {
                *widest = width.max(*widest);
            }
        }
        let Some(terminal) = self.style.width else {
            return widths;
        };
        let gaps = GAP.len() * widths.len().saturating_sub(1);
        let mut excess = (widths.iter().sum::<usize>() + gaps).saturating_sub(terminal);
        while excess > 0 {
            // The widest that may be cut loses first, down to the next widest.
            let may_shrink = |index: usize, width: usize| {
                matches!(self.columns[index].kind, Kind::Text | Kind::List)
                    && width > LEAST.max(self.columns[index].name.len())
            };
            let widest = widths
                .iter()
                .enumerate()
                .filter(|(index, width)| may_shrink(*index, **width))
                .max_by_key(|(_, width)| **width);
            let Some((index, &width)) = widest else {
                break;
            };
            let next = widths
                .iter()
                .enumerate()
                .filter(|(other, width)| *other != index && may_shrink(*other, **width))
                .map(|(_, width)| *width)
                .max()
                .unwrap_or(0);
            let floor = next.max(LEAST).max(self.columns[index].name.len());
            let step = (width - floor.min(width - 1)).min(excess);
            widths[index] = width - step;
            excess -= step;
        }
        widths
    }
}

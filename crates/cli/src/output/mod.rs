//! The one place that writes rows, whatever they are about and in whatever
//! form they are wanted.

pub mod escape;
pub mod json;
mod markdown;
mod table;

use std::io::{self, Write};

use secmon_guest::{ColumnInfo, Kind, TrustLevel, Value};

pub use markdown::describe_tables;
pub use table::{Style, push_value};

use crate::arguments::Format;
use table::Table;

/// The member of each row about a guest that says how well what it says was
/// protected.
const TRUST_LEVEL: &str = "trust_level";

/// Rows on their way out.
pub struct Rows<W: Write> {
    form: Form<W>,
    columns: Vec<ColumnInfo>,
    trust: Option<TrustLevel>,
    /// Whether somebody looks at a terminal.
    terminal: bool,
    rows: u64,
    unreadable: Vec<u64>,
    rows_with_unreadable: u64,
}

enum Form<W: Write> {
    Table(Table, W),
    Json(W),
    Ndjson(W),
    Csv(Box<csv::Writer<W>>),
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// How many rows.
    pub rows: u64,
    /// In how many of them something could not be read.
    pub rows_with_unreadable: u64,
    /// How many values could not be read, by column; only columns with any.
    pub unreadable: Vec<(&'static str, u64)>,
}

/// The name of a column's type, for people.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Boolean => "boolean",
        Kind::Unsigned | Kind::Signed => "number",
        Kind::Address => "address",
        Kind::Text => "text",
        Kind::Time => "time",
        Kind::List => "list",
    }
}

impl<W: Write> Rows<W> {
    /// Starts to write rows of these columns. Markdown is not a form of rows
    /// and is taken for a table.
    pub fn new(
        mut out: W,
        columns: Vec<ColumnInfo>,
        format: Format,
        style: Style,
    ) -> io::Result<Self> {
        let form = match format {
            Format::Table | Format::Markdown => {
                Form::Table(Table::new(columns.clone(), style), out)
            }
            Format::Json => {
                out.write_all(b"[")?;
                Form::Json(out)
            }
            Format::Ndjson => Form::Ndjson(out),
            Format::Csv => {
                let mut writer = csv::WriterBuilder::new().from_writer(out);
                if style.header {
                    writer
                        .write_record(
                            (columns.iter().map(|column| column.name))
                                .chain(style.trust.map(|_| TRUST_LEVEL)),
                        )
                        .map_err(csv_error)?;
                }
                Form::Csv(Box::new(writer))
            }
        };
        Ok(Self {
            form,
            unreadable: vec![0; columns.len()],
            columns,
            trust: style.trust,
            terminal: style.width.is_some(),
            rows: 0,
            rows_with_unreadable: 0,
        })
    }

    /// Writes one row: a value for each column.
    pub fn row(&mut self, values: &[Value]) -> io::Result<()> {
        let mut any = false;
        for (value, count) in values.iter().zip(&mut self.unreadable) {
            if matches!(value, Value::Unreadable(_)) {
                *count += 1;
                any = true;
            }
        }
        self.rows_with_unreadable += u64::from(any);
        match &mut self.form {
            Form::Table(table, out) => table.row(out, values)?,
            Form::Json(out) => {
                let separator: &[u8] = if self.rows == 0 { b"\n" } else { b",\n" };
                out.write_all(separator)?;
                json::write_row(out, &self.columns, values, self.trust)?;
            }
            Form::Ndjson(out) => {
                json::write_row(out, &self.columns, values, self.trust)?;
                out.write_all(b"\n")?;
            }
            Form::Csv(writer) => {
                for value in values {
                    writer.write_field(csv_cell(value)).map_err(csv_error)?;
                }
                if let Some(trust) = self.trust {
                    writer.write_field(trust.name()).map_err(csv_error)?;
                }
                writer.write_record(None::<&[u8]>).map_err(csv_error)?;
            }
        }
        self.rows += 1;
        Ok(())
    }

    /// Writes what is left and tells what was written.
    pub fn finish(mut self) -> io::Result<Summary> {
        match &mut self.form {
            Form::Table(table, out) => {
                table.flush(out)?;
                if let Some(trust) = self.trust.filter(|_| self.terminal) {
                    writeln!(out, "trust level {trust}: {}", trust.meaning())?;
                }
                out.flush()?;
            }
            Form::Json(out) => {
                let end: &[u8] = if self.rows == 0 { b"]\n" } else { b"\n]\n" };
                out.write_all(end)?;
                out.flush()?;
            }
            Form::Ndjson(out) => out.flush()?,
            Form::Csv(writer) => writer.flush()?,
        }
        let counts = self.columns.iter().zip(&self.unreadable);
        Ok(Summary {
            rows: self.rows,
            rows_with_unreadable: self.rows_with_unreadable,
            unreadable: counts
                .filter(|(_, count)| **count > 0)
                .map(|(column, count)| (column.name, *count))
                .collect(),
        })
    }
}

/// The error of the writer below, where it is one.
fn csv_error(error: csv::Error) -> io::Error {
    match error.into_kind() {
        csv::ErrorKind::Io(error) => error,
        other => io::Error::other(format!("{other:?}")),
    }
}

/// A CSV cell: as in the table, but a list is a JSON array, which a reader can
/// take apart again.
fn csv_cell(value: &Value) -> Vec<u8> {
    if let Value::List(_) = value {
        let mut bytes = Vec::new();
        // Writing to memory does not fail.
        let _ = json::write(&mut bytes, value);
        return bytes;
    }
    let mut cell = String::new();
    push_value(&mut cell, value);
    cell.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use secmon_guest::{Cost, Shown};
    use unicode_width::UnicodeWidthStr;

    const fn column(name: &'static str, kind: Kind) -> ColumnInfo {
        ColumnInfo {
            name,
            kind,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "",
        }
    }

    const COLUMNS: [ColumnInfo; 3] = [
        column("pid", Kind::Unsigned),
        column("comm", Kind::Text),
        column("cmdline", Kind::List),
    ];

    const PIPE: Style = Style {
        width: None,
        color: false,
        header: true,
        trust: None,
    };

    fn written(format: Format, style: Style, rows: &[Vec<Value>]) -> (String, Summary) {
        let mut out = Vec::new();
        let mut writer = Rows::new(&mut out, COLUMNS.to_vec(), format, style).expect("starts");
        for row in rows {
            writer.row(row).expect("memory takes all");
        }
        let summary = writer.finish().expect("memory takes all");
        (String::from_utf8(out).expect("text"), summary)
    }

    fn row(pid: u64, comm: &[u8], arguments: &[&[u8]]) -> Vec<Value> {
        let arguments = arguments.iter().map(|bytes| Value::text(*bytes)).collect();
        vec![pid.into(), Value::text(comm), Value::List(arguments)]
    }

    #[test]
    fn every_row_about_a_guest_says_its_trust_level() {
        let trusted = Style {
            trust: Some(TrustLevel::L1),
            ..PIPE
        };
        let rows = [row(1, b"init", &[])];
        let text = |format, style| written(format, style, &rows).0;
        let json = r#"{"pid":1,"comm":"init","cmdline":[],"trust_level":"L1"}"#;
        assert_eq!(text(Format::Ndjson, trusted), format!("{json}\n"));
        assert_eq!(text(Format::Json, trusted), format!("[\n{json}\n]\n"));
        assert_eq!(
            text(Format::Csv, trusted),
            "pid,comm,cmdline,trust_level\n1,init,[],L1\n"
        );
        assert!(!text(Format::Table, trusted).contains("L1"));
        let terminal = Style {
            width: Some(80),
            ..trusted
        };
        let shown = text(Format::Table, terminal);
        assert!(
            shown.ends_with("\ntrust level L1: a monitoring VM\n"),
            "{shown}"
        );
    }

    /// What a hostile guest calls its processes.
    const HOSTILE: [&[u8]; 7] = [
        b"\x1b[2J\x1b]0;owned\x07",
        b"a,b\"c\";d",
        b"line\r\nfeed",
        b"\xff\xfe\x80",
        "\u{202e}gpj.exe \u{2066}x".as_bytes(),
        "\u{9b}31m\u{200b}".as_bytes(),
        b"|-- =1+1",
    ];

    #[test]
    fn nothing_written_acts_on_a_terminal() {
        let rows: Vec<_> = HOSTILE.iter().map(|name| row(1, name, &[name])).collect();
        for format in [Format::Table, Format::Json, Format::Ndjson, Format::Csv] {
            let (text, _) = written(format, PIPE, &rows);
            let acts: Vec<char> = text.chars().filter(|c| escape::is_dangerous(*c)).collect();
            assert!(acts.iter().all(|c| *c == '\n'), "{format:?}: {acts:?}");
        }
    }

    #[test]
    fn json_gives_guest_text_back() {
        let rows: Vec<_> = HOSTILE.iter().map(|name| row(1, name, &[name])).collect();
        let (array, _) = written(Format::Json, PIPE, &rows);
        let parsed: serde_json::Value = serde_json::from_str(&array).expect("JSON");
        let (lines, _) = written(Format::Ndjson, PIPE, &rows);
        for (index, name) in HOSTILE.iter().enumerate() {
            let wanted = secmon_guest::Text::new(*name).to_display().into_owned();
            assert_eq!(parsed[index]["comm"], wanted);
            assert_eq!(parsed[index]["cmdline"][0], wanted);
            let line = lines.lines().nth(index).expect("a line for each row");
            let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
            assert_eq!(line, parsed[index]);
        }
        assert_eq!(written(Format::Json, PIPE, &[]).0, "[]\n");
    }

    #[test]
    fn csv_has_one_record_a_row() {
        let rows: Vec<_> = HOSTILE.iter().map(|name| row(7, name, &[name])).collect();
        let (text, _) = written(Format::Csv, PIPE, &rows);
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let header = reader.headers().expect("a header").clone();
        assert_eq!(&header, vec!["pid", "comm", "cmdline"]);
        let records: Vec<csv::StringRecord> = reader.records().map(|r| r.expect("CSV")).collect();
        assert_eq!(records.len(), HOSTILE.len());
        assert_eq!(&records[1][1], "a,b\"c\";d");
        let list: Vec<String> = serde_json::from_str(&records[1][2]).expect("a JSON list");
        assert_eq!(list, ["a,b\"c\";d"]);
    }

    #[test]
    fn unreadable_values_have_their_reason() {
        let mut bad = row(1, b"a", &[]);
        bad[2] = Value::unreadable("swapped out");
        let rows = [row(0, b"b", &[]), bad];
        let (json, summary) = written(Format::Json, PIPE, &rows);
        let parsed: serde_json::Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(parsed[1]["cmdline"], serde_json::Value::Null);
        assert_eq!(parsed[1]["unreadable"]["cmdline"], "swapped out");
        assert_eq!(parsed[0].get("unreadable"), None);
        assert_eq!(summary.unreadable, [("cmdline", 1)]);
        assert_eq!((summary.rows, summary.rows_with_unreadable), (2, 1));
        let (table, _) = written(Format::Table, PIPE, &rows);
        assert_eq!(table, "PID  COMM  CMDLINE\n  0  b\n  1  a     ?\n");
    }

    #[test]
    fn a_pipe_gets_whole_values_and_a_terminal_no_line_too_long() {
        let long = [b'x'; 300];
        let rows = [row(1, b"init", &[&long, "漢字".as_bytes()])];
        let (piped, _) = written(Format::Table, PIPE, &rows);
        assert!(piped.contains(&"x".repeat(300)));
        for width in [40, 41, 80] {
            let style = Style {
                width: Some(width),
                ..PIPE
            };
            let (shown, _) = written(Format::Table, style, &rows);
            assert!(shown.contains('…'));
            assert!(shown.lines().all(|line| line.width() <= width), "{shown}");
            assert!(shown.contains("init"), "{shown}");
        }
    }

    #[test]
    fn list_items_stay_apart() {
        let mut text = String::new();
        let items = ["sh", "-c", "a b", "", "it's"].map(Value::from);
        push_value(&mut text, &Value::List(items.into()));
        assert_eq!(text, r"sh -c 'a b' '' 'it'\''s'");
    }

    #[test]
    fn a_table_of_any_length_is_written() {
        let rows: Vec<_> = (0..10_000).map(|pid| row(pid, b"kworker", &[])).collect();
        let (table, summary) = written(Format::Table, PIPE, &rows);
        assert_eq!(table.lines().count(), 10_001);
        assert_eq!(summary.rows, 10_000);
        assert!(table.ends_with("9999  kworker\n"));
    }

    proptest! {
        #[test]
        fn any_guest_text_makes_valid_json_and_csv(
            names in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..12), 0..6),
            width in 1usize..60,
        ) {
            let rows: Vec<_> = names.iter().map(|name| row(1, name, &[name])).collect();
            let (json, _) = written(Format::Json, PIPE, &rows);
            let parsed: Vec<serde_json::Value> = serde_json::from_str(&json).expect("JSON");
            prop_assert_eq!(parsed.len(), rows.len());
            let (text, _) = written(Format::Csv, PIPE, &rows);
            let records = csv::Reader::from_reader(text.as_bytes()).into_records().count();
            prop_assert_eq!(records, rows.len());
            let style = Style { width: Some(width), color: true, header: true, trust: None };
            let (table, _) = written(Format::Table, style, &rows);
            prop_assert_eq!(table.lines().count(), rows.len() + 1);
        }
    }
}

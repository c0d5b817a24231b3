//! Rows as JSON objects: in one array, or one a line.

use std::io::{self, Write};

use secmon_guest::{ColumnInfo, TrustLevel, Value};
use serde::ser::Serializer;
use serde_json::ser::{CompactFormatter, Formatter};

use super::escape::is_dangerous;

/// Writes what [`is_dangerous`] as `\uXXXX`, which any JSON reader turns back:
/// a terminal that shows the JSON is as safe as one that shows the table.
#[derive(Clone, Debug, Default)]
pub struct SafeFormatter(CompactFormatter);

impl Formatter for SafeFormatter {
    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // Nearly all text, and quickly seen, many bytes at once.
        if fragment.bytes().fold(true, |harmless, byte| {
            harmless & matches!(byte, b' '..=b'~')
        }) {
            return writer.write_all(fragment.as_bytes());
        }
        let mut start = 0;
        for (at, c) in fragment.char_indices() {
            if !is_dangerous(c) {
                continue;
            }
            writer.write_all(&fragment.as_bytes()[start..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            start = at + c.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[start..])
    }
}

/// Any value as compact and safe JSON.
pub fn write(out: &mut impl Write, value: &impl serde::Serialize) -> io::Result<()> {
    let mut serializer = serde_json::Serializer::with_formatter(out, SafeFormatter::default());
    value.serialize(&mut serializer).map_err(io::Error::from)
}

/// Writes one row as an object; what could not be read is `null` there and has
/// its reason in a member `unreadable` after the others; the last is the trust
/// level, if the row has one.
pub fn write_row(
    out: &mut impl Write,
    columns: &[ColumnInfo],
    values: &[Value],
    trust: Option<TrustLevel>,
) -> io::Result<()> {
    let mut unreadable = false;
    let mut before: &[u8] = b"{\"";
    for (column, value) in columns.iter().zip(values) {
        // Names of columns have nothing that would have to be escaped.
        out.write_all(before)?;
        out.write_all(column.name.as_bytes())?;
        out.write_all(b"\":")?;
        write(out, value)?;
        unreadable |= matches!(value, Value::Unreadable(_));
        before = b",\"";
    }
    if unreadable {
        out.write_all(b",\"unreadable\":")?;
        write(out, &Reasons(columns, values))?;
    }
    if let Some(trust) = trust {
        let comma: &[u8] = if columns.is_empty() { b"{" } else { b"," };
        out.write_all(comma)?;
        write!(out, "\"{}\":\"{}\"", super::TRUST_LEVEL, trust.name())?;
        return out.write_all(b"}");
    }
    out.write_all(if columns.is_empty() { b"{}" } else { b"}" })
}

/// The reasons of a row's unreadable values, by column.
struct Reasons<'a>(&'a [ColumnInfo], &'a [Value]);

impl serde::Serialize for Reasons<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let reasons = self.0.iter().zip(self.1);
        serializer.collect_map(reasons.filter_map(|(column, value)| match value {
            Value::Unreadable(reason) => Some((column.name, &**reason)),
            _ => None,
        }))
    }
}

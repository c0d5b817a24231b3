//! Rows of a table of the guest, by the names of their columns.

use std::ops::ControlFlow;

use secmon_guest::{Guest, Request, Selection, Value};

use crate::detector::whole;
use crate::{DetectError, Evidence};

/// Some columns of a table.
pub(crate) struct Rows {
    table: &'static dyn secmon_guest::Table,
    columns: &'static [&'static str],
    request: Request,
}

impl Rows {
    /// These columns of that table.
    ///
    /// # Errors
    /// [`DetectError::Missing`] if there is no such table or column.
    pub(crate) fn of(
        table: &'static str,
        columns: &'static [&'static str],
    ) -> Result<Self, DetectError> {
        let table = secmon_guest::table(table).ok_or(DetectError::Missing { what: table })?;
        let known = table.columns();
        let place = |column: &&'static str| {
            let place = known.iter().position(|known| known.name == *column);
            place.ok_or(DetectError::Missing { what: column })
        };
        let request = Request {
            columns: Some(columns.iter().map(place).collect::<Result<_, _>>()?),
            selection: Selection {
                all_namespaces: true,
                ..Selection::default()
            },
        };
        Ok(Self {
            table,
            columns,
            request,
        })
    }

    /// Hands out all rows.
    ///
    /// # Errors
    /// [`DetectError::Table`] if the table can't be made from this guest,
    /// [`DetectError::Incomplete`] if something in it could not be read.
    pub(crate) fn read(
        &self,
        guest: &Guest,
        mut each: impl FnMut(Fields<'_>),
    ) -> Result<(), DetectError> {
        let before = guest.diagnostics().recorded();
        self.table.read(guest, &self.request, &mut |row| {
            each(Fields {
                columns: self.columns,
                values: &row.values,
            });
            ControlFlow::Continue(())
        })?;
        whole(guest, before, self.table.name())
    }
}

/// What parts of a detector's work came to, so that one which fails keeps no
/// other from being done.
#[derive(Default)]
pub(crate) struct Parts {
    first: Option<DetectError>,
}

impl Parts {
    /// Takes note of one part.
    pub(crate) fn note<T>(&mut self, part: Result<T, DetectError>) -> Option<T> {
        match part {
            Ok(value) => Some(value),
            Err(error) => {
                self.first.get_or_insert(error);
                None
            }
        }
    }

    /// The first error, if there was one.
    pub(crate) fn finish(self) -> Result<(), DetectError> {
        self.first.map_or(Ok(()), Err)
    }
}

/// A row.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'r> {
    columns: &'static [&'static str],
    values: &'r [Value],
}

impl<'r> Fields<'r> {
    /// A row of these columns.
    #[cfg(test)]
    pub(crate) fn new(columns: &'static [&'static str], values: &'r [Value]) -> Self {
        Self { columns, values }
    }

    /// The value in a column; null if it was not asked for.
    pub(crate) fn value(&self, column: &str) -> &'r Value {
        let place = self.columns.iter().position(|known| *known == column);
        place
            .and_then(|place| self.values.get(place))
            .unwrap_or(&Value::Null)
    }

    /// A number or an address.
    pub(crate) fn number(&self, column: &str) -> Option<u64> {
        match self.value(column) {
            Value::Unsigned(value) | Value::Address(value) => Some(*value),
            _ => None,
        }
    }

    /// A number of at most 32 bits, such as an id.
    pub(crate) fn id(&self, column: &str) -> Option<u32> {
        self.number(column).and_then(|value| value.try_into().ok())
    }

    /// A text's bytes.
    pub(crate) fn text(&self, column: &str) -> Option<&'r [u8]> {
        match self.value(column) {
            Value::Text(text) => Some(text.as_bytes()),
            _ => None,
        }
    }

    /// Whether it is true; not if it is unknown.
    pub(crate) fn is_true(&self, column: &str) -> bool {
        matches!(self.value(column), Value::Boolean(true))
    }

    /// The values of a list.
    pub(crate) fn list(&self, column: &str) -> &'r [Value] {
        match self.value(column) {
            Value::List(values) => values,
            _ => &[],
        }
    }

    /// The row as evidence, of `view`.
    pub(crate) fn evidence(&self, view: &'static str, what: impl Into<String>) -> Evidence {
        let row = self
            .columns
            .iter()
            .copied()
            .zip(self.values.iter().cloned());
        Evidence::new(view, what).with_row(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_and_columns_must_be_there() {
        assert!(Rows::of("processes", &["pid", "comm"]).is_ok());
        for (table, columns) in [
            ("proceses", &["pid"] as &[_]),
            ("processes", &["pid", "neme"]),
        ] {
            let missing = Rows::of(table, columns).err();
            assert!(matches!(missing, Some(DetectError::Missing { .. })));
        }
    }

    #[test]
    fn a_row_is_asked_by_names() {
        let values = [Value::from(7_u32), "sh".into(), Value::Boolean(true)];
        let row = Fields {
            columns: &["pid", "comm", "exe_deleted"],
            values: &values,
        };
        assert_eq!(row.id("pid"), Some(7));
        assert_eq!(row.text("comm"), Some(&b"sh"[..]));
        assert!(row.is_true("exe_deleted"));
        assert_eq!(row.value("exe"), &Value::Null);
        assert_eq!(row.evidence("processes", "").row.len(), 3);
    }
}

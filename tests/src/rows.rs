//! Comparing a table's rows with the rows that the guest's truth says it
//! should have.
//!
//! Even a quiet guest is not still: kernel workers come and go. So the truth
//! is taken twice, before and after the table is read. What is in both must be
//! in the table; what is in the table must be in one of them; and a value that
//! both agree on must be the table's value.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use anyhow::{Context, Result, anyhow};
use secmon_guest::{Guest, Request, Selection, Value};

/// What a cell should hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// This value; numbers are compared as numbers, whatever their sign type.
    Exactly(Value),
    /// One of these.
    OneOf(Vec<Value>),
    /// A number or time (nanoseconds) in this range, both ends included.
    Between(i128, i128),
    /// A text that sorts into this range, both ends included.
    TextBetween(String, String),
    /// The text of a number whose whole part is in this range, both ends
    /// included.
    DecimalBetween(i128, i128),
    /// A list of these, in any order.
    Same(Vec<Value>),
    /// A list with all of these in it, and maybe others.
    Includes(Vec<Value>),
    /// Whatever could not be read or whatever value: not compared.
    Anything,
}

/// A row as the truth has it: column name to what should stand there.
pub type ExpectedRow = BTreeMap<&'static str, Expected>;

/// A row of a table: column name to value.
pub type TableRow = BTreeMap<&'static str, Value>;

/// How one table is compared.
pub struct Comparison {
    /// The table's name.
    pub table: &'static str,
    /// The columns that tell rows apart. They must be [`Expected::Exactly`].
    /// Several rows may share a key; then they are compared as a multiset.
    pub key: &'static [&'static str],
}

/// All rows of a table.
///
/// # Errors
/// If there is no such table, or it can't be made from this guest.
pub fn read_table(guest: &Guest, name: &str, selection: Selection) -> Result<Vec<TableRow>> {
    let table = secmon_guest::table(name).ok_or_else(|| anyhow!("there is no table {name}"))?;
    let columns = table.columns();
    let mut rows = Vec::new();
    let request = Request {
        columns: None,
        selection,
    };
    table
        .read(guest, &request, &mut |row| {
            let cells = columns
                .iter()
                .map(|column| column.name)
                .zip(row.values.drain(..));
            rows.push(cells.collect());
            ControlFlow::Continue(())
        })
        .with_context(|| format!("reading the table {name}"))?;
    Ok(rows)
}

fn as_number(value: &Value) -> Option<i128> {
    match value {
        Value::Unsigned(value) | Value::Address(value) => Some((*value).into()),
        Value::Signed(value) => Some((*value).into()),
        Value::Time(value) => Some(value.nanoseconds()),
        _ => None,
    }
}

fn equal(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::List(left), Value::List(right)) => {
            left.len() == right.len()
                && left
                    .iter()
                    .zip(right)
                    .all(|(left, right)| equal(left, right))
        }
        _ => match (as_number(left), as_number(right)) {
            (Some(left), Some(right)) => left == right,
            _ => left == right,
        },
    }
}

impl Expected {
    /// Exactly this value.
    pub fn exactly(value: impl Into<Value>) -> Self {
        Self::Exactly(value.into())
    }

    /// Exactly this text.
    pub fn text(bytes: &[u8]) -> Self {
        Self::Exactly(Value::text(bytes))
    }

    /// Whether `value` is what was expected.
    pub fn accepts(&self, value: &Value) -> bool {
        match self {
            Self::Exactly(expected) => equal(expected, value),
            Self::OneOf(expected) => expected.iter().any(|expected| equal(expected, value)),
            Self::Between(low, high) => {
                as_number(value).is_some_and(|number| *low <= number && number <= *high)
            }
            Self::TextBetween(low, high) => match value {
                Value::Text(text) => (low.as_bytes()..=high.as_bytes()).contains(&text.as_bytes()),
                _ => false,
            },
            Self::DecimalBetween(low, high) => match value {
                Value::Text(text) => whole_part(text.as_bytes())
                    .is_some_and(|number| (*low..=*high).contains(&number)),
                _ => false,
            },
            Self::Same(expected) => match value {
                Value::List(found) => found.len() == expected.len() && includes(found, expected),
                _ => false,
            },
            Self::Includes(expected) => match value {
                Value::List(found) => includes(found, expected),
                _ => false,
            },
            Self::Anything => true,
        }
    }
}

fn whole_part(text: &[u8]) -> Option<i128> {
    let text = std::str::from_utf8(text).ok()?;
    let whole = text.split_once('.').map_or(text, |(whole, _)| whole);
    whole.parse().ok()
}

/// Whether each of `wanted` is in the list, as often as it is wanted.
fn includes(list: &[Value], wanted: &[Value]) -> bool {
    let mut left: Vec<&Value> = list.iter().collect();
    wanted.iter().all(|wanted| {
        let at = left.iter().position(|value| equal(value, wanted));
        at.map(|at| left.swap_remove(at)).is_some()
    })
}

/// The key as text: equal for values that [`equal`] calls equal.
fn key_text(value: &Value) -> String {
    match value {
        Value::List(values) => values.iter().map(key_text).collect::<Vec<_>>().join(" "),
        _ => as_number(value).map_or_else(|| format!("{value:?}"), |number| number.to_string()),
    }
}

type Key = Vec<String>;

impl Comparison {
    fn key_of_expected(&self, row: &ExpectedRow) -> Result<Key> {
        let cell = |column: &&'static str| match row.get(column) {
            Some(Expected::Exactly(value)) => Ok(key_text(value)),
            other => Err(anyhow!(
                "{}: the key column {column} is {other:?}",
                self.table
            )),
        };
        self.key.iter().map(cell).collect()
    }

    fn key_of_row(&self, row: &TableRow) -> Result<Key> {
        let cell = |column: &&'static str| {
            row.get(column)
                .map(key_text)
                .ok_or_else(|| anyhow!("the table {} has no column {column}", self.table))
        };
        self.key.iter().map(cell).collect()
    }

    /// Every difference between the rows and the truth around them, in words;
    /// none if they agree.
    ///
    /// # Errors
    /// If a compared column does not exist or a key is not exact: a mistake
    /// of the test.
    pub fn differences(
        &self,
        before: &[ExpectedRow],
        rows: &[TableRow],
        after: &[ExpectedRow],
    ) -> Result<Vec<String>> {
        let mut differences = Vec::new();
        let before = self.by_key(before)?;
        let after = self.by_key(after)?;
        let mut ours: BTreeMap<Key, Vec<&TableRow>> = BTreeMap::new();
        for row in rows {
            ours.entry(self.key_of_row(row)?).or_default().push(row);
        }
        for (key, found) in &ours {
            let least = before
                .get(key)
                .map_or(0, Vec::len)
                .min(after.get(key).map_or(0, Vec::len));
            let most = before
                .get(key)
                .map_or(0, Vec::len)
                .max(after.get(key).map_or(0, Vec::len));
            let name = self.name(key);
            if most == 0 {
                differences.push(format!("invented: {name}: {:?}", found[0]));
            } else if found.len() > most {
                differences.push(format!("{name} is there {} times, not {most}", found.len()));
            } else if found.len() < least {
                differences.push(format!(
                    "{name} is there {} times, not {least}",
                    found.len()
                ));
            }
            let candidates = || {
                let rows = [&before, &after]
                    .into_iter()
                    .filter_map(|truth| truth.get(key));
                rows.flatten()
            };
            for row in found {
                if candidates().next().is_some()
                    && !candidates().any(|expected| {
                        self.mismatch(expected, row).is_ok_and(|all| all.is_empty())
                    })
                {
                    let nearest = candidates()
                        .map(|expected| self.mismatch(expected, row))
                        .collect::<Result<Vec<_>>>()?
                        .into_iter()
                        .min_by_key(Vec::len)
                        .unwrap_or_default();
                    // A value that changed meanwhile may be either of the two,
                    // column by column.
                    let agreed = nearest.iter().filter(|(column, _)| {
                        !candidates().any(|expected| {
                            expected
                                .get(column)
                                .zip(row.get(column))
                                .is_some_and(|(e, v)| e.accepts(v))
                        })
                    });
                    differences.extend(agreed.map(|(_, text)| format!("{name}: {text}")));
                }
            }
        }
        for (key, expected) in &before {
            if after.contains_key(key) && !ours.contains_key(key) {
                differences.push(format!("missing: {}: {:?}", self.name(key), expected[0]));
            }
        }
        Ok(differences)
    }

    fn name(&self, key: &Key) -> String {
        let pairs = self
            .key
            .iter()
            .zip(key)
            .map(|(column, value)| format!("{column}={value}"));
        format!("{} {}", self.table, pairs.collect::<Vec<_>>().join(" "))
    }

    fn by_key<'r>(&self, rows: &'r [ExpectedRow]) -> Result<BTreeMap<Key, Vec<&'r ExpectedRow>>> {
        let mut map: BTreeMap<Key, Vec<&ExpectedRow>> = BTreeMap::new();
        for row in rows {
            map.entry(self.key_of_expected(row)?).or_default().push(row);
        }
        Ok(map)
    }

    fn mismatch(
        &self,
        expected: &ExpectedRow,
        row: &TableRow,
    ) -> Result<Vec<(&'static str, String)>> {
        let mut all = Vec::new();
        for (column, expected) in expected {
            let value = row
                .get(column)
                .ok_or_else(|| anyhow!("the table {} has no column {column}", self.table))?;
            if !expected.accepts(value) {
                all.push((
                    *column,
                    format!("{column} is {value:?}, the guest says {expected:?}"),
                ));
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPARISON: Comparison = Comparison {
        table: "processes",
        key: &["pid"],
    };

    fn expected(pid: u64, comm: &str) -> ExpectedRow {
        BTreeMap::from([
            ("pid", Expected::Exactly(pid.into())),
            ("comm", Expected::Exactly(comm.into())),
        ])
    }

    fn row(pid: i64, comm: &str) -> TableRow {
        BTreeMap::from([("pid", pid.into()), ("comm", comm.into())])
    }

    fn differences(before: &[ExpectedRow], rows: &[TableRow], after: &[ExpectedRow]) -> usize {
        COMPARISON
            .differences(before, rows, after)
            .expect("a sound comparison")
            .len()
    }

    #[test]
    fn agreement_is_silent() {
        let truth = [expected(1, "init"), expected(2, "sh")];
        assert_eq!(
            differences(&truth, &[row(2, "sh"), row(1, "init")], &truth),
            0
        );
    }

    #[test]
    fn what_came_and_went_may_be_there_or_not() {
        let before = [expected(1, "init"), expected(2, "sh")];
        let after = [expected(1, "init"), expected(3, "ls")];
        assert_eq!(differences(&before, &[row(1, "init")], &after), 0);
        assert_eq!(
            differences(
                &before,
                &[row(1, "init"), row(3, "ls"), row(2, "sh")],
                &after
            ),
            0
        );
    }

    #[test]
    fn missing_invented_doubled_and_wrong_rows_are_found() {
        let truth = [expected(1, "init")];
        assert_eq!(differences(&truth, &[], &truth), 1);
        assert_eq!(
            differences(&truth, &[row(1, "init"), row(9, "x")], &truth),
            1
        );
        assert_eq!(
            differences(&truth, &[row(1, "init"), row(1, "init")], &truth),
            1
        );
        assert_eq!(differences(&truth, &[row(1, "evil")], &truth), 1);
    }

    #[test]
    fn a_value_that_changed_may_be_either() {
        let (before, after) = ([expected(1, "old")], [expected(1, "new")]);
        assert_eq!(differences(&before, &[row(1, "old")], &after), 0);
        assert_eq!(differences(&before, &[row(1, "new")], &after), 0);
        assert_eq!(differences(&before, &[row(1, "other")], &after), 1);
    }

    #[test]
    fn lists_in_any_order() {
        let list = |numbers: &[u64]| numbers.iter().map(|n| Value::from(*n)).collect::<Vec<_>>();
        let found = Value::List(list(&[1, 2, 2]).into());
        assert!(Expected::Same(list(&[2, 1, 2])).accepts(&found));
        assert!(!Expected::Same(list(&[2, 1, 1])).accepts(&found));
        assert!(!Expected::Same(list(&[2, 1])).accepts(&found));
        assert!(Expected::Includes(list(&[2, 1])).accepts(&found));
        assert!(!Expected::Includes(list(&[1, 1])).accepts(&found));
        assert!(!Expected::Includes(list(&[])).accepts(&Value::Null));
    }

    #[test]
    fn an_unknown_column_is_a_mistake_of_the_test() {
        let truth = [BTreeMap::from([
            ("pid", Expected::Exactly(1_u64.into())),
            ("no_such", Expected::Anything),
        ])];
        assert!(
            COMPARISON
                .differences(&truth, &[row(1, "init")], &truth)
                .is_err()
        );
    }
}

//! Conditions on rows and their order, as given on the command line.

use std::cmp::Ordering;

use regex_lite::Regex;
use secmon_guest::{ColumnInfo, Value};

use crate::columns::{self, UnknownColumn};
use crate::location::parse_number;
use crate::output::push_value;

/// A condition on one column.
#[derive(Debug)]
pub struct Filter {
    /// The column's index in the table.
    pub column: usize,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Equal(String),
    Different(String),
    Matches(Regex),
    MatchesNot(Regex),
    Compare(Comparison, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Less,
    AtMost,
    Greater,
    AtLeast,
}

/// What a condition says about a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The value fits.
    Fits,
    /// It does not.
    Differs,
    /// The value could not be read, so nobody knows.
    Unknown,
}

/// Why a text is not a condition.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// No operator in it.
    #[error("`{0}` is no condition: write column=value, !=, <, <=, >, >=, ~ or !~")]
    Form(String),
    /// The column is not the table's.
    #[error(transparent)]
    Column(#[from] UnknownColumn),
    /// The regular expression is none.
    #[error("`{expression}` is not a regular expression: {source}")]
    Expression {
        /// What was given.
        expression: String,
        /// What is wrong with it.
        source: regex_lite::Error,
    },
    /// The order asked for is not one.
    #[error("`{0}` is no order: write COLUMN, COLUMN:asc or COLUMN:desc")]
    Order(String),
}

/// Longest first where one begins another.
const OPERATORS: [&str; 8] = ["!=", "!~", "<=", ">=", "=", "~", "<", ">"];

impl Filter {
    /// Reads `column OPERATOR value`.
    pub fn parse(text: &str, known: &[ColumnInfo]) -> Result<Self, FilterError> {
        let form = || FilterError::Form(text.to_owned());
        let at = text.find(['=', '!', '~', '<', '>']).ok_or_else(form)?;
        let (name, rest) = text.split_at(at);
        let operator = OPERATORS
            .into_iter()
            .find(|operator| rest.starts_with(operator))
            .ok_or_else(form)?;
        let value = rest[operator.len()..].to_owned();
        let column = columns::find(known, name)?;
        let regex = |expression: &str| {
            Regex::new(expression).map_err(|source| FilterError::Expression {
                expression: expression.to_owned(),
                source,
            })
        };
        let test = match operator {
            "=" => Test::Equal(value),
            "!=" => Test::Different(value),
            "~" => Test::Matches(regex(&value)?),
            "!~" => Test::MatchesNot(regex(&value)?),
            "<" => Test::Compare(Comparison::Less, value),
            "<=" => Test::Compare(Comparison::AtMost, value),
            ">" => Test::Compare(Comparison::Greater, value),
            _ => Test::Compare(Comparison::AtLeast, value),
        };
        Ok(Self { column, test })
    }

    /// Whether a value fits.
    pub fn judge(&self, value: &Value) -> Verdict {
        if matches!(value, Value::Unreadable(_)) {
            return Verdict::Unknown;
        }
        let fits = match &self.test {
            Test::Equal(wanted) => is_equal(value, wanted),
            Test::Different(wanted) => !is_equal(value, wanted),
            Test::Matches(regex) => any_text(value, &|text| regex.is_match(text)),
            Test::MatchesNot(regex) => !any_text(value, &|text| regex.is_match(text)),
            Test::Compare(comparison, bound) => {
                compare_with(value, bound).is_some_and(|order| match comparison {
                    Comparison::Less => order.is_lt(),
                    Comparison::AtMost => order.is_le(),
                    Comparison::Greater => order.is_gt(),
                    Comparison::AtLeast => order.is_ge(),
                })
            }
        };
        if fits {
            Verdict::Fits
        } else {
            Verdict::Differs
        }
    }
}

/// The value as it is shown, the same text that a user copies from a table.
fn shown(value: &Value) -> String {
    let mut text = String::new();
    push_value(&mut text, value);
    text
}

/// Whether the test holds for the value's text or, of a list, for that of one
/// item or the whole.
fn any_text(value: &Value, test: &dyn Fn(&str) -> bool) -> bool {
    if let Value::List(items) = value
        && items.iter().any(|item| test(&shown(item)))
    {
        return true;
    }
    test(&shown(value))
}

fn is_equal(value: &Value, wanted: &str) -> bool {
    match number_of(value).zip(parse_signed(wanted)) {
        Some((value, wanted)) => value == wanted,
        None => any_text(value, &|text| text == wanted),
    }
}

fn parse_signed(text: &str) -> Option<i128> {
    let text = text.trim();
    match text.strip_prefix('-') {
        Some(digits) => parse_number(digits).ok().map(|value| -i128::from(value)),
        None => parse_number(text).ok().map(i128::from),
    }
}

fn number_of(value: &Value) -> Option<i128> {
    match value {
        Value::Unsigned(value) | Value::Address(value) => Some((*value).into()),
        Value::Signed(value) => Some((*value).into()),
        _ => None,
    }
}

/// How the value compares with the bound: numbers as numbers, what has no
/// number as text; a time thus by as much of it as was written. Null compares
/// with nothing.
fn compare_with(value: &Value, bound: &str) -> Option<Ordering> {
    match value {
        Value::Null | Value::Unreadable(_) => None,
        Value::Unsigned(_) | Value::Address(_) | Value::Signed(_) => {
            Some(number_of(value)?.cmp(&parse_signed(bound)?))
        }
        Value::Time(_) => {
            let text = shown(value);
            let start = text.get(..bound.len()).unwrap_or(&text);
            Some(start.cmp(bound))
        }
        _ => Some(shown(value).as_str().cmp(bound)),
    }
}

/// The order of rows by one column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// The column's index in the table.
    pub column: usize,
    /// The highest first.
    pub descending: bool,
}

impl Order {
    /// Reads `column`, `column:asc` or `column:desc`.
    pub fn parse(text: &str, known: &[ColumnInfo]) -> Result<Self, FilterError> {
        let (name, direction) = text.split_once(':').unwrap_or((text, "asc"));
        let descending = match direction {
            "asc" => false,
            "desc" => true,
            _ => return Err(FilterError::Order(text.to_owned())),
        };
        let column = columns::find(known, name)?;
        Ok(Self { column, descending })
    }

    /// Compares two values; what is null or could not be read comes last,
    /// whichever the direction.
    pub fn compare(&self, a: &Value, b: &Value) -> Ordering {
        let last = |value: &Value| matches!(value, Value::Null | Value::Unreadable(_));
        let order = compare(a, b);
        match last(a).cmp(&last(b)) {
            Ordering::Equal if self.descending => order.reverse(),
            Ordering::Equal => order,
            other => other,
        }
    }
}

fn compare(a: &Value, b: &Value) -> Ordering {
    if let Some((a, b)) = number_of(a).zip(number_of(b)) {
        return a.cmp(&b);
    }
    match (a, b) {
        (Value::Text(a), Value::Text(b)) => a.cmp(b),
        (Value::Time(a), Value::Time(b)) => a.cmp(b),
        (Value::Boolean(a), Value::Boolean(b)) => a.cmp(b),
        (Value::List(a), Value::List(b)) => {
            let items = a.iter().zip(b).map(|(a, b)| compare(a, b));
            items
                .into_iter()
                .find(|order| order.is_ne())
                .unwrap_or_else(|| a.len().cmp(&b.len()))
        }
        _ => rank(a).cmp(&rank(b)),
    }
}

/// An order between values of different types, so that sorting stays total.
fn rank(value: &Value) -> u8 {
    match value {
        Value::Boolean(_) => 0,
        Value::Unsigned(_) | Value::Signed(_) | Value::Address(_) => 1,
        Value::Time(_) => 2,
        Value::Text(_) => 3,
        Value::List(_) => 4,
        Value::Null => 5,
        Value::Unreadable(_) => 6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secmon_guest::{Cost, Kind, Shown};

    fn known() -> Vec<ColumnInfo> {
        let column = |(name, kind)| ColumnInfo {
            name,
            kind,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "",
        };
        [("pid", Kind::Unsigned), ("comm", Kind::Text)]
            .map(column)
            .to_vec()
    }

    fn verdict(condition: &str, value: impl Into<Value>) -> Verdict {
        Filter::parse(condition, &known())
            .expect("a condition")
            .judge(&value.into())
    }

    #[test]
    fn conditions_judge_by_type() {
        use Verdict::{Differs, Fits, Unknown};
        assert_eq!(verdict("pid=0x10", 16u64), Fits);
        assert_eq!(verdict("pid=1", 16u64), Differs);
        assert_eq!(verdict("pid<9", 10u64), Differs);
        assert_eq!(verdict("pid>=-1", -1i64), Fits);
        assert_eq!(verdict("pid>9", Value::Null), Differs);
        assert_eq!(verdict("comm=", Value::Null), Fits);
        assert_eq!(verdict("comm!=", "a"), Fits);
        assert_eq!(verdict("comm~^kw.*:0$", "kworker/0:0"), Fits);
        assert_eq!(verdict("comm!~^kw", "kworker/0:0"), Differs);
        assert_eq!(verdict("comm=a=b", "a=b"), Fits);
        assert_eq!(verdict("comm=b c", vec!["a", "b c"]), Fits);
        assert_eq!(verdict("comm=true", true), Fits);
        assert_eq!(
            verdict("comm>=2026-01", Value::time(1_800_000_000_000_000_000)),
            Fits
        );
        assert_eq!(verdict("comm!=x", Value::unreadable("gone")), Unknown);
    }

    #[test]
    fn what_is_no_condition_is_an_error() {
        let error = |text| Filter::parse(text, &known()).expect_err("none").to_string();
        assert!(error("pid").contains("no condition"));
        assert!(error("pi=1").contains("did you mean pid"));
        assert!(error("comm~(").contains("regular expression"));
        assert!(error("comm!a").contains("no condition"));
        assert!(Order::parse("pid:up", &known()).is_err());
    }

    #[test]
    fn what_is_not_there_sorts_last_both_ways() {
        for text in ["pid", "pid:desc"] {
            let order = Order::parse(text, &known()).expect("an order");
            let mut values = [
                Value::Null,
                Value::from(2u64),
                Value::unreadable(""),
                Value::from(-1i64),
                Value::from(10u64),
            ];
            values.sort_by(|a, b| order.compare(a, b));
            let mut wanted = [Value::from(-1i64), Value::from(2u64), Value::from(10u64)];
            if order.descending {
                wanted.reverse();
            }
            assert_eq!(values[..3], wanted);
        }
    }
}

//! What `env` should have: `/proc/PID/environ`.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::{ByteString, Process};

use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The comparison: variables are told apart by all they have, as nothing
/// forbids two of one name.
pub const ENV: Check = Check {
    comparison: Comparison {
        table: "env",
        key: &["pid", "name", "value"],
    },
    selection: Selection::default,
    expected,
    beyond_truth: |_| false,
};

fn expected(truth: &Truth) -> Vec<ExpectedRow> {
    truth.processes.iter().flat_map(rows).collect()
}

fn rows(process: &Process) -> impl Iterator<Item = ExpectedRow> {
    let strings = process.environ.iter().map(ByteString::as_bytes);
    strings.filter(|string| !string.is_empty()).map(|string| {
        let equals = string.iter().position(|byte| *byte == b'=');
        let (name, value) = match equals {
            Some(at) => (&string[..at], Expected::text(&string[at + 1..])),
            None => (string, Expected::Exactly(Value::Null)),
        };
        ExpectedRow::from([
            ("pid", Expected::exactly(process.pid)),
            ("name", Expected::text(name)),
            ("value", value),
        ])
    })
}

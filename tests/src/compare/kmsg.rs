//! What the table `kmsg` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::KernelMessage;

use super::Check;
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The check of `kmsg`.
pub const KMSG: Check = Check {
    comparison: Comparison {
        table: "kmsg",
        key: &["sequence"],
    },
    selection: Selection::default,
    expected: |truth| truth.kmsg.iter().map(expected).collect(),
    // /dev/kmsg does not show a record that may still be continued.
    beyond_truth: |row| row.get("complete") == Some(&Value::Boolean(false)),
};

fn expected(message: &KernelMessage) -> ExpectedRow {
    const LEVELS: [&str; 8] = [
        "emerg", "alert", "crit", "err", "warn", "notice", "info", "debug",
    ];
    let entry = |key: &str| {
        let value = message
            .dictionary
            .iter()
            .find_map(|line| line.strip_prefix(key));
        Expected::Exactly(value.map_or(Value::Null, Value::from))
    };
    let start = i128::from(message.microseconds) * 1000;
    ExpectedRow::from([
        ("sequence", Expected::Exactly(message.sequence.into())),
        ("nanoseconds", Expected::Between(start, start + 999)),
        (
            "level",
            Expected::Exactly(LEVELS[message.level as usize & 7].into()),
        ),
        (
            "facility",
            match message.facility {
                0 => Expected::Exactly("kern".into()),
                1 => Expected::Exactly("user".into()),
                3 => Expected::Exactly("daemon".into()),
                _ => Expected::Anything,
            },
        ),
        ("subsystem", entry("SUBSYSTEM=")),
        ("device", entry("DEVICE=")),
        (
            "text",
            Expected::Exactly(Value::text(message.text.as_bytes())),
        ),
    ])
}

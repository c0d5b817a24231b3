//! Memory of a process that is not in RAM: its row says so, and what there is
//! is told.

use anyhow::{Result, ensure};
use secmon_guest::{Selection, Value};
use secmon_lab::Suite;
use secmon_tests::images;
use secmon_tests::rows::read_table;

/// Why a cell can't be told whole, if it is for a page that is swapped out.
fn swapped(value: &Value) -> Option<&str> {
    match value {
        Value::Unreadable(reason) => Some(&**reason).filter(|text| text.contains("swapped out")),
        _ => None,
    }
}

#[test]
fn arguments_that_are_swapped_out_are_said_to_be() -> Result<()> {
    // Nobody in this guest was asked for the arguments, which would bring
    // them back.
    let opened = images::quiet(Suite::Trixie)?;
    let rows = read_table(&opened.guest(), "processes", Selection::default())?;
    let found: Vec<_> = rows
        .iter()
        .filter_map(|row| Some((row, swapped(row.get("cmdline")?)?)))
        .collect();
    let [(row, reason)] = found[..] else {
        anyhow::bail!("{} rows of swapped arguments", found.len());
    };
    // With as much as there is before the gap.
    ensure!(reason.contains("swapped-00-sss"), "{reason}");
    ensure!(row.get("comm") == Some(&"lab-worker".into()), "{row:?}");
    Ok(())
}

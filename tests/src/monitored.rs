//! What a monitoring VM says of its targets.

use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use secmon_guest::Value;
use secmon_monitor::protocol::{Answer, Client, Pause, Query};

/// The ids of a target's processes.
///
/// # Errors
/// If the monitor does not answer, or can't list them.
pub fn pids(client: &mut Client, target: &str) -> Result<Vec<u64>> {
    let query = Query {
        target: target.to_owned(),
        table: "processes".to_owned(),
        columns: Some(vec!["pid".to_owned()]),
        pids: None,
        all_namespaces: false,
        limit: None,
        credit: 0,
        pause: Pause::None,
    };
    let mut pids = Vec::new();
    let end = client.query(query, &mut |answer| {
        if let Answer::Rows(rows) = answer {
            let cells = rows.into_iter().flatten().map(Value::from);
            pids.extend(cells.filter_map(|value| match value {
                Value::Unsigned(pid) => Some(pid),
                _ => None,
            }));
        }
        ControlFlow::Continue(())
    })?;
    ensure!(end.error.is_none(), "{target}: {:?}", end.error);
    Ok(pids)
}

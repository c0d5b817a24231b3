//! What the table `namespaces` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Namespace;

use super::Check;
use super::processes::number;
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The check of `namespaces`.
pub const NAMESPACES: Check = Check {
    comparison: Comparison {
        table: "namespaces",
        key: &["type", "inode"],
    },
    selection: Selection::default,
    expected: |truth| {
        let listed = truth.namespaces.iter().filter(|namespace| {
            let held = !namespace.descriptors.is_empty() || !namespace.mounts.is_empty();
            !namespace.pids.is_empty()
                || namespace.kind == "net"
                || (held && namespace.kind != "user")
                // Threads can be in namespaces that no first thread is in.
                || truth.threads.iter().any(|thread| {
                    thread.own_namespaces.get(&namespace.kind) == Some(&namespace.inode)
                })
        });
        listed.map(expected).collect()
    },
    // Owners of others that nobody is in: `/proc` does not show them.
    beyond_truth: |row| {
        row.get("processes") == Some(&Value::Unsigned(0))
            && row.get("type") == Some(&Value::from("user"))
    },
};

fn expected(namespace: &Namespace) -> ExpectedRow {
    let first = namespace.pids.iter().min();
    ExpectedRow::from([
        ("type", Expected::Exactly(namespace.kind.as_str().into())),
        ("inode", Expected::Exactly(namespace.inode.into())),
        // Of processes only first threads are counted.
        (
            "processes",
            Expected::Between(namespace.pids.len() as i128, i128::MAX),
        ),
        ("pid", first.map_or(Expected::Anything, |pid| number(*pid))),
    ])
}

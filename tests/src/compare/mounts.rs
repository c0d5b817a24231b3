//! What `mounts` should have: `/proc/PID/mountinfo` of a process in each
//! mount namespace.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Mount;

use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The comparison.
pub const MOUNTS: Check = Check {
    comparison: Comparison {
        table: "mounts",
        key: &["namespace", "id"],
    },
    selection: || Selection {
        all_namespaces: true,
        ..Selection::default()
    },
    expected,
    // mountinfo leaves out what its reader's root directory does not lead to.
    beyond_truth: |row| row.get("reachable") == Some(&Value::Boolean(false)),
};

fn expected(truth: &Truth) -> Vec<ExpectedRow> {
    truth.mounts.iter().map(row).collect()
}

fn row(mount: &Mount) -> ExpectedRow {
    ExpectedRow::from([
        ("namespace", Expected::exactly(mount.namespace)),
        ("id", Expected::exactly(mount.id)),
        ("parent", Expected::exactly(mount.parent)),
        ("source", Expected::text(mount.source.as_bytes())),
        ("target", Expected::text(mount.target.as_bytes())),
        ("fstype", Expected::text(mount.fstype.as_bytes())),
        ("options", Expected::exactly(mount.options.clone())),
        (
            "super_options",
            Expected::exactly(general(&mount.super_options.to_string())),
        ),
        ("root", Expected::text(mount.root.as_bytes())),
        ("device", Expected::exactly(mount.device.clone())),
        (
            "propagation",
            Expected::exactly(propagation(&mount.propagation)),
        ),
    ])
}

/// The options that every file system can have.
fn general(options: &str) -> String {
    let known = ["ro", "rw", "sync", "dirsync", "mand", "lazytime"];
    let options = options.split(',').filter(|option| known.contains(option));
    options.collect::<Vec<_>>().join(",")
}

fn propagation(fields: &[String]) -> String {
    if fields.is_empty() {
        return "private".into();
    }
    let told = fields
        .iter()
        .filter(|field| !field.starts_with("propagate_from:"));
    told.cloned().collect::<Vec<_>>().join(" ")
}

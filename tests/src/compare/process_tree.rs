//! What the table `process_tree` should hold: each process with what stands
//! between it and the first ones.

use std::collections::BTreeMap;

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Process;

use super::processes::{comm, number, state};
use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The check of `process_tree`.
pub const PROCESS_TREE: Check = Check {
    comparison: Comparison {
        table: "process_tree",
        key: &["pid"],
    },
    selection: Selection::default,
    expected,
    beyond_truth: |_| false,
};

fn expected(truth: &Truth) -> Vec<ExpectedRow> {
    let parents: BTreeMap<i32, i32> = truth
        .processes
        .iter()
        .map(|process| (process.pid, process.ppid))
        .collect();
    let row = |process: &Process| {
        let asks = process.pid == truth.info.agent_pid;
        let words = process
            .cmdline
            .iter()
            .map(|word| Value::text(word.as_bytes()))
            .collect();
        ExpectedRow::from([
            ("pid", number(process.pid)),
            ("ppid", number(process.ppid)),
            ("depth", number(above(&parents, process.pid))),
            ("comm", comm(&process.comm, process.kernel_thread)),
            ("state", state(process.state, process.kernel_thread, asks)),
            ("uid", number(process.uid[0])),
            ("cmdline", Expected::Exactly(Value::List(words))),
        ])
    };
    truth.processes.iter().map(row).collect()
}

/// How many parents are above a process.
fn above(parents: &BTreeMap<i32, i32>, pid: i32) -> u32 {
    let known = |pid: &i32| parents.get(pid).copied().filter(|parent| *parent != 0);
    let line = std::iter::successors(known(&pid), known);
    line.take(parents.len()).count() as u32
}

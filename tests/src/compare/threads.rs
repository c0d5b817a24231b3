//! What the table `threads` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Thread;

use super::processes::{comm, cpu_time, number, start_time, state};
use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The check of `threads`.
pub const THREADS: Check = Check {
    comparison: Comparison {
        table: "threads",
        key: &["pid", "tid"],
    },
    selection: Selection::default,
    expected: |truth| {
        let row = |thread| expected(thread, truth);
        truth.threads.iter().map(row).collect()
    },
    beyond_truth: |_| false,
};

fn expected(thread: &Thread, truth: &Truth) -> ExpectedRow {
    let asks = thread.pid == truth.info.agent_pid;
    let kernel_thread = thread.kernel_thread;
    ExpectedRow::from([
        ("pid", number(thread.pid)),
        ("tid", number(thread.tid)),
        ("comm", comm(&thread.comm, kernel_thread)),
        (
            "task_comm",
            Expected::Exactly(Value::text(thread.task_comm().as_bytes())),
        ),
        ("state", state(thread.state, kernel_thread, asks)),
        (
            "kernel_thread",
            Expected::Exactly(Value::Boolean(kernel_thread)),
        ),
        ("start_time", start_time(thread.start_time, &truth.info)),
        ("uid", number(thread.uid[0])),
        ("euid", number(thread.uid[1])),
        ("user_time", cpu_time(thread.user_time, asks)),
        ("system_time", cpu_time(thread.system_time, asks)),
    ])
}

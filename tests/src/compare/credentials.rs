//! What the table `credentials` should hold.
//!
//! No file of `/proc` tells which tasks share one structure. The kernel's own
//! rule does (`copy_creds` in `kernel/cred.c`): a new thread shares the one of
//! who made it, a new process gets a copy. A thread that then changes an id
//! has one of its own. So the threads of one process that say the same of
//! themselves share one, and no process shares one with another.

use std::collections::BTreeMap;

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Thread;

use super::processes::{capabilities, number};
use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The check of `credentials`.
pub const CREDENTIALS: Check = Check {
    comparison: Comparison {
        table: "credentials",
        key: &["pids", "uid", "euid", "gid", "egid", "user_namespace"],
    },
    selection: Selection::default,
    expected,
    beyond_truth: |_| false,
};

/// What a thread says of its credentials; of two structures that say the same
/// nothing tells one from the other.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Said<'t> {
    pid: i32,
    uid: [u32; 4],
    gid: [u32; 4],
    groups: &'t [u32],
    capabilities: [u64; 5],
    user_namespace: Option<u64>,
}

fn expected(truth: &Truth) -> Vec<ExpectedRow> {
    let namespaces: BTreeMap<i32, Option<u64>> = truth
        .processes
        .iter()
        .map(|process| (process.pid, process.namespaces.get("user").copied()))
        .collect();
    let mut shared: BTreeMap<Said<'_>, u64> = BTreeMap::new();
    for thread in &truth.threads {
        let own = thread.own_namespaces.get("user").copied();
        let of_process = namespaces.get(&thread.pid).copied().flatten();
        *shared.entry(said(thread, own.or(of_process))).or_default() += 1;
    }
    shared
        .into_iter()
        .map(|(said, tasks)| row(&said, tasks))
        .collect()
}

fn said(thread: &Thread, user_namespace: Option<u64>) -> Said<'_> {
    let sets = thread.capabilities;
    Said {
        pid: thread.pid,
        uid: thread.uid,
        gid: thread.gid,
        groups: &thread.groups,
        capabilities: [
            sets.inheritable,
            sets.permitted,
            sets.effective,
            sets.bounding,
            sets.ambient,
        ],
        user_namespace,
    }
}

fn row(said: &Said<'_>, tasks: u64) -> ExpectedRow {
    let [uid, euid, suid, fsuid] = said.uid;
    let [gid, egid, sgid, fsgid] = said.gid;
    let [_, permitted, effective, bounding, _] = said.capabilities;
    let groups = said.groups.iter().copied().map(Value::from).collect();
    ExpectedRow::from([
        ("uid", number(uid)),
        ("account_uid", number(uid)),
        ("euid", number(euid)),
        ("suid", number(suid)),
        ("fsuid", number(fsuid)),
        ("gid", number(gid)),
        ("egid", number(egid)),
        ("sgid", number(sgid)),
        ("fsgid", number(fsgid)),
        ("cap_permitted", capabilities(permitted)),
        ("cap_effective", capabilities(effective)),
        ("cap_bounding", capabilities(bounding)),
        ("groups", Expected::Exactly(Value::List(groups))),
        (
            "user_namespace",
            Expected::Exactly(said.user_namespace.into()),
        ),
        (
            "pids",
            Expected::Exactly(Value::List(Box::new([Value::Signed(said.pid.into())]))),
        ),
        ("tasks", Expected::exactly(tasks)),
        // Two for each task; files that it opened hold more.
        ("usage", Expected::Between(2 * i128::from(tasks), i128::MAX)),
    ])
}

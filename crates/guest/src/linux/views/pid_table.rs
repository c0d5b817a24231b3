//! The table of process ids: what `kill`, `waitid` and a look-up in `/proc`
//! find a task by (`kernel/pid.c`).
//!
//! Each pid namespace has an IDR of its ids. A `struct pid` stands in the IDR
//! of its own namespace and of all around it, and heads the list of the tasks
//! that have it.

use std::collections::BTreeMap;

use secmon_memory::VirtualAddress;

use super::task_record::TaskRecordModel;
use super::{View, settled};
use crate::linux::list::chain::{ChainEnd, chain_nodes};
use crate::linux::list::is_object_address;
use crate::linux::pid::PidModel;
use crate::linux::xarray::idr_entries;
use crate::{Guest, TableError, layout};

/// `PID_MAX_LIMIT` (`include/linux/threads.h`).
const LIMIT: usize = 1 << 22;
/// No id belongs to more tasks; two for a moment when a thread executes.
const MOST_TASKS: usize = 16;
/// `PIDTYPE_PID` is the first list of `pid.tasks` and the first node of
/// `task_struct.pid_links`.
const PIDTYPE_PID: u64 = 0;

layout! {
    /// `include/linux/pid_namespace.h`
    struct NamespaceLayout: "pid_namespace" {
        ids: "idr",
    }
}

layout! {
    /// `include/linux/pid.h`
    struct PidTasksLayout: "pid" {
        tasks: "tasks",
    }
}

/// The ids of one pid namespace: the `struct pid` of each.
#[derive(Clone, Debug, Default)]
pub struct Ids {
    /// By number.
    pub pids: BTreeMap<u64, VirtualAddress>,
    /// Why some may be missing.
    pub errors: Vec<String>,
}

/// The ids in the IDR of the `pid_namespace` at `namespace`.
///
/// # Errors
/// [`TableError`] if the kernel's types lack something or the IDR can't be
/// read.
pub fn ids(
    guest: &Guest,
    table: &'static str,
    namespace: VirtualAddress,
) -> Result<Ids, TableError> {
    let layout = guest.layout::<NamespaceLayout>(table)?;
    let idr = namespace.wrapping_add(layout.ids.offset);
    let walk = idr_entries(guest, table, idr, LIMIT)?;
    let errors = walk.errors.iter().map(ToString::to_string).collect();
    let pids = walk
        .items
        .iter()
        .filter_map(|entry| Some((entry.index, entry.pointer()?)))
        .filter(|(_, pid)| is_object_address(guest.space(), *pid))
        .collect();
    Ok(Ids { pids, errors })
}

/// The tasks that the initial pid namespace's ids belong to, and these ids.
///
/// # Errors
/// [`TableError`] if there is no such table.
pub fn tasks(
    guest: &Guest,
    table: &'static str,
    model: &TaskRecordModel,
) -> Result<(View, Ids), TableError> {
    let namespace = guest.symbol(table, "init_pid_ns")?;
    let found = ids(guest, table, namespace)?;
    let mut view = View::default();
    for error in &found.errors {
        view.fail(error);
    }
    for pid in found.pids.values() {
        let of_pid = tasks_of(guest, table, model, *pid)?;
        view.tasks.extend(of_pid.tasks);
        for error in of_pid.errors {
            view.fail(error);
        }
    }
    Ok((view, found))
}

/// The tasks that have the id of the `struct pid` at `pid` as their own.
///
/// # Errors
/// [`TableError`] if the kernel's types lack something.
pub fn tasks_of(
    guest: &Guest,
    table: &'static str,
    model: &TaskRecordModel,
    pid: VirtualAddress,
) -> Result<View, TableError> {
    let layout = guest.layout::<PidTasksLayout>(table)?;
    let first = pid.wrapping_add(layout.tasks.offset + PIDTYPE_PID * 8);
    let offset = model.layout.pid_links.offset + PIDTYPE_PID * 16;
    let (space, diagnostics) = (guest.space(), guest.diagnostics());
    Ok(settled(guest, || {
        let mut view = View::default();
        for node in chain_nodes(space, diagnostics, first, ChainEnd::Null, MOST_TASKS) {
            match node {
                Ok(node) => {
                    view.tasks.insert(node.wrapping_sub(offset));
                }
                Err(error) => view.fail(error),
            }
        }
        view
    }))
}

/// The pid namespaces inside the initial one that these ids belong to, each
/// with the numbers that its own table must hold and the `struct pid` of each.
///
/// # Errors
/// [`TableError`] if the kernel's types lack something.
pub fn inner_namespaces(
    guest: &Guest,
    table: &'static str,
    ids: &Ids,
) -> Result<BTreeMap<VirtualAddress, Vec<(u64, VirtualAddress)>>, TableError> {
    let model = guest.layout::<PidModel>(table)?;
    let mut namespaces: BTreeMap<VirtualAddress, Vec<(u64, VirtualAddress)>> = BTreeMap::new();
    for pid in ids.pids.values() {
        // One that is freed meanwhile has no numbers any more.
        let Ok(numbers) = model.numbers(guest, *pid) else {
            continue;
        };
        if let Some(innermost) = numbers.inner.last()
            && is_object_address(guest.space(), numbers.namespace)
        {
            let of_namespace = namespaces.entry(numbers.namespace).or_default();
            of_namespace.push(((*innermost).into(), *pid));
        }
    }
    Ok(namespaces)
}

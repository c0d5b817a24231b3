//! Which places must have a task, and which lack it.
//!
//! What `fork` and `exit` do, in which order, decides. A task that `fork` has
//! not finished is in the state `TASK_NEW`, which nothing but the end of
//! `fork` changes; before that its `task_struct` is still a copy of its
//! parent's, with the parent's id. One that ends has an `exit_state` before
//! any list loses it, but for its control groups, which lose it at once.

use std::collections::{BTreeMap, BTreeSet};

use secmon_guest::Guest;
use secmon_guest::linux::views::pid_table::{self, Ids};
use secmon_guest::linux::views::task_record::{TaskRecord, is_linked};
use secmon_guest::linux::views::{View, control_groups, task_lists};
use secmon_memory::VirtualAddress;

use super::gathered::{Gathered, Place};
use crate::DetectError;

/// A task that is missing from places that must have it.
#[derive(Clone, Debug)]
pub(super) struct Missing {
    /// The task.
    pub(super) record: TaskRecord,
    /// The places that lack it.
    pub(super) places: Vec<Place>,
    /// The id that the kernel gave it, if the task names another.
    pub(super) true_pid: Option<u32>,
    /// The pid namespace whose table lacks it, and its number there.
    pub(super) namespace: Option<(VirtualAddress, u64)>,
}

/// The tasks that some place lacks, by the views of one look.
pub(super) fn suspects(guest: &Guest, gathered: &Gathered) -> Vec<Missing> {
    let copies = copies(gathered);
    let mut suspects = Vec::new();
    for record in gathered.records.values() {
        if !must_be_listed(guest, gathered, record) || copies.contains(&record.address) {
            continue;
        }
        let places = required(gathered, record)
            .filter(|place| lacks(guest, gathered, *place, record))
            .collect();
        suspects.push(Missing {
            record: record.clone(),
            places,
            true_pid: forged(guest, gathered, record),
            namespace: None,
        });
    }
    suspects.extend(missing_from_namespaces(guest, gathered));
    suspects.retain(Missing::is_something);
    suspects
}

impl Missing {
    fn is_something(&self) -> bool {
        !self.places.is_empty() || self.true_pid.is_some() || self.namespace.is_some()
    }

    /// Whether who asks the kernel for processes is not told of it.
    pub(super) fn is_hidden(&self) -> bool {
        let hides =
            |place: &Place| matches!(place, Place::TaskList | Place::ThreadList | Place::PidTable);
        self.places.iter().any(hides)
    }
}

/// Whether the task lives and is made to its end.
fn must_be_listed(guest: &Guest, gathered: &Gathered, record: &TaskRecord) -> bool {
    record.is_sound(guest)
        && !record.is_ended()
        && !record.is_new()
        && !gathered.processors.idle.contains(&record.address)
}

/// The places that must have a task.
fn required<'g>(gathered: &'g Gathered, record: &TaskRecord) -> impl Iterator<Item = Place> + 'g {
    let leads = record.is_leader();
    let groups = gathered.control_groups.is_some() && !record.is_exiting();
    [
        (Place::TaskList, leads),
        (Place::ThreadList, true),
        (Place::PidTable, true),
        (Place::Children, leads),
        (Place::ControlGroups, groups),
    ]
    .into_iter()
    .filter_map(|(place, required)| required.then_some(place))
}

/// Whether the place's view lacks the task. A view that ended early proves
/// something only about a task that is not linked there by its own account.
fn lacks(guest: &Guest, gathered: &Gathered, place: Place, record: &TaskRecord) -> bool {
    let Some(view) = gathered.view(place) else {
        return false;
    };
    let layout = &gathered.model.layout;
    let node = match place {
        Place::TaskList => Some(&layout.tasks),
        Place::ThreadList => Some(&layout.thread_node),
        Place::Children => Some(&layout.sibling),
        Place::ControlGroups => layout.cg_list.as_ref(),
        _ => None,
    };
    let walked = match place {
        Place::ThreadList => !gathered.threads.broken.contains(&record.signal),
        Place::Children => !gathered.children.broken.contains(&record.real_parent),
        _ => view.is_complete(),
    };
    !view.has(record.address)
        && (walked || node.is_some_and(|node| !is_linked(guest, record.address, node)))
}

/// The id that the kernel gave the task, if the task names another.
fn forged(guest: &Guest, gathered: &Gathered, record: &TaskRecord) -> Option<u32> {
    let given = gathered.model.number_of(guest, record).ok().flatten()?;
    (given != record.pid).then_some(given)
}

/// The objects that are copies of their parents until `fork` gives them
/// something of their own: they do not run, and a thread that is listed has
/// the same id and process. So is what is left of a `fork` that failed at once,
/// for as long as the parent lives; later its stack is another task's or gone.
///
/// Only the lists of threads count: a place that was looked at earlier may
/// have had another task, which lay at the same address.
fn copies(gathered: &Gathered) -> BTreeSet<VirtualAddress> {
    let is_listed = |record: &&TaskRecord| gathered.threads.all.has(record.address);
    let listed = || gathered.records.values().filter(is_listed);
    let processes: BTreeSet<(u32, VirtualAddress)> =
        listed().map(|record| (record.pid, record.signal)).collect();
    let stacks: BTreeSet<VirtualAddress> = listed().map(|record| record.stack).collect();
    let is_copy = |record: &&TaskRecord| {
        !is_listed(record)
            && !gathered.is_running(record.address)
            && (processes.contains(&(record.pid, record.signal)) || stacks.contains(&record.stack))
    };
    let copies = gathered.records.values().filter(is_copy);
    copies.map(|record| record.address).collect()
}

/// The tasks whose id in an inner pid namespace is not in its table.
fn missing_from_namespaces(guest: &Guest, gathered: &Gathered) -> Vec<Missing> {
    let Ok(namespaces) = pid_table::inner_namespaces(guest, super::NAME, &gathered.ids) else {
        return Vec::new();
    };
    let mut by_pid: BTreeMap<VirtualAddress, &TaskRecord> = BTreeMap::new();
    for record in gathered.records.values() {
        if must_be_listed(guest, gathered, record) && gathered.pid_table.has(record.address) {
            by_pid.insert(record.thread_pid, record);
        }
    }
    let mut missing = Vec::new();
    for (namespace, expected) in namespaces {
        let Ok(table) = pid_table::ids(guest, super::NAME, namespace) else {
            continue;
        };
        for (number, pid) in expected {
            let known = table.pids.get(&number) == Some(&pid) || !table.errors.is_empty();
            if let (false, Some(record)) = (known, by_pid.get(&pid)) {
                missing.push(Missing {
                    record: (*record).clone(),
                    places: Vec::new(),
                    true_pid: None,
                    namespace: Some((namespace, number)),
                });
            }
        }
    }
    missing
}

/// Looks again at what differed, the places in the opposite order: a task that
/// began or ended between two views is no hidden one.
pub(super) fn confirm(
    guest: &Guest,
    table: &'static str,
    gathered: &Gathered,
    suspects: Vec<Missing>,
) -> Result<Vec<Missing>, DetectError> {
    let mut suspects: Vec<Missing> = suspects
        .into_iter()
        .filter(|missing| gathered.is_still(guest, &missing.record))
        .collect();
    if suspects.is_empty() {
        return Ok(suspects);
    }
    let again = Again::look(guest, table, gathered, &suspects)?;
    for missing in &mut suspects {
        let record = missing.record.clone();
        missing
            .places
            .retain(|place| again.lacks(guest, gathered, *place, &record));
        missing.true_pid = missing
            .true_pid
            .and_then(|_| forged(guest, gathered, &record));
        missing.namespace = missing.namespace.filter(|(namespace, number)| {
            let found = pid_table::ids(guest, table, *namespace);
            found.is_ok_and(|found| {
                found.errors.is_empty() && found.pids.get(number) != Some(&record.thread_pid)
            })
        });
        // What it was missing from counts only if it was there to be found
        // until now.
        let now = gathered.now(guest, &record);
        if now.as_ref().is_some_and(TaskRecord::is_exiting) {
            missing
                .places
                .retain(|place| *place != Place::ControlGroups);
        }
        if now.is_none_or(|now| now.is_new()) {
            missing.places.clear();
            missing.true_pid = None;
            missing.namespace = None;
        }
    }
    suspects.retain(Missing::is_something);
    suspects.sort_by_key(|missing| (missing.record.pid, missing.record.address));
    Ok(suspects)
}

/// The global views, walked a second time.
struct Again {
    control_groups: Option<View>,
    ids: Ids,
    task_list: View,
}

impl Again {
    fn look(
        guest: &Guest,
        table: &'static str,
        gathered: &Gathered,
        suspects: &[Missing],
    ) -> Result<Self, DetectError> {
        let sets = suspects.iter().filter_map(|missing| missing.record.cgroups);
        let control_groups = match gathered.control_groups {
            Some(_) => Some(control_groups::members(
                guest,
                table,
                &gathered.model,
                sets,
            )?),
            None => None,
        };
        let (_, ids) = pid_table::tasks(guest, table, &gathered.model)?;
        let task_list = task_lists::processes(guest, table, &gathered.model)?;
        Ok(Self {
            control_groups,
            ids,
            task_list,
        })
    }

    fn lacks(&self, guest: &Guest, gathered: &Gathered, place: Place, record: &TaskRecord) -> bool {
        let (model, task) = (&gathered.model, record.address);
        let layout = &model.layout;
        let lacks = |view: &View, node| {
            !view.has(task) && (view.is_complete() || !is_linked(guest, task, node))
        };
        match place {
            Place::ControlGroups => match (&self.control_groups, &layout.cg_list) {
                (Some(view), Some(node)) => lacks(view, node),
                _ => false,
            },
            Place::Children => {
                let view = task_lists::children(guest, model, record.real_parent);
                lacks(&view, &layout.sibling)
            }
            Place::PidTable => self.lacks_pid(guest, gathered, record),
            Place::ThreadList => {
                let view = task_lists::threads(guest, model, record.signal);
                lacks(&view, &layout.thread_node)
            }
            Place::TaskList => lacks(&self.task_list, &layout.tasks),
            Place::Current | Place::RunQueues | Place::AddressSpaces | Place::Slab => false,
        }
    }

    /// Whether the table of ids does not lead to the task: its number leads to
    /// another `struct pid` or to none, or that does not lead to it.
    fn lacks_pid(&self, guest: &Guest, gathered: &Gathered, record: &TaskRecord) -> bool {
        let model = &gathered.model;
        let number = model.number_of(guest, record);
        let Ok(Some(number)) = number else {
            // It has none any more, but lives.
            return true;
        };
        let in_table = self.ids.pids.get(&number.into()) == Some(&record.thread_pid);
        if !in_table && self.ids.errors.is_empty() {
            return true;
        }
        let of_pid = pid_table::tasks_of(guest, super::NAME, model, record.thread_pid);
        of_pid.is_ok_and(|of_pid| of_pid.is_complete() && !of_pid.has(record.address))
    }
}

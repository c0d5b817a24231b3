//! All views of one look, and a record of each task that any of them has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use secmon_guest::linux::views::pid_table::{self, Ids};
use secmon_guest::linux::views::run_queues::{self, Processors};
use secmon_guest::linux::views::task_record::{TaskRecord, TaskRecordModel};
use secmon_guest::linux::views::{View, address_spaces, control_groups, slab, task_lists};
use secmon_guest::{Guest, TableError};
use secmon_memory::VirtualAddress;

use super::holders::{self, Holders};
use super::incomplete;
use crate::DetectError;

/// A place where tasks are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Place {
    TaskList,
    ThreadList,
    PidTable,
    Children,
    ControlGroups,
    Current,
    RunQueues,
    AddressSpaces,
    Slab,
}

impl Place {
    pub(super) const ALL: [Self; 9] = [
        Self::TaskList,
        Self::ThreadList,
        Self::PidTable,
        Self::Children,
        Self::ControlGroups,
        Self::Current,
        Self::RunQueues,
        Self::AddressSpaces,
        Self::Slab,
    ];

    /// Its name, as findings have it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::TaskList => "task_list",
            Self::ThreadList => "thread_list",
            Self::PidTable => "pid_table",
            Self::Children => "children",
            Self::ControlGroups => "control_groups",
            Self::Current => "current",
            Self::RunQueues => "run_queues",
            Self::AddressSpaces => "address_spaces",
            Self::Slab => "slab",
        }
    }

    /// What it is, for people.
    pub(super) const fn meaning(self) -> &'static str {
        match self {
            Self::TaskList => "the list of all processes",
            Self::ThreadList => "the list of its process's threads",
            Self::PidTable => "the table of process ids",
            Self::Children => "the list of its parent's children",
            Self::ControlGroups => "the members of its control groups",
            Self::Current => "what the CPUs run",
            Self::RunQueues => "the queues of what is to run",
            Self::AddressSpaces => "the owners of address spaces",
            Self::Slab => "the task_struct objects that are in use",
        }
    }
}

/// Views that were walked for several tasks each: one for each list.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// What all of them hold.
    pub(super) all: View,
    /// The heads of those that could not be walked to their end.
    pub(super) broken: BTreeSet<VirtualAddress>,
}

impl Lists {
    fn add(&mut self, head: VirtualAddress, view: View) {
        if !view.is_complete() {
            self.broken.insert(head);
        }
        self.all.tasks.extend(view.tasks);
        if self.all.errors.is_empty() {
            self.all.errors = view.errors;
        }
    }
}

/// All views of one look.
pub(super) struct Gathered {
    pub(super) model: Arc<TaskRecordModel>,
    pub(super) task_list: View,
    /// By `signal_struct`.
    pub(super) threads: Lists,
    /// By parent.
    pub(super) children: Lists,
    pub(super) pid_table: View,
    pub(super) ids: Ids,
    /// None if the kernel has no control groups.
    pub(super) control_groups: Option<View>,
    pub(super) processors: Processors,
    pub(super) address_spaces: View,
    pub(super) slab: View,
    /// Open files and directories, and which tasks have them.
    pub(super) holders: Holders,
    /// Each task that any view has and that can be one.
    pub(super) records: BTreeMap<VirtualAddress, TaskRecord>,
}

impl Gathered {
    /// Looks at all places.
    pub(super) fn gather(guest: &Guest, table: &'static str) -> Result<Self, DetectError> {
        let model = TaskRecordModel::of(guest, table)?;
        let task_list = task_lists::processes(guest, table, &model)?;
        let (pid_table, ids) = pid_table::tasks(guest, table, &model)?;
        let processors = run_queues::processors(guest, table, &model)?;
        let task_cache = slab::cache(guest, table, "task_struct_cachep")?;
        let mm_cache = slab::cache(guest, table, "mm_cachep")?;
        let mut caches = vec![task_cache, mm_cache];
        caches.extend(holders::caches(guest));
        let objects = slab::objects(guest, table, &caches)?;
        let holders = Holders::read(guest, &objects)?;
        let address_spaces = address_spaces::owners(guest, table, objects.of(mm_cache))?;
        let mut gathered = Self {
            model,
            task_list,
            threads: Lists::default(),
            children: Lists::default(),
            pid_table,
            ids,
            control_groups: None,
            processors,
            address_spaces,
            slab: View {
                errors: objects.errors.clone(),
                ..View::default()
            },
            holders,
            records: BTreeMap::new(),
        };
        gathered.take_objects(guest, objects.of(task_cache));
        let seen: Vec<VirtualAddress> = [
            &gathered.task_list,
            &gathered.pid_table,
            &gathered.processors.current,
            &gathered.processors.queued,
            &gathered.address_spaces,
        ]
        .into_iter()
        .flat_map(|view| view.tasks.iter().copied())
        .collect();
        gathered.take(guest, seen);
        gathered.walk_threads(guest);
        gathered.walk_children(guest);
        gathered.walk_control_groups(guest, table)?;
        Ok(gathered)
    }

    /// Notes the objects that are living tasks by their own account.
    fn take_objects(&mut self, guest: &Guest, objects: &[VirtualAddress]) {
        for address in objects {
            let Ok(record) = self.model.read(guest, *address) else {
                continue;
            };
            self.holders.note(&record);
            let lives = record.is_sound(guest)
                && !record.is_ended()
                && self.model.has_process(guest, &record) == Ok(true);
            if lives {
                self.slab.tasks.insert(*address);
                self.records.insert(*address, record);
            }
        }
    }

    /// Notes tasks that a view has; gives those that were not known.
    fn take(
        &mut self,
        guest: &Guest,
        tasks: impl IntoIterator<Item = VirtualAddress>,
    ) -> Vec<VirtualAddress> {
        let mut new = Vec::new();
        for address in tasks {
            if self.records.contains_key(&address) {
                continue;
            }
            if let Ok(record) = self.model.read(guest, address)
                && record.is_sound(guest)
            {
                self.holders.note(&record);
                self.records.insert(address, record);
                new.push(address);
            }
        }
        new
    }

    fn walk_threads(&mut self, guest: &Guest) {
        let signals: BTreeSet<VirtualAddress> = self
            .records
            .values()
            .filter(|record| !record.is_ended())
            .map(|record| record.signal)
            .collect();
        for signal in signals {
            let view = task_lists::threads(guest, &self.model, signal);
            // The list of a process that went away meanwhile means nothing.
            let still =
                |record: &TaskRecord| record.signal == signal && self.is_still(guest, record);
            if view.is_complete() || self.records.values().any(still) {
                self.threads.add(signal, view);
            }
        }
        let found: Vec<VirtualAddress> = self.threads.all.tasks.iter().copied().collect();
        self.take(guest, found);
    }

    fn walk_children(&mut self, guest: &Guest) {
        let mut parents: Vec<VirtualAddress> = self.records.keys().copied().collect();
        parents.extend(self.processors.idle.iter());
        // Each round walks the children of tasks that the one before found;
        // nearly always there are none.
        while !parents.is_empty() {
            let mut found = Vec::new();
            for parent in std::mem::take(&mut parents) {
                let known = self.records.get(&parent);
                if known.is_some_and(TaskRecord::is_ended) {
                    continue;
                }
                let view = task_lists::children(guest, &self.model, parent);
                if view.is_complete() || known.is_none_or(|known| self.is_still(guest, known)) {
                    found.extend(view.tasks.iter().copied());
                    self.children.add(parent, view);
                }
            }
            parents = self.take(guest, found);
        }
    }

    fn walk_control_groups(
        &mut self,
        guest: &Guest,
        table: &'static str,
    ) -> Result<(), TableError> {
        let sets: BTreeSet<VirtualAddress> = self
            .records
            .values()
            .filter(|record| !record.is_ended())
            .filter_map(|record| record.cgroups)
            .collect();
        // A kernel without control groups is no less sound.
        if guest.address("css_set_table").is_none() {
            return Ok(());
        }
        let view = control_groups::members(guest, table, &self.model, sets)?;
        let found: Vec<VirtualAddress> = view.tasks.iter().copied().collect();
        self.control_groups = Some(view);
        self.take(guest, found);
        Ok(())
    }

    /// Whether the task lives and is as it was when it was noted.
    pub(super) fn is_still(&self, guest: &Guest, record: &TaskRecord) -> bool {
        self.now(guest, record).is_some()
    }

    /// The task as it is now, if it still is the one that was noted.
    pub(super) fn now(&self, guest: &Guest, record: &TaskRecord) -> Option<TaskRecord> {
        let now = self.model.read(guest, record.address).ok()?;
        (now.is_same(record) && now.is_sound(guest) && !now.is_ended()).then_some(now)
    }

    /// The view of a place, where there is one.
    pub(super) fn view(&self, place: Place) -> Option<&View> {
        match place {
            Place::TaskList => Some(&self.task_list),
            Place::ThreadList => Some(&self.threads.all),
            Place::PidTable => Some(&self.pid_table),
            Place::Children => Some(&self.children.all),
            Place::ControlGroups => self.control_groups.as_ref(),
            Place::Current => Some(&self.processors.current),
            Place::RunQueues => Some(&self.processors.queued),
            Place::AddressSpaces => Some(&self.address_spaces),
            Place::Slab => Some(&self.slab),
        }
    }

    /// Whether a CPU runs the task or has it queued.
    pub(super) fn is_running(&self, task: VirtualAddress) -> bool {
        self.processors.current.has(task) || self.processors.queued.has(task)
    }

    /// Why tasks may have been overlooked.
    pub(super) fn incomplete(&self) -> Option<DetectError> {
        Place::ALL.into_iter().find_map(|place| {
            let view = self.view(place)?;
            incomplete(place.name(), view)
        })
    }
}

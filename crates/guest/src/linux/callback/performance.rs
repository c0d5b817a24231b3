//! Performance events (`kernel/events/core.c`): what is called when a counter
//! runs over, when an event ends, and to learn of virtual machines.

use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};

use super::{LeadsTo, Walk};
use crate::linux::hash::AddressSet;
use crate::linux::list::{entries, is_object_address};
use crate::linux::per_cpu::PerCpu;
use crate::{Guest, TableError, Text, layout};

/// More events than this has no context.
const MOST_EVENTS: usize = 1 << 14;
/// More sources of events than this has no guest.
const MOST_SOURCES: usize = 1 << 10;
/// More contexts than this has no task (`perf_nr_task_contexts` is 2).
const MOST_CONTEXTS: u64 = 8;

layout! {
    /// `include/linux/sched.h`
    struct TaskLayout: "task_struct" {
        /// One until Linux 6.1 for each kind of source.
        contexts: "perf_event_ctxp",
    }
}

layout! {
    /// `include/linux/perf_event.h`
    struct ContextLayout: "perf_event_context" {
        events: "event_list",
    }
}

layout! {
    /// `include/linux/perf_event.h`
    struct EventLayout: "perf_event" {
        node: "event_entry",
        overflow: "overflow_handler",
    } optional {
        end: "destroy",
        clock: "clock",
    }
}

layout! {
    /// `include/linux/perf_event.h`
    struct CpuLayout: "perf_cpu_context" {
        context: "ctx",
    }
}

layout! {
    /// `include/linux/perf_event.h`
    struct SourceLayout: "pmu" {
        list: "entry",
    } optional {
        /// Until Linux 6.1 each source has contexts of its own.
        contexts: "pmu_cpu_context",
    }
}

/// How events are read; none where the kernel was built without them.
pub(super) struct Events {
    task: Arc<TaskLayout>,
    context: Arc<ContextLayout>,
    event: Arc<EventLayout>,
}

impl Events {
    pub(super) fn of(guest: &Guest, table: &'static str) -> Result<Option<Self>, TableError> {
        if !guest.types(table)?.has("task_struct", "perf_event_ctxp") {
            return Ok(None);
        }
        Ok(Some(Self {
            task: guest.layout(table)?,
            context: guest.layout(table)?,
            event: guest.layout(table)?,
        }))
    }

    /// The functions of a task's events.
    pub(super) fn of_task(&self, walk: &mut Walk<'_>, task: VirtualAddress, name: &Text) {
        let guest = walk.guest;
        let count = (self.task.contexts.size / 8).min(MOST_CONTEXTS);
        for number in 0..count {
            let place = task.wrapping_add(self.task.contexts.offset + number * 8);
            match guest.space().read_pointer(place) {
                Ok(context) if is_object_address(guest.space(), context) => {
                    self.of_context(walk, context, name);
                }
                Ok(_) => {}
                Err(error) => walk.complain("task_struct.perf_event_ctxp", place, &error),
            }
        }
    }

    fn of_context(&self, walk: &mut Walk<'_>, context: VirtualAddress, name: &Text) {
        let (guest, table) = (walk.guest, walk.table);
        let head = context.wrapping_add(self.context.events.offset);
        // One that no CPU has used is all zeros.
        if guest.space().read_pointer(head) == Ok(VirtualAddress::new(0)) {
            return;
        }
        let subject = "perf_event_context.event_list";
        let members = [
            Some(&self.event.overflow),
            self.event.end.as_ref(),
            self.event.clock.as_ref(),
        ];
        let found = entries(guest, table, subject, head, self.event.node.offset);
        for event in found.take(MOST_EVENTS) {
            for member in members.into_iter().flatten() {
                let location = event.wrapping_add(member.offset);
                if let Err(error) = walk.add("perf_event", name, location, LeadsTo::Function) {
                    walk.complain("perf_event", event, &error);
                }
            }
        }
    }
}

/// The functions of the events of CPUs, and those that tell of guests of this
/// guest. Tasks' own events are walked with the tasks.
pub(super) fn events(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let Some(events) = Events::of(guest, table)? else {
        return Ok(());
    };
    let cpus = PerCpu::read(guest, table)?;
    let layout = guest.layout::<CpuLayout>(table)?;
    let mut contexts = Vec::new();
    if let Some(symbol) = guest.address("perf_cpu_context") {
        contexts.push(symbol);
    } else if let Some(head) = guest.address("pmus") {
        contexts = of_sources(walk, head)?;
    }
    let name = Text::from("perf_cpu_context");
    for context in contexts {
        for cpu in cpus.online() {
            if let Some(at) = cpus.checked_address(guest, context, *cpu) {
                events.of_context(walk, at.wrapping_add(layout.context.offset), &name);
            }
        }
    }
    if let Some(place) = guest.address("perf_guest_cbs") {
        let size = guest.types(table)?.size_of("perf_guest_info_callbacks");
        let leads_to = LeadsTo::Table(size.unwrap_or(0));
        let name = Text::from("perf_guest_cbs");
        if let Err(error) = walk.add("perf_guest_info_callbacks", &name, place, leads_to) {
            walk.complain("perf_guest_cbs", place, &error);
        }
    }
    Ok(())
}

/// The per-CPU contexts that sources of events share or have of their own.
fn of_sources(walk: &Walk<'_>, head: VirtualAddress) -> Result<Vec<VirtualAddress>, TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let layout = guest.layout::<SourceLayout>(table)?;
    let Some(member) = &layout.contexts else {
        return Ok(Vec::new());
    };
    let mut known = AddressSet::default();
    let mut found = Vec::new();
    for source in entries(guest, table, "pmus", head, layout.list.offset).take(MOST_SOURCES) {
        let context: Result<_, ReadError> = guest.pointer(source, member);
        match context {
            // A pointer from `alloc_percpu` is an offset as a rule.
            Ok(context) if !context.is_null() && known.insert(context) => found.push(context),
            Ok(_) => {}
            Err(error) => walk.complain("pmu", source, &error),
        }
    }
    Ok(found)
}

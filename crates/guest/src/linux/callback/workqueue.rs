//! Work that is queued or runs on the kernel's workers (`kernel/workqueue.c`).
//! Delayed work waits for its timer: its function stands behind that timer.

use secmon_memory::{ReadError, VirtualAddress};

use super::{LeadsTo, Walk};
use crate::linux::list::{entries, is_object_address};
use crate::linux::xarray::idr_entries;
use crate::{Guest, TableError, Text, layout};

/// More pools than this has no guest.
const MOST_POOLS: usize = 1 << 14;
/// More workers than this has no pool.
const MOST_WORKERS: usize = 1 << 16;
/// More work than this is in no queue.
const MOST_WORKS: usize = 1 << 16;
/// More queues than this has no guest.
const MOST_QUEUES: usize = 1 << 16;
/// Bytes of a queue's name that are read.
const LONGEST_NAME: u64 = 64;

layout! {
    /// `kernel/workqueue.c`
    struct PoolLayout: "worker_pool" {
        works: "worklist",
        workers: "workers",
    }
}

layout! {
    /// `kernel/workqueue_internal.h`
    struct WorkerLayout: "worker" {
        function: "current_func",
        scheduled: "scheduled",
        node: "node",
    }
}

layout! {
    /// `include/linux/workqueue_types.h`
    struct WorkLayout: "work_struct" {
        entry: "entry",
        function: "func",
    }
}

layout! {
    /// `kernel/workqueue.c`
    struct QueueLayout: "workqueue_struct" {
        list: "list",
        pools: "pwqs",
        name: "name",
    } optional {
        rescuer: "rescuer",
    }
}

layout! {
    /// `kernel/workqueue.c`
    struct PoolOfQueueLayout: "pool_workqueue" {
        node: "pwqs_node",
        /// What waits until less of the queue runs; `delayed_works` until
        /// Linux 5.9.
        waiting: "inactive_works" | "delayed_works",
    }
}

/// The functions of all work that is queued, waits for a place or runs.
pub(super) fn works(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let (Some(pools), Some(queues)) = (
        guest.address("worker_pool_idr"),
        guest.address("workqueues"),
    ) else {
        return Ok(());
    };
    let layouts = Layouts {
        work: &*guest.layout::<WorkLayout>(table)?,
        worker: &*guest.layout::<WorkerLayout>(table)?,
    };
    let pool = guest.layout::<PoolLayout>(table)?;
    let all = idr_entries(guest, table, pools, MOST_POOLS)?;
    for entry in all.report(guest, table, "worker_pool_idr") {
        let Some(at) = entry.pointer().filter(|at| is_object(guest, *at)) else {
            continue;
        };
        let name = Text::from(format!("worker pool {}", entry.index));
        let works = at.wrapping_add(pool.works.offset);
        layouts.list(walk, works, "worker_pool.worklist", &name);
        let workers = at.wrapping_add(pool.workers.offset);
        let workers = entries(
            guest,
            table,
            "worker_pool.workers",
            workers,
            layouts.worker.node.offset,
        );
        for worker in workers.take(MOST_WORKERS) {
            layouts.worker(walk, worker, &name);
        }
    }
    let queue = guest.layout::<QueueLayout>(table)?;
    let of_queue = guest.layout::<PoolOfQueueLayout>(table)?;
    for at in entries(guest, table, "workqueues", queues, queue.list.offset).take(MOST_QUEUES) {
        let name = match name_of(guest, &queue, at) {
            Ok(name) => name,
            Err(error) => {
                walk.complain("workqueue_struct", at, &error);
                continue;
            }
        };
        if let Some(member) = &queue.rescuer {
            match guest.pointer(at, member) {
                Ok(rescuer) if is_object(guest, rescuer) => layouts.worker(walk, rescuer, &name),
                Ok(_) => {}
                Err(error) => walk.complain("workqueue_struct", at, &error),
            }
        }
        let head = at.wrapping_add(queue.pools.offset);
        let pools = entries(
            guest,
            table,
            "workqueue_struct.pwqs",
            head,
            of_queue.node.offset,
        );
        for part in pools.take(MOST_POOLS) {
            let waiting = part.wrapping_add(of_queue.waiting.offset);
            layouts.list(walk, waiting, "pool_workqueue.inactive_works", &name);
        }
    }
    Ok(())
}

fn is_object(guest: &Guest, address: VirtualAddress) -> bool {
    is_object_address(guest.space(), address)
}

fn name_of(guest: &Guest, layout: &QueueLayout, at: VirtualAddress) -> Result<Text, ReadError> {
    let mut bytes = vec![0; layout.name.size.min(LONGEST_NAME) as usize];
    guest
        .space()
        .read(at.wrapping_add(layout.name.offset), &mut bytes)?;
    let end = bytes.iter().position(|byte| *byte == 0);
    Ok(Text::new(
        bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default(),
    ))
}

struct Layouts<'l> {
    work: &'l WorkLayout,
    worker: &'l WorkerLayout,
}

impl Layouts<'_> {
    /// The functions of the work in a list.
    fn list(&self, walk: &mut Walk<'_>, head: VirtualAddress, subject: &'static str, name: &Text) {
        let (guest, table) = (walk.guest, walk.table);
        let works = entries(guest, table, subject, head, self.work.entry.offset);
        for work in works.take(MOST_WORKS) {
            let location = work.wrapping_add(self.work.function.offset);
            if let Err(error) = walk.add("work_struct", name, location, LeadsTo::Function) {
                walk.complain("work_struct", work, &error);
            }
        }
    }

    /// What a worker runs, and what it took over to run next.
    fn worker(&self, walk: &mut Walk<'_>, worker: VirtualAddress, name: &Text) {
        let location = worker.wrapping_add(self.worker.function.offset);
        if let Err(error) = walk.add("worker", name, location, LeadsTo::Function) {
            walk.complain("worker", worker, &error);
        }
        let scheduled = worker.wrapping_add(self.worker.scheduled.offset);
        self.list(walk, scheduled, "worker.scheduled", name);
    }
}

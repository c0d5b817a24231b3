//! The name of a task as `/proc` shows it. `task_struct.comm` has 15
//! characters; kernel threads can have a longer name elsewhere, and workers of
//! workqueues show what they work on (`proc_task_name`, `fs/proc/array.c`;
//! `wq_worker_comm`, `kernel/workqueue.c`; `get_kthread_comm`,
//! `kernel/kthread.c`).

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::is_object_address;
use crate::linux::task::{PF_WQ_WORKER, Task};
use crate::{Guest, layout};

/// The kernel's buffer for the name, without the zero at its end.
const LONGEST: usize = 63;
/// What rescuers of workqueues are called since 6.8.
const RESCUER: &[u8] = b"kworker/R-";

layout! {
    /// `kernel/kthread.c`
    struct KthreadLayout: "kthread" {
        data: "data",
    } optional {
        /// Since 5.17, if the name did not fit into `comm`.
        full_name: "full_name",
    }
}

layout! {
    /// `kernel/workqueue_internal.h`
    struct WorkerLayout: "worker" {
        current_work: "current_work",
        pool: "pool",
        description: "desc",
        rescue_workqueue: "rescue_wq",
    }
}

layout! {
    /// `kernel/workqueue.c`
    struct WorkqueueLayout: "workqueue_struct" {
        name: "name",
    }
}

/// The name of `task` as in `/proc/PID/comm`. What a kernel thread has beyond
/// `comm` is left out if it can't be read: nothing in it is needed to know the
/// thread.
pub fn command_name(guest: &Guest, table: &'static str, task: &Task) -> Vec<u8> {
    let comm = task.comm();
    if !task.is_kernel_thread() {
        return comm.to_vec();
    }
    let longer = if task.flags & PF_WQ_WORKER != 0 {
        worker_name(guest, table, task)
    } else {
        full_name(guest, table, task)
    };
    match longer {
        Some(mut name) => {
            name.truncate(LONGEST);
            name
        }
        None => comm.to_vec(),
    }
}

/// The `kthread` of a kernel thread.
fn kthread(guest: &Guest, task: &Task) -> Option<VirtualAddress> {
    let layout = &task.model().layout;
    let member = layout
        .worker_private
        .as_ref()
        .or(layout.set_child_tid.as_ref())?;
    let kthread = task.pointer(member);
    is_object_address(guest.space(), kthread).then_some(kthread)
}

fn full_name(guest: &Guest, table: &'static str, task: &Task) -> Option<Vec<u8>> {
    let layout = guest.layout::<KthreadLayout>(table).ok()?;
    let full_name = layout.full_name.as_ref()?;
    let name = guest.pointer(kthread(guest, task)?, full_name).ok()?;
    if name.is_null() {
        return None;
    }
    guest.space().read_c_string(name, LONGEST).ok()
}

fn worker_name(guest: &Guest, table: &'static str, task: &Task) -> Option<Vec<u8>> {
    let layout = guest.layout::<KthreadLayout>(table).ok()?;
    let worker = guest.pointer(kthread(guest, task)?, &layout.data).ok()?;
    if !is_object_address(guest.space(), worker) {
        return None;
    }
    let layout = guest.layout::<WorkerLayout>(table).ok()?;
    read_worker_name(guest, table, &layout, task.comm(), worker).ok()
}

fn read_worker_name(
    guest: &Guest,
    table: &'static str,
    layout: &WorkerLayout,
    comm: &[u8],
    worker: VirtualAddress,
) -> Result<Vec<u8>, ReadError> {
    let mut name = comm.to_vec();
    let workqueue = guest.pointer(worker, &layout.rescue_workqueue)?;
    if !workqueue.is_null()
        && comm.starts_with(RESCUER)
        && let Ok(layout) = guest.layout::<WorkqueueLayout>(table)
    {
        let limit = layout.name.size.clamp(1, 32) as usize;
        let address = workqueue.wrapping_add(layout.name.offset);
        name = RESCUER.to_vec();
        name.extend(guest.space().read_c_string(address, limit)?);
    }
    if guest.pointer(worker, &layout.pool)?.is_null() {
        return Ok(name);
    }
    let limit = layout.description.size.clamp(1, 32) as usize;
    let address = worker.wrapping_add(layout.description.offset);
    let description = guest.space().read_c_string(address, limit)?;
    if !description.is_empty() {
        let idle = guest.pointer(worker, &layout.current_work)?.is_null();
        name.push(if idle { b'-' } else { b'+' });
        name.extend(description);
    }
    Ok(name)
}

//! The name of a task as `/proc` shows it. `task_struct.comm` has 15
//! characters; kernel threads can have a longer name elsewhere, and workers of
//! workqueues show what they work on (`proc_task_name`, `fs/proc/array.c`;
//! `wq_worker_comm`, `kernel/workqueue.c`; `get_kthread_comm`,
//! `kernel/kthread.c`).

use std::sync::Arc;

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

/// Reads the names of tasks.
pub struct CommandNames {
    kthread: Option<Arc<KthreadLayout>>,
    worker: Option<Arc<WorkerLayout>>,
    workqueue: Option<Arc<WorkqueueLayout>>,
}

impl CommandNames {
    /// A reader for `table`. What the types lack of workers is left out of
    /// their names.
    pub fn new(guest: &Guest, table: &'static str) -> Self {
        Self {
            kthread: guest.layout(table).ok(),
            worker: guest.layout(table).ok(),
            workqueue: guest.layout(table).ok(),
        }
    }

    /// The name of `task` as in `/proc/PID/comm`. What a kernel thread has
    /// beyond `comm` is left out if it can't be read: nothing in it is needed
    /// to know the thread.
    pub fn of(&self, guest: &Guest, task: &Task) -> Vec<u8> {
        let comm = task.comm();
        if !task.is_kernel_thread() {
            return comm.to_vec();
        }
        let longer = if task.flags & PF_WQ_WORKER != 0 {
            self.worker_name(guest, task)
        } else {
            self.full_name(guest, task)
        };
        match longer {
            Some(mut name) => {
                name.truncate(LONGEST);
                name
            }
            None => comm.to_vec(),
        }
    }

    fn full_name(&self, guest: &Guest, task: &Task) -> Option<Vec<u8>> {
        let full_name = self.kthread.as_ref()?.full_name.as_ref()?;
        let name = guest.pointer(kthread(guest, task)?, full_name).ok()?;
        if name.is_null() {
            return None;
        }
        guest.space().read_c_string(name, LONGEST).ok()
    }

    fn worker_name(&self, guest: &Guest, task: &Task) -> Option<Vec<u8>> {
        let data = &self.kthread.as_ref()?.data;
        let worker = guest.pointer(kthread(guest, task)?, data).ok()?;
        if !is_object_address(guest.space(), worker) {
            return None;
        }
        self.read_worker_name(guest, self.worker.as_ref()?, task.comm(), worker)
            .ok()
    }

    fn read_worker_name(
        &self,
        guest: &Guest,
        layout: &WorkerLayout,
        comm: &[u8],
        worker: VirtualAddress,
    ) -> Result<Vec<u8>, ReadError> {
        let mut name = comm.to_vec();
        let workqueue = guest.pointer(worker, &layout.rescue_workqueue)?;
        if !workqueue.is_null()
            && comm.starts_with(RESCUER)
            && let Some(layout) = &self.workqueue
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
}

/// The `kthread` of a kernel thread.
pub(crate) fn kthread(guest: &Guest, task: &Task) -> Option<VirtualAddress> {
    let layout = &task.model().layout;
    let member = layout
        .worker_private
        .as_ref()
        .or(layout.set_child_tid.as_ref())?;
    let kthread = task.pointer(member);
    is_object_address(guest.space(), kthread).then_some(kthread)
}

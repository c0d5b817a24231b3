//! What tasks run: the functions of kernel threads (`kernel/kthread.c`), the
//! work that a task does before it returns to its program
//! (`kernel/task_work.c`), which io_uring and others give to it, and its
//! performance events.

use secmon_memory::{ReadError, VirtualAddress};

use super::performance::Events;
use super::{LeadsTo, Walk};
use crate::linux::command_name::kthread;
use crate::linux::hash::AddressSet;
use crate::linux::list::is_object_address;
use crate::linux::task::{Task, leaders, threads};
use crate::{TableError, Text, layout};

/// More work than this waits for no task.
const MOST_WORKS: usize = 1 << 12;
/// More tasks than this has no guest: the kernel's limit of ids.
const MOST_TASKS: usize = 1 << 22;

layout! {
    /// `include/linux/sched.h`
    struct WorksLayout: "task_struct" {} optional {
        works: "task_works",
    }
}

layout! {
    /// `kernel/kthread.c`
    struct ThreadLayout: "kthread" {
        function: "threadfn",
    }
}

layout! {
    /// `include/linux/types.h`
    struct HeadLayout: "callback_head" {
        next: "next",
        function: "func",
    }
}

/// What all listed tasks run.
pub(super) fn tasks(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let layouts = Layouts {
        works: &*guest.layout::<WorksLayout>(table)?,
        thread: &*guest.layout::<ThreadLayout>(table)?,
        head: &*guest.layout::<HeadLayout>(table)?,
        events: Events::of(guest, table)?,
    };
    for leader in leaders(guest, table)?.take(MOST_TASKS) {
        if leader.is_kernel_thread() {
            layouts.kernel_thread(walk, &leader);
            continue;
        }
        layouts.task(walk, &leader);
        for thread in threads(guest, table, &leader)?.take(MOST_TASKS) {
            if thread.address != leader.address {
                layouts.task(walk, &thread);
            }
        }
    }
    Ok(())
}

struct Layouts<'l> {
    works: &'l WorksLayout,
    thread: &'l ThreadLayout,
    head: &'l HeadLayout,
    events: Option<Events>,
}

impl Layouts<'_> {
    fn kernel_thread(&self, walk: &mut Walk<'_>, task: &Task) {
        // Those that a program's start passes through have none.
        let Some(thread) = kthread(walk.guest, task) else {
            return;
        };
        let location = thread.wrapping_add(self.thread.function.offset);
        let name = Text::new(task.comm());
        if let Err(error) = walk.add("kthread", &name, location, LeadsTo::Function) {
            walk.complain("kthread", thread, &error);
        }
        self.task(walk, task);
    }

    fn task(&self, walk: &mut Walk<'_>, task: &Task) {
        let name = Text::new(task.comm());
        if let Err(error) = self.works(walk, task.address, &name) {
            walk.complain("task_struct.task_works", task.address, &error);
        }
        if let Some(events) = &self.events {
            events.of_task(walk, task.address, &name);
        }
    }

    /// The work that waits for a task.
    fn works(
        &self,
        walk: &mut Walk<'_>,
        task: VirtualAddress,
        name: &Text,
    ) -> Result<(), ReadError> {
        let (guest, space) = (walk.guest, walk.guest.space());
        let Some(works) = &self.works.works else {
            return Ok(());
        };
        // A task that ends takes no more: this is the last of its list.
        let last = guest.address("work_exited");
        let mut seen = AddressSet::default();
        let mut work = guest.pointer(task, works)?;
        while is_object_address(space, work)
            && Some(work) != last
            && seen.len() < MOST_WORKS
            && seen.insert(work)
        {
            let location = work.wrapping_add(self.head.function.offset);
            walk.add("callback_head", name, location, LeadsTo::Function)?;
            work = guest.pointer(work, &self.head.next)?;
        }
        Ok(())
    }
}

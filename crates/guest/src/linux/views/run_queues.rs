//! What the processors run and will run next: each CPU's current task and its
//! queues (`struct rq`, `kernel/sched/sched.h`).
//!
//! A task that waits for something is in none of them. Those of a class that
//! is written in eBPF (`sched_ext`) are in queues of its own; of them only the
//! one that runs is seen.

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::Member;

use super::task_record::TaskRecordModel;
use super::{Tasks, View, settled};
use crate::linux::list::{LIMIT, is_object_address, nodes};
use crate::linux::per_cpu::PerCpu;
use crate::linux::rb_tree;
use crate::{Guest, TableError, layout};

/// Bytes of a `list_head`.
const LIST_HEAD: u64 = 16;
/// `MAX_RT_PRIO` (`include/linux/sched/prio.h`), and one more than is used.
const MOST_PRIORITIES: u64 = 128;

layout! {
    /// `kernel/sched/sched.h`
    struct RunQueueLayout: "rq" {
        current: "curr",
        idle: "idle",
    } optional {
        fair: "cfs_tasks",
        realtime: "rt.active.queue",
        deadline: "dl.root",
    }
}

layout! {
    /// `include/linux/sched.h`
    struct DeadlineLayout: "sched_dl_entity" {
        node: "rb_node",
    } optional {
        /// Since 6.8: whether this stands for a whole class, not a task.
        server: "dl_server",
    }
}

layout! {
    /// `arch/x86/include/asm/current.h`, 6.2 to 6.14.
    struct HotLayout: "pcpu_hot" {
        current: "current_task",
    }
}

/// What the processors run.
#[derive(Clone, Debug, Default)]
pub struct Processors {
    /// The tasks that run or are queued to run, without idle ones.
    pub queued: View,
    /// The tasks that run, by two accounts: the scheduler's and the one that
    /// the kernel's own code goes by. Without idle ones.
    pub current: View,
    /// The idle task of each possible CPU.
    pub idle: Tasks,
}

/// Looks at all CPUs' queues.
///
/// # Errors
/// [`TableError`] if they can't be found.
pub fn processors(
    guest: &Guest,
    table: &'static str,
    model: &TaskRecordModel,
) -> Result<Processors, TableError> {
    let cpus = PerCpu::read(guest, table)?;
    let queues = Queues {
        guest,
        model,
        layout: &*guest.layout::<RunQueueLayout>(table)?,
        deadline: guest
            .layout::<DeadlineLayout>(table)
            .ok()
            .as_deref()
            .cloned(),
        queue: guest.symbol(table, "runqueues")?,
        current: current_symbol(guest, table),
        cpus: &cpus,
    };
    let mut idle = Tasks::default();
    for queue in cpus.possible().filter_map(|cpu| queues.queue(cpu)) {
        if let Ok(task) = guest.pointer(queue, &queues.layout.idle) {
            idle.insert(task);
        }
    }
    idle.insert(guest.symbol(table, "init_task")?);
    let current = settled(guest, || queues.running());
    let queued = settled(guest, || queues.queued());
    let without_idle = |view: View| View {
        tasks: view.tasks.difference(&idle).copied().collect(),
        errors: view.errors,
    };
    Ok(Processors {
        queued: without_idle(queued),
        current: without_idle(current),
        idle,
    })
}

/// The per-CPU variable by which a CPU's own code knows its task.
fn current_symbol(guest: &Guest, table: &'static str) -> Option<VirtualAddress> {
    if let Some(hot) = guest.address("pcpu_hot")
        && let Ok(layout) = guest.layout::<HotLayout>(table)
    {
        return Some(hot.wrapping_add(layout.current.offset));
    }
    guest.address("current_task")
}

struct Queues<'g> {
    guest: &'g Guest,
    model: &'g TaskRecordModel,
    layout: &'g RunQueueLayout,
    deadline: Option<DeadlineLayout>,
    queue: VirtualAddress,
    current: Option<VirtualAddress>,
    cpus: &'g PerCpu,
}

impl Queues<'_> {
    fn queue(&self, cpu: u32) -> Option<VirtualAddress> {
        self.cpus.checked_address(self.guest, self.queue, cpu)
    }

    fn take(&self, view: &mut View, task: Result<VirtualAddress, ReadError>) {
        match task {
            Ok(task) if is_object_address(self.guest.space(), task) => {
                view.tasks.insert(task);
            }
            Ok(task) => view.fail(format_args!("the task that a CPU runs is at {task}")),
            Err(error) => view.fail(error),
        }
    }

    fn running(&self) -> View {
        let mut view = View::default();
        for cpu in self.cpus.online() {
            if let Some(queue) = self.queue(*cpu) {
                let current = self.guest.pointer(queue, &self.layout.current);
                self.take(&mut view, current);
            }
            let own = self
                .current
                .and_then(|symbol| self.cpus.checked_address(self.guest, symbol, *cpu));
            if let Some(own) = own {
                self.take(&mut view, self.guest.space().read_pointer(own));
            }
        }
        view
    }

    fn queued(&self) -> View {
        let mut view = View::default();
        let queues = self.cpus.online().iter().filter_map(|cpu| self.queue(*cpu));
        for queue in queues {
            self.fair(queue, &mut view);
            self.realtime(queue, &mut view);
            self.deadline(queue, &mut view);
        }
        view
    }

    /// The tasks of a list whose nodes are this member of them.
    fn list(&self, head: VirtualAddress, node: &Member, view: &mut View) {
        for found in nodes(self.guest.space(), self.guest.diagnostics(), head, LIMIT) {
            match found {
                Ok(found) => {
                    view.tasks.insert(found.wrapping_sub(node.offset));
                }
                Err(error) => view.fail(error),
            }
        }
    }

    fn fair(&self, queue: VirtualAddress, view: &mut View) {
        match (&self.layout.fair, &self.model.layout.fair_node) {
            (Some(head), Some(node)) => self.list(queue.wrapping_add(head.offset), node, view),
            _ => view.fail("the kernel has no rq.cfs_tasks"),
        }
    }

    fn realtime(&self, queue: VirtualAddress, view: &mut View) {
        let (Some(heads), Some(node)) = (&self.layout.realtime, &self.model.layout.realtime_node)
        else {
            view.fail("the kernel has no rq.rt.active");
            return;
        };
        for priority in 0..(heads.size / LIST_HEAD).min(MOST_PRIORITIES) {
            let head = queue.wrapping_add(heads.offset + priority * LIST_HEAD);
            match self.guest.space().read_pointer(head) {
                // Nearly all: an empty list, or one of a priority that is not
                // in use.
                Ok(first) if first == head || first.is_null() => {}
                Ok(_) => self.list(head, node, view),
                Err(error) => view.fail(error),
            }
        }
    }

    fn deadline(&self, queue: VirtualAddress, view: &mut View) {
        let (Some(root), Some(node), Some(layout)) = (
            &self.layout.deadline,
            &self.model.layout.deadline_node,
            &self.deadline,
        ) else {
            view.fail("the kernel has no rq.dl.root");
            return;
        };
        let root = queue.wrapping_add(root.offset);
        let (space, diagnostics) = (self.guest.space(), self.guest.diagnostics());
        let walk = rb_tree::nodes(space, diagnostics, root, LIMIT);
        for error in walk.errors {
            view.fail(error);
        }
        for found in walk.items {
            let entity = found.wrapping_sub(layout.node.offset);
            let server = layout.server.as_ref();
            match server.map_or(Ok(0), |server| self.guest.number(entity, server)) {
                Ok(0) => {
                    view.tasks.insert(found.wrapping_sub(node.offset));
                }
                Ok(_) => {}
                Err(error) => view.fail(error),
            }
        }
    }
}

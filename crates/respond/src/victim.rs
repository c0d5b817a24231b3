//! The process that is to end, known by more than its number.

use std::sync::Arc;

use secmon_guest::linux::task::{self, Membership, PF_EXITING, Task, TaskError, TaskModel};
use secmon_guest::{Guest, TableError, layout};
use secmon_memory::{ReadError, VirtualAddress};

/// For errors: what the types are looked up for.
const TABLE: &str = "processes";

/// `SIGNAL_GROUP_EXIT` of `signal_struct.flags` (`include/linux/sched/signal.h`):
/// all threads are to end.
const SIGNAL_GROUP_EXIT: u64 = 0x4;

layout! {
    /// `include/linux/sched/signal.h`
    struct EndLayout: "signal_struct" {
        flags: "flags",
        live: "live",
    }
}

/// A process of a guest, as somebody saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Victim {
    /// A `task_struct` of it.
    pub task: VirtualAddress,
    /// Its id in the initial pid namespace.
    pub pid: u32,
    /// When that task was started: nanoseconds since the guest's boot.
    pub started: u64,
}

/// Why a process is not ended.
#[derive(Debug, thiserror::Error)]
pub enum VictimError {
    /// The kernel's types lack something.
    #[error(transparent)]
    Table(#[from] TableError),
    /// No process has this id.
    #[error("there is no process {pid} in the guest's list of processes")]
    Absent {
        /// The id.
        pid: u32,
    },
    /// There is no task any more where it was.
    #[error("process {pid} is not there any more: {source}")]
    Gone {
        /// Its id.
        pid: u32,
        /// What is at its address.
        source: TaskError,
    },
    /// Another process is there now.
    #[error(
        "at {task} is process {found}, started {found_started} ns after boot; process {pid} was started at {started} ns"
    )]
    Another {
        /// The address.
        task: VirtualAddress,
        /// The id that was meant.
        pid: u32,
        /// Its start.
        started: u64,
        /// The id that is there.
        found: u32,
        /// Its start.
        found_started: u64,
    },
    /// It has ended, or is about to.
    #[error("process {pid} is ending already")]
    Ending {
        /// Its id.
        pid: u32,
    },
    /// A part of the kernel.
    #[error("{pid} is a thread of the kernel, which no signal ends")]
    Kernel {
        /// Its id.
        pid: u32,
    },
    /// The kernel panics when it ends.
    #[error("process 1 is not ended: the guest's kernel would panic; pause the target instead")]
    Init,
    /// What its threads share can't be read.
    #[error("reading what the threads of process {pid} share: {source}")]
    Signal {
        /// Its id.
        pid: u32,
        /// Why not.
        source: ReadError,
    },
}

/// How far a process is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its threads are gone, or in the part of the kernel that ends them: no
    /// instruction of the process runs any more.
    Ended,
    /// Its threads are to end, and each will as soon as it runs.
    Told {
        /// How many have not begun to.
        threads: u64,
    },
    /// Nobody told it to end.
    Alive,
}

impl Victim {
    /// The process with this id.
    ///
    /// # Errors
    /// [`VictimError::Absent`] if the guest's list of processes has none.
    pub fn find(guest: &Guest, pid: u32) -> Result<Self, VictimError> {
        let mut leaders = task::leaders(guest, TABLE)?;
        let task = leaders.find(|task| task.tgid == pid);
        task.map(|task| Self::of(&task))
            .ok_or(VictimError::Absent { pid })
    }

    /// The process of the task at an address, in whatever list it is.
    ///
    /// # Errors
    /// [`VictimError::Gone`] if no task is there.
    pub fn at(guest: &Guest, address: VirtualAddress) -> Result<Self, VictimError> {
        let model = guest.layout::<TaskModel>(TABLE)?;
        let task = Task::read(guest, &model, address, Membership::Anywhere);
        let task = task.map_err(|source| VictimError::Gone { pid: 0, source })?;
        Ok(Self::of(&task))
    }

    fn of(task: &Task) -> Self {
        Self {
            task: task.address,
            pid: task.tgid,
            started: task.number(&task.model().layout.start_boottime),
        }
    }

    /// Reads the task again and sees that it is the same one.
    fn read(&self, guest: &Guest, model: &Arc<TaskModel>) -> Result<Task, VictimError> {
        let pid = self.pid;
        let task = Task::read(guest, model, self.task, Membership::Anywhere)
            .map_err(|source| VictimError::Gone { pid, source })?;
        let now = Self::of(&task);
        if now != *self {
            return Err(VictimError::Another {
                task: self.task,
                pid,
                started: self.started,
                found: now.pid,
                found_started: now.started,
            });
        }
        Ok(task)
    }

    /// That it is still the process that was meant, and one that may be ended;
    /// gives a thread of it that has not begun to end, which the kernel takes
    /// a signal for.
    ///
    /// # Errors
    /// [`VictimError`] otherwise.
    pub fn check(&self, guest: &Guest) -> Result<VirtualAddress, VictimError> {
        let pid = self.pid;
        let model = guest.layout::<TaskModel>(TABLE)?;
        let task = self.read(guest, &model)?;
        if task.is_kernel_thread() || task.mm.is_null() && task.flags & PF_EXITING == 0 {
            return Err(VictimError::Kernel { pid });
        }
        // Of another namespace's process 1 the kernel ends the namespace alone.
        if pid <= 1 {
            return Err(VictimError::Init);
        }
        let (flags, live) = self.signal(guest, &task)?;
        if live == 0 || flags & SIGNAL_GROUP_EXIT != 0 {
            return Err(VictimError::Ending { pid });
        }
        if task.flags & PF_EXITING == 0 {
            return Ok(task.address);
        }
        let mut threads = task::threads(guest, TABLE, &task)?;
        let thread = threads.find(|thread| thread.flags & PF_EXITING == 0);
        thread
            .map(|thread| thread.address)
            .ok_or(VictimError::Ending { pid })
    }

    /// `signal_struct.flags` and how many threads have not begun to end.
    fn signal(&self, guest: &Guest, task: &Task) -> Result<(u64, u64), VictimError> {
        let layout = guest.layout::<EndLayout>(TABLE)?;
        let number = |member| {
            let number = guest.number(task.signal, member);
            number.map_err(|source| VictimError::Signal {
                pid: self.pid,
                source,
            })
        };
        Ok((number(&layout.flags)?, number(&layout.live)?))
    }

    /// How far it is on its way out.
    ///
    /// # Errors
    /// [`VictimError`] if that can't be seen.
    pub(crate) fn end(&self, guest: &Guest) -> Result<End, VictimError> {
        let model = guest.layout::<TaskModel>(TABLE)?;
        let task = match self.read(guest, &model) {
            Ok(task) => task,
            Err(VictimError::Gone {
                source: TaskError::Changing { .. },
                ..
            }) => return Ok(End::Told { threads: 1 }),
            Err(VictimError::Gone { .. } | VictimError::Another { .. }) => return Ok(End::Ended),
            Err(error) => return Err(error),
        };
        let (flags, live) = self.signal(guest, &task)?;
        // What was read through the task was its own only if it still is one.
        if !task.is_unchanged(guest) {
            return Ok(End::Told { threads: 1 });
        }
        Ok(match (live, flags & SIGNAL_GROUP_EXIT) {
            (0, _) => End::Ended,
            (_, 0) => End::Alive,
            (threads, _) => End::Told { threads },
        })
    }
}

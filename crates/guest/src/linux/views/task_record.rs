//! What of a task says whether it lives and where it has to be listed
//! (`struct task_struct`, `struct signal_struct`).
//!
//! Unlike [`Task`](crate::linux::task::Task), a [`TaskRecord`] is read wherever
//! it lies, in a list or not, and is no claim that there is a task.

use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{Member, TypeError, Types};

use crate::linux::list::is_object_address;
use crate::linux::pid::PidModel;
use crate::linux::snapshot::Spans;
use crate::linux::task::PF_EXITING;
use crate::{Guest, Layout, TableError, Text, layout};

/// `TASK_DEAD` of `task_struct.__state` (`include/linux/sched.h`).
const TASK_DEAD: u64 = 0x80;
/// `TASK_NEW`: the state, as a whole, of a task that `fork` has not finished.
const TASK_NEW: u64 = 0x800;
/// `PID_MAX_LIMIT` (`include/linux/threads.h`).
const PID_MAX_LIMIT: u32 = 1 << 22;
/// `pids[PIDTYPE_TGID]` (`include/linux/pid_types.h`).
const TGID: u64 = 1;

layout! {
    /// `include/linux/sched.h`
    pub struct TaskRecordLayout: "task_struct" {
        pid: "pid",
        tgid: "tgid",
        comm: "comm",
        flags: "flags",
        state: "__state" | "state",
        exit_state: "exit_state",
        usage: "usage",
        signal: "signal",
        group_leader: "group_leader",
        real_parent: "real_parent",
        thread_pid: "thread_pid",
        files: "files",
        fs: "fs",
        stack: "stack",
        start_boottime: "start_boottime" | "real_start_time",
        tasks: "tasks",
        thread_node: "thread_node",
        children: "children",
        sibling: "sibling",
        pid_links: "pid_links",
    } optional {
        cgroups: "cgroups",
        cg_list: "cg_list",
        fair_node: "se.group_node",
        realtime_node: "rt.run_list",
        deadline_node: "dl.rb_node",
    }
}

layout! {
    /// `include/linux/sched/signal.h`
    struct SharedLayout: "signal_struct" {
        references: "sigcnt",
        threads: "nr_threads",
        thread_head: "thread_head",
        pids: "pids",
    }
}

/// How these parts of a guest's tasks are read.
#[derive(Debug)]
pub struct TaskRecordModel {
    /// The members.
    pub layout: TaskRecordLayout,
    spans: Spans,
    shared: SharedLayout,
    pid: PidModel,
}

impl Layout for TaskRecordModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = TaskRecordLayout::resolve(types)?;
        let copied = [
            &layout.pid,
            &layout.tgid,
            &layout.comm,
            &layout.flags,
            &layout.state,
            &layout.exit_state,
            &layout.usage,
            &layout.signal,
            &layout.group_leader,
            &layout.real_parent,
            &layout.thread_pid,
            &layout.files,
            &layout.fs,
            &layout.stack,
            &layout.start_boottime,
        ];
        let spans = Spans::covering(copied.into_iter().chain(&layout.cgroups));
        Ok(Self {
            layout,
            spans,
            shared: SharedLayout::resolve(types)?,
            pid: PidModel::resolve(types)?,
        })
    }
}

impl TaskRecordModel {
    /// The model for this guest.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types lack something.
    pub fn of(guest: &Guest, table: &'static str) -> Result<Arc<Self>, TableError> {
        guest.layout(table)
    }

    /// The head of the list of threads in the `signal_struct` at `signal`.
    pub(crate) fn thread_head(&self, signal: VirtualAddress) -> VirtualAddress {
        signal.wrapping_add(self.shared.thread_head.offset)
    }

    /// Copies what lies at `address`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn read(&self, guest: &Guest, address: VirtualAddress) -> Result<TaskRecord, ReadError> {
        let layout = &self.layout;
        let copy = self.spans.read(guest.space(), address)?;
        let number = |member| self.spans.number(&copy, member);
        let pointer = |member| self.spans.pointer(&copy, member);
        let comm = self.spans.member(&copy, &layout.comm);
        let end = comm.iter().position(|byte| *byte == 0);
        Ok(TaskRecord {
            address,
            pid: number(&layout.pid) as u32,
            tgid: number(&layout.tgid) as u32,
            name: end.and_then(|end| comm.get(..end)).map(Text::new),
            flags: number(&layout.flags) as u32,
            state: number(&layout.state),
            exit_state: number(&layout.exit_state),
            usage: number(&layout.usage) as u32,
            signal: pointer(&layout.signal),
            group_leader: pointer(&layout.group_leader),
            real_parent: pointer(&layout.real_parent),
            thread_pid: pointer(&layout.thread_pid),
            files: pointer(&layout.files),
            fs: pointer(&layout.fs),
            stack: pointer(&layout.stack),
            cgroups: layout.cgroups.as_ref().map(pointer),
            started: number(&layout.start_boottime),
        })
    }

    /// Whether the `signal_struct` of the task is in use, by the process that
    /// the task says it belongs to or with the task among its threads.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn has_process(&self, guest: &Guest, task: &TaskRecord) -> Result<bool, ReadError> {
        let number = |member| guest.number(task.signal, member);
        let used =
            number(&self.shared.references)? as i32 > 0 && number(&self.shared.threads)? as i32 > 0;
        let pid = task.signal.wrapping_add(self.shared.pids.offset + TGID * 8);
        let pid = guest.space().read_pointer(pid)?;
        if !used {
            return Ok(false);
        }
        let of_process =
            is_object_address(guest.space(), pid) && self.pid.initial(guest, pid)? == task.tgid;
        Ok(of_process || is_linked(guest, task.address, &self.layout.thread_node))
    }

    /// The id that the kernel gave the task in the initial pid namespace, from
    /// its `struct pid`; none once it has no such any more.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn number_of(&self, guest: &Guest, task: &TaskRecord) -> Result<Option<u32>, ReadError> {
        if !is_object_address(guest.space(), task.thread_pid) {
            return Ok(None);
        }
        self.pid.initial(guest, task.thread_pid).map(Some)
    }
}

/// Whether both neighbours of the `list_head` that is this member of the
/// structure at `address` lead back to it.
pub fn is_linked(guest: &Guest, address: VirtualAddress, node: &Member) -> bool {
    let space = guest.space();
    let node = address.wrapping_add(node.offset);
    let leads_back = |link: u64, back: u64| {
        space.read_pointer(node.wrapping_add(link)).is_ok_and(|to| {
            to != node
                && is_object_address(space, to)
                && space.read_pointer(to.wrapping_add(back)) == Ok(node)
        })
    };
    leads_back(0, 8) && leads_back(8, 0)
}

/// What of a task says whether it lives and where it has to be listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskRecord {
    /// Where its `task_struct` lies.
    pub address: VirtualAddress,
    /// The thread's id in the initial pid namespace, by its own account.
    pub pid: u32,
    /// The process's id in the initial pid namespace, by its own account.
    pub tgid: u32,
    /// Its name; none if that does not end, as every name does.
    pub name: Option<Text>,
    flags: u32,
    state: u64,
    exit_state: u64,
    usage: u32,
    /// `signal_struct`, shared by the threads.
    pub signal: VirtualAddress,
    /// The first thread of the process.
    pub group_leader: VirtualAddress,
    /// The parent process.
    pub real_parent: VirtualAddress,
    /// Its `struct pid`.
    pub thread_pid: VirtualAddress,
    /// Its table of open files (`files_struct`); null once it gave that up.
    pub files: VirtualAddress,
    /// Its root and current directory (`fs_struct`); null likewise.
    pub fs: VirtualAddress,
    /// The lowest address of its kernel stack.
    pub stack: VirtualAddress,
    /// Its `css_set`, where the kernel has such.
    pub cgroups: Option<VirtualAddress>,
    /// When it was started: nanoseconds since boot.
    pub started: u64,
}

impl TaskRecord {
    /// Whether this can be a task at all: its numbers are in range and its
    /// pointers lead to where objects can be.
    pub fn is_sound(&self, guest: &Guest) -> bool {
        let numbers = self.pid <= PID_MAX_LIMIT && self.tgid <= PID_MAX_LIMIT;
        let pointers = [self.signal, self.group_leader, self.real_parent];
        let led = |pointer: &VirtualAddress| is_object_address(guest.space(), *pointer);
        numbers && self.name.is_some() && pointers.iter().all(led)
    }

    /// Whether `exit` has come so far that the lists may already lack it, or
    /// its memory is free.
    pub fn is_ended(&self) -> bool {
        self.exit_state != 0 || self.usage == 0 || self.state & TASK_DEAD != 0
    }

    /// Whether `exit` has begun, which takes the task out of its control
    /// groups long before the lists of processes lack it.
    pub fn is_exiting(&self) -> bool {
        self.flags & PF_EXITING != 0
    }

    /// Whether `fork` is still making it, and nothing can wake it.
    pub fn is_new(&self) -> bool {
        self.state == TASK_NEW
    }

    /// Whether it is the first thread of its process.
    pub fn is_leader(&self) -> bool {
        self.group_leader == self.address
    }

    /// Whether it is the same task as in another copy, and listed the same.
    pub fn is_same(&self, other: &Self) -> bool {
        self.address == other.address
            && self.pid == other.pid
            && self.tgid == other.tgid
            && self.started == other.started
            && self.signal == other.signal
            && self.group_leader == other.group_leader
            && self.real_parent == other.real_parent
    }
}

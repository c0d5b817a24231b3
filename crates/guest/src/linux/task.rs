//! Tasks: the kernel's processes and threads (`task_struct`,
//! `include/linux/sched.h`).
//!
//! [`leaders`] walks the list of all processes, [`threads`] those of one. A
//! [`Task`] is a validated copy: its numbers are in range, its pointers can be
//! kernel objects, and on a live guest all of it stood in memory at one moment
//! while the task was linked into its list.

use std::collections::HashSet;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress, Volatility};
use secmon_profile::{Member, TypeError, Types};

use crate::linux::hash::Keyed;
use crate::linux::list::{entries, is_object_address};
use crate::linux::snapshot::{Snapshot, Spans};
use crate::{Diagnostic, Guest, Layout, TableError, layout};

/// The largest process id and the number of them: `PID_MAX_LIMIT`
/// (`include/linux/threads.h`).
const PID_MAX_LIMIT: i64 = 1 << 22;

/// `PF_EXITING` of `task_struct.flags`: the task is on its way out.
pub const PF_EXITING: u32 = 0x4;
/// `PF_WQ_WORKER`: a worker of a workqueue.
pub const PF_WQ_WORKER: u32 = 0x20;
/// `PF_KTHREAD`: a kernel thread.
pub const PF_KTHREAD: u32 = 0x20_0000;

/// How often a task that changes while it is copied is copied again.
const ATTEMPTS: u32 = 8;

layout! {
    /// `include/linux/sched.h`
    pub struct TaskLayout: "task_struct" {
        pid: "pid",
        tgid: "tgid",
        comm: "comm",
        flags: "flags",
        /// `__state` since 5.14.
        state: "__state" | "state",
        exit_state: "exit_state",
        tasks: "tasks",
        thread_node: "thread_node",
        signal: "signal",
        group_leader: "group_leader",
        real_parent: "real_parent",
        mm: "mm",
        fs: "fs",
        files: "files",
        nsproxy: "nsproxy",
        cred: "cred",
        real_cred: "real_cred",
        stack: "stack",
        utime: "utime",
        stime: "stime",
        sum_exec_runtime: "se.sum_exec_runtime",
        static_prio: "static_prio",
        prio: "prio",
        policy: "policy",
        rt_priority: "rt_priority",
        atomic_flags: "atomic_flags",
        /// `real_start_time` until 5.4.
        start_boottime: "start_boottime" | "real_start_time",
    } optional {
        /// Part of `thread_info` since 5.16; absent for one CPU.
        cpu: "thread_info.cpu" | "cpu",
        stack_pointer: "thread.sp",
        /// What FS of user mode adds to addresses: where thread-local data is.
        thread_pointer: "thread.fsbase",
        /// Whom it tells when it no longer needs its parent's memory.
        vfork_done: "vfork_done",
        ptrace: "ptrace",
        parent: "parent",
        exit_code: "exit_code",
        /// Absent where CPU time is measured exactly
        /// (`VIRT_CPU_ACCOUNTING_NATIVE`).
        told_utime: "prev_cputime.utime",
        told_stime: "prev_cputime.stime",
        cgroups: "cgroups",
        thread_pid: "thread_pid",
        seccomp_mode: "seccomp.mode",
        loginuid: "loginuid",
        sessionid: "sessionid",
        nvcsw: "nvcsw",
        nivcsw: "nivcsw",
        min_flt: "min_flt",
        maj_flt: "maj_flt",
        /// Of a kernel thread: its `kthread`, since 5.17.
        worker_private: "worker_private",
        /// Of a kernel thread before 5.17: its `kthread`.
        set_child_tid: "set_child_tid",
    }
}

/// How tasks of a guest are read.
#[derive(Clone, Debug)]
pub struct TaskModel {
    /// The members.
    pub layout: TaskLayout,
    /// The runs that are copied.
    spans: Spans,
}

impl Layout for TaskModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = TaskLayout::resolve(types)?;
        let spans = Spans::covering(layout.copied());
        Ok(Self { layout, spans })
    }
}

impl TaskLayout {
    /// The members that a [`Task`]'s copy holds: all of them.
    fn copied(&self) -> impl Iterator<Item = &Member> {
        let required = [
            &self.pid,
            &self.tgid,
            &self.comm,
            &self.flags,
            &self.state,
            &self.exit_state,
            &self.tasks,
            &self.thread_node,
            &self.signal,
            &self.group_leader,
            &self.real_parent,
            &self.mm,
            &self.fs,
            &self.files,
            &self.nsproxy,
            &self.cred,
            &self.real_cred,
            &self.stack,
            &self.utime,
            &self.stime,
            &self.sum_exec_runtime,
            &self.static_prio,
            &self.prio,
            &self.policy,
            &self.rt_priority,
            &self.atomic_flags,
            &self.start_boottime,
        ];
        let optional = [
            &self.cpu,
            &self.stack_pointer,
            &self.thread_pointer,
            &self.vfork_done,
            &self.ptrace,
            &self.parent,
            &self.exit_code,
            &self.told_utime,
            &self.told_stime,
            &self.cgroups,
            &self.thread_pid,
            &self.seccomp_mode,
            &self.loginuid,
            &self.sessionid,
            &self.nvcsw,
            &self.nivcsw,
            &self.min_flt,
            &self.maj_flt,
            &self.worker_private,
            &self.set_child_tid,
        ];
        required
            .into_iter()
            .chain(optional.into_iter().filter_map(Option::as_ref))
    }

    /// The members that must be the same in two copies for these to be one
    /// version of the task.
    fn identity(&self) -> [&Member; 15] {
        [
            &self.pid,
            &self.tgid,
            &self.comm,
            &self.flags,
            &self.exit_state,
            &self.signal,
            &self.group_leader,
            &self.real_parent,
            &self.mm,
            &self.fs,
            &self.files,
            &self.nsproxy,
            &self.cred,
            &self.real_cred,
            &self.start_boottime,
        ]
    }
}

/// Why there is no task at an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaskError {
    /// Its memory can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A number is out of its range.
    #[error("{member} is {found}, which no task has")]
    Number {
        /// The member.
        member: &'static str,
        /// What it holds.
        found: i64,
    },
    /// A pointer can't be one.
    #[error("{member} is {found}, which is no address of an object")]
    Pointer {
        /// The member.
        member: &'static str,
        /// What it holds.
        found: VirtualAddress,
    },
    /// The name has no end.
    #[error("comm is not terminated")]
    Name,
    /// The task was different in each copy.
    #[error("it changed during each of {attempts} reads")]
    Changing {
        /// How many copies were taken.
        attempts: u32,
    },
    /// The task is in no list any more.
    #[error("it was released during the read")]
    Released,
}

/// Which list a task must be linked into to be there at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// The list of all processes (`task_struct.tasks`).
    Processes,
    /// The threads of its process (`task_struct.thread_node`).
    Threads,
    /// None: it was found otherwise.
    Anywhere,
}

/// A validated copy of a `task_struct`.
#[derive(Clone, Debug)]
pub struct Task {
    /// Where it lies.
    pub address: VirtualAddress,
    /// The thread's id in the initial pid namespace.
    pub pid: u32,
    /// The process's id in the initial pid namespace.
    pub tgid: u32,
    /// `flags`: `PF_…`.
    pub flags: u32,
    /// `mm_struct`, null for kernel threads and zombies.
    pub mm: VirtualAddress,
    /// `fs_struct`, null for zombies.
    pub fs: VirtualAddress,
    /// `files_struct`, null for zombies.
    pub files: VirtualAddress,
    /// `nsproxy`, null for zombies.
    pub nsproxy: VirtualAddress,
    /// The effective `cred`.
    pub cred: VirtualAddress,
    /// The objective `cred`: what `/proc` shows.
    pub real_cred: VirtualAddress,
    /// `signal_struct`, shared by the threads.
    pub signal: VirtualAddress,
    /// The first thread of the process.
    pub group_leader: VirtualAddress,
    /// The parent process.
    pub real_parent: VirtualAddress,
    model: Arc<TaskModel>,
    snapshot: Snapshot,
}

impl Task {
    /// Copies and validates the task at `address`, again while it changes.
    ///
    /// # Errors
    /// [`TaskError`] if there is no task there (any more).
    pub fn read(
        guest: &Guest,
        model: &Arc<TaskModel>,
        address: VirtualAddress,
        membership: Membership,
    ) -> Result<Self, TaskError> {
        let mut task = Self::copy(guest, model, address)?;
        if guest.space().memory().volatility() == Volatility::Live {
            let mut attempts = 1;
            while !task.is_linked(guest, membership) || !task.is_unchanged(guest) {
                if !task.is_linked(guest, membership) {
                    guest.diagnostics().count_torn_read();
                    return Err(TaskError::Released);
                }
                if attempts == ATTEMPTS {
                    return Err(TaskError::Changing { attempts });
                }
                attempts += 1;
                guest.diagnostics().count_torn_read();
                task = Self::copy(guest, model, address)?;
            }
        }
        task.validate(guest)?;
        Ok(task)
    }

    fn copy(
        guest: &Guest,
        model: &Arc<TaskModel>,
        address: VirtualAddress,
    ) -> Result<Self, ReadError> {
        let snapshot = model.spans.read(guest.space(), address)?;
        let layout = &model.layout;
        let number = |member| model.spans.number(&snapshot, member) as u32;
        let pointer = |member| model.spans.pointer(&snapshot, member);
        Ok(Self {
            address,
            pid: number(&layout.pid),
            tgid: number(&layout.tgid),
            flags: number(&layout.flags),
            mm: pointer(&layout.mm),
            fs: pointer(&layout.fs),
            files: pointer(&layout.files),
            nsproxy: pointer(&layout.nsproxy),
            cred: pointer(&layout.cred),
            real_cred: pointer(&layout.real_cred),
            signal: pointer(&layout.signal),
            group_leader: pointer(&layout.group_leader),
            real_parent: pointer(&layout.real_parent),
            model: model.clone(),
            snapshot,
        })
    }

    fn validate(&self, guest: &Guest) -> Result<(), TaskError> {
        for (member, value) in [("pid", self.pid), ("tgid", self.tgid)] {
            let found = i64::from(value as i32);
            if !(0..=PID_MAX_LIMIT).contains(&found) {
                return Err(TaskError::Number { member, found });
            }
        }
        let required = [
            ("cred", self.cred),
            ("real_cred", self.real_cred),
            ("signal", self.signal),
            ("group_leader", self.group_leader),
            ("real_parent", self.real_parent),
        ];
        let nullable = [
            ("mm", self.mm),
            ("fs", self.fs),
            ("files", self.files),
            ("nsproxy", self.nsproxy),
        ];
        let nullable = nullable
            .into_iter()
            .filter(|(_, pointer)| !pointer.is_null());
        for (member, found) in required.into_iter().chain(nullable) {
            if !is_object_address(guest.space(), found) {
                return Err(TaskError::Pointer { member, found });
            }
        }
        if !self.bytes(&self.model.layout.comm).contains(&0) {
            return Err(TaskError::Name);
        }
        Ok(())
    }

    /// How tasks of this guest are read.
    pub fn model(&self) -> &Arc<TaskModel> {
        &self.model
    }

    /// The bytes of a member of [`TaskLayout`], from the copy.
    pub fn bytes(&self, member: &Member) -> &[u8] {
        self.model.spans.member(&self.snapshot, member)
    }

    /// The number in a member of [`TaskLayout`], from the copy.
    pub fn number(&self, member: &Member) -> u64 {
        self.model.spans.number(&self.snapshot, member)
    }

    /// The pointer in a member of [`TaskLayout`], from the copy.
    pub fn pointer(&self, member: &Member) -> VirtualAddress {
        self.model.spans.pointer(&self.snapshot, member)
    }

    /// `comm` up to its end.
    pub fn comm(&self) -> &[u8] {
        let bytes = self.bytes(&self.model.layout.comm);
        let end = bytes.iter().position(|byte| *byte == 0);
        end.and_then(|end| bytes.get(..end)).unwrap_or(bytes)
    }

    /// Whether this is a kernel thread.
    pub fn is_kernel_thread(&self) -> bool {
        self.flags & PF_KTHREAD != 0
    }

    /// Whether the guest still holds what identifies this copy: ids, name,
    /// and the pointers to what the task uses. Objects that were read through
    /// these pointers before were then the task's own.
    pub fn is_unchanged(&self, guest: &Guest) -> bool {
        let Ok(snapshot) = self.model.spans.read(guest.space(), self.address) else {
            return false;
        };
        let spans = &self.model.spans;
        self.model
            .layout
            .identity()
            .into_iter()
            .all(|member| spans.member(&snapshot, member) == self.bytes(member))
    }

    /// Whether the task is linked into its list and unchanged.
    pub fn is_current(&self, guest: &Guest, membership: Membership) -> bool {
        self.is_unchanged(guest) && self.is_linked(guest, membership)
    }

    /// Whether the task is linked into the list now.
    fn is_linked(&self, guest: &Guest, membership: Membership) -> bool {
        let member = match membership {
            Membership::Processes => &self.model.layout.tasks,
            Membership::Threads => &self.model.layout.thread_node,
            Membership::Anywhere => return true,
        };
        let node = self.address.wrapping_add(member.offset);
        let space = guest.space();
        space
            .read_pointer(node.wrapping_add(8))
            .is_ok_and(|previous| {
                is_object_address(space, previous) && space.read_pointer(previous) == Ok(node)
            })
    }
}

layout! {
    /// `include/linux/sched/signal.h`
    pub struct ThreadListLayout: "signal_struct" {
        thread_head: "thread_head",
    }
}

/// All processes: the first thread of each, in the kernel's order. The idle
/// task (pid 0), which heads the list, is not among them.
///
/// What is in the list but no task is a diagnostic, not an item.
///
/// # Errors
/// [`TableError`] if the list can't be found.
pub fn leaders<'g>(
    guest: &'g Guest,
    table: &'static str,
) -> Result<impl Iterator<Item = Task> + 'g, TableError> {
    let model = guest.layout::<TaskModel>(table)?;
    let offset = model.layout.tasks.offset;
    let head = guest.symbol(table, "init_task")?.wrapping_add(offset);
    let mut first = first_of_its_id(guest, table);
    Ok(
        entries(guest, table, "task_struct.tasks", head, offset).filter_map(move |address| {
            let task = leader(guest, table, &model, address)?;
            first(task.tgid, address).then_some(task)
        }),
    )
}

/// Where the first threads of all processes lie that are not checked yet, in
/// the kernel's order.
///
/// # Errors
/// [`TableError`] if the list can't be found.
pub fn leader_addresses(
    guest: &Guest,
    table: &'static str,
) -> Result<Vec<VirtualAddress>, TableError> {
    let offset = guest.layout::<TaskModel>(table)?.layout.tasks.offset;
    let head = guest.symbol(table, "init_task")?.wrapping_add(offset);
    Ok(entries(guest, table, "task_struct.tasks", head, offset).collect())
}

/// The task at `address`, which is in the list of all processes; none, with a
/// diagnostic, if there is no task.
pub fn leader(
    guest: &Guest,
    table: &'static str,
    model: &Arc<TaskModel>,
    address: VirtualAddress,
) -> Option<Task> {
    let task = Task::read(guest, model, address, Membership::Processes);
    let task = or_diagnostic(guest, table, address, task)?;
    if task.group_leader != address || task.pid != task.tgid {
        // A thread becomes the first one in several steps (execve of a
        // thread).
        match guest.space().memory().volatility() {
            Volatility::Live => guest.diagnostics().count_torn_read(),
            Volatility::Static => guest.diagnostics().record(Diagnostic {
                table,
                subject: format!("task_struct of pid {}", task.tgid),
                address: Some(address),
                reason: format!(
                    "it is listed as a process, but its pid is {} and its first thread at {}",
                    task.pid, task.group_leader
                ),
            }),
        }
    }
    Some(task)
}

/// Tells of each process of a listing whether no other one had its id before;
/// one that has is counted or recorded.
pub fn first_of_its_id(
    guest: &Guest,
    table: &'static str,
) -> impl FnMut(u32, VirtualAddress) -> bool {
    let mut pids = HashSet::with_hasher(Keyed::default());
    move |tgid, address| {
        if pids.insert(tgid) {
            return true;
        }
        // The process went on under another first thread (execve of a thread)
        // while its list was walked.
        match guest.space().memory().volatility() {
            Volatility::Live => guest.diagnostics().count_torn_read(),
            Volatility::Static => guest.diagnostics().record(Diagnostic {
                table,
                subject: format!("task_struct of pid {tgid}"),
                address: Some(address),
                reason: "another process in the list has the same id; left out".into(),
            }),
        }
        false
    }
}

/// All threads of a process, its first one among them, in the kernel's order.
///
/// # Errors
/// [`TableError`] if the kernel's types lack the list.
pub fn threads<'g>(
    guest: &'g Guest,
    table: &'static str,
    leader: &Task,
) -> Result<impl Iterator<Item = Task> + 'g, TableError> {
    let layout = guest.layout::<ThreadListLayout>(table)?;
    let model = leader.model.clone();
    let head = leader.signal.wrapping_add(layout.thread_head.offset);
    let offset = model.layout.thread_node.offset;
    let (signal, tgid) = (leader.signal, leader.tgid);
    Ok(
        entries(guest, table, "signal_struct.thread_head", head, offset).filter_map(
            move |address| {
                let task = Task::read(guest, &model, address, Membership::Threads);
                let task = or_diagnostic(guest, table, address, task)?;
                if task.signal == signal && task.tgid == tgid {
                    return Some(task);
                }
                guest.diagnostics().record(Diagnostic {
                    table,
                    subject: format!("thread of pid {tgid}"),
                    address: Some(address),
                    reason: format!(
                        "its tgid is {}, its signal_struct at {}; left out",
                        task.tgid, task.signal
                    ),
                });
                None
            },
        ),
    )
}

/// The task, or none after saying why. A task that was released during the
/// read is no loss: it was not there any more.
fn or_diagnostic(
    guest: &Guest,
    table: &'static str,
    address: VirtualAddress,
    task: Result<Task, TaskError>,
) -> Option<Task> {
    match task {
        Ok(task) => Some(task),
        Err(TaskError::Released) => None,
        Err(error) => {
            guest.diagnostics().record(Diagnostic {
                table,
                subject: "task_struct".into(),
                address: Some(address),
                reason: format!("left out: {error}"),
            });
            None
        }
    }
}

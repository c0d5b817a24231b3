//! The table `processes`.

use std::sync::Arc;

use secmon_memory::{VirtualAddress, Volatility};

use crate::linux::ahead;
use crate::linux::cred::{Cred, capability_digits, capability_names};
use crate::linux::listing::Listing;
use crate::linux::namespace::Kind as NamespaceKind;
use crate::linux::path::Path;
use crate::linux::process::{self, Process};
use crate::linux::state::{State, has_exited};
use crate::linux::task::{self, Membership, TaskLayout, TaskModel};
use crate::split::{First, Reader, Split};
use crate::table::{Items, SplitTable};
use crate::{Column, Cost, Guest, Kind, Selection, Shown, TableError, TableOf, Value};

const TABLE: &str = "processes";

/// `MAX_RT_PRIO` (`include/linux/sched/prio.h`): where priorities of ordinary
/// tasks begin.
const MAX_RT_PRIO: i64 = 100;
/// `DEFAULT_PRIO`: the static priority of niceness 0.
const DEFAULT_PRIO: i64 = 120;
/// Nanoseconds in a clock tick as `/proc` counts them (`USER_HZ` is 100).
const TICK: u64 = 10_000_000;
/// `PFA_NO_NEW_PRIVS` of `task_struct.atomic_flags`.
const NO_NEW_PRIVS: u64 = 1;
/// `AUDIT_UID_UNSET` and `AUDIT_SID_UNSET`.
const AUDIT_UNSET: u64 = 0xffff_ffff;

/// A kernel column of a table about processes.
pub(crate) const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Process) -> Value,
) -> Column<Process> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `processes`.
pub static PROCESSES: SplitTable<Process> = SplitTable {
    table: ONE_BY_ONE,
    split: Split {
        possible: can_be_split,
        objects: |guest| task::leader_addresses(guest, TABLE),
        reader,
        key: |process| process.task.tgid.into(),
        first,
    },
};

const ONE_BY_ONE: TableOf<Process> = TableOf {
    name: TABLE,
    aliases: &["ps"],
    meaning: "All processes, as the initial pid namespace sees them: kernel threads and zombies \
              too, the idle task (pid 0) not, as in /proc.",
    columns: &[
        column(
            "pid",
            Kind::Unsigned,
            Shown::Always,
            "Process id.",
            |_, process| process.task.tgid.into(),
        ),
        column(
            "ppid",
            Kind::Unsigned,
            Shown::Always,
            "Id of the parent process; 0 for what the kernel started.",
            |guest, process| Value::from_read(process.parent(guest), Value::from),
        ),
        column(
            "uid",
            Kind::Unsigned,
            Shown::Always,
            "Real user id.",
            |guest, process| cred(guest, process, |cred| cred.uid),
        ),
        column(
            "state",
            Kind::Text,
            Shown::Always,
            "Letter of the first thread's state, as in /proc/PID/stat: R running, S sleeping, D \
             disk sleep, T stopped, t tracing stop, X dead, Z zombie, P parked, I idle.",
            |_, process| Value::word(state(process).letter),
        ),
        column(
            "start_time",
            Kind::Time,
            Shown::Always,
            "When the process was started, by the guest's wall clock as it is set now.",
            |_, process| {
                let started = process.task.number(&layout(process).start_boottime);
                let clock = process.listing.clock.as_ref();
                Value::from_read(clock, |clock| Value::time(clock.of_boot_time(started)))
            },
        ),
        column(
            "tty",
            Kind::Text,
            Shown::Always,
            "Controlling terminal below /dev; null if there is none.",
            terminal,
        ),
        column(
            "comm",
            Kind::Text,
            Shown::Always,
            "Name, as in /proc/PID/comm: for workers of workqueues with what they work on.",
            |guest, process| Value::text(process.listing.names.of(guest, &process.task)),
        ),
        column(
            "task_comm",
            Kind::Text,
            Shown::OnRequest,
            "Name as its task_struct holds it, 15 bytes at most.",
            |_, process| Value::text(process.task.comm()),
        ),
        column(
            "exe",
            Kind::Text,
            Shown::Always,
            "Path of the executable; null for a kernel thread or zombie. A deleted file keeps \
             its path.",
            |guest, process| optional(process.executable(guest), |path| path.text.clone().into()),
        ),
        column(
            "exe_deleted",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether the executable is a file that was deleted.",
            |guest, process| {
                Value::from_read(process.executable(guest), |path| {
                    path.is_some_and(|path| path.deleted).into()
                })
            },
        ),
        Column {
            name: "cmdline",
            kind: Kind::List,
            cost: Cost::UserPages,
            shown: Shown::Always,
            meaning: "Command line, one text an argument, as /proc/PID/cmdline; empty for a \
                      kernel thread or zombie.",
            value: |guest, process| process.arguments(guest),
        },
        column(
            "cwd",
            Kind::Text,
            Shown::OnRequest,
            "Working directory, as it looks from the root of the guest's first process, also for \
             a process in a container; followed by ` (deleted)` if it was, as in /proc; null for \
             a zombie.",
            |guest, process| optional(process.working_directory(guest), |path| directory(&path)),
        ),
        column(
            "root",
            Kind::Text,
            Shown::OnRequest,
            "Root directory, as it looks from the root of the guest's first process; / where it \
             is the root of another mount namespace; null for a zombie.",
            |guest, process| optional(process.root(guest), |path| directory(&path)),
        ),
        column(
            "kernel_thread",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether it is a kernel thread (PF_KTHREAD).",
            |_, process| process.task.is_kernel_thread().into(),
        ),
        column(
            "gid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Real group id.",
            |guest, process| cred(guest, process, |cred| cred.gid),
        ),
        column(
            "euid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Effective user id.",
            |guest, process| cred(guest, process, |cred| cred.euid),
        ),
        column(
            "egid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Effective group id.",
            |guest, process| cred(guest, process, |cred| cred.egid),
        ),
        column(
            "suid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Saved user id.",
            |guest, process| cred(guest, process, |cred| cred.suid),
        ),
        column(
            "sgid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Saved group id.",
            |guest, process| cred(guest, process, |cred| cred.sgid),
        ),
        column(
            "fsuid",
            Kind::Unsigned,
            Shown::OnRequest,
            "User id for file access.",
            |guest, process| cred(guest, process, |cred| cred.fsuid),
        ),
        column(
            "fsgid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Group id for file access.",
            |guest, process| cred(guest, process, |cred| cred.fsgid),
        ),
        column(
            "groups",
            Kind::List,
            Shown::OnRequest,
            "Supplementary group ids.",
            |guest, process| {
                Value::from_read(process.cred(guest), |cred| {
                    let groups = process.listing.groups.as_ref();
                    Value::from_read(groups, |groups| groups.of(guest, cred))
                })
            },
        ),
        column(
            "capabilities",
            Kind::List,
            Shown::OnRequest,
            "Effective capabilities by name, without cap_; `all` for a full set.",
            |guest, process| {
                Value::from_read(process.cred(guest), |cred| {
                    let full = process.listing.full_capabilities;
                    capability_names(cred.capabilities.effective, full)
                })
            },
        ),
        column(
            "cap_effective",
            Kind::Text,
            Shown::OnRequest,
            "Effective capabilities as 16 hexadecimal digits.",
            |guest, process| capability_set(guest, process, |cred| cred.capabilities.effective),
        ),
        column(
            "cap_permitted",
            Kind::Text,
            Shown::OnRequest,
            "Permitted capabilities as 16 hexadecimal digits.",
            |guest, process| capability_set(guest, process, |cred| cred.capabilities.permitted),
        ),
        column(
            "cap_inheritable",
            Kind::Text,
            Shown::OnRequest,
            "Inheritable capabilities as 16 hexadecimal digits.",
            |guest, process| capability_set(guest, process, |cred| cred.capabilities.inheritable),
        ),
        column(
            "cap_bounding",
            Kind::Text,
            Shown::OnRequest,
            "Capabilities that can ever be gained, as 16 hexadecimal digits.",
            |guest, process| capability_set(guest, process, |cred| cred.capabilities.bounding),
        ),
        column(
            "cap_ambient",
            Kind::Text,
            Shown::OnRequest,
            "Ambient capabilities as 16 hexadecimal digits.",
            |guest, process| capability_set(guest, process, |cred| cred.capabilities.ambient),
        ),
        column(
            "container",
            Kind::Text,
            Shown::OnRequest,
            "Id or name of the container, as the cgroup's name tells; null if it tells none.",
            |guest, process| {
                cgroup(guest, process, |membership| {
                    let container = membership.container.as_ref();
                    container.map(|container| container.id.clone()).into()
                })
            },
        ),
        column(
            "container_runtime",
            Kind::Text,
            Shown::OnRequest,
            "What runs the container: docker, podman, cri-o, containerd, kubernetes, lxc, \
             systemd-nspawn; null if the cgroup's name does not say.",
            |guest, process| {
                cgroup(guest, process, |membership| {
                    let container = membership.container.as_ref();
                    container
                        .and_then(|container| container.runtime)
                        .map_or(Value::Null, Value::word)
                })
            },
        ),
        column(
            "cgroup",
            Kind::Text,
            Shown::OnRequest,
            "Path in the unified cgroup hierarchy, as the initial cgroup namespace sees it; of \
             another hierarchy where the unified one is not used.",
            |guest, process| {
                cgroup(guest, process, |membership| {
                    Value::from_read(membership.path(), |path| path.clone().into())
                })
            },
        ),
        column(
            "virtual_size",
            Kind::Unsigned,
            Shown::OnRequest,
            "Bytes of address space; null where the process has none of its own.",
            |guest, process| optional(process.memory_size(guest), |size| size.virtual_size.into()),
        ),
        column(
            "resident_size",
            Kind::Unsigned,
            Shown::OnRequest,
            "Bytes of it that are in RAM.",
            |guest, process| optional(process.memory_size(guest), |size| size.resident.into()),
        ),
        column(
            "user_time",
            Kind::Unsigned,
            Shown::OnRequest,
            "CPU time in user mode of all threads, in hundredths of a second.",
            |guest, process| cpu_time(guest, process, |(user, _)| user),
        ),
        column(
            "system_time",
            Kind::Unsigned,
            Shown::OnRequest,
            "CPU time in the kernel of all threads, in hundredths of a second.",
            |guest, process| cpu_time(guest, process, |(_, system)| system),
        ),
        column(
            "threads",
            Kind::Unsigned,
            Shown::OnRequest,
            "Number of threads.",
            |guest, process| {
                Value::from_read(process.signal(guest), |signal| signal.threads.into())
            },
        ),
        column(
            "session",
            Kind::Unsigned,
            Shown::OnRequest,
            "Session id.",
            |guest, process| Value::from_read(process.session(guest), Value::from),
        ),
        column(
            "process_group",
            Kind::Unsigned,
            Shown::OnRequest,
            "Process group id.",
            |guest, process| Value::from_read(process.process_group(guest), Value::from),
        ),
        column(
            "namespace_pids",
            Kind::List,
            Shown::OnRequest,
            "Ids in all pid namespaces that the process is in, from the initial one inwards.",
            |guest, process| {
                Value::from_read(process.pids(guest), |pids| {
                    let ids = pids.into_iter().flat_map(|pids| {
                        let inner = pids.inner.iter().copied();
                        std::iter::once(pids.initial).chain(inner)
                    });
                    Value::List(ids.map(Value::from).collect())
                })
            },
        ),
        column(
            "nice",
            Kind::Signed,
            Shown::OnRequest,
            "Niceness, -20 to 19.",
            |_, process| {
                Value::Signed(
                    signed(process.task.number(&layout(process).static_prio)) - DEFAULT_PRIO,
                )
            },
        ),
        column(
            "priority",
            Kind::Signed,
            Shown::OnRequest,
            "Priority as in /proc/PID/stat: 0 to 39, negative for real-time ones.",
            |_, process| {
                Value::Signed(signed(process.task.number(&layout(process).prio)) - MAX_RT_PRIO)
            },
        ),
        column(
            "policy",
            Kind::Text,
            Shown::OnRequest,
            "Scheduling policy: normal, fifo, rr, batch, idle, deadline, ext.",
            |_, process| policy(process.task.number(&layout(process).policy)),
        ),
        column(
            "realtime_priority",
            Kind::Unsigned,
            Shown::OnRequest,
            "Real-time priority, 1 to 99; 0 under other policies.",
            |_, process| process.task.number(&layout(process).rt_priority).into(),
        ),
        column(
            "cpu",
            Kind::Unsigned,
            Shown::OnRequest,
            "CPU on which its first thread ran last.",
            |_, process| number(process, |layout| layout.cpu.as_ref()),
        ),
        column(
            "seccomp",
            Kind::Text,
            Shown::OnRequest,
            "System call filtering: disabled, strict, filter.",
            |_, process| match layout(process).seccomp_mode.as_ref() {
                None => Value::Null,
                Some(member) => match process.task.number(member) {
                    0 => Value::word("disabled"),
                    1 => Value::word("strict"),
                    2 => Value::word("filter"),
                    other => other.to_string().into(),
                },
            },
        ),
        column(
            "no_new_privs",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether no program it starts can gain rights.",
            |_, process| {
                (process.task.number(&layout(process).atomic_flags) & NO_NEW_PRIVS != 0).into()
            },
        ),
        column(
            "tracer",
            Kind::Unsigned,
            Shown::OnRequest,
            "Id of the thread that traces it (ptrace); null if none does.",
            |guest, process| {
                let layout = layout(process);
                let (Some(traced), Some(parent)) = (&layout.ptrace, &layout.parent) else {
                    return Value::Null;
                };
                if process.task.number(traced) == 0 {
                    return Value::Null;
                }
                let tracer = process.task.pointer(parent);
                Value::from_read(guest.number(tracer, &layout.pid), Value::from)
            },
        ),
        column(
            "login_uid",
            Kind::Unsigned,
            Shown::OnRequest,
            "User that logged in (audit); null if nobody did.",
            |_, process| match number(process, |layout| layout.loginuid.as_ref()) {
                Value::Unsigned(AUDIT_UNSET) => Value::Null,
                id => id,
            },
        ),
        column(
            "audit_session",
            Kind::Unsigned,
            Shown::OnRequest,
            "Number of the login (audit); null if there was none.",
            |_, process| match number(process, |layout| layout.sessionid.as_ref()) {
                Value::Unsigned(AUDIT_UNSET) => Value::Null,
                id => id,
            },
        ),
        column(
            "exit_code",
            Kind::Signed,
            Shown::OnRequest,
            "How a zombie ended, as wait() gives it: the exit status times 256, or the signal; \
             null while it lives.",
            |_, process| {
                let exited = has_exited(process.task.number(&layout(process).exit_state));
                match layout(process).exit_code.as_ref().filter(|_| exited) {
                    Some(member) => Value::Signed(signed(process.task.number(member))),
                    None => Value::Null,
                }
            },
        ),
        column(
            "oom_score_adj",
            Kind::Signed,
            Shown::OnRequest,
            "What was added to its score as a victim when memory runs out, -1000 to 1000.",
            |guest, process| {
                Value::from_read(process.signal(guest), |signal| signal.oom_score_adj.into())
            },
        ),
        column(
            "flags",
            Kind::Unsigned,
            Shown::OnRequest,
            "task_struct.flags (PF_…).",
            |_, process| process.task.flags.into(),
        ),
        namespace(
            "mount_namespace",
            "Mount namespace, by its inode number; null for a zombie.",
            |guest, process| process.namespace(guest, NamespaceKind::Mount),
        ),
        namespace(
            "pid_namespace",
            "Pid namespace, by its inode number.",
            |guest, process| process.namespace(guest, NamespaceKind::Pid),
        ),
        namespace(
            "network_namespace",
            "Network namespace, by its inode number; null for a zombie.",
            |guest, process| process.namespace(guest, NamespaceKind::Network),
        ),
        namespace(
            "user_namespace",
            "User namespace, by its inode number.",
            |guest, process| process.namespace(guest, NamespaceKind::User),
        ),
        namespace(
            "uts_namespace",
            "UTS (host name) namespace, by its inode number; null for a zombie.",
            |guest, process| process.namespace(guest, NamespaceKind::Uts),
        ),
        namespace(
            "ipc_namespace",
            "IPC namespace, by its inode number; null for a zombie.",
            |guest, process| process.namespace(guest, NamespaceKind::Ipc),
        ),
        namespace(
            "cgroup_namespace",
            "Cgroup namespace, by its inode number; null for a zombie.",
            |guest, process| process.namespace(guest, NamespaceKind::Cgroup),
        ),
        namespace(
            "time_namespace",
            "Time namespace, by its inode number; null for a zombie.",
            |guest, process| process.namespace(guest, NamespaceKind::Time),
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its task_struct lies.",
            |_, process| process.task.address.into(),
        ),
    ],
    items: processes,
};

const fn namespace(
    name: &'static str,
    meaning: &'static str,
    value: fn(&Guest, &Process) -> Value,
) -> Column<Process> {
    column(name, Kind::Unsigned, Shown::OnRequest, meaning, value)
}

/// All processes of an image, from its kernel's memory alone.
fn can_be_split(guest: &Guest, selection: &Selection) -> bool {
    let memory = guest.space().memory();
    memory.mapped().is_some()
        && memory.volatility() == Volatility::Static
        && !selection.user_pages
        && selection.pids.is_none()
}

fn reader(guest: &Guest) -> Result<Reader<'_, Process>, TableError> {
    let listing = Listing::new(guest, TABLE)?;
    // Not the guest's own: each task counts its references to it, and threads
    // would wait for each other's counting.
    let model = Arc::new(TaskModel::clone(&listing.task));
    Ok(Box::new(move |address| {
        let task = task::leader(guest, TABLE, &model, address)?;
        Process::read(guest, &listing, task, Membership::Processes)
    }))
}

fn first(guest: &Guest) -> First<'_> {
    let mut first = task::first_of_its_id(guest, TABLE);
    Box::new(move |tgid, address| first(tgid as u32, address))
}

fn processes(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Process>,
) -> Result<(), TableError> {
    let listing = Listing::new(guest, TABLE)?;
    let mut rows = || -> Result<(), TableError> {
        for process in process::processes(guest, &listing, selection)? {
            if sink(process).is_break() {
                break;
            }
        }
        Ok(())
    };
    let mapped = guest.space().memory().mapped().is_some();
    if mapped && selection.user_pages && selection.pids.is_none() {
        return ahead::touching(guest, &listing, rows);
    }
    rows()
}

/// The row of the process whose first thread lies at `address`, whether it is
/// in the list of processes or not.
///
/// # Errors
/// Why there is no row.
pub fn row_at(
    guest: &Guest,
    address: VirtualAddress,
) -> Result<Vec<(&'static str, Value)>, String> {
    let process = process::at(guest, TABLE, address)?;
    Ok(ONE_BY_ONE.row(guest, &process))
}

fn layout(process: &Process) -> &TaskLayout {
    &process.task.model().layout
}

fn terminal(guest: &Guest, process: &Process) -> Value {
    let tty = match process.signal(guest) {
        Ok(signal) if signal.tty.is_null() => return Value::Null,
        Ok(signal) => signal.tty,
        Err(reason) => return Value::unreadable(reason),
    };
    match &process.listing.terminals {
        Ok(terminals) => Value::from_read(terminals.name(guest, tty), Value::text),
        Err(reason) => Value::unreadable(reason),
    }
}

/// A member of at most 4 bytes that was read sign-extended, or a number that
/// the types call unsigned.
pub(crate) fn signed(value: u64) -> i64 {
    i64::from(value as i32)
}

pub(crate) fn number(
    process: &Process,
    member: impl FnOnce(&TaskLayout) -> Option<&secmon_profile::Member>,
) -> Value {
    member(layout(process)).map_or(Value::Null, |member| process.task.number(member).into())
}

pub(crate) fn state(process: &Process) -> State {
    let layout = layout(process);
    State::of(
        process.task.number(&layout.state),
        process.task.number(&layout.exit_state),
    )
}

fn cred(guest: &Guest, process: &Process, id: impl FnOnce(&Cred) -> u32) -> Value {
    Value::from_read(process.cred(guest), |cred| id(cred).into())
}

fn capability_set(guest: &Guest, process: &Process, set: impl FnOnce(&Cred) -> u64) -> Value {
    Value::from_read(process.cred(guest), |cred| capability_digits(set(cred)))
}

/// The value of something that not every process has.
fn optional<T, E: std::fmt::Display>(
    found: Result<Option<T>, E>,
    value: impl FnOnce(T) -> Value,
) -> Value {
    Value::from_read(found, |found| found.map_or(Value::Null, value))
}

/// A directory as the link in `/proc` names it.
fn directory(path: &Path) -> Value {
    if path.deleted {
        return Value::text([path.text.as_bytes(), b" (deleted)"].concat());
    }
    path.text.clone().into()
}

fn cgroup(
    guest: &Guest,
    process: &Process,
    value: impl FnOnce(&crate::linux::cgroup::Membership) -> Value,
) -> Value {
    Value::from_read(process.cgroups(guest), value)
}

fn cpu_time(guest: &Guest, process: &Process, part: fn((u64, u64)) -> u64) -> Value {
    Value::from_read(process.total_cpu_time(guest), |time| {
        (part(time) / TICK).into()
    })
}

/// The name of a scheduling policy (`include/uapi/linux/sched.h`).
pub(crate) fn policy(policy: u64) -> Value {
    match policy {
        0 => Value::word("normal"),
        1 => Value::word("fifo"),
        2 => Value::word("rr"),
        3 => Value::word("batch"),
        5 => Value::word("idle"),
        6 => Value::word("deadline"),
        7 => Value::word("ext"),
        other => other.to_string().into(),
    }
}

//! What the table `processes` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::{Info, Process};

use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow};

/// Nanoseconds of a clock tick as `/proc` counts them.
pub(super) const TICK: i128 = 10_000_000;
/// How far the agent's two readings of its clocks can lie apart, nanoseconds.
const CLOCK_READ: i128 = 20_000_000;
/// Ticks of CPU time that a process may spend between two looks.
const SPENT: i128 = 300;

/// The check of `processes`.
pub const PROCESSES: Check = Check {
    comparison: Comparison {
        table: "processes",
        key: &["pid"],
    },
    selection: Selection::default,
    expected: |truth| {
        let row = |process| expected(process, truth);
        truth.processes.iter().map(row).collect()
    },
    beyond_truth: |_| false,
};

/// A number as the truth has it.
pub(super) fn number(value: impl Into<i64>) -> Expected {
    Expected::Exactly(Value::Signed(value.into()))
}

/// Bytes, or null.
fn optional(bytes: Option<&secmon_lab::truth::ByteString>) -> Expected {
    Expected::Exactly(bytes.map_or(Value::Null, |bytes| Value::text(bytes.as_bytes())))
}

/// A name, unless it changes all the time as that of a worker does.
pub(super) fn comm(comm: &secmon_lab::truth::ByteString, kernel_thread: bool) -> Expected {
    if kernel_thread && comm.as_bytes().starts_with(b"kworker/") {
        return Expected::Anything;
    }
    Expected::Exactly(Value::text(comm.as_bytes()))
}

/// A state. What serves the kernel can be woken at any moment; and who asks
/// sees itself running, which it no more is when we look.
pub(super) fn state(state: char, kernel_thread: bool, asks: bool) -> Expected {
    let mut letters = vec![Value::from(state.to_string())];
    if asks {
        return Expected::Anything;
    }
    if kernel_thread {
        if state == 'R' {
            return Expected::Anything;
        }
        letters.push("R".into());
        letters.push("D".into());
    }
    Expected::OneOf(letters)
}

/// How many pages of a process `/proc` may leave out, or count though they are
/// gone. From 6.2 on each CPU counts up to a batch of each of three kinds for
/// itself, which `/proc` adds only since 6.16; Debian has that in its 6.12.
fn uncounted_pages(info: &Info) -> u64 {
    let release = info.uname[2].to_string();
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return 0;
    };
    if !(2..16).contains(&minor) || major != 6 || release.contains("deb") {
        return 0;
    }
    let processors = u64::from(info.processors);
    3 * processors * (2 * processors).max(32)
}

/// The moment of a start given in clock ticks since boot.
pub(super) fn start_time(ticks: u64, info: &Info) -> Expected {
    let boot = i128::from(info.wall_time) - i128::from(info.uptime);
    let start = boot + i128::from(ticks) * TICK;
    Expected::Between(start - CLOCK_READ, start + TICK + CLOCK_READ)
}

/// CPU time, which may have been spent since; by who asks, any amount.
pub(super) fn cpu_time(ticks: u64, asks: bool) -> Expected {
    if asks {
        return Expected::Between(i128::from(ticks), i128::MAX);
    }
    Expected::Between(i128::from(ticks), i128::from(ticks) + SPENT)
}

/// A capability set.
pub(super) fn capabilities(set: u64) -> Expected {
    Expected::Exactly(format!("{set:016x}").into())
}

/// The terminal with this device number (`Documentation/admin-guide/devices.txt`).
fn terminal(number: i32) -> Expected {
    let number = number as u32;
    let major = number >> 8 & 0xfff;
    let minor = (number & 0xff) | (number >> 12 & 0xf_ff00);
    let name = match (major, minor) {
        (0, 0) => return Expected::Exactly(Value::Null),
        (4, 64..) => format!("ttyS{}", minor - 64),
        (4, _) => format!("tty{minor}"),
        (136..=143, _) => format!("pts/{}", (major - 136) * 256 + minor),
        _ => return Expected::Anything,
    };
    Expected::Exactly(name.into())
}

/// The name of a scheduling policy.
fn policy(policy: u32) -> Expected {
    Expected::Exactly(
        match policy {
            0 => "normal",
            1 => "fifo",
            2 => "rr",
            3 => "batch",
            5 => "idle",
            6 => "deadline",
            7 => "ext",
            _ => return Expected::Anything,
        }
        .into(),
    )
}

/// The path of the unified hierarchy, or of another one where that is unused.
fn cgroup(process: &Process) -> Expected {
    let path = |unified: bool| {
        process
            .cgroups
            .iter()
            .filter(move |cgroup| (cgroup.hierarchy == 0) == unified)
            .map(|cgroup| cgroup.path.as_bytes())
            .map(|path| path.strip_suffix(b" (deleted)").unwrap_or(path))
            .filter(|path| *path != b"/")
    };
    let mut found: Vec<Value> = path(true).take(1).map(Value::text).collect();
    if found.is_empty() {
        found = path(false).map(Value::text).collect();
    }
    if found.is_empty() {
        found.push("/".into());
    }
    Expected::OneOf(found)
}

fn expected(process: &Process, truth: &Truth) -> ExpectedRow {
    let info = &truth.info;
    let asks = process.pid == info.agent_pid;
    let kernel_thread = process.kernel_thread;
    let list = |values: Vec<Value>| Expected::Exactly(values.into());
    let text = |value: &str| Expected::Exactly(value.into());
    let namespace = |kind: &str| {
        let inode = process.namespaces.get(kind).copied();
        Expected::Exactly(inode.into())
    };
    let size = |bytes: u64| match bytes {
        _ if asks => Expected::Anything,
        0 => Expected::Exactly(Value::Null),
        bytes => Expected::Exactly(bytes.into()),
    };
    let resident = process.memory_kib.get("VmRSS").copied().unwrap_or(0) * 1024;
    let [uid, euid, suid, fsuid] = process.uid;
    let [gid, egid, sgid, fsgid] = process.gid;
    ExpectedRow::from([
        ("pid", number(process.pid)),
        ("ppid", number(process.ppid)),
        ("comm", comm(&process.comm, kernel_thread)),
        (
            "task_comm",
            Expected::Exactly(Value::text(process.task_comm().as_bytes())),
        ),
        ("state", state(process.state, kernel_thread, asks)),
        ("uid", number(uid)),
        ("euid", number(euid)),
        ("suid", number(suid)),
        ("fsuid", number(fsuid)),
        ("gid", number(gid)),
        ("egid", number(egid)),
        ("sgid", number(sgid)),
        ("fsgid", number(fsgid)),
        (
            "groups",
            list(process.groups.iter().copied().map(Value::from).collect()),
        ),
        (
            "cap_inheritable",
            capabilities(process.capabilities.inheritable),
        ),
        (
            "cap_permitted",
            capabilities(process.capabilities.permitted),
        ),
        (
            "cap_effective",
            capabilities(process.capabilities.effective),
        ),
        ("cap_bounding", capabilities(process.capabilities.bounding)),
        ("cap_ambient", capabilities(process.capabilities.ambient)),
        (
            "kernel_thread",
            Expected::Exactly(Value::Boolean(kernel_thread)),
        ),
        ("start_time", start_time(process.start_time, info)),
        ("exe", optional(process.exe.as_ref())),
        (
            "exe_deleted",
            Expected::Exactly(Value::Boolean(process.exe_deleted)),
        ),
        (
            "cmdline",
            list(
                process
                    .cmdline
                    .iter()
                    .map(|argument| Value::text(argument.as_bytes()))
                    .collect(),
            ),
        ),
        ("cwd", optional(process.cwd.as_ref())),
        ("root", optional(process.root.as_ref())),
        ("cgroup", cgroup(process)),
        ("mount_namespace", namespace("mnt")),
        ("pid_namespace", namespace("pid")),
        ("network_namespace", namespace("net")),
        ("user_namespace", namespace("user")),
        ("uts_namespace", namespace("uts")),
        ("ipc_namespace", namespace("ipc")),
        ("cgroup_namespace", namespace("cgroup")),
        ("time_namespace", namespace("time")),
        (
            "namespace_pids",
            list(
                process
                    .namespace_pids
                    .iter()
                    .map(|pid| Value::Signed((*pid).into()))
                    .collect(),
            ),
        ),
        ("process_group", number(process.process_group)),
        ("session", number(process.session)),
        ("tty", terminal(process.tty_number)),
        ("threads", number(process.threads)),
        ("priority", number(process.priority)),
        ("nice", number(process.nice)),
        ("policy", policy(process.policy)),
        ("virtual_size", size(process.virtual_bytes)),
        (
            "resident_size",
            match (resident, uncounted_pages(info)) {
                (0, _) | (_, 0) => size(resident),
                (_, pages) => {
                    let (told, most) = (i128::from(resident), i128::from(pages) * 4096);
                    Expected::Between(told - most, told + most)
                }
            },
        ),
        ("user_time", cpu_time(process.user_time, asks)),
        ("system_time", cpu_time(process.system_time, asks)),
        (
            "seccomp",
            text(match process.seccomp {
                0 => "disabled",
                1 => "strict",
                _ => "filter",
            }),
        ),
        (
            "no_new_privs",
            Expected::Exactly(Value::Boolean(process.no_new_privileges)),
        ),
        (
            "tracer",
            match u64::try_from(process.tracer) {
                Ok(tracer) if tracer != 0 => Expected::Exactly(tracer.into()),
                _ => Expected::Exactly(Value::Null),
            },
        ),
        ("oom_score_adj", number(process.oom_score_adjustment)),
        (
            "flags",
            if kernel_thread || asks {
                Expected::Anything
            } else {
                Expected::Exactly(process.flags.into())
            },
        ),
    ])
}

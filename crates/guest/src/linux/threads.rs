//! The table `threads`.

use secmon_memory::VirtualAddress;

use crate::linux::listing::Listing;
use crate::linux::process::{self, Process};
use crate::linux::processes::{column, number, policy, signed, state};
use crate::linux::task::TaskLayout;
use crate::linux::user_registers::{self, UserRegisters};
use crate::table::Items;
use crate::{Guest, Kind, Selection, Shown, TableError, TableOf, Value};

const TABLE: &str = "threads";

/// Nanoseconds in a clock tick as `/proc` counts them (`USER_HZ` is 100).
const TICK: u64 = 10_000_000;
/// `DEFAULT_PRIO` (`include/linux/sched/prio.h`): the static priority of
/// niceness 0.
const DEFAULT_PRIO: i64 = 120;

/// The table `threads`.
pub static THREADS: TableOf<Process> = TableOf {
    name: TABLE,
    aliases: &[],
    meaning: "All threads of all processes, the first of each included, as in /proc/PID/task.",
    columns: &[
        column(
            "pid",
            Kind::Unsigned,
            Shown::Always,
            "Id of the process (tgid).",
            |_, thread| thread.task.tgid.into(),
        ),
        column(
            "tid",
            Kind::Unsigned,
            Shown::Always,
            "Id of the thread; the process's own id for its first thread.",
            |_, thread| thread.task.pid.into(),
        ),
        column(
            "state",
            Kind::Text,
            Shown::Always,
            "State letter, as in /proc/PID/task/TID/stat.",
            |_, thread| Value::word(state(thread).letter),
        ),
        column(
            "cpu",
            Kind::Unsigned,
            Shown::Always,
            "CPU on which it runs or ran last.",
            |_, thread| number(thread, |layout| layout.cpu.as_ref()),
        ),
        column(
            "user_time",
            Kind::Unsigned,
            Shown::Always,
            "CPU time in user mode, in hundredths of a second.",
            |_, thread| (cpu_time(thread).0 / TICK).into(),
        ),
        column(
            "system_time",
            Kind::Unsigned,
            Shown::Always,
            "CPU time in the kernel, in hundredths of a second.",
            |_, thread| (cpu_time(thread).1 / TICK).into(),
        ),
        column(
            "comm",
            Kind::Text,
            Shown::Always,
            "Name, as in /proc/PID/task/TID/comm.",
            |guest, thread| Value::text(thread.listing.names.of(guest, &thread.task)),
        ),
        column(
            "task_comm",
            Kind::Text,
            Shown::OnRequest,
            "Name as its task_struct holds it, 15 bytes at most.",
            |_, thread| Value::text(thread.task.comm()),
        ),
        column(
            "uid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Real user id.",
            |guest, thread| Value::from_read(thread.cred(guest), |cred| cred.uid.into()),
        ),
        column(
            "euid",
            Kind::Unsigned,
            Shown::OnRequest,
            "Effective user id.",
            |guest, thread| Value::from_read(thread.cred(guest), |cred| cred.euid.into()),
        ),
        column(
            "kernel_thread",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether it is a kernel thread (PF_KTHREAD).",
            |_, thread| thread.task.is_kernel_thread().into(),
        ),
        column(
            "start_time",
            Kind::Time,
            Shown::OnRequest,
            "When the thread was started, by the guest's wall clock as it is set now.",
            |_, thread| {
                let started = thread.task.number(&layout(thread).start_boottime);
                let clock = thread.listing.clock.as_ref();
                Value::from_read(clock, |clock| Value::time(clock.of_boot_time(started)))
            },
        ),
        column(
            "nice",
            Kind::Signed,
            Shown::OnRequest,
            "Niceness, -20 to 19.",
            |_, thread| {
                let priority = signed(thread.task.number(&layout(thread).static_prio));
                Value::Signed(priority - DEFAULT_PRIO)
            },
        ),
        column(
            "policy",
            Kind::Text,
            Shown::OnRequest,
            "Scheduling policy: normal, fifo, rr, batch, idle, deadline, ext.",
            |_, thread| policy(thread.task.number(&layout(thread).policy)),
        ),
        column(
            "voluntary_switches",
            Kind::Unsigned,
            Shown::OnRequest,
            "How often it gave its CPU up.",
            |_, thread| number(thread, |layout| layout.nvcsw.as_ref()),
        ),
        column(
            "involuntary_switches",
            Kind::Unsigned,
            Shown::OnRequest,
            "How often its CPU was taken from it.",
            |_, thread| number(thread, |layout| layout.nivcsw.as_ref()),
        ),
        column(
            "minor_faults",
            Kind::Unsigned,
            Shown::OnRequest,
            "Page faults that read nothing from a disk.",
            |_, thread| number(thread, |layout| layout.min_flt.as_ref()),
        ),
        column(
            "major_faults",
            Kind::Unsigned,
            Shown::OnRequest,
            "Page faults that read from a disk.",
            |_, thread| number(thread, |layout| layout.maj_flt.as_ref()),
        ),
        column(
            "stack",
            Kind::Address,
            Shown::OnRequest,
            "Lowest address of its kernel stack; null once that is freed.",
            |_, thread| match thread.task.pointer(&layout(thread).stack) {
                stack if stack.is_null() => Value::Null,
                stack => stack.into(),
            },
        ),
        column(
            "stack_pointer",
            Kind::Address,
            Shown::OnRequest,
            "Where its kernel stack stood when its CPU was last switched away from it.",
            |_, thread| {
                let member = layout(thread).stack_pointer.as_ref();
                member.map(|member| thread.task.pointer(member)).into()
            },
        ),
        column(
            "user_instruction_pointer",
            Kind::Address,
            Shown::OnRequest,
            "The instruction at which it last came out of user mode; null for what has none.",
            |guest, thread| registers(guest, thread, |found| found.instruction.into()),
        ),
        column(
            "user_stack_pointer",
            Kind::Address,
            Shown::OnRequest,
            "Where its stack of user mode stood then.",
            |guest, thread| registers(guest, thread, |found| found.stack.into()),
        ),
        column(
            "system_call",
            Kind::Unsigned,
            Shown::OnRequest,
            "The number of the system call by which it last came out of user mode; null if by an \
             interrupt or a fault.",
            |guest, thread| registers(guest, thread, |found| found.system_call.into()),
        ),
        column(
            "thread_pointer",
            Kind::Address,
            Shown::OnRequest,
            "Where its thread-local data is: the base of FS when it was last switched away from.",
            |_, thread| {
                let member = layout(thread).thread_pointer.as_ref();
                member.map(|member| thread.task.pointer(member)).into()
            },
        ),
        column(
            "memory",
            Kind::Address,
            Shown::OnRequest,
            "Where its mm_struct lies, which says what memory it has; null for threads of the \
             kernel and zombies.",
            |_, thread| match thread.task.mm {
                mm if mm.is_null() => Value::Null,
                mm => mm.into(),
            },
        ),
        column(
            "borrows_memory",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether it has its parent's memory for as long as it runs no program of its own \
             (vfork, posix_spawn).",
            |_, thread| {
                let member = layout(thread).vfork_done.as_ref();
                member
                    .map(|member| !thread.task.pointer(member).is_null())
                    .into()
            },
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its task_struct lies.",
            |_, thread| thread.task.address.into(),
        ),
    ],
    items: threads,
};

/// The row of the thread at `address`, whether it is in the list of its
/// process's threads or not.
///
/// # Errors
/// Why there is no row.
pub fn row_at(
    guest: &Guest,
    address: VirtualAddress,
) -> Result<Vec<(&'static str, Value)>, String> {
    let thread = process::at(guest, TABLE, address)?;
    Ok(THREADS.row(guest, &thread))
}

fn layout(thread: &Process) -> &TaskLayout {
    &thread.task.model().layout
}

fn registers(guest: &Guest, thread: &Process, value: fn(&UserRegisters) -> Value) -> Value {
    let found = user_registers::of_thread(guest, TABLE, &thread.task);
    Value::from_read(found, |found| found.as_ref().map_or(Value::Null, value))
}

fn cpu_time(thread: &Process) -> (u64, u64) {
    let layout = layout(thread);
    let number = |member: &Option<_>| member.as_ref().map(|member| thread.task.number(member));
    let told = number(&layout.told_utime).zip(number(&layout.told_stime));
    thread.own_cpu_time().adjusted(told)
}

fn threads(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Process>,
) -> Result<(), TableError> {
    let listing = Listing::new(guest, TABLE)?;
    process::for_each_thread(guest, &listing, selection, sink)
}

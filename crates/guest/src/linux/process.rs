//! A process with what belongs to it: its task, credentials, signal and memory
//! descriptor, copied together so that all of it was true at one moment.
//!
//! Tables about processes share this; the columns that show it are in
//! [`processes`](super::processes).

use std::cell::OnceCell;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress, Volatility};
use secmon_profile::{Member, TypeError, Types};

use crate::linux::cgroup::{self, Cgroups};
use crate::linux::clock::Clock;
use crate::linux::command_name::CommandNames;
use crate::linux::cred::{Cred, CredModel, Groups};
use crate::linux::namespace::{Kind, Namespaces};
use crate::linux::path::{Path, PathPointer, Paths};
use crate::linux::per_cpu::PerCpu;
use crate::linux::snapshot::{Snapshot, Spans};
use crate::linux::task::{self, Membership, Task, TaskError};
use crate::linux::tty::Terminals;
use crate::linux::user;
use crate::table::Items;
use crate::{Diagnostic, Guest, Layout, Selection, TableError, Value, layout};

/// How often a process that changes while it is read is read again.
const ATTEMPTS: u32 = 8;

/// `pids[PIDTYPE_PGID]` of `signal_struct`.
const PROCESS_GROUP: u64 = 2;
/// `pids[PIDTYPE_SID]` of `signal_struct`.
const SESSION: u64 = 3;

layout! {
    /// `include/linux/sched/signal.h`
    pub struct SignalLayout: "signal_struct" {
        threads: "nr_threads",
        pids: "pids",
        tty: "tty",
        utime: "utime",
        stime: "stime",
        sum_sched_runtime: "sum_sched_runtime",
    } optional {
        /// Absent where CPU time is measured exactly
        /// (`VIRT_CPU_ACCOUNTING_NATIVE`).
        previous_utime: "prev_cputime.utime",
        previous_stime: "prev_cputime.stime",
        oom_score_adj: "oom_score_adj",
    }
}

/// How signal descriptors of a guest are read.
#[derive(Debug)]
pub struct SignalModel {
    /// The members.
    pub layout: SignalLayout,
    spans: Spans,
}

impl Layout for SignalModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = SignalLayout::resolve(types)?;
        let required = [
            &layout.threads,
            &layout.pids,
            &layout.tty,
            &layout.utime,
            &layout.stime,
            &layout.sum_sched_runtime,
        ];
        let optional = [
            &layout.previous_utime,
            &layout.previous_stime,
            &layout.oom_score_adj,
        ];
        let optional = optional.into_iter().filter_map(Option::as_ref);
        let spans = Spans::covering(required.into_iter().chain(optional));
        Ok(Self { layout, spans })
    }
}

layout! {
    /// `include/linux/mm_types.h`
    pub struct MmLayout: "mm_struct" {
        total_vm: "total_vm",
        exe_file: "exe_file",
        rss: "rss_stat",
    } optional {
        pgd: "pgd",
    }
}

layout! {
    /// `include/linux/percpu_counter.h`
    struct PercpuCounterLayout: "percpu_counter" {
        count: "count",
        counters: "counters",
    }
}

/// How a guest counts the pages of a process.
#[derive(Debug)]
enum RssModel {
    /// `struct mm_rss_stat`: an array of `atomic_long_t` (until 6.1).
    Plain,
    /// An array of `struct percpu_counter` (since 6.2).
    PerCpu(PercpuCounterLayout),
}

/// How memory descriptors of a guest are read.
#[derive(Debug)]
pub struct MmModel {
    /// The members.
    pub layout: MmLayout,
    rss: RssModel,
    spans: Spans,
}

impl Layout for MmModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = MmLayout::resolve(types)?;
        let rss = if layout.rss.type_name.contains("percpu_counter") {
            RssModel::PerCpu(PercpuCounterLayout::resolve(types)?)
        } else {
            RssModel::Plain
        };
        let spans = Spans::covering([&layout.total_vm, &layout.exe_file, &layout.rss]);
        Ok(Self { layout, rss, spans })
    }
}

layout! {
    /// `include/linux/pid.h`
    pub(crate) struct PidLayout: "pid" {
        level: "level",
        numbers: "numbers",
    }
}

layout! {
    /// `include/linux/pid.h`
    pub(crate) struct UpidLayout: "upid" {
        number: "nr",
        namespace: "ns",
    }
}

layout! {
    /// `include/linux/fs_struct.h`
    struct FsLayout: "fs_struct" {
        root: "root",
        working_directory: "pwd",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct FileLayout: "file" {
        path: "f_path",
    }
}

layout! {
    /// `include/linux/pid_namespace.h`
    struct PidNamespaceLayout: "pid_namespace" {
        child_reaper: "child_reaper",
    }
}

/// Something a listing needs for some columns only; what is missing is said in
/// these columns and costs no other.
pub type Part<T> = Result<T, Arc<str>>;

fn part<T, E: std::fmt::Display>(found: Result<T, E>) -> Part<T> {
    found.map_err(|error| error.to_string().into())
}

/// What all processes of one listing share.
pub struct Listing {
    /// The table that is made.
    pub table: &'static str,
    task: Arc<task::TaskModel>,
    signal: Arc<SignalModel>,
    cred: Arc<CredModel>,
    mm: Part<Arc<MmModel>>,
    pid: Arc<PidLayout>,
    upid: Part<Arc<UpidLayout>>,
    fs: Part<Arc<FsLayout>>,
    file: Part<Arc<FileLayout>>,
    /// Names of tasks.
    pub names: CommandNames,
    /// Names of terminals.
    pub terminals: Part<Terminals>,
    /// Supplementary groups.
    pub groups: Part<Groups>,
    /// Paths as a process with the root of the guest's first one sees them.
    pub paths: Part<Paths>,
    /// Cgroups.
    pub cgroups: Part<Cgroups>,
    /// The clock, as it stood when the listing began.
    pub clock: Part<Clock>,
    /// Namespaces.
    pub namespaces: Part<Namespaces>,
    cpus: Part<PerCpu>,
    /// The capabilities that the first process started with: all that this
    /// kernel has.
    pub full_capabilities: u64,
}

impl Listing {
    /// Begins a listing for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack what every process needs.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Arc<Self>, TableError> {
        let task: Arc<task::TaskModel> = guest.layout(table)?;
        let cred: Arc<CredModel> = guest.layout(table)?;
        let full_capabilities = guest
            .symbol(table, "init_task")
            .ok()
            .and_then(|address| guest.pointer(address, &task.layout.real_cred).ok())
            .and_then(|address| Cred::read(guest, &cred, address).ok())
            .map_or(u64::MAX, |cred| cred.capabilities.bounding);
        let fs = part(guest.layout::<FsLayout>(table));
        let root = fs
            .as_ref()
            .ok()
            .and_then(|layout| first_root(guest, table, &task, layout));
        Ok(Arc::new(Self {
            table,
            signal: guest.layout(table)?,
            cred,
            mm: part(guest.layout(table)),
            pid: guest.layout(table)?,
            upid: part(guest.layout(table)),
            fs,
            file: part(guest.layout(table)),
            names: CommandNames::new(guest, table),
            terminals: part(Terminals::new(guest, table)),
            groups: part(Groups::new(guest, table)),
            paths: part(Paths::new(guest, table, root)),
            cgroups: part(Cgroups::new(guest, table)),
            clock: part(Clock::read(guest, table)),
            namespaces: part(Namespaces::new(guest, table)),
            cpus: part(PerCpu::read(guest, table)),
            full_capabilities,
            task,
        }))
    }

    /// Copies the `cred` at `address`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn cred(&self, guest: &Guest, address: VirtualAddress) -> Result<Cred, ReadError> {
        Cred::read(guest, &self.cred, address)
    }

    /// How tasks are read.
    pub fn task_model(&self) -> &Arc<task::TaskModel> {
        &self.task
    }
}

/// The root directory of the first process (`init_pid_ns.child_reaper`): the
/// root of whoever reads `/proc` outside of containers.
fn first_root(
    guest: &Guest,
    table: &'static str,
    task: &task::TaskModel,
    fs: &FsLayout,
) -> Option<PathPointer> {
    let layout = guest.layout::<PidNamespaceLayout>(table).ok()?;
    let namespace = guest.symbol(table, "init_pid_ns").ok()?;
    let reaper = guest.pointer(namespace, &layout.child_reaper).ok()?;
    let fs_struct = guest.pointer(reaper, &task.layout.fs).ok()?;
    let address = fs_struct.wrapping_add(fs.root.offset);
    let root = PathPointer::read(guest.space(), address).ok()?;
    (!root.is_null()).then_some(root)
}

/// Pages of memory that a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// Bytes of address space (`VmSize`).
    pub virtual_size: u64,
    /// Bytes in RAM (`VmRSS`).
    pub resident: u64,
}

/// A copy of what is read of an `mm_struct`.
#[derive(Clone, Debug)]
struct Mm {
    snapshot: Snapshot,
    /// The executable's `file`, null if there is none.
    exe_file: VirtualAddress,
}

/// A process, or a thread with what belongs to it.
///
/// On a live guest all of it is copied at once, so that it was true together;
/// of an image only what is asked for.
pub struct Process {
    /// Its task.
    pub task: Task,
    /// The listing that it belongs to.
    pub listing: Arc<Listing>,
    membership: Membership,
    cred: OnceCell<Result<Cred, ReadError>>,
    parent: OnceCell<Result<u32, ReadError>>,
    process_group: OnceCell<Result<u32, ReadError>>,
    session: OnceCell<Result<u32, ReadError>>,
    signal: OnceCell<Result<Snapshot, ReadError>>,
    mm: OnceCell<Result<Mm, ReadError>>,
    executable: OnceCell<Result<Option<Arc<Path>>, String>>,
    memory_size: OnceCell<Result<Option<MemorySize>, String>>,
    cgroups: OnceCell<Part<Arc<cgroup::Membership>>>,
    cpu_time: OnceCell<Result<(u64, u64), String>>,
}

/// All processes that the selection wants.
///
/// # Errors
/// [`TableError`] if there is no list of processes.
pub fn processes<'g>(
    guest: &'g Guest,
    listing: &'g Arc<Listing>,
    selection: &'g Selection,
) -> Result<impl Iterator<Item = Process> + 'g, TableError> {
    Ok(task::leaders(guest, listing.table)?
        .filter(|task| selection.wants_pid(task.tgid.into()))
        .filter_map(|task| Process::read(guest, listing, task, Membership::Processes)))
}

/// All threads of all processes that the selection wants, until the sink
/// breaks.
///
/// # Errors
/// [`TableError`] if there is no list of processes or threads.
pub fn for_each_thread(
    guest: &Guest,
    listing: &Arc<Listing>,
    selection: &Selection,
    sink: &mut Items<'_, Process>,
) -> Result<(), TableError> {
    for leader in task::leaders(guest, listing.table)? {
        if !selection.wants_pid(leader.tgid.into()) {
            continue;
        }
        for thread in task::threads(guest, listing.table, &leader)? {
            let Some(thread) = Process::read(guest, listing, thread, Membership::Threads) else {
                continue;
            };
            if sink(thread).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

impl Process {
    /// Reads what belongs to `task`, again while it changes; none if the task
    /// went away meanwhile or never held still, which is a diagnostic.
    pub fn read(
        guest: &Guest,
        listing: &Arc<Listing>,
        task: Task,
        membership: Membership,
    ) -> Option<Self> {
        let live = guest.space().memory().volatility() == Volatility::Live;
        let address = task.address;
        let mut process = Self::gather(guest, listing, task, membership);
        if !live {
            return Some(process);
        }
        for _ in 0..ATTEMPTS {
            if process.task.is_current(guest, membership) {
                return Some(process);
            }
            guest.diagnostics().count_torn_read();
            match Task::read(guest, &listing.task, address, membership) {
                Ok(task) => process = Self::gather(guest, listing, task, membership),
                Err(TaskError::Released) => return None,
                Err(error) => {
                    process.record(guest, &error.to_string());
                    return None;
                }
            }
        }
        process.record(
            guest,
            &format!("left out: it changed during each of {ATTEMPTS} reads"),
        );
        None
    }

    fn record(&self, guest: &Guest, reason: &str) {
        guest.diagnostics().record(Diagnostic {
            table: self.listing.table,
            subject: format!("task_struct of pid {}", self.task.pid),
            address: Some(self.task.address),
            reason: reason.to_owned(),
        });
    }

    fn gather(guest: &Guest, listing: &Arc<Listing>, task: Task, membership: Membership) -> Self {
        let process = Self {
            task,
            listing: listing.clone(),
            membership,
            cred: OnceCell::new(),
            parent: OnceCell::new(),
            process_group: OnceCell::new(),
            session: OnceCell::new(),
            signal: OnceCell::new(),
            mm: OnceCell::new(),
            executable: OnceCell::new(),
            memory_size: OnceCell::new(),
            cgroups: OnceCell::new(),
            cpu_time: OnceCell::new(),
        };
        if guest.space().memory().volatility() == Volatility::Live {
            let _ = process.cred(guest);
            let _ = process.parent(guest);
            let _ = process.process_group(guest);
            let _ = process.session(guest);
            let _ = process.mm(guest);
        }
        process
    }

    /// Its objective credentials.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn cred(&self, guest: &Guest) -> Result<&Cred, &ReadError> {
        self.cred
            .get_or_init(|| Cred::read(guest, &self.listing.cred, self.task.real_cred))
            .as_ref()
    }

    /// The id of its parent process in the initial pid namespace.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn parent(&self, guest: &Guest) -> Result<u32, &ReadError> {
        let tgid = &self.listing.task.layout.tgid;
        let read = || guest.number(self.task.real_parent, tgid);
        let found = self.parent.get_or_init(|| read().map(|tgid| tgid as u32));
        found.as_ref().copied()
    }

    /// The id of its process group in the initial pid namespace.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn process_group(&self, guest: &Guest) -> Result<u32, &ReadError> {
        let read = || self.pid_number(guest, PROCESS_GROUP);
        self.process_group.get_or_init(read).as_ref().copied()
    }

    /// The id of its session in the initial pid namespace.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn session(&self, guest: &Guest) -> Result<u32, &ReadError> {
        let read = || self.pid_number(guest, SESSION);
        self.session.get_or_init(read).as_ref().copied()
    }

    /// The number of one of the `pid`s of the signal descriptor.
    fn pid_number(&self, guest: &Guest, kind: u64) -> Result<u32, ReadError> {
        let spans = &self.listing.signal.spans;
        let signal = self.signal(guest).map_err(Clone::clone)?;
        let offset = self.signal_layout().pids.offset.wrapping_add(kind * 8);
        let pid = spans.bytes(signal, offset, 8);
        let pid = pid.and_then(|bytes| bytes.try_into().ok());
        let pid = VirtualAddress::new(pid.map_or(0, u64::from_le_bytes));
        if pid.is_null() {
            return Ok(0);
        }
        let number = pid.wrapping_add(self.listing.pid.numbers.offset);
        guest.space().read_u32(number)
    }

    fn signal(&self, guest: &Guest) -> Result<&Snapshot, &ReadError> {
        let spans = &self.listing.signal.spans;
        self.signal
            .get_or_init(|| spans.read(guest.space(), self.task.signal))
            .as_ref()
    }

    /// The memory descriptor; none for a process without memory of its own.
    fn mm(&self, guest: &Guest) -> Result<Option<&Mm>, String> {
        if self.task.mm.is_null() {
            return Ok(None);
        }
        let model = self.listing.mm.as_ref().map_err(ToString::to_string)?;
        let read = || {
            let snapshot = model.spans.read(guest.space(), self.task.mm)?;
            Ok(Mm {
                exe_file: model.spans.pointer(&snapshot, &model.layout.exe_file),
                snapshot,
            })
        };
        let found = self.mm.get_or_init(read).as_ref();
        found.map(Some).map_err(ToString::to_string)
    }

    /// The number in a member of the process's [`SignalLayout`].
    ///
    /// # Errors
    /// [`ReadError`] if the signal descriptor could not be read.
    pub fn signal_number(&self, guest: &Guest, member: &Member) -> Result<u64, ReadError> {
        let spans = &self.listing.signal.spans;
        let signal = self.signal(guest).map_err(Clone::clone)?;
        Ok(spans.number(signal, member))
    }

    /// The signal descriptor's members.
    pub fn signal_layout(&self) -> &SignalLayout {
        &self.listing.signal.layout
    }

    /// Its cgroups.
    ///
    /// # Errors
    /// A text that says why they can't be read.
    pub fn cgroups(&self, guest: &Guest) -> Result<&cgroup::Membership, &Arc<str>> {
        let read = || {
            let cgroups = self.listing.cgroups.as_ref().map_err(Clone::clone)?;
            let member = self.listing.task.layout.cgroups.as_ref();
            let member = member.ok_or("the kernel has no task_struct.cgroups")?;
            Ok(cgroups.of(guest, self.task.pointer(member)))
        };
        let found = self.cgroups.get_or_init(read).as_ref();
        found.map(AsRef::as_ref)
    }

    /// On a live guest: whether the process still is what was copied, so that
    /// what was read by its pointers in between was its own. Counts a torn
    /// read otherwise.
    fn still(&self, guest: &Guest) -> bool {
        if guest.space().memory().volatility() == Volatility::Static
            || self.task.is_current(guest, self.membership)
        {
            return true;
        }
        guest.diagnostics().count_torn_read();
        false
    }

    /// `found`, unless the process changed meanwhile.
    fn if_still<T>(&self, guest: &Guest, found: Result<T, String>) -> Result<T, String> {
        if self.still(guest) {
            found
        } else {
            Err("the process ended or changed during the read".into())
        }
    }

    /// The path of the executable; none for a process without memory of its
    /// own.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn executable(&self, guest: &Guest) -> Result<Option<&Path>, &String> {
        let found = self.executable.get_or_init(|| self.read_executable(guest));
        found.as_ref().map(Option::as_deref)
    }

    fn read_executable(&self, guest: &Guest) -> Result<Option<Arc<Path>>, String> {
        if self.task.is_kernel_thread() {
            return Ok(None);
        }
        let Some(mm) = self.mm(guest)?.filter(|mm| !mm.exe_file.is_null()) else {
            return Ok(None);
        };
        let file = self.listing.file.as_ref().map_err(ToString::to_string)?;
        let pointer = PathPointer::read(guest.space(), mm.exe_file.wrapping_add(file.path.offset));
        let found = pointer
            .map_err(|error| error.to_string())
            .and_then(|pointer| self.path(guest, pointer));
        self.if_still(guest, found).map(Some)
    }

    fn path(&self, guest: &Guest, pointer: PathPointer) -> Result<Arc<Path>, String> {
        let paths = self.listing.paths.as_ref().map_err(ToString::to_string)?;
        paths
            .resolve(guest, pointer)
            .map_err(|error| error.to_string())
    }

    fn directory(
        &self,
        guest: &Guest,
        member: fn(&FsLayout) -> &Member,
    ) -> Result<Option<Arc<Path>>, String> {
        if self.task.fs.is_null() {
            return Ok(None);
        }
        let layout = self.listing.fs.as_ref().map_err(ToString::to_string)?;
        let address = self.task.fs.wrapping_add(member(layout).offset);
        let found = PathPointer::read(guest.space(), address)
            .map_err(|error| error.to_string())
            .and_then(|pointer| self.path(guest, pointer));
        self.if_still(guest, found).map(Some)
    }

    /// The working directory; none for a zombie.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn working_directory(&self, guest: &Guest) -> Result<Option<Arc<Path>>, String> {
        self.directory(guest, |layout| &layout.working_directory)
    }

    /// The root directory; none for a zombie.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn root(&self, guest: &Guest) -> Result<Option<Arc<Path>>, String> {
        self.directory(guest, |layout| &layout.root)
    }

    /// The command line, as it stands in the process's own memory.
    pub fn arguments(&self, guest: &Guest) -> Value {
        if self.task.mm.is_null() || self.task.is_kernel_thread() {
            return Value::List(Vec::new());
        }
        let found = user::arguments(guest, self.task.mm);
        match self.if_still(guest, Ok(found)) {
            Ok(found) => found,
            Err(reason) => Value::unreadable(reason),
        }
    }

    /// How much memory the process has; none if it has none of its own.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn memory_size(&self, guest: &Guest) -> Result<Option<MemorySize>, &String> {
        let found = self
            .memory_size
            .get_or_init(|| self.read_memory_size(guest));
        found.as_ref().copied()
    }

    fn read_memory_size(&self, guest: &Guest) -> Result<Option<MemorySize>, String> {
        let Some(mm) = self.mm(guest)? else {
            return Ok(None);
        };
        let model = self.listing.mm.as_ref().map_err(ToString::to_string)?;
        let pages = model.spans.number(&mm.snapshot, &model.layout.total_vm);
        let resident = self.resident_pages(guest, model, mm)?;
        Ok(Some(MemorySize {
            virtual_size: pages.saturating_mul(secmon_memory::PAGE_SIZE),
            resident: resident.saturating_mul(secmon_memory::PAGE_SIZE),
        }))
    }

    /// Pages of files, anonymous and shared memory: the counters 0, 1 and 3
    /// (`MM_FILEPAGES`, `MM_ANONPAGES`, `MM_SHMEMPAGES`,
    /// `include/linux/mm_types_task.h`); 2 counts swapped pages.
    fn resident_pages(&self, guest: &Guest, model: &MmModel, mm: &Mm) -> Result<u64, String> {
        const COUNTED: [u64; 3] = [0, 1, 3];
        let base = model.layout.rss.offset;
        let word = |offset: u64| {
            let bytes = model.spans.bytes(&mm.snapshot, offset, 8);
            let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let mut pages = 0_u64;
        match &model.rss {
            RssModel::Plain => {
                for index in COUNTED {
                    let count = word(base.wrapping_add(index * 8)) as i64;
                    pages = pages.saturating_add(count.max(0) as u64);
                }
            }
            RssModel::PerCpu(counter) => {
                let cpus = self.listing.cpus.as_ref().map_err(ToString::to_string)?;
                for index in COUNTED {
                    let at = base.wrapping_add(index.wrapping_mul(counter.size));
                    let mut count = word(at.wrapping_add(counter.count.offset)) as i64;
                    let counters =
                        VirtualAddress::new(word(at.wrapping_add(counter.counters.offset)));
                    for cpu in cpus.online() {
                        let address = cpus
                            .checked_address(guest, counters, *cpu)
                            .ok_or_else(|| format!("percpu_counter.counters is {counters}"))?;
                        let part = guest
                            .space()
                            .read_u32(address)
                            .map_err(|error| error.to_string())?;
                        count = count.wrapping_add(i64::from(part as i32));
                    }
                    pages = pages.saturating_add(count.max(0) as u64);
                }
            }
        }
        Ok(pages)
    }

    /// The ids of the process in all pid namespaces it is in, the initial one
    /// first.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn namespace_pids(&self, guest: &Guest) -> Result<Vec<u32>, String> {
        /// `MAX_PID_NS_LEVEL` (`include/linux/pid_namespace.h`).
        const DEEPEST: u32 = 32;
        let member = self.listing.task.layout.thread_pid.as_ref();
        let member = member.ok_or("the kernel has no task_struct.thread_pid")?;
        let upid = self.listing.upid.as_ref().map_err(ToString::to_string)?;
        let pid = self.task.pointer(member);
        if pid.is_null() {
            return Ok(Vec::new());
        }
        let read = |offset: u64| {
            guest
                .space()
                .read_u32(pid.wrapping_add(offset))
                .map_err(|error| error.to_string())
        };
        let level = read(self.listing.pid.level.offset)?;
        if level > DEEPEST {
            return Err(format!("the pid at {pid} is at level {level}"));
        }
        let numbers = self.listing.pid.numbers.offset;
        let ids = (0..=u64::from(level))
            .map(|level| read(numbers + level.wrapping_mul(upid.size) + upid.number.offset))
            .collect::<Result<Vec<_>, _>>()?;
        if ids.first() == Some(&self.task.pid) {
            return Ok(ids);
        }
        let found = format!("the pid at {pid} is not that of pid {}", self.task.pid);
        self.if_still(guest, Err(found))
    }

    /// The number of the namespace of that kind in which the process is; null
    /// if it has left it.
    pub fn namespace(&self, guest: &Guest, kind: Kind) -> Value {
        let namespaces = match &self.listing.namespaces {
            Ok(namespaces) => namespaces,
            Err(reason) => return Value::unreadable(reason),
        };
        let found = namespaces.of(guest, self, kind).and_then(|namespace| {
            namespace
                .map(|namespace| namespaces.inode(guest, kind, namespace))
                .transpose()
        });
        Value::from_read(found, Value::from)
    }

    /// The CPU time of all threads, living and ended, as `/proc/PID/stat`
    /// gives it: (user, system), nanoseconds.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn total_cpu_time(&self, guest: &Guest) -> Result<(u64, u64), String> {
        let count = || -> Result<(u64, u64), String> {
            let threads = self
                .signal_number(guest, &self.signal_layout().threads)
                .map_err(|error| error.to_string())?;
            let time = if threads == 1 {
                self.sum_cpu_time(guest, std::iter::once(&self.task))
            } else {
                let threads: Vec<Task> = task::threads(guest, self.listing.table, &self.task)
                    .map_err(|error| error.to_string())?
                    .collect();
                self.sum_cpu_time(guest, threads.iter())
            };
            time.map_err(|error| error.to_string())
        };
        self.cpu_time.get_or_init(count).clone()
    }

    fn sum_cpu_time<'t>(
        &self,
        guest: &Guest,
        threads: impl Iterator<Item = &'t Task>,
    ) -> Result<(u64, u64), ReadError> {
        let layout = &self.listing.task.layout;
        let signal = self.signal_layout();
        let mut time = CpuTime {
            user: self.signal_number(guest, &signal.utime)?,
            system: self.signal_number(guest, &signal.stime)?,
            run: self.signal_number(guest, &signal.sum_sched_runtime)?,
        };
        for thread in threads {
            time.user = time.user.wrapping_add(thread.number(&layout.utime));
            time.system = time.system.wrapping_add(thread.number(&layout.stime));
            time.run = time
                .run
                .wrapping_add(thread.number(&layout.sum_exec_runtime));
        }
        match (&signal.previous_utime, &signal.previous_stime) {
            (Some(user), Some(system)) => {
                let user = self.signal_number(guest, user)?;
                let system = self.signal_number(guest, system)?;
                Ok(time.adjusted(user, system))
            }
            _ => Ok((time.user, time.system)),
        }
    }
}

/// Measured CPU time, nanoseconds. User and system time are counted in ticks;
/// what the scheduler measured is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTime {
    /// Ticks in user mode.
    pub user: u64,
    /// Ticks in the kernel.
    pub system: u64,
    /// Exact time on a CPU.
    pub run: u64,
}

impl CpuTime {
    /// The exact time divided as the ticks are, never less than was said
    /// before (`cputime_adjust`, `kernel/sched/cputime.c`): (user, system).
    pub fn adjusted(self, previous_user: u64, previous_system: u64) -> (u64, u64) {
        if previous_user.saturating_add(previous_system) >= self.run {
            return (previous_user, previous_system);
        }
        let system = if self.system == 0 {
            0
        } else if self.user == 0 {
            self.run
        } else {
            let ticks = u128::from(self.user) + u128::from(self.system);
            let share = u128::from(self.system) * u128::from(self.run) / ticks;
            u64::try_from(share).unwrap_or(self.run)
        };
        let system = system.max(previous_system);
        let user = self.run.saturating_sub(system);
        if user < previous_user {
            return (previous_user, self.run.saturating_sub(previous_user));
        }
        (user, system)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn adjusts_cpu_time_as_the_kernel_does() {
        let time = |user, system, run| CpuTime { user, system, run };
        assert_eq!(time(4, 0, 10).adjusted(0, 0), (10, 0));
        assert_eq!(time(0, 4, 10).adjusted(0, 0), (0, 10));
        assert_eq!(time(4, 4, 10).adjusted(0, 0), (5, 5));
        assert_eq!(time(4, 4, 10).adjusted(7, 2), (7, 3));
        assert_eq!(time(4, 4, 10).adjusted(2, 7), (3, 7));
        assert_eq!(time(4, 4, 10).adjusted(6, 6), (6, 6));
    }

    proptest! {
        #[test]
        fn any_cpu_time(user: u64, system: u64, run: u64, before: (u64, u64)) {
            let (after_user, after_system) = CpuTime { user, system, run }.adjusted(before.0, before.1);
            let sum = u128::from(after_user) + u128::from(after_system);
            if u128::from(before.0) + u128::from(before.1) < u128::from(run) {
                prop_assert_eq!(sum, u128::from(run));
            } else {
                prop_assert_eq!((after_user, after_system), before);
            }
        }
    }
}

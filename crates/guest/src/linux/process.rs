//! A process with what belongs to it: its task, credentials, signal and memory
//! descriptor, copied together so that all of it was true at one moment.
//!
//! Tables about processes share this; the columns that show it are in
//! [`processes`](super::processes).

use std::cell::OnceCell;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress, Volatility};

use crate::linux::cgroup;
use crate::linux::cred::Cred;
use crate::linux::listing::{Listing, Part};
use crate::linux::memory_size::{MemorySize, Mm};
use crate::linux::namespace::{Kind, NamespaceNumbers};
use crate::linux::path::{Path, PathPointer};
use crate::linux::pid::PidNumbers;
use crate::linux::signal::{CpuTime, Signal};
use crate::linux::task::{self, Membership, Task, TaskError};
use crate::linux::user;
use crate::table::Items;
use crate::{Diagnostic, Guest, Selection, TableError, Value};

/// How often a process that changes while it is read is read again.
const ATTEMPTS: u32 = 8;

/// Why something of a process can't be told.
pub type Reason = Arc<str>;

fn reason(error: impl std::fmt::Display) -> Reason {
    error.to_string().into()
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
    cred: OnceCell<Part<Cred>>,
    parent: OnceCell<Result<u32, ReadError>>,
    process_group: OnceCell<Part<u32>>,
    session: OnceCell<Part<u32>>,
    signal: OnceCell<Part<Signal>>,
    mm: OnceCell<Part<Mm>>,
    executable: OnceCell<Part<Option<Arc<Path>>>>,
    directories: OnceCell<Part<[PathPointer; 2]>>,
    memory_size: OnceCell<Part<Option<MemorySize>>>,
    cgroups: OnceCell<Part<Arc<cgroup::Membership>>>,
    cpu_time: OnceCell<Part<(u64, u64)>>,
    pids: OnceCell<Part<Option<PidNumbers>>>,
    namespaces: OnceCell<Part<Option<NamespaceNumbers>>>,
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

/// The process or thread at `address`, whether any list has it or not.
///
/// # Errors
/// Why there is none.
pub(crate) fn at(
    guest: &Guest,
    table: &'static str,
    address: VirtualAddress,
) -> Result<Process, String> {
    let listing = Listing::new(guest, table).map_err(|error| error.to_string())?;
    let task = Task::read(guest, &listing.task, address, Membership::Anywhere);
    let task = task.map_err(|error| error.to_string())?;
    let process = Process::read(guest, &listing, task, Membership::Anywhere);
    process.ok_or_else(|| format!("the task at {address} changed during each read"))
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
        let address = task.address;
        let mut process = Self::of(listing, task, membership);
        if guest.space().memory().volatility() == Volatility::Static {
            return Some(process);
        }
        for _ in 0..ATTEMPTS {
            process.gather(guest);
            if process.task.is_current(guest, membership) {
                return Some(process);
            }
            guest.diagnostics().count_torn_read();
            match Task::read(guest, &listing.task, address, membership) {
                Ok(task) => process = Self::of(listing, task, membership),
                Err(TaskError::Released) => return None,
                Err(error) => {
                    process.record(guest, error.to_string());
                    return None;
                }
            }
        }
        let reason = format!("left out: it changed during each of {ATTEMPTS} reads");
        process.record(guest, reason);
        None
    }

    fn of(listing: &Arc<Listing>, task: Task, membership: Membership) -> Self {
        Self {
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
            directories: OnceCell::new(),
            memory_size: OnceCell::new(),
            cgroups: OnceCell::new(),
            cpu_time: OnceCell::new(),
            pids: OnceCell::new(),
            namespaces: OnceCell::new(),
        }
    }

    /// Copies what must have been true together with the task.
    fn gather(&self, guest: &Guest) {
        let _ = self.cred(guest);
        let _ = self.parent(guest);
        let _ = self.process_group(guest);
        let _ = self.session(guest);
        let _ = self.mm(guest);
        let _ = self.directories(guest);
        let _ = self.pids(guest);
        let _ = self.namespaces(guest);
    }

    fn record(&self, guest: &Guest, reason: String) {
        guest.diagnostics().record(Diagnostic {
            table: self.listing.table,
            subject: format!("task_struct of pid {}", self.task.pid),
            address: Some(self.task.address),
            reason,
        });
    }

    /// Its objective credentials.
    ///
    /// # Errors
    /// Why they can't be read.
    pub fn cred(&self, guest: &Guest) -> Result<&Cred, &Reason> {
        let read = || self.listing.cred(guest, self.task.real_cred);
        self.cred.get_or_init(read).as_ref()
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

    /// What it shares with its threads.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn signal(&self, guest: &Guest) -> Result<&Signal, &Reason> {
        let read = || {
            let model = self.listing.signal.as_ref().map_err(Clone::clone)?;
            Signal::read(guest, model, self.task.signal).map_err(reason)
        };
        self.signal.get_or_init(read).as_ref()
    }

    /// The id of its process group in the initial pid namespace.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn process_group(&self, guest: &Guest) -> Result<u32, &Reason> {
        let read = || self.pid_number(guest, |signal| signal.process_group);
        self.process_group.get_or_init(read).as_ref().copied()
    }

    /// The id of its session in the initial pid namespace.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn session(&self, guest: &Guest) -> Result<u32, &Reason> {
        let read = || self.pid_number(guest, |signal| signal.session);
        self.session.get_or_init(read).as_ref().copied()
    }

    fn pid_number(&self, guest: &Guest, of: fn(&Signal) -> VirtualAddress) -> Part<u32> {
        let pid = of(self.signal(guest).map_err(Clone::clone)?);
        if pid.is_null() {
            return Ok(0);
        }
        let model = self.listing.pid.as_ref().map_err(Clone::clone)?;
        model.initial(guest, pid).map_err(reason)
    }

    /// Its ids in all pid namespaces, and the innermost of these; none once it
    /// is released.
    ///
    /// # Errors
    /// Why they can't be read.
    pub fn pids(&self, guest: &Guest) -> Result<Option<&PidNumbers>, &Reason> {
        let found = self.pids.get_or_init(|| self.read_pids(guest));
        found.as_ref().map(Option::as_ref)
    }

    fn read_pids(&self, guest: &Guest) -> Part<Option<PidNumbers>> {
        let member = self.listing.task.layout.thread_pid.as_ref();
        let member = member.ok_or("the kernel has no task_struct.thread_pid")?;
        let pid = self.task.pointer(member);
        if pid.is_null() {
            return Ok(None);
        }
        let model = self.listing.pid.as_ref().map_err(Clone::clone)?;
        let found = model.numbers(guest, pid).map_err(reason)?;
        if found.initial == self.task.pid {
            return Ok(Some(found));
        }
        let pid = format!("the pid at {pid} is not that of pid {}", self.task.pid);
        Err(pid.into())
    }

    /// The memory descriptor; none for a process without memory of its own.
    fn mm(&self, guest: &Guest) -> Result<Option<&Mm>, &Reason> {
        if self.task.mm.is_null() {
            return Ok(None);
        }
        let read = || {
            let model = self.listing.mm.as_ref().map_err(Clone::clone)?;
            Mm::read(guest, model, self.task.mm).map_err(reason)
        };
        self.mm.get_or_init(read).as_ref().map(Some)
    }

    /// How much memory the process has; none if it has none of its own.
    ///
    /// # Errors
    /// Why it can't be told.
    pub fn memory_size(&self, guest: &Guest) -> Result<Option<MemorySize>, &Reason> {
        let read = || {
            let Some(mm) = self.mm(guest).map_err(Clone::clone)? else {
                return Ok(None);
            };
            let cpus = self.listing.cpus.as_ref().map_err(ToString::to_string);
            mm.size(guest, cpus).map(Some).map_err(Reason::from)
        };
        self.memory_size.get_or_init(read).as_ref().copied()
    }

    /// Its cgroups.
    ///
    /// # Errors
    /// Why they can't be read.
    pub fn cgroups(&self, guest: &Guest) -> Result<&cgroup::Membership, &Reason> {
        let read = || {
            let cgroups = self.listing.cgroups.as_ref().map_err(Clone::clone)?;
            let member = self.listing.task.layout.cgroups.as_ref();
            let member = member.ok_or("the kernel has no task_struct.cgroups")?;
            Ok(cgroups.of(guest, self.task.pointer(member)))
        };
        let found = self.cgroups.get_or_init(read).as_ref();
        found.map(AsRef::as_ref)
    }

    /// The numbers of the namespaces it is in except those of users and pids;
    /// none if it has left them.
    fn namespaces(&self, guest: &Guest) -> Result<Option<&NamespaceNumbers>, &Reason> {
        let read = || {
            if self.task.nsproxy.is_null() {
                return Ok(None);
            }
            let namespaces = self.listing.namespaces.as_ref().map_err(Clone::clone)?;
            namespaces.numbers(guest, self.task.nsproxy).map(Some)
        };
        let found = self.namespaces.get_or_init(read);
        found.as_ref().map(Option::as_ref)
    }

    /// The number of the namespace of that kind in which the process is; null
    /// if it has left it.
    pub fn namespace(&self, guest: &Guest, kind: Kind) -> Value {
        let inode = |address| {
            let namespaces = self.listing.namespaces.as_ref().map_err(Clone::clone)?;
            namespaces.inode(guest, kind, address).map_err(Reason::from)
        };
        let found: Part<Option<u32>> = match kind {
            Kind::User => self
                .cred(guest)
                .map_err(Clone::clone)
                .and_then(|cred| inode(cred.user_namespace).map(Some)),
            Kind::Pid => self
                .pids(guest)
                .map_err(Clone::clone)
                .and_then(|pids| pids.map(|pids| inode(pids.namespace)).transpose()),
            _ => self
                .namespaces(guest)
                .map_err(Clone::clone)
                .map(|numbers| numbers.and_then(|numbers| numbers.of(kind))),
        };
        Value::from_read(found, Value::from)
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
    fn if_still<T>(&self, guest: &Guest, found: Part<T>) -> Part<T> {
        if self.still(guest) {
            found
        } else {
            Err("the process ended or changed during the read".into())
        }
    }

    fn path(&self, guest: &Guest, pointer: PathPointer) -> Part<Arc<Path>> {
        let paths = self.listing.paths.as_ref().map_err(Clone::clone)?;
        self.if_still(guest, paths.resolve(guest, pointer).map_err(reason))
    }

    /// The path of the executable; none for a process without memory of its
    /// own.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn executable(&self, guest: &Guest) -> Result<Option<&Path>, &Reason> {
        let found = self.executable.get_or_init(|| self.read_executable(guest));
        found.as_ref().map(Option::as_deref)
    }

    fn read_executable(&self, guest: &Guest) -> Part<Option<Arc<Path>>> {
        if self.task.is_kernel_thread() {
            return Ok(None);
        }
        let mm = self.mm(guest).map_err(Clone::clone)?;
        let Some(mm) = mm.filter(|mm| !mm.exe_file.is_null()) else {
            return Ok(None);
        };
        let file = self.listing.file.as_ref().map_err(Clone::clone)?;
        let pointer = PathPointer::read(guest.space(), mm.exe_file.wrapping_add(file.path.offset));
        self.path(guest, pointer.map_err(reason)?).map(Some)
    }

    /// The root and the working directory.
    fn directories(&self, guest: &Guest) -> Result<Option<[PathPointer; 2]>, &Reason> {
        if self.task.fs.is_null() {
            return Ok(None);
        }
        let read = || {
            let layout = self.listing.fs.as_ref().map_err(Clone::clone)?;
            let at = |offset| {
                let address = self.task.fs.wrapping_add(offset);
                PathPointer::read(guest.space(), address).map_err(reason)
            };
            Ok([
                at(layout.root.offset)?,
                at(layout.working_directory.offset)?,
            ])
        };
        let found = self.directories.get_or_init(read);
        found.as_ref().copied().map(Some)
    }

    fn directory(&self, guest: &Guest, index: usize) -> Part<Option<Arc<Path>>> {
        let pointers = self.directories(guest).map_err(Clone::clone)?;
        let pointer = pointers.and_then(|pointers| pointers.get(index).copied());
        pointer.map(|pointer| self.path(guest, pointer)).transpose()
    }

    /// The root directory; none for a zombie.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn root(&self, guest: &Guest) -> Part<Option<Arc<Path>>> {
        self.directory(guest, 0)
    }

    /// The working directory; none for a zombie.
    ///
    /// # Errors
    /// Why it can't be read.
    pub fn working_directory(&self, guest: &Guest) -> Part<Option<Arc<Path>>> {
        self.directory(guest, 1)
    }

    /// The command line, as it stands in the process's own memory.
    pub fn arguments(&self, guest: &Guest) -> Value {
        if self.task.mm.is_null() || self.task.is_kernel_thread() {
            return Value::List(Box::default());
        }
        let found = user::arguments(guest, self.task.mm);
        Value::from_read(self.if_still(guest, Ok(found)), |found| found)
    }

    /// The CPU time of this thread alone.
    pub fn own_cpu_time(&self) -> CpuTime {
        own_cpu_time(&self.task)
    }

    /// The CPU time of all threads, living and ended, as `/proc/PID/stat`
    /// gives it: (user, system), nanoseconds.
    ///
    /// # Errors
    /// Why it can't be told.
    pub fn total_cpu_time(&self, guest: &Guest) -> Result<(u64, u64), &Reason> {
        let count = || {
            let signal = self.signal(guest).map_err(Clone::clone)?;
            let mut time = signal.cpu_time;
            if signal.threads == 1 {
                time = time.plus(own_cpu_time(&self.task));
            } else {
                let threads = task::threads(guest, self.listing.table, &self.task);
                for thread in threads.map_err(reason)? {
                    time = time.plus(own_cpu_time(&thread));
                }
            }
            Ok(time.adjusted(signal.told))
        };
        self.cpu_time.get_or_init(count).as_ref().copied()
    }
}

fn own_cpu_time(task: &Task) -> CpuTime {
    let layout = &task.model().layout;
    CpuTime {
        user: task.number(&layout.utime),
        system: task.number(&layout.stime),
        run: task.number(&layout.sum_exec_runtime),
    }
}

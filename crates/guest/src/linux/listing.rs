//! What all processes of one listing share: how they are read, and what was
//! met before.

use std::fmt::Display;
use std::sync::Arc;

use secmon_memory::VirtualAddress;

use crate::linux::cgroup::Cgroups;
use crate::linux::clock::Clock;
use crate::linux::command_name::CommandNames;
use crate::linux::cred::{Cred, CredModel, Groups};
use crate::linux::memory_size::MmModel;
use crate::linux::namespace::{Kind, Namespaces};
use crate::linux::path::{PathPointer, Paths};
use crate::linux::per_cpu::PerCpu;
use crate::linux::pid::PidModel;
use crate::linux::signal::SignalModel;
use crate::linux::task::TaskModel;
use crate::linux::tty::Terminals;
use crate::{Guest, TableError, layout};

layout! {
    /// `include/linux/fs_struct.h`
    pub(crate) struct FsLayout: "fs_struct" {
        root: "root",
        working_directory: "pwd",
    }
}

layout! {
    /// `include/linux/fs.h`
    pub(crate) struct FileLayout: "file" {
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

fn part<T>(found: Result<T, impl Display>) -> Part<T> {
    found.map_err(|error| error.to_string().into())
}

/// What all processes of one listing share.
pub struct Listing {
    /// The table that is made.
    pub table: &'static str,
    /// Tasks.
    pub task: Arc<TaskModel>,
    /// Signal descriptors.
    pub signal: Part<Arc<SignalModel>>,
    /// Credentials.
    pub cred: Part<Arc<CredModel>>,
    /// Memory descriptors.
    pub mm: Part<Arc<MmModel>>,
    /// Process ids.
    pub pid: Part<Arc<PidModel>>,
    /// Names of tasks.
    pub names: CommandNames,
    /// Names of terminals.
    pub terminals: Part<Terminals>,
    /// Supplementary groups.
    pub groups: Part<Groups>,
    /// Paths as a process with the root of the guest's first one sees them.
    pub paths: Part<Paths>,
    pub(crate) fs: Part<Arc<FsLayout>>,
    pub(crate) file: Part<Arc<FileLayout>>,
    /// Cgroups.
    pub cgroups: Part<Cgroups>,
    /// Namespaces.
    pub namespaces: Part<Namespaces>,
    /// The clock, as it stood when the listing began.
    pub clock: Part<Clock>,
    /// Per-CPU variables.
    pub cpus: Part<PerCpu>,
    /// The capabilities that the first process started with: all that this
    /// kernel has.
    pub full_capabilities: u64,
}

impl Listing {
    /// Begins a listing for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack tasks.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Arc<Self>, TableError> {
        let task: Arc<TaskModel> = guest.layout(table)?;
        let cred = part(guest.layout::<CredModel>(table));
        let full_capabilities = cred
            .as_ref()
            .ok()
            .and_then(|cred| full_capabilities(guest, table, &task, cred))
            .unwrap_or(u64::MAX);
        let fs = part(guest.layout::<FsLayout>(table));
        let root = fs
            .as_ref()
            .ok()
            .and_then(|layout| first_root(guest, table, &task, layout));
        Ok(Arc::new(Self {
            table,
            signal: part(guest.layout(table)),
            cred,
            mm: part(guest.layout(table)),
            pid: part(guest.layout(table)),
            names: CommandNames::new(guest, table),
            terminals: part(Terminals::new(guest, table)),
            groups: part(Groups::new(guest, table)),
            paths: part(Paths::new(guest, table, root)),
            fs,
            file: part(guest.layout(table)),
            cgroups: part(Cgroups::new(guest, table)),
            namespaces: part(Namespaces::new(guest, table)),
            clock: part(Clock::read(guest, table)),
            cpus: part(PerCpu::read(guest, table)),
            full_capabilities,
            task,
        }))
    }
}

impl Listing {
    /// Copies the `cred` at `address`, if there is one: in use, and of a user
    /// namespace.
    ///
    /// # Errors
    /// Why it can't be read, or that there is none.
    pub fn cred(&self, guest: &Guest, address: VirtualAddress) -> Part<Cred> {
        let model = self.cred.as_ref().map_err(Clone::clone)?;
        let cred = part(Cred::read(guest, model, address))?;
        if cred.usage == 0 {
            return Err(format!("the cred at {address} is in no use").into());
        }
        if let Ok(namespaces) = &self.namespaces {
            namespaces
                .inode(guest, Kind::User, cred.user_namespace)
                .map_err(|error| format!("the cred at {address}: {error}"))?;
        }
        Ok(cred)
    }
}

/// What the kernel's own credentials may at most do.
fn full_capabilities(
    guest: &Guest,
    table: &'static str,
    task: &TaskModel,
    cred: &CredModel,
) -> Option<u64> {
    let init_task = guest.symbol(table, "init_task").ok()?;
    let address = guest.pointer(init_task, &task.layout.real_cred).ok()?;
    let cred = Cred::read(guest, cred, address).ok()?;
    Some(cred.capabilities.bounding)
}

/// The root directory of the first process (`init_pid_ns.child_reaper`): the
/// root of whoever reads `/proc` outside of containers.
fn first_root(
    guest: &Guest,
    table: &'static str,
    task: &TaskModel,
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

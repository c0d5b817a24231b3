//! Namespaces: what of the system a process sees (`include/linux/nsproxy.h`,
//! `include/linux/ns_common.h`).

use std::sync::{Arc, Mutex, PoisonError};

use secmon_memory::VirtualAddress;
use secmon_profile::{TypeError, Types};

use crate::linux::hash::AddressMap;
use crate::linux::list::is_object_address;
use crate::linux::process::{PidLayout, Process, UpidLayout};
use crate::{Guest, Layout, TableError, layout};

/// `MAX_PID_NS_LEVEL` (`include/linux/pid_namespace.h`).
const DEEPEST: u32 = 32;

/// What a namespace separates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Roots of cgroup paths.
    Cgroup,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Mounts.
    Mount,
    /// Interfaces, addresses, sockets.
    Network,
    /// Process ids.
    Pid,
    /// Clocks since boot.
    Time,
    /// User ids and rights.
    User,
    /// Host name.
    Uts,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Cgroup,
        Self::Ipc,
        Self::Mount,
        Self::Network,
        Self::Pid,
        Self::Time,
        Self::User,
        Self::Uts,
    ];

    /// The name below `/proc/PID/ns`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Ipc => "ipc",
            Self::Mount => "mnt",
            Self::Network => "net",
            Self::Pid => "pid",
            Self::Time => "time",
            Self::User => "user",
            Self::Uts => "uts",
        }
    }

    /// The kernel's structure, and the member that names the user namespace
    /// which owns it: for a user namespace its parent.
    const fn structure(self) -> (&'static str, &'static str) {
        match self {
            Self::Cgroup => ("cgroup_namespace", "user_ns"),
            Self::Ipc => ("ipc_namespace", "user_ns"),
            Self::Mount => ("mnt_namespace", "user_ns"),
            Self::Network => ("net", "user_ns"),
            Self::Pid => ("pid_namespace", "user_ns"),
            Self::Time => ("time_namespace", "user_ns"),
            Self::User => ("user_namespace", "parent"),
            Self::Uts => ("uts_namespace", "user_ns"),
        }
    }
}

layout! {
    /// `include/linux/nsproxy.h`
    struct NsproxyLayout: "nsproxy" {
        uts: "uts_ns",
        ipc: "ipc_ns",
        mount: "mnt_ns",
        network: "net_ns",
    } optional {
        cgroup: "cgroup_ns",
        /// Since 5.6.
        time: "time_ns",
    }
}

/// Where a namespace structure has its number and owner.
#[derive(Clone, Copy, Debug)]
struct Places {
    inode: u64,
    owner: u64,
}

/// How namespaces of a guest are read.
#[derive(Debug)]
pub struct NamespaceModel {
    nsproxy: NsproxyLayout,
    /// By kind, in the order of [`Kind::ALL`]; none for what this kernel was
    /// built without.
    places: [Option<Places>; Kind::ALL.len()],
}

impl Layout for NamespaceModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        Ok(Self {
            nsproxy: NsproxyLayout::resolve(types)?,
            places: Kind::ALL.map(|kind| {
                let (structure, owner) = kind.structure();
                Some(Places {
                    inode: types.member(structure, "ns.inum").ok()?.offset,
                    owner: types.member(structure, owner).ok()?.offset,
                })
            }),
        })
    }
}

/// Reads the namespaces of one listing, remembering their numbers.
pub struct Namespaces {
    model: Arc<NamespaceModel>,
    pid: Arc<PidLayout>,
    upid: Arc<UpidLayout>,
    inodes: Mutex<AddressMap<u32>>,
}

impl Namespaces {
    /// A reader for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack namespaces.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        Ok(Self {
            model: guest.layout(table)?,
            pid: guest.layout(table)?,
            upid: guest.layout(table)?,
            inodes: Mutex::default(),
        })
    }

    fn places(&self, kind: Kind) -> Option<Places> {
        let index = Kind::ALL.iter().position(|other| *other == kind)?;
        self.model.places.get(index).copied().flatten()
    }

    /// The namespace of that kind in which `process` is; none if it has left
    /// all (a zombie) or the kernel has no such kind.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn of(
        &self,
        guest: &Guest,
        process: &Process,
        kind: Kind,
    ) -> Result<Option<VirtualAddress>, String> {
        let nsproxy = &self.model.nsproxy;
        let member = match kind {
            Kind::User => {
                let cred = process.cred(guest).map_err(ToString::to_string)?;
                return checked(guest, kind, cred.user_namespace).map(Some);
            }
            Kind::Pid => return self.pid_namespace(guest, process),
            Kind::Cgroup => nsproxy.cgroup.as_ref(),
            Kind::Time => nsproxy.time.as_ref(),
            Kind::Ipc => Some(&nsproxy.ipc),
            Kind::Mount => Some(&nsproxy.mount),
            Kind::Network => Some(&nsproxy.network),
            Kind::Uts => Some(&nsproxy.uts),
        };
        let Some(member) = member.filter(|_| !process.task.nsproxy.is_null()) else {
            return Ok(None);
        };
        let found = guest
            .pointer(process.task.nsproxy, member)
            .map_err(|error| format!("nsproxy: {error}"))?;
        checked(guest, kind, found).map(Some)
    }

    /// The pid namespace in which `process` was made: the innermost that knows
    /// it.
    fn pid_namespace(
        &self,
        guest: &Guest,
        process: &Process,
    ) -> Result<Option<VirtualAddress>, String> {
        let Some(member) = &process.task.model().layout.thread_pid else {
            return Ok(None);
        };
        let pid = process.task.pointer(member);
        if pid.is_null() {
            return Ok(None);
        }
        let level = guest
            .number(pid, &self.pid.level)
            .map_err(|error| format!("pid.level: {error}"))? as u32;
        if level > DEEPEST {
            return Err(format!("the pid at {pid} is at level {level}"));
        }
        let upid = self.pid.numbers.offset + u64::from(level).wrapping_mul(self.upid.size);
        let found = guest
            .pointer(pid.wrapping_add(upid), &self.upid.namespace)
            .map_err(|error| format!("upid.ns: {error}"))?;
        checked(guest, Kind::Pid, found).map(Some)
    }

    /// The number of a namespace: that of its inode.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn inode(
        &self,
        guest: &Guest,
        kind: Kind,
        namespace: VirtualAddress,
    ) -> Result<u32, String> {
        let lock = || self.inodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inode) = lock().get(&namespace) {
            return Ok(*inode);
        }
        let places = self
            .places(kind)
            .ok_or_else(|| format!("the kernel has no type {}", kind.structure().0))?;
        let inode = guest
            .space()
            .read_u32(namespace.wrapping_add(places.inode))
            .map_err(|error| error.to_string())?;
        lock().insert(namespace, inode);
        Ok(inode)
    }

    /// The user namespace that owns this one; none for the initial user
    /// namespace.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn owner(
        &self,
        guest: &Guest,
        kind: Kind,
        namespace: VirtualAddress,
    ) -> Result<Option<VirtualAddress>, String> {
        let places = self
            .places(kind)
            .ok_or_else(|| format!("the kernel has no type {}", kind.structure().0))?;
        let owner = guest
            .space()
            .read_pointer(namespace.wrapping_add(places.owner))
            .map_err(|error| error.to_string())?;
        if owner.is_null() {
            return Ok(None);
        }
        checked(guest, Kind::User, owner).map(Some)
    }
}

fn checked(guest: &Guest, kind: Kind, found: VirtualAddress) -> Result<VirtualAddress, String> {
    if is_object_address(guest.space(), found) {
        Ok(found)
    } else {
        let structure = kind.structure().0;
        Err(format!(
            "the pointer to {structure} is {found}, which is no address of an object"
        ))
    }
}

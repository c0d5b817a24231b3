//! Namespaces: what of the system a process sees (`include/linux/nsproxy.h`,
//! `include/linux/ns_common.h`).

use std::sync::{Arc, Mutex, PoisonError};

use secmon_memory::{VirtualAddress, Volatility};
use secmon_profile::{Member, TypeError, Types};

use crate::linux::hash::AddressMap;
use crate::linux::list::is_object_address;
use crate::linux::process::Process;
use crate::linux::snapshot::Spans;
use crate::{Guest, Layout, TableError, layout};

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
    /// All kinds, in the order of their declaration.
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

    /// The `proc_ns_operations` that every namespace of the kind points to
    /// (`ns_common.ops`).
    const fn operations(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroupns_operations",
            Self::Ipc => "ipcns_operations",
            Self::Mount => "mntns_operations",
            Self::Network => "netns_operations",
            Self::Pid => "pidns_operations",
            Self::Time => "timens_operations",
            Self::User => "userns_operations",
            Self::Uts => "utsns_operations",
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
    operations: u64,
    owner: u64,
}

/// What an `nsproxy` holds, in the order of [`Kind::ALL`].
type Pointers = [Option<VirtualAddress>; Kind::ALL.len()];

/// How namespaces of a guest are read.
#[derive(Debug)]
pub struct NamespaceModel {
    nsproxy: NsproxyLayout,
    spans: Spans,
    /// The offset of `ns_common.ops`.
    common_operations: Option<u64>,
    /// By kind, in the order of [`Kind::ALL`]; none for what this kernel was
    /// built without.
    places: [Option<Places>; Kind::ALL.len()],
}

impl Layout for NamespaceModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let nsproxy = NsproxyLayout::resolve(types)?;
        let required = [&nsproxy.uts, &nsproxy.ipc, &nsproxy.mount, &nsproxy.network];
        let optional = nsproxy.cgroup.iter().chain(&nsproxy.time);
        Ok(Self {
            spans: Spans::covering(required.into_iter().chain(optional)),
            nsproxy,
            common_operations: types
                .member("ns_common", "ops")
                .ok()
                .map(|member| member.offset),
            places: Kind::ALL.map(|kind| {
                let (structure, owner) = kind.structure();
                Some(Places {
                    inode: types.member(structure, "ns.inum").ok()?.offset,
                    operations: types.member(structure, "ns.ops").ok()?.offset,
                    owner: types.member(structure, owner).ok()?.offset,
                })
            }),
        })
    }
}

impl NamespaceModel {
    /// The member of `nsproxy` that holds a namespace of that kind.
    fn member(&self, kind: Kind) -> Option<&Member> {
        let nsproxy = &self.nsproxy;
        match kind {
            Kind::Cgroup => nsproxy.cgroup.as_ref(),
            Kind::Time => nsproxy.time.as_ref(),
            Kind::Ipc => Some(&nsproxy.ipc),
            Kind::Mount => Some(&nsproxy.mount),
            Kind::Network => Some(&nsproxy.network),
            Kind::Uts => Some(&nsproxy.uts),
            Kind::Pid | Kind::User => None,
        }
    }
}

/// The numbers of the namespaces that an `nsproxy` holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceNumbers([Option<u32>; Kind::ALL.len()]);

impl NamespaceNumbers {
    /// The number of the namespace of that kind; none if an `nsproxy` of this
    /// kernel holds none.
    pub fn of(&self, kind: Kind) -> Option<u32> {
        self.0.get(kind as usize).copied().flatten()
    }
}

/// Reads the namespaces of one listing, remembering their numbers.
pub struct Namespaces {
    model: Arc<NamespaceModel>,
    known: Mutex<AddressMap<(Pointers, NamespaceNumbers)>>,
    inodes: Mutex<AddressMap<(Kind, u32)>>,
}

impl Namespaces {
    /// A reader for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack namespaces.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        Ok(Self {
            model: guest.layout(table)?,
            known: Mutex::default(),
            inodes: Mutex::default(),
        })
    }

    fn places(&self, kind: Kind) -> Option<Places> {
        self.model.places.get(kind as usize).copied().flatten()
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
        let found = match kind {
            Kind::User => Some(
                process
                    .cred(guest)
                    .map_err(ToString::to_string)?
                    .user_namespace,
            ),
            Kind::Pid => process
                .pids(guest)
                .map_err(ToString::to_string)?
                .map(|pids| pids.namespace),
            _ => {
                let member = self.model.member(kind);
                let member = member.filter(|_| !process.task.nsproxy.is_null());
                member
                    .map(|member| guest.pointer(process.task.nsproxy, member))
                    .transpose()
                    .map_err(|error| format!("nsproxy: {error}"))?
            }
        };
        if let Some(found) = found {
            self.inode(guest, kind, found)?;
        }
        Ok(found)
    }

    /// The numbers of all namespaces that the `nsproxy` at that address holds.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn numbers(
        &self,
        guest: &Guest,
        nsproxy: VirtualAddress,
    ) -> Result<NamespaceNumbers, Arc<str>> {
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // A live guest can make another nsproxy where one was.
        let fixed = guest.space().memory().volatility() == Volatility::Static;
        if let Some((_, numbers)) = lock().get(&nsproxy).filter(|_| fixed) {
            return Ok(*numbers);
        }
        let pointers = self
            .model
            .spans
            .with(guest.space(), nsproxy, |spans, copy| {
                Kind::ALL.map(|kind| {
                    let member = self.model.member(kind)?;
                    Some(spans.pointer(copy, member))
                })
            })
            .map_err(|error| format!("nsproxy: {error}"))?;
        if let Some((known, numbers)) = lock().get(&nsproxy)
            && *known == pointers
        {
            return Ok(*numbers);
        }
        let mut numbers = NamespaceNumbers::default();
        for ((kind, pointer), number) in Kind::ALL.into_iter().zip(pointers).zip(&mut numbers.0) {
            *number = match pointer {
                Some(pointer) => Some(self.inode(guest, kind, pointer)?),
                None => None,
            };
        }
        lock().insert(nsproxy, (pointers, numbers));
        Ok(numbers)
    }

    /// The number of a namespace: that of its inode. Whether there is a
    /// namespace of that kind is known by its operations, which are a table of
    /// the kernel's.
    ///
    /// # Errors
    /// A text that says what could not be read, or that there is none.
    pub fn inode(
        &self,
        guest: &Guest,
        kind: Kind,
        namespace: VirtualAddress,
    ) -> Result<u32, String> {
        let lock = || self.inodes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, inode)) = lock().get(&namespace).filter(|known| known.0 == kind) {
            return Ok(*inode);
        }
        checked(guest, kind, namespace)?;
        let places = self
            .places(kind)
            .ok_or_else(|| format!("the kernel has no type {}", kind.structure().0))?;
        let operations = guest
            .space()
            .read_pointer(namespace.wrapping_add(places.operations))
            .map_err(|error| error.to_string())?;
        let symbol = kind.operations();
        if guest
            .address(symbol)
            .is_some_and(|expected| expected != operations)
        {
            let structure = kind.structure().0;
            return Err(format!(
                "there is no {structure} at {namespace}: its operations are at {operations}, \
                 which is not {symbol}"
            ));
        }
        let inode = guest
            .space()
            .read_u32(namespace.wrapping_add(places.inode))
            .map_err(|error| error.to_string())?;
        lock().insert(namespace, (kind, inode));
        Ok(inode)
    }

    /// The namespace whose `ns_common` is at `common`, and its kind.
    ///
    /// # Errors
    /// A text that says what could not be read, or that there is none.
    pub fn containing(
        &self,
        guest: &Guest,
        common: VirtualAddress,
    ) -> Result<(Kind, VirtualAddress), String> {
        let offset = self
            .model
            .common_operations
            .ok_or_else(|| "the kernel has no type ns_common".to_owned())?;
        if !is_object_address(guest.space(), common) {
            return Err(format!("{common} is no address of a namespace"));
        }
        let place = common.wrapping_add(offset);
        let operations = guest
            .space()
            .read_pointer(place)
            .map_err(|error| error.to_string())?;
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| guest.address(kind.operations()) == Some(operations))
            .ok_or_else(|| format!("the operations at {operations} are of no kind of namespace"))?;
        let places = self
            .places(kind)
            .ok_or_else(|| format!("the kernel has no type {}", kind.structure().0))?;
        let namespace = place.wrapping_sub(places.operations);
        self.inode(guest, kind, namespace)?;
        Ok((kind, namespace))
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
        self.inode(guest, Kind::User, owner)?;
        Ok(Some(owner))
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

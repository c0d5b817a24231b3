//! The table `namespaces`.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress, Volatility};

use crate::linux::list::entries;
use crate::linux::listing::Listing;
use crate::linux::mount::MountModel;
use crate::linux::namespace::{Kind as NamespaceKind, Namespaces};
use crate::linux::owner::{Behind, Owners};
use crate::linux::path::Paths;
use crate::linux::process;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
    layout,
};

const TABLE: &str = "namespaces";
/// User and pid namespaces nest 32 deep at most; others have owners that do.
const DEEPEST: usize = 64;

layout! {
    /// `include/net/net_namespace.h`
    struct NetLayout: "net" {
        list: "list",
    }
}

layout! {
    /// `include/linux/mount.h`
    struct MountLayout: "vfsmount" {
        superblock: "mnt_sb",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct HeldInodeLayout: "inode" {
        private: "i_private",
    }
}

layout! {
    /// `include/linux/user_namespace.h`
    struct UserNamespaceLayout: "user_namespace" {
        owner: "owner",
        level: "level",
    }
}

/// A namespace and who is in it.
pub struct Namespace {
    kind: NamespaceKind,
    address: VirtualAddress,
    processes: u64,
    /// The process with the lowest id, and its name.
    first: Option<(u32, Text)>,
    listing: Arc<Listing>,
}

/// The processes found in a namespace.
#[derive(Default)]
struct Members {
    pids: BTreeSet<u32>,
    first: Option<(u32, Text)>,
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Namespace) -> Value,
) -> Column<Namespace> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `namespaces`.
pub static NAMESPACES: TableOf<Namespace> = TableOf {
    name: TABLE,
    aliases: &["lsns"],
    meaning: "Namespaces that any thread is in, those that own them, and all network namespaces.",
    columns: &[
        column(
            "type",
            Kind::Text,
            Shown::Always,
            "What it separates, as below /proc/PID/ns: cgroup, ipc, mnt, net, pid, time, user, uts.",
            |_, namespace| Value::word(namespace.kind.name()),
        ),
        column(
            "inode",
            Kind::Unsigned,
            Shown::Always,
            "Its number, as in /proc/PID/ns.",
            |guest, namespace| {
                namespace.with(|namespaces| {
                    namespaces
                        .inode(guest, namespace.kind, namespace.address)
                        .map(Value::from)
                })
            },
        ),
        column(
            "processes",
            Kind::Unsigned,
            Shown::Always,
            "How many processes have a thread in it.",
            |_, namespace| namespace.processes.into(),
        ),
        column(
            "pid",
            Kind::Unsigned,
            Shown::Always,
            "The lowest id of a process in it; null if there is none.",
            |_, namespace| namespace.first.as_ref().map(|(pid, _)| *pid).into(),
        ),
        column(
            "comm",
            Kind::Text,
            Shown::Always,
            "The name of that process.",
            |_, namespace| {
                namespace
                    .first
                    .as_ref()
                    .map(|(_, comm)| comm.clone())
                    .into()
            },
        ),
        column(
            "owner",
            Kind::Unsigned,
            Shown::Always,
            "Number of the user namespace that owns it, of a user namespace its parent; null \
             for the initial one.",
            |guest, namespace| {
                namespace.with(|namespaces| {
                    let owner = namespaces.owner(guest, namespace.kind, namespace.address)?;
                    let inode = owner
                        .map(|owner| namespaces.inode(guest, NamespaceKind::User, owner))
                        .transpose()?;
                    Ok(inode.into())
                })
            },
        ),
        column(
            "owner_uid",
            Kind::Unsigned,
            Shown::Always,
            "User who made the user namespace that owns it, or this one if it is one.",
            |guest, namespace| namespace.with(|namespaces| namespace.owner_uid(guest, namespaces)),
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its structure lies.",
            |_, namespace| namespace.address.into(),
        ),
    ],
    items: namespaces,
};

impl Namespace {
    fn with(&self, value: impl FnOnce(&Namespaces) -> Result<Value, String>) -> Value {
        match &self.listing.namespaces {
            Ok(namespaces) => Value::from_read(value(namespaces), |value| value),
            Err(reason) => Value::unreadable(reason),
        }
    }

    fn owner_uid(&self, guest: &Guest, namespaces: &Namespaces) -> Result<Value, String> {
        let user = if self.kind == NamespaceKind::User {
            Some(self.address)
        } else {
            namespaces.owner(guest, self.kind, self.address)?
        };
        let Some(user) = user else {
            return Ok(Value::Null);
        };
        let layout = guest
            .layout::<UserNamespaceLayout>(TABLE)
            .map_err(|error| error.to_string())?;
        guest
            .number(user, &layout.owner)
            .map(Value::from)
            .map_err(|error| error.to_string())
    }
}

fn namespaces(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Namespace>,
) -> Result<(), TableError> {
    let listing = Listing::new(guest, TABLE)?;
    let Ok(namespaces) = &listing.namespaces else {
        // Says what is missing.
        return Namespaces::new(guest, TABLE).map(|_| ());
    };
    let mut found: BTreeMap<(NamespaceKind, VirtualAddress), Members> = BTreeMap::new();
    process::for_each_thread(guest, &listing, selection, &mut |thread| {
        for kind in NamespaceKind::ALL {
            match namespaces.of(guest, &thread, kind) {
                Ok(None) => {}
                Ok(Some(address)) => {
                    let members = found.entry((kind, address)).or_default();
                    let pid = thread.task.tgid;
                    members.pids.insert(pid);
                    if members.first.as_ref().is_none_or(|(first, _)| pid < *first) {
                        let comm = Text::new(thread.listing.names.of(guest, &thread.task));
                        members.first = Some((pid, comm));
                    }
                }
                Err(reason) => guest.diagnostics().record(Diagnostic {
                    table: TABLE,
                    subject: format!("{} namespace of thread {}", kind.name(), thread.task.pid),
                    address: Some(thread.task.address),
                    reason,
                }),
            }
        }
        ControlFlow::Continue(())
    })?;
    if selection.pids.is_none() {
        let network = network_namespaces(guest);
        for address in network {
            found.entry((NamespaceKind::Network, address)).or_default();
        }
        add_held(guest, namespaces, &mut found);
        add_owners(guest, namespaces, &mut found);
    }
    for ((kind, address), members) in found {
        let namespace = Namespace {
            kind,
            address,
            processes: members.pids.len() as u64,
            first: members.first,
            listing: listing.clone(),
        };
        if sink(namespace).is_break() {
            break;
        }
    }
    Ok(())
}

/// All network namespaces: also those held by nothing but a mount or a socket.
fn network_namespaces(guest: &Guest) -> Vec<VirtualAddress> {
    let Ok(layout) = guest.layout::<NetLayout>(TABLE) else {
        return Vec::new();
    };
    let Ok(head) = guest.symbol(TABLE, "net_namespace_list") else {
        return Vec::new();
    };
    entries(guest, TABLE, "net.list", head, layout.list.offset).collect()
}

/// Adds the namespaces that a descriptor or a mount holds, whether or not
/// anybody is in them.
fn add_held(
    guest: &Guest,
    namespaces: &Namespaces,
    found: &mut BTreeMap<(NamespaceKind, VirtualAddress), Members>,
) {
    let live = guest.space().memory().volatility() == Volatility::Live;
    let complain = |subject: &str, address, reason: String| {
        guest.diagnostics().record(Diagnostic {
            table: TABLE,
            subject: subject.into(),
            address,
            reason: format!("namespaces that it holds are missing: {reason}"),
        });
    };
    let add = |found: &mut BTreeMap<_, Members>, what, common| match namespaces
        .containing(guest, common)
    {
        Ok(key) => {
            found.entry(key).or_default();
        }
        // It may have been let go since it was found.
        Err(_) if live => guest.diagnostics().count_torn_read(),
        Err(reason) => complain(what, Some(common), reason),
    };
    match Owners::read(guest, TABLE, Behind::Inode, "ns_file_operations", &[]) {
        Ok(owners) => owners
            .objects()
            .for_each(|common| add(found, "a descriptor of nsfs", common)),
        Err(error) => complain("descriptors", None, error.to_string()),
    }
    let places = found
        .keys()
        .filter(|(kind, _)| *kind == NamespaceKind::Mount);
    let places: Vec<_> = places.map(|(_, address)| *address).collect();
    match mounted(guest, &places) {
        Ok(mounted) => mounted
            .into_iter()
            .for_each(|common| add(found, "a mount of nsfs", common)),
        Err(error) => complain("mounts", None, error.to_string()),
    }
}

/// What is behind the mounts of `nsfs` in these mount namespaces.
fn mounted(guest: &Guest, places: &[VirtualAddress]) -> Result<Vec<VirtualAddress>, HeldError> {
    let mount = guest.layout::<MountLayout>(TABLE)?;
    let inode = guest.layout::<HeldInodeLayout>(TABLE)?;
    let paths = Paths::new(guest, TABLE, None)?;
    let mounts = MountModel::new(guest, TABLE)?;
    let nsfs = guest
        .space()
        .read_pointer(guest.symbol(TABLE, "nsfs_mnt")?)?;
    let nsfs = guest.pointer(nsfs, &mount.superblock)?;
    let mut found = Vec::new();
    for place in places {
        // What is wrong among them is told by the table of mounts.
        let (mounts, _) = mounts.mounts(guest, *place);
        for mount in mounts.iter().filter(|mount| mount.superblock == nsfs) {
            if let Some(held) = paths.inode_of(guest, mount.top.dentry) {
                found.push(guest.pointer(held, &inode.private)?);
            }
        }
    }
    Ok(found)
}

/// Why mounts of namespaces could not be found.
#[derive(Debug, thiserror::Error)]
enum HeldError {
    /// The kernel lacks a symbol or a type.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The way to them can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Adds the user namespaces that own what was found, and their parents.
fn add_owners(
    guest: &Guest,
    namespaces: &Namespaces,
    found: &mut BTreeMap<(NamespaceKind, VirtualAddress), Members>,
) {
    let mut open: Vec<_> = found.keys().map(|key| (*key, 0)).collect();
    while let Some(((kind, address), depth)) = open.pop() {
        match namespaces.owner(guest, kind, address) {
            Ok(Some(owner)) if depth < DEEPEST => {
                let key = (NamespaceKind::User, owner);
                if let Entry::Vacant(vacant) = found.entry(key) {
                    vacant.insert(Members::default());
                    open.push((key, depth + 1));
                }
            }
            Ok(_) => {}
            Err(reason) => guest.diagnostics().record(Diagnostic {
                table: TABLE,
                subject: format!("owner of the {} namespace", kind.name()),
                address: Some(address),
                reason,
            }),
        }
    }
}

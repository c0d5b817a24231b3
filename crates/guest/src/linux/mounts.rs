//! The table `mounts`.

use std::collections::HashMap;
use std::sync::Arc;

use secmon_memory::VirtualAddress;

use super::file::root_directory;
use super::list::is_object_address;
use super::mount::{Mount, MountModel};
use super::path::{Path, PathError, PathPointer, Paths, Reach};
use super::task::leaders;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
    layout,
};

const TABLE: &str = "mounts";

/// How many different root directories of the processes in a namespace are
/// tried to find the one that sees most of its mounts.
const ROOT_LIMIT: usize = 8;

layout! {
    /// `include/linux/nsproxy.h`
    struct NsproxyLayout: "nsproxy" {
        mounts: "mnt_ns",
    }
}

/// A mount in a namespace.
pub struct Mounted {
    namespace: u64,
    mount: Mount,
    target: Result<Arc<Path>, PathError>,
    root: Result<Text, PathError>,
    kind: Result<Text, PathError>,
}

impl Mounted {
    /// The type with its subtype, as mountinfo has it.
    fn file_system(&self) -> Value {
        Value::from_read(self.kind.as_ref(), |kind| match &self.mount.subtype {
            None => kind.clone().into(),
            Some(subtype) => Value::text([kind.as_bytes(), b".", subtype.as_bytes()].concat()),
        })
    }

    /// Whether the mount is seen from the root directory that paths start at:
    /// mountinfo leaves the others out.
    fn is_reachable(&self) -> bool {
        self.target
            .as_ref()
            .map_or(true, |path| path.reach == Reach::Root)
    }
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Mounted) -> Value,
) -> Column<Mounted> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table.
pub static MOUNTS: TableOf<Mounted> = TableOf {
    name: TABLE,
    aliases: &["mount"],
    meaning: "What is mounted where, as /proc/PID/mountinfo shows it: in the initial mount \
              namespace, or with all namespaces in each that a process is in, then also what \
              can't be reached from a root directory there.",
    columns: &[
        column(
            "source",
            Kind::Text,
            Shown::Always,
            "What is mounted, as its mounter named it: a device, or anything.",
            |_, row| row.mount.source.clone().into(),
        ),
        column(
            "target",
            Kind::Text,
            Shown::Always,
            "Where it is mounted, from the root directory of process 1 or of a process in the \
             namespace. No character is escaped.",
            |_, row| Value::from_read(row.target.as_ref(), |path| path.text.clone().into()),
        ),
        column(
            "fstype",
            Kind::Text,
            Shown::Always,
            "Type of the file system, with its subtype: ext4, fuse.sshfs.",
            |_, row| row.file_system(),
        ),
        column(
            "options",
            Kind::Text,
            Shown::Always,
            "Options of this mount: rw or ro, then nosuid, nodev, noexec, noatime, nodiratime, \
             relatime, nosymfollow, idmapped as they apply.",
            |_, row| row.mount.options().into(),
        ),
        column(
            "namespace",
            Kind::Unsigned,
            Shown::OnRequest,
            "Mount namespace, by the number of its file below /proc/PID/ns.",
            |_, row| row.namespace.into(),
        ),
        column(
            "super_options",
            Kind::Text,
            Shown::OnRequest,
            "Options of the file system itself that every file system can have: rw or ro, then \
             sync, dirsync, mand, lazytime. Those of one type only are not among them.",
            |_, row| row.mount.superblock_options().into(),
        ),
        column(
            "root",
            Kind::Text,
            Shown::OnRequest,
            "Which directory of the file system is mounted: / for all of it.",
            |_, row| Value::from_read(row.root.as_ref(), |root| root.clone().into()),
        ),
        column(
            "device",
            Kind::Text,
            Shown::OnRequest,
            "Device of the file system, MAJOR:MINOR in decimal.",
            |_, row| row.mount.device.to_string().into(),
        ),
        column(
            "id",
            Kind::Signed,
            Shown::OnRequest,
            "Id of the mount, unique while it is there.",
            |_, row| row.mount.id.into(),
        ),
        column(
            "parent",
            Kind::Signed,
            Shown::OnRequest,
            "Id of the mount that it is mounted on; its own at the top of a namespace.",
            |_, row| row.mount.parent.into(),
        ),
        column(
            "propagation",
            Kind::Text,
            Shown::OnRequest,
            "Whether mounts below it appear elsewhere: private, or shared:GROUP, master:GROUP \
             and unbindable as they apply.",
            |_, row| row.mount.propagation().into(),
        ),
        column(
            "reachable",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether the root directory that target starts at leads there. What it does not \
             lead to is missing in mountinfo.",
            |_, row| row.is_reachable().into(),
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Address of the struct mount.",
            |_, row| row.mount.address.into(),
        ),
    ],
    items,
};

/// A mount namespace with the root directories of processes in it.
#[derive(Default)]
struct Namespace {
    address: VirtualAddress,
    roots: Vec<PathPointer>,
    /// That of a kernel thread: where a namespace is seen from if it has no
    /// other processes, as that of `kdevtmpfs`.
    kernel_root: Option<PathPointer>,
}

fn items(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Mounted>,
) -> Result<(), TableError> {
    let model = MountModel::new(guest, TABLE)?;
    let mut namespaces = namespaces(guest)?;
    if !selection.all_namespaces {
        // That of the idle task, in which the kernel mounted the first root.
        let initial = initial_namespace(guest)?;
        namespaces.retain(|namespace| namespace.address == initial);
        if namespaces.is_empty() {
            namespaces.push(Namespace {
                address: initial,
                ..Namespace::default()
            });
        }
    }
    for namespace in namespaces {
        let rows = rows(guest, &model, &namespace)?;
        for row in rows {
            if !row.is_reachable() && !selection.all_namespaces {
                continue;
            }
            if sink(row).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The initial mount namespace.
pub(crate) fn initial_namespace(guest: &Guest) -> Result<VirtualAddress, TableError> {
    let read = |source| TableError::Read {
        table: TABLE,
        what: "init_task.nsproxy",
        source,
    };
    let task = guest.layout::<super::task::TaskModel>(TABLE)?;
    let nsproxy = guest.layout::<NsproxyLayout>(TABLE)?;
    let init = guest.symbol(TABLE, "init_task")?;
    let address = guest.pointer(init, &task.layout.nsproxy).map_err(read)?;
    guest.pointer(address, &nsproxy.mounts).map_err(read)
}

/// The mount namespaces that processes are in, in the order in which
/// processes with them were found.
fn namespaces(guest: &Guest) -> Result<Vec<Namespace>, TableError> {
    let nsproxy = guest.layout::<NsproxyLayout>(TABLE)?;
    let mut namespaces: Vec<Namespace> = Vec::new();
    let mut places: HashMap<VirtualAddress, usize> = HashMap::new();
    for task in leaders(guest, TABLE)? {
        // Zombies are in none; kernel threads are in the initial one.
        if task.nsproxy.is_null() {
            continue;
        }
        let found = guest.pointer(task.nsproxy, &nsproxy.mounts);
        let root = root_directory(guest, TABLE, task.fs)?;
        if !task.is_unchanged(guest) {
            guest.diagnostics().count_torn_read();
            continue;
        }
        let address = match found {
            Ok(address) if is_object_address(guest.space(), address) => address,
            found => {
                guest.diagnostics().record(Diagnostic {
                    table: TABLE,
                    subject: format!("pid {} nsproxy.mnt_ns", task.tgid),
                    address: Some(task.nsproxy),
                    reason: match found {
                        Ok(found) => format!("{found} is no address of a namespace"),
                        Err(error) => error.to_string(),
                    },
                });
                continue;
            }
        };
        let place = *places.entry(address).or_insert_with(|| {
            namespaces.push(Namespace {
                address,
                ..Namespace::default()
            });
            namespaces.len() - 1
        });
        let (Some(namespace), Ok(root)) = (namespaces.get_mut(place), root) else {
            continue;
        };
        if task.is_kernel_thread() {
            namespace.kernel_root = Some(root);
        } else if namespace.roots.len() < ROOT_LIMIT && !namespace.roots.contains(&root) {
            namespace.roots.push(root);
        }
    }
    Ok(namespaces)
}

/// The mounts of a namespace, seen from the root directory there that sees
/// most.
fn rows(
    guest: &Guest,
    model: &MountModel,
    namespace: &Namespace,
) -> Result<Vec<Mounted>, TableError> {
    let record = |address, reason: String| {
        guest.diagnostics().record(Diagnostic {
            table: TABLE,
            subject: "mnt_namespace".into(),
            address: Some(address),
            reason,
        });
    };
    let inode = match model.inode(guest, namespace.address) {
        Ok(inode) => inode,
        Err(error) => {
            record(namespace.address, error.to_string());
            return Ok(Vec::new());
        }
    };
    let (mounts, errors) = model.mounts(guest, namespace.address);
    for error in errors {
        record(namespace.address, error.to_string());
    }
    let mut best: Option<(usize, Vec<Mounted>)> = None;
    let roots = namespace.roots.iter().copied().map(Some);
    // Without a process that has a root there, the top of the namespace is
    // where its paths start.
    let other = || namespace.kernel_root.or_else(|| top(&mounts));
    let roots = roots.chain(namespace.roots.is_empty().then(other));
    for root in roots {
        let paths = Paths::new(guest, TABLE, root)?;
        let row = |mount: &Mount| Mounted {
            namespace: inode,
            target: paths.resolve(guest, mount.top),
            root: paths.within_file_system(guest, mount.top.dentry),
            kind: paths.file_system(guest, mount.superblock),
            mount: mount.clone(),
        };
        let rows: Vec<_> = mounts.iter().map(row).collect();
        let seen = rows.iter().filter(|row| row.is_reachable()).count();
        if best.as_ref().is_none_or(|(most, _)| seen > *most) {
            best = Some((seen, rows));
        }
        if seen == mounts.len() {
            break;
        }
    }
    Ok(best.map(|(_, rows)| rows).unwrap_or_default())
}

/// The root of the mount that all others are mounted on.
fn top(mounts: &[Mount]) -> Option<PathPointer> {
    let top = mounts.iter().find(|mount| mount.id == mount.parent);
    top.or(mounts.first()).map(|mount| mount.top)
}

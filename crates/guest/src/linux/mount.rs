//! `struct mount` and the namespaces that mounts are in (`fs/mount.h`).

use std::sync::Arc;

use secmon_memory::VirtualAddress;
use secmon_profile::{TypeError, Types};

use super::file::Device;
use super::list;
use super::path::{PathError, PathPointer, is_kernel_pointer};
use super::span::Span;
use super::tree::{Patience, TreeError, Walk};
use super::{list::ListError, rb_tree};
use crate::{Guest, Layout, TableError, Text, layout};

/// More mounts than these are read of no namespace; the kernel's usual limit
/// (`fs.mount-max`) is 100,000.
const MOUNT_LIMIT: usize = 1 << 20;

/// How often mounts that change are read again.
const ATTEMPTS: usize = 8;

/// `MNT_CURSOR` (`include/linux/mount.h`): no mount but the place of a reader
/// of `/proc/PID/mountinfo`, in the list of kernels 5.8 to 6.7.
const MNT_CURSOR: u64 = 0x1000_0000;

layout! {
    /// `fs/mount.h`
    struct MountLayout: "mount" {
        vfsmount: "mnt",
        root: "mnt.mnt_root",
        superblock: "mnt.mnt_sb",
        flags: "mnt.mnt_flags",
        parent: "mnt_parent",
        namespace: "mnt_ns",
        master: "mnt_master",
        source: "mnt_devname",
        id: "mnt_id",
        group: "mnt_group_id",
    } optional {
        /// Before 6.8.
        list: "mnt_list",
        /// Since 6.8.
        node: "mnt_node",
        /// Since 6.17 what is shared is said here, not among the flags.
        propagation: "mnt_t_flags",
        /// Since 6.2: how ids are mapped.
        idmap: "mnt.mnt_idmap",
        /// 5.12 to 6.1.
        user_namespace: "mnt.mnt_userns",
    }
}

layout! {
    /// `fs/mount.h`
    struct MountNamespaceLayout: "mnt_namespace" {
        inode: "ns.inum",
        root: "root",
        /// Counts changes.
        event: "event",
    } optional {
        /// Before 6.8.
        list: "list",
        /// Since 6.8.
        tree: "mounts.rb_node",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct SuperblockLayout: "super_block" {
        device: "s_dev",
        flags: "s_flags",
        user_namespace: "s_user_ns",
    } optional {
        subtype: "s_subtype",
    }
}

/// How mounts of a guest are read.
#[derive(Debug)]
pub struct MountModel {
    mount: MountLayout,
    mount_span: Span,
    namespace: MountNamespaceLayout,
    superblock: SuperblockLayout,
}

impl Layout for MountModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let mount = MountLayout::resolve(types)?;
        let namespace = MountNamespaceLayout::resolve(types)?;
        if namespace.tree.is_none() || mount.node.is_none() {
            // Says which member is missing, if one is.
            types.member("mnt_namespace", "list")?;
            types.member("mount", "mnt_list")?;
        }
        let required = [
            &mount.root,
            &mount.superblock,
            &mount.flags,
            &mount.parent,
            &mount.namespace,
            &mount.master,
            &mount.source,
            &mount.id,
            &mount.group,
        ];
        let optional = [&mount.propagation, &mount.idmap, &mount.user_namespace];
        let mount_span = Span::of(required.into_iter().chain(optional.into_iter().flatten()));
        Ok(Self {
            mount_span,
            namespace,
            superblock: SuperblockLayout::resolve(types)?,
            mount,
        })
    }
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `struct mount *`.
    pub address: VirtualAddress,
    /// Its own root through itself: the path of this is where it is mounted.
    pub top: PathPointer,
    /// `struct super_block *`.
    pub superblock: VirtualAddress,
    /// `mnt_flags`: `MNT_…`.
    pub flags: u64,
    /// `mnt_id`.
    pub id: i32,
    /// `mnt_id` of the mount that it is mounted on; its own at the top.
    pub parent: i32,
    /// The group of mounts that it shares mounts with, if it does.
    pub shared: Option<i32>,
    /// The group of mounts that it receives mounts from, if it does.
    pub master: Option<i32>,
    /// Whether it can't be bound elsewhere.
    pub unbindable: bool,
    /// Whether user ids are mapped.
    pub id_mapped: bool,
    /// What is mounted, as its mounter said.
    pub source: Text,
    /// Device number of the file system.
    pub device: Device,
    /// `s_flags`: `SB_…`.
    pub superblock_flags: u64,
    /// The part of the type behind a dot: `fuse.SUBTYPE`.
    pub subtype: Option<Text>,
}

/// Something wrong among the mounts of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// The list that holds them is damaged.
    #[error("mounts may be missing: {0}")]
    List(#[from] ListError),
    /// The tree that holds them is damaged.
    #[error("mounts may be missing: {0}")]
    Tree(#[from] TreeError),
    /// A mount that can't be read.
    #[error("the mount at {mount} is left out: {source}")]
    Mount {
        /// Where it should be.
        mount: VirtualAddress,
        /// Why not.
        source: PathError,
    },
    /// A mount of another namespace.
    #[error("the mount at {mount} is left out: its namespace is the one at {found}")]
    Namespace {
        /// The mount.
        mount: VirtualAddress,
        /// What `mnt_ns` holds.
        found: VirtualAddress,
    },
    /// They changed each time they were read.
    #[error("mounts changed during each of {attempts} reads")]
    Changing {
        /// How often they were read.
        attempts: usize,
    },
}

impl MountModel {
    /// The model for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types are not known or lack a member.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Arc<Self>, TableError> {
        guest.layout(table)
    }

    /// The number of the namespace at `namespace`, by which the guest knows
    /// it.
    ///
    /// # Errors
    /// [`PathError`] if it can't be read.
    pub fn inode(&self, guest: &Guest, namespace: VirtualAddress) -> Result<u64, PathError> {
        let what = "mnt_namespace";
        let address = checked(what, namespace)?;
        guest
            .number(address, &self.namespace.inode)
            .map_err(|source| PathError::Read {
                what,
                address,
                source,
            })
    }

    /// The mounts of a namespace in the kernel's order, all of them from one
    /// moment unless an error says otherwise.
    pub fn mounts(
        &self,
        guest: &Guest,
        namespace: VirtualAddress,
    ) -> (Vec<Mount>, Vec<MountError>) {
        let live = guest.space().memory().volatility() == secmon_memory::Volatility::Live;
        let event = || guest.number(namespace, &self.namespace.event).ok();
        let patience = Patience::default();
        let mut result = (Vec::new(), Vec::new());
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                guest.diagnostics().count_torn_read();
                patience.wait(attempt);
            }
            let before = event();
            result = self.read(guest, namespace);
            if !live || (before == event() && result.1.is_empty()) {
                return result;
            }
        }
        if result.1.is_empty() {
            result.1.push(MountError::Changing { attempts: ATTEMPTS });
        }
        result
    }

    fn read(&self, guest: &Guest, namespace: VirtualAddress) -> (Vec<Mount>, Vec<MountError>) {
        let mut mounts = Vec::new();
        let mut errors = Vec::new();
        let (space, diagnostics) = (guest.space(), guest.diagnostics());
        let at = |offset| namespace.wrapping_add(offset);
        let found: Walk<VirtualAddress> = match (&self.namespace.tree, &self.mount.node) {
            (Some(tree), Some(node)) => {
                rb_tree::nodes(space, diagnostics, at(tree.offset), MOUNT_LIMIT)
                    .map(|found| found.wrapping_sub(node.offset))
            }
            _ => {
                let (head, offset) = match (&self.namespace.list, &self.mount.list) {
                    (Some(head), Some(list)) => (head.offset, list.offset),
                    _ => return (mounts, errors),
                };
                let mut found = Walk::default();
                for node in list::nodes(space, diagnostics, at(head), MOUNT_LIMIT) {
                    match node {
                        Ok(node) => found.items.push(node.wrapping_sub(offset)),
                        Err(error) => errors.push(error.into()),
                    }
                }
                found
            }
        };
        errors.extend(found.errors.into_iter().map(MountError::from));
        for address in found.items {
            match self.mount(guest, namespace, address) {
                Ok(mount) => mounts.extend(mount),
                Err(error) => errors.push(error),
            }
        }
        (mounts, errors)
    }

    /// The mount at `mount`, or none if it only marks a reader's place.
    fn mount(
        &self,
        guest: &Guest,
        namespace: VirtualAddress,
        mount: VirtualAddress,
    ) -> Result<Option<Mount>, MountError> {
        let failed = |source| MountError::Mount { mount, source };
        let read = |what, address| {
            move |source| MountError::Mount {
                mount,
                source: PathError::Read {
                    what,
                    address,
                    source,
                },
            }
        };
        let layout = &self.mount;
        let copied = self
            .mount_span
            .read(guest.space(), mount)
            .map_err(read("mount", mount))?;
        let flags = copied.number(&layout.flags);
        if flags & MNT_CURSOR != 0 && self.namespace.tree.is_none() {
            return Ok(None);
        }
        let found = copied.pointer(&layout.namespace);
        if found != namespace {
            return Err(MountError::Namespace { mount, found });
        }
        let id_of = |what, address: VirtualAddress, member| {
            let address = checked(what, address).map_err(failed)?;
            let number = guest.number(address, member).map_err(read(what, address))?;
            Ok::<i32, MountError>(number as i32)
        };
        let master = copied.pointer(&layout.master);
        let master = if master.is_null() {
            None
        } else {
            Some(id_of("mount.mnt_master", master, &layout.group)?)
        };
        let superblock = copied.pointer(&layout.superblock);
        let superblock = checked("vfsmount.mnt_sb", superblock).map_err(failed)?;
        let number = |member| {
            guest
                .number(superblock, member)
                .map_err(read("super_block", superblock))
        };
        let text = |what, address: VirtualAddress| {
            let address = checked(what, address).map_err(failed)?;
            let bytes = guest.space().read_c_string(address, 4096);
            bytes.map(Text::new).map_err(read(what, address))
        };
        let source = copied.pointer(&layout.source);
        let source = if source.is_null() {
            "none".into()
        } else {
            text("mount.mnt_devname", source)?
        };
        let subtype = match &self.superblock.subtype {
            Some(member) => guest
                .pointer(superblock, member)
                .map_err(read("super_block", superblock))?,
            None => VirtualAddress::default(),
        };
        // MNT_SHARED and MNT_UNBINDABLE, or T_SHARED and T_UNBINDABLE.
        let (shared, unbindable) = match copied.optional(layout.propagation.as_ref()) {
            Some(propagation) => (propagation & 1 != 0, propagation & 2 != 0),
            None => (flags & 0x1000 != 0, flags & 0x2000 != 0),
        };
        let id_mapped = match (&layout.idmap, &layout.user_namespace) {
            (Some(idmap), _) => {
                let none = guest.address("nop_mnt_idmap");
                none.is_some_and(|none| copied.pointer(idmap) != none)
            }
            (None, Some(mapped)) => {
                // What is not mapped has the initial namespace here, from 5.17
                // on that of its file system; nothing is mapped to either.
                let mapped = copied.pointer(mapped);
                Some(mapped) != guest.symbols().address("init_user_ns")
                    && mapped.as_u64() != number(&self.superblock.user_namespace)?
            }
            (None, None) => false,
        };
        Ok(Some(Mount {
            address: mount,
            top: PathPointer {
                mount: mount.wrapping_add(layout.vfsmount.offset),
                dentry: copied.pointer(&layout.root),
            },
            superblock,
            flags,
            id: copied.number(&layout.id) as i32,
            parent: id_of(
                "mount.mnt_parent",
                copied.pointer(&layout.parent),
                &layout.id,
            )?,
            shared: shared.then(|| copied.number(&layout.group) as i32),
            master,
            unbindable,
            id_mapped,
            source,
            device: Device(number(&self.superblock.device)? as u32),
            superblock_flags: number(&self.superblock.flags)?,
            subtype: if subtype.is_null() {
                None
            } else {
                Some(text("super_block.s_subtype", subtype)?)
            },
        }))
    }
}

fn checked(what: &'static str, value: VirtualAddress) -> Result<VirtualAddress, PathError> {
    if is_kernel_pointer(value) {
        Ok(value)
    } else {
        Err(PathError::Pointer { what, value })
    }
}

/// `MNT_…` (`include/linux/mount.h`) and what `/proc` calls them, in its
/// order.
const OPTIONS: &[(u64, &str)] = &[
    (0x01, ",nosuid"),
    (0x02, ",nodev"),
    (0x04, ",noexec"),
    (0x08, ",noatime"),
    (0x10, ",nodiratime"),
    (0x20, ",relatime"),
    (0x80, ",nosymfollow"),
];
const MNT_READONLY: u64 = 0x40;

/// `SB_…` (`include/linux/fs.h`), likewise.
const SUPERBLOCK_OPTIONS: &[(u64, &str)] = &[
    (1 << 4, ",sync"),
    (1 << 7, ",dirsync"),
    (1 << 6, ",mand"),
    (1 << 25, ",lazytime"),
];
const SB_RDONLY: u64 = 1;

fn options(flags: u64, read_only: u64, names: &[(u64, &str)]) -> String {
    let mut text = String::from(if flags & read_only != 0 { "ro" } else { "rw" });
    for (flag, name) in names {
        if flags & flag != 0 {
            text.push_str(name);
        }
    }
    text
}

impl Mount {
    /// The options of the mount, as the sixth field of mountinfo.
    pub fn options(&self) -> String {
        let mut text = options(self.flags, MNT_READONLY, OPTIONS);
        if self.id_mapped {
            text.push_str(",idmapped");
        }
        text
    }

    /// The options of the file system that all file systems have, as the last
    /// field of mountinfo begins.
    pub fn superblock_options(&self) -> String {
        options(self.superblock_flags, SB_RDONLY, SUPERBLOCK_OPTIONS)
    }

    /// What it shares with other mounts, as the optional fields of mountinfo,
    /// or `private`.
    pub fn propagation(&self) -> String {
        let mut fields = Vec::new();
        fields.extend(self.shared.map(|group| format!("shared:{group}")));
        fields.extend(self.master.map(|group| format!("master:{group}")));
        if self.unbindable {
            fields.push("unbindable".into());
        }
        if fields.is_empty() {
            fields.push("private".into());
        }
        fields.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_options_as_mountinfo_does() {
        let mount = Mount {
            address: VirtualAddress::default(),
            top: PathPointer::default(),
            superblock: VirtualAddress::default(),
            flags: 0x67,
            id: 30,
            parent: 1,
            shared: Some(5),
            master: Some(2),
            unbindable: false,
            id_mapped: true,
            source: "tmpfs".into(),
            device: Device(23),
            superblock_flags: 1 << 25 | 1 << 4 | 1 << 30,
            subtype: None,
        };
        assert_eq!(mount.options(), "ro,nosuid,nodev,noexec,relatime,idmapped");
        assert_eq!(mount.superblock_options(), "rw,sync,lazytime");
        assert_eq!(mount.propagation(), "shared:5 master:2");
        let private = Mount {
            shared: None,
            master: None,
            ..mount
        };
        assert_eq!(private.propagation(), "private");
    }
}

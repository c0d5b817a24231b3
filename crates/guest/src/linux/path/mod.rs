//! From a dentry and a mount to the path that the guest's `/proc` shows.
//!
//! `fs/d_path.c` is the model: up through `d_parent` to the root of the
//! mount, on at the place where that mount is mounted, until the root given
//! or the root of the mount tree. Files of file systems that are never
//! mounted have no path but a name made up on demand (`pipe:[12]`).
//!
//! What differs from the text in `/proc`: there is no suffix `" (deleted)"`
//! ([`Path::deleted`] says it without ambiguity) and no character is escaped.
//!
//! Renames and mounts go on while a running guest is read. The kernel's own
//! readers retry when the sequence counters `rename_lock` and `mount_lock`
//! moved; so does this one, and it reads every dentry on the way a second
//! time, since nothing keeps one alive for us.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use secmon_memory::{AddressSpace, ReadError, VirtualAddress, Volatility};

use self::view::View;
use self::walk::ATTEMPTS;
use super::hash::{AddressMap, Keyed};
use super::span::Span;
use super::tree::Patience;
use crate::{Guest, TableError, Text, layout};

mod pseudo;
#[cfg(test)]
mod tests;
mod view;
mod walk;

layout! {
    /// `include/linux/dcache.h`
    struct DentryLayout: "dentry" {
        parent: "d_parent",
        hash_pprev: "d_hash.pprev",
        name_length: "d_name.len",
        name: "d_name.name",
        inode: "d_inode",
        operations: "d_op",
        superblock: "d_sb",
    }
}

layout! {
    /// `fs/mount.h`
    struct MountLayout: "mount" {
        vfsmount: "mnt",
        root: "mnt.mnt_root",
        superblock: "mnt.mnt_sb",
        parent: "mnt_parent",
        mountpoint: "mnt_mountpoint",
        namespace: "mnt_ns",
    }
}

layout! {
    /// `fs/mount.h`
    struct MountNamespaceLayout: "mnt_namespace" {
        root: "root",
    } optional {
        /// Of trees that are no process's yet (`is_anon_ns`): since 6.16 this
        /// is true, before that `seq` is 0.
        is_anonymous: "is_anon",
        sequence: "seq",
    }
}

layout! {
    /// `include/linux/fs.h`: what makes the names of pseudo files.
    struct NameInodeLayout: "inode" {
        number: "i_ino",
        private: "i_private",
    }
}

layout! {
    /// `include/linux/dcache.h`
    struct DentryOperationsLayout: "dentry_operations" {
        dname: "d_dname",
    }
}

layout! {
    /// `include/linux/fs.h`, `struct super_block`
    struct NameSuperblockLayout: "super_block" {
        kind: "s_type",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct FileSystemTypeLayout: "file_system_type" {
        name: "name",
    }
}

layout! {
    /// `include/linux/ns_common.h`
    struct NamespaceNameLayout: "ns_common" {
        operations: "ops",
    }
}

layout! {
    /// `include/linux/proc_ns.h`
    struct NamespaceOperationsLayout: "proc_ns_operations" {
        name: "name",
    }
}

/// The kernel's `struct path`: a dentry and the mount through which it is
/// reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PathPointer {
    /// `struct vfsmount *`.
    pub mount: VirtualAddress,
    /// `struct dentry *`.
    pub dentry: VirtualAddress,
}

impl PathPointer {
    /// Reads the `struct path` of 16 bytes at `address`
    /// (`include/linux/path.h`: `mnt`, then `dentry`).
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn read(space: &AddressSpace, address: VirtualAddress) -> Result<Self, ReadError> {
        let mut bytes = [[0; 8]; 2];
        space.read(address, bytes.as_flattened_mut())?;
        let [mount, dentry] = bytes.map(|bytes| VirtualAddress::new(u64::from_le_bytes(bytes)));
        Ok(Self { mount, dentry })
    }

    /// Whether there is no path: a process that has left its `fs_struct`.
    pub fn is_null(&self) -> bool {
        self.dentry.is_null()
    }
}

/// How far up a path could be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// It starts at the root that was given.
    Root,
    /// It starts at the root of a mount namespace, without meeting the root
    /// that was given: another namespace, or outside of a chroot.
    Namespace,
    /// It starts at the root of a mount that is in no namespace: unmounted
    /// lazily, not mounted yet, or the kernel's own.
    Detached,
    /// It left a bind mount upwards (the directory was moved out of it); the
    /// path starts at the file system's own root.
    Escaped,
    /// There is no way up: the name of a pseudo file.
    Pseudo,
}

/// A path as the guest's `/proc` would show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// The path, without `" (deleted)"`.
    pub text: Text,
    /// Whether its last component is no longer in its directory. Always true
    /// for what lives in the kernel's own tmpfs (`/memfd:…`, `/SYSV…`,
    /// `/dev/zero` of shared memory), as in `/proc`.
    pub deleted: bool,
    /// Where it starts.
    pub reach: Reach,
}

/// Why there is no path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// A pointer that leads nowhere in the kernel.
    #[error("{what} is {value}, which is no kernel pointer")]
    Pointer {
        /// The member, by its kernel name.
        what: &'static str,
        /// Its value.
        value: VirtualAddress,
    },
    /// Memory that can't be read.
    #[error("reading {what} at {address}: {source}")]
    Read {
        /// The object, by its kernel name.
        what: &'static str,
        /// Where it should be.
        address: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
    /// A name that no file can have.
    #[error("the name of the dentry at {dentry} is not one: {reason}")]
    Name {
        /// The dentry.
        dentry: VirtualAddress,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More steps than any path takes: the links form a circle.
    #[error("the path of the dentry at {dentry} does not end after {steps} steps")]
    Endless {
        /// Where it started.
        dentry: VirtualAddress,
        /// How many steps were made.
        steps: usize,
    },
    /// More bytes than are read of a path.
    #[error("the path of the dentry at {dentry} is longer than {limit} bytes")]
    TooLong {
        /// Where it started.
        dentry: VirtualAddress,
        /// The bound.
        limit: usize,
    },
    /// It changed each time it was read.
    #[error("the path of the dentry at {dentry} changed during each of {attempts} reads")]
    Torn {
        /// Where it started.
        dentry: VirtualAddress,
        /// How often it was read.
        attempts: usize,
    },
}

/// Resolves paths for one listing, remembering directories and mounts it has
/// met. Make a new one for each listing: what it remembers is not checked
/// again.
pub struct Paths {
    dentry: Arc<DentryLayout>,
    dentry_span: Span,
    mount: Arc<MountLayout>,
    mount_span: Span,
    mount_namespace: Arc<MountNamespaceLayout>,
    operations: Arc<DentryOperationsLayout>,
    superblock: Arc<NameSuperblockLayout>,
    file_system: Arc<FileSystemTypeLayout>,
    inode: Arc<NameInodeLayout>,
    namespace: Arc<NamespaceNameLayout>,
    namespace_operations: Arc<NamespaceOperationsLayout>,
    root: Option<PathPointer>,
    /// `rename_lock` and `mount_lock`, if the guest runs and they are known.
    locks: [Option<VirtualAddress>; 2],
    live: bool,
    patience: Patience,
    memory: Mutex<Memory>,
}

/// What has been met so far.
#[derive(Default)]
struct Memory {
    paths: HashMap<PathPointer, Arc<Path>, Keyed>,
    directories: HashMap<PathPointer, Arc<Directory>, Keyed>,
    mounts: AddressMap<Mount>,
    names: AddressMap<Text>,
}

/// A directory's path with no slash at its end: empty for a root.
struct Directory {
    text: Vec<u8>,
    reach: Reach,
}

/// What a path needs of a `struct mount`.
#[derive(Clone, Copy, Debug)]
struct Mount {
    root: VirtualAddress,
    /// `struct vfsmount *` of the parent; its own at the top.
    parent: VirtualAddress,
    mountpoint: VirtualAddress,
    in_namespace: bool,
}

/// What one attempt gave: the path, and which directory to remember.
struct Attempt {
    path: Path,
    directory: Option<(PathPointer, Directory)>,
}

impl Paths {
    /// A resolver for `table`. `root` is where paths start, as the reader of
    /// the guest's `/proc` would have it; without it they start at the root
    /// of their mount tree, which gives the same text unless that reader is
    /// in a chroot.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types are not known or lack a member.
    pub fn new(
        guest: &Guest,
        table: &'static str,
        root: Option<PathPointer>,
    ) -> Result<Self, TableError> {
        let dentry = guest.layout::<DentryLayout>(table)?;
        let mount = guest.layout::<MountLayout>(table)?;
        let live = guest.space().memory().volatility() == Volatility::Live;
        let lock = |name| guest.address(name).filter(|_| live);
        Ok(Self {
            dentry_span: Span::of([
                &dentry.parent,
                &dentry.hash_pprev,
                &dentry.name_length,
                &dentry.name,
                &dentry.inode,
                &dentry.operations,
                &dentry.superblock,
            ]),
            mount_span: Span::of([
                &mount.root,
                &mount.parent,
                &mount.mountpoint,
                &mount.namespace,
            ]),
            dentry,
            mount,
            mount_namespace: guest.layout(table)?,
            operations: guest.layout(table)?,
            superblock: guest.layout(table)?,
            file_system: guest.layout(table)?,
            inode: guest.layout(table)?,
            namespace: guest.layout(table)?,
            namespace_operations: guest.layout(table)?,
            root,
            locks: [lock("rename_lock"), lock("mount_lock")],
            live,
            patience: Patience::default(),
            memory: Mutex::default(),
        })
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of `pointer`.
    ///
    /// # Errors
    /// [`PathError`] if it can't be followed to its start.
    pub fn resolve(&self, guest: &Guest, pointer: PathPointer) -> Result<Arc<Path>, PathError> {
        self.resolve_in(View::of(guest), pointer)
    }

    fn resolve_in(&self, view: View<'_>, pointer: PathPointer) -> Result<Arc<Path>, PathError> {
        if let Some(path) = self.memory().paths.get(&pointer) {
            return Ok(path.clone());
        }
        let attempt = self.attempts(view, pointer)?;
        let path = Arc::new(attempt.path);
        let mut memory = self.memory();
        memory.paths.insert(pointer, path.clone());
        if let Some((pointer, directory)) = attempt.directory {
            memory.directories.insert(pointer, Arc::new(directory));
        }
        Ok(path)
    }

    /// `dentry.d_inode`, or `None` for a dentry without one.
    pub(crate) fn inode_of(&self, guest: &Guest, dentry: VirtualAddress) -> Option<VirtualAddress> {
        guest
            .pointer(dentry, &self.dentry.inode)
            .ok()
            .filter(|inode| is_kernel_pointer(*inode))
    }

    /// Whether the mount is one of the kernel's own (`MNT_NS_INTERNAL`), in
    /// no namespace.
    pub(crate) fn is_kernel_mount(&self, guest: &Guest, vfsmount: VirtualAddress) -> bool {
        let base = vfsmount.wrapping_sub(self.mount.vfsmount.offset);
        is_kernel_pointer(vfsmount)
            && guest
                .pointer(base, &self.mount.namespace)
                .is_ok_and(is_error)
    }

    /// Whether a mount and a dentry belong to the same file system, as those
    /// of a path do.
    pub(crate) fn agrees(&self, guest: &Guest, path: PathPointer) -> bool {
        if !is_kernel_pointer(path.mount) || !is_kernel_pointer(path.dentry) {
            return false;
        }
        let base = path.mount.wrapping_sub(self.mount.vfsmount.offset);
        let mounted = guest.pointer(base, &self.mount.superblock);
        mounted.is_ok() && mounted == guest.pointer(path.dentry, &self.dentry.superblock)
    }

    /// The path of a dentry inside its file system (`dentry_path`), as the
    /// root of a mount is told: `/` for the file system's own root, with
    /// `//deleted` behind a directory that was removed.
    ///
    /// # Errors
    /// [`PathError`] if it can't be followed to its start.
    pub fn within_file_system(
        &self,
        guest: &Guest,
        dentry: VirtualAddress,
    ) -> Result<Text, PathError> {
        let mut outcome = self.climb(View::of(guest), dentry);
        for _ in 1..ATTEMPTS {
            let again = if self.live {
                self.climb(View::of(guest), dentry)
            } else {
                return outcome;
            };
            if again == outcome {
                return outcome;
            }
            guest.diagnostics().count_torn_read();
            outcome = again;
        }
        outcome
    }

    /// The name of the type of the file system at `superblock`.
    ///
    /// # Errors
    /// [`PathError`] if it can't be read.
    pub fn file_system(
        &self,
        guest: &Guest,
        superblock: VirtualAddress,
    ) -> Result<Text, PathError> {
        self.file_system_name(View::of(guest), superblock)
    }
}

/// Whether this is an error number in a pointer's place (`IS_ERR`).
pub(crate) fn is_error(address: VirtualAddress) -> bool {
    address.as_u64() >= 4096_u64.wrapping_neg()
}

/// Whether this can be a pointer into the kernel: in the upper half, and no
/// error number.
pub(crate) fn is_kernel_pointer(address: VirtualAddress) -> bool {
    address.as_u64() >> 63 == 1 && !is_error(address)
}

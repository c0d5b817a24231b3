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
use secmon_profile::Member;

use super::span::{Copied, Span};
use crate::{Guest, TableError, Text, layout};

/// The longest path made, in bytes. `PATH_MAX` bounds one system call only;
/// a path can grow past it by relative steps.
const LENGTH_LIMIT: usize = 1 << 16;

/// The most steps up: each takes at least two bytes of a path or a mount.
const DEPTH_LIMIT: usize = 1 << 15;

/// The longest name of one dentry: `NAME_MAX` is 255, names of pseudo files
/// are shorter than a page.
const NAME_LIMIT: u64 = 4096;

/// How often a path that changed under the reader is read again.
const ATTEMPTS: usize = 8;

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
    } optional {
        fs_data: "d_fsdata",
    }
}

layout! {
    /// `fs/mount.h`
    pub(crate) struct MountLayout: "mount" {
        vfsmount: "mnt",
        root: "mnt.mnt_root",
        superblock: "mnt.mnt_sb",
        flags: "mnt.mnt_flags",
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
    memory: Mutex<Memory>,
}

/// What has been met so far.
#[derive(Default)]
struct Memory {
    paths: HashMap<PathPointer, Arc<Path>>,
    directories: HashMap<PathPointer, Arc<Directory>>,
    mounts: HashMap<VirtualAddress, Mount>,
    names: HashMap<VirtualAddress, Text>,
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
        let lock = |name| guest.symbols().address(name).filter(|_| live);
        Ok(Self {
            dentry_span: Span::of(
                [
                    &dentry.parent,
                    &dentry.hash_pprev,
                    &dentry.name_length,
                    &dentry.name,
                    &dentry.inode,
                    &dentry.operations,
                    &dentry.superblock,
                ]
                .into_iter()
                .chain(&dentry.fs_data),
            ),
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
        if let Some(path) = self.memory().paths.get(&pointer) {
            return Ok(path.clone());
        }
        let attempt = self.attempts(guest, pointer)?;
        let path = Arc::new(attempt.path);
        let mut memory = self.memory();
        memory.paths.insert(pointer, path.clone());
        if let Some((pointer, directory)) = attempt.directory {
            memory.directories.insert(pointer, Arc::new(directory));
        }
        Ok(path)
    }

    /// Reads until nothing moved meanwhile.
    fn attempts(&self, guest: &Guest, pointer: PathPointer) -> Result<Attempt, PathError> {
        let space = guest.space();
        let mut trail = Vec::new();
        let mut outcome = Err(PathError::Torn {
            dentry: pointer.dentry,
            attempts: ATTEMPTS,
        });
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                guest.diagnostics().count_torn_read();
                // Mounts may be what moved.
                self.memory().mounts.clear();
            }
            trail.clear();
            let before = self.sequence(space);
            outcome = self.attempt(guest, pointer, &mut trail);
            if !self.live {
                return outcome;
            }
            let after = self.sequence(space);
            if before == after && before.iter().all(|count| count & 1 == 0) {
                let unchanged = |(dentry, copied): &(VirtualAddress, Copied)| {
                    self.dentry_span.read(space, *dentry).ok().as_ref() == Some(copied)
                };
                // An error of a quiet moment is a real one.
                if trail.iter().all(unchanged) {
                    return outcome;
                }
            }
        }
        match outcome {
            Err(error) => Err(error),
            Ok(_) => Err(PathError::Torn {
                dentry: pointer.dentry,
                attempts: ATTEMPTS,
            }),
        }
    }

    /// The sequence counters as they are now: even at rest.
    fn sequence(&self, space: &AddressSpace) -> [u32; 2] {
        self.locks
            .map(|lock| lock.map_or(0, |lock| space.read_u32(lock).unwrap_or(0)))
    }

    fn attempt(
        &self,
        guest: &Guest,
        start: PathPointer,
        trail: &mut Vec<(VirtualAddress, Copied)>,
    ) -> Result<Attempt, PathError> {
        let first = self.dentry(guest, start.dentry, trail)?;
        if let Some(path) = self.pseudo(guest, start, &first)? {
            let directory = None;
            return Ok(Attempt { path, directory });
        }
        let is_root = first.pointer(&self.dentry.parent) == start.dentry;
        let unhashed = first.number(&self.dentry.hash_pprev) == 0;
        let deleted = unhashed && !is_root;

        let mut names = Names::default();
        let mut here = start;
        let mut copied = Some(first);
        let mut directory = None;
        let mut base: Option<Arc<Directory>> = None;
        let mut steps = 0;
        let reach = loop {
            if Some(here) == self.root {
                break Reach::Root;
            }
            if let Some(known) = self.memory().directories.get(&here).cloned() {
                let reach = known.reach;
                base = Some(known);
                break reach;
            }
            if names.count == 1 && directory.is_none() {
                directory = Some(here);
            }
            steps += 1;
            if steps > DEPTH_LIMIT {
                let dentry = start.dentry;
                return Err(PathError::Endless { dentry, steps });
            }
            let mount = self.mount(guest, here.mount)?;
            if here.dentry == mount.root {
                if mount.parent != here.mount {
                    here.dentry = kernel_pointer("mount.mnt_mountpoint", mount.mountpoint)?;
                    here.mount = mount.parent;
                    copied = None;
                    continue;
                }
                break if mount.in_namespace {
                    Reach::Namespace
                } else {
                    Reach::Detached
                };
            }
            let dentry = match copied.take() {
                Some(dentry) => dentry,
                None => self.dentry(guest, here.dentry, trail)?,
            };
            let parent = dentry.pointer(&self.dentry.parent);
            if parent == here.dentry {
                break Reach::Escaped;
            }
            let name = self.name(guest, here.dentry, &dentry)?;
            if name.contains(&b'/') {
                return Err(PathError::Name {
                    dentry: here.dentry,
                    reason: "it contains a slash",
                });
            }
            names.push(&name);
            if names.bytes.len() > LENGTH_LIMIT {
                return Err(PathError::TooLong {
                    dentry: start.dentry,
                    limit: LENGTH_LIMIT,
                });
            }
            here.dentry = kernel_pointer("dentry.d_parent", parent)?;
        };
        let base_text = base.as_deref().map_or(&[][..], |base| &base.text);
        if base_text.len() + names.bytes.len() > LENGTH_LIMIT {
            return Err(PathError::TooLong {
                dentry: start.dentry,
                limit: LENGTH_LIMIT,
            });
        }
        let mut text = names.join(base_text);
        let directory = directory.map(|pointer| {
            let text = text[..text.len() - names.first].to_vec();
            (pointer, Directory { text, reach })
        });
        if text.is_empty() {
            text.push(b'/');
        }
        let path = Path {
            text: Text::new(text),
            deleted,
            reach,
        };
        Ok(Attempt { path, directory })
    }

    /// Copies a dentry and notes it for the second reading.
    fn dentry(
        &self,
        guest: &Guest,
        address: VirtualAddress,
        trail: &mut Vec<(VirtualAddress, Copied)>,
    ) -> Result<Copied, PathError> {
        let address = kernel_pointer("dentry", address)?;
        let copied = self
            .dentry_span
            .read(guest.space(), address)
            .map_err(|source| PathError::Read {
                what: "dentry",
                address,
                source,
            })?;
        if self.live {
            trail.push((address, copied.clone()));
        }
        Ok(copied)
    }

    /// The name of a copied dentry.
    fn name(
        &self,
        guest: &Guest,
        dentry: VirtualAddress,
        copied: &Copied,
    ) -> Result<Vec<u8>, PathError> {
        let length = copied.number(&self.dentry.name_length);
        let reason = match length {
            0 => Some("it is empty"),
            1..=NAME_LIMIT => None,
            _ => Some("it is longer than any name"),
        };
        if let Some(reason) = reason {
            return Err(PathError::Name { dentry, reason });
        }
        let address = kernel_pointer("dentry.d_name.name", copied.pointer(&self.dentry.name))?;
        let mut name = vec![0; length as usize];
        guest
            .space()
            .read(address, &mut name)
            .map_err(|source| PathError::Read {
                what: "dentry.d_name.name",
                address,
                source,
            })?;
        if name.contains(&0) {
            let reason = "it ends before its length";
            return Err(PathError::Name { dentry, reason });
        }
        Ok(name)
    }

    /// What is to be known of the mount whose `struct vfsmount` is at
    /// `address`.
    fn mount(&self, guest: &Guest, address: VirtualAddress) -> Result<Mount, PathError> {
        if let Some(mount) = self.memory().mounts.get(&address) {
            return Ok(*mount);
        }
        let layout = &*self.mount;
        let base = kernel_pointer("vfsmount", address)?.wrapping_sub(layout.vfsmount.offset);
        let copied = self
            .mount_span
            .read(guest.space(), base)
            .map_err(|source| PathError::Read {
                what: "mount",
                address: base,
                source,
            })?;
        let namespace = copied.pointer(&layout.namespace);
        // NULL once unmounted, an error number for the kernel's own.
        let in_namespace = is_kernel_pointer(namespace) && !self.is_anonymous(guest, namespace);
        let mount = Mount {
            root: copied.pointer(&layout.root),
            parent: copied
                .pointer(&layout.parent)
                .wrapping_add(layout.vfsmount.offset),
            mountpoint: copied.pointer(&layout.mountpoint),
            in_namespace,
        };
        self.memory().mounts.insert(address, mount);
        Ok(mount)
    }

    /// Whether this mount namespace is no process's: a tree that open_tree or
    /// fsmount made and that is not mounted yet.
    fn is_anonymous(&self, guest: &Guest, namespace: VirtualAddress) -> bool {
        let layout = &self.mount_namespace;
        let number = |member| guest.number(namespace, member).ok();
        match (&layout.is_anonymous, &layout.sequence) {
            (Some(member), _) => number(member).is_some_and(|value| value != 0),
            (None, Some(member)) => number(member) == Some(0),
            (None, None) => false,
        }
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
        let mut outcome = self.climb(guest, dentry);
        for _ in 1..ATTEMPTS {
            let again = if self.live {
                self.climb(guest, dentry)
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

    fn climb(&self, guest: &Guest, start: VirtualAddress) -> Result<Text, PathError> {
        let mut names = Names::default();
        let mut here = start;
        let mut deleted = false;
        for step in 0..DEPTH_LIMIT {
            let copied = self.dentry(guest, here, &mut Vec::new())?;
            let parent = copied.pointer(&self.dentry.parent);
            if parent == here {
                let mut text = names.join(b"");
                if text.is_empty() {
                    let kind = self.file_system(guest, copied.pointer(&self.dentry.superblock))?;
                    if kind.as_bytes() == b"nsfs" {
                        return self.namespace_name(guest, copied.pointer(&self.dentry.inode));
                    }
                    text.push(b'/');
                }
                if deleted {
                    text.extend_from_slice(b"//deleted");
                }
                return Ok(Text::new(text));
            }
            if step == 0 {
                deleted = copied.number(&self.dentry.hash_pprev) == 0;
            }
            names.push(&self.name(guest, here, &copied)?);
            if names.bytes.len() > LENGTH_LIMIT {
                return Err(PathError::TooLong {
                    dentry: start,
                    limit: LENGTH_LIMIT,
                });
            }
            here = kernel_pointer("dentry.d_parent", parent)?;
        }
        Err(PathError::Endless {
            dentry: start,
            steps: DEPTH_LIMIT,
        })
    }

    /// The name of a namespace's file: `net:[4026531840]`.
    fn namespace_name(&self, guest: &Guest, inode: VirtualAddress) -> Result<Text, PathError> {
        let namespace = pointer(guest, "dentry.d_inode", inode, &self.inode.private)?;
        let member = &self.namespace.operations;
        let operations = pointer(guest, "inode.i_private", namespace, member)?;
        let member = &self.namespace_operations.name;
        let name = pointer(guest, "ns_common.ops", operations, member)?;
        let name = c_string(guest, "proc_ns_operations.name", name)?;
        let number = self.inode_number(guest, inode)?;
        Ok(Text::new(numbered(name.as_bytes(), number)))
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
        if let Some(name) = self.memory().names.get(&superblock) {
            return Ok(name.clone());
        }
        let kind = pointer(guest, "super_block", superblock, &self.superblock.kind)?;
        let name = pointer(guest, "super_block.s_type", kind, &self.file_system.name)?;
        let name = c_string(guest, "file_system_type.name", name)?;
        self.memory().names.insert(superblock, name.clone());
        Ok(name)
    }

    /// The name of a file whose file system makes names up (`d_dname`), or
    /// `None` for a file with a path.
    fn pseudo(
        &self,
        guest: &Guest,
        start: PathPointer,
        dentry: &Copied,
    ) -> Result<Option<Path>, PathError> {
        let operations = dentry.pointer(&self.dentry.operations);
        if operations.is_null() {
            return Ok(None);
        }
        let dname = pointer(guest, "dentry.d_op", operations, &self.operations.dname)?;
        if dname.is_null() {
            return Ok(None);
        }
        let is_root = dentry.pointer(&self.dentry.parent) == start.dentry;
        if is_root && self.mount(guest, start.mount)?.root == start.dentry {
            return Ok(None);
        }
        let kind = self.file_system(guest, dentry.pointer(&self.dentry.superblock))?;
        let inode = dentry.pointer(&self.dentry.inode);
        let mut deleted = false;
        let text = match kind.as_bytes() {
            b"pipefs" => numbered(b"pipe", self.inode_number(guest, inode)?),
            b"sockfs" => numbered(b"socket", self.inode_number(guest, inode)?),
            b"nsfs" => self.namespace_name(guest, inode)?.as_bytes().to_vec(),
            b"anon_inodefs" => {
                let mut text = b"anon_inode:".to_vec();
                text.extend(self.name(guest, start.dentry, dentry)?);
                text
            }
            b"pidfs" => b"anon_inode:[pidfd]".to_vec(),
            b"dmabuf" => {
                let mut text = b"/".to_vec();
                text.extend(self.name(guest, start.dentry, dentry)?);
                text.push(b':');
                text
            }
            // simple_dname(): the kernel's own tmpfs and hugetlbfs mounts and
            // whatever came through alloc_file_pseudo().
            _ => {
                deleted = true;
                let mut text = b"/".to_vec();
                text.extend(self.name(guest, start.dentry, dentry)?);
                text
            }
        };
        let text = Text::new(text);
        let reach = Reach::Pseudo;
        Ok(Some(Path {
            text,
            deleted,
            reach,
        }))
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

    fn inode_number(&self, guest: &Guest, inode: VirtualAddress) -> Result<u64, PathError> {
        let address = kernel_pointer("dentry.d_inode", inode)?;
        let what = "inode.i_ino";
        guest
            .number(address, &self.inode.number)
            .map_err(|source| PathError::Read {
                what,
                address,
                source,
            })
    }
}

/// `name:[number]`.
fn numbered(name: &[u8], number: u64) -> Vec<u8> {
    let mut text = name.to_vec();
    text.extend_from_slice(format!(":[{number}]").as_bytes());
    text
}

/// The names of a path, collected from its end.
#[derive(Default)]
struct Names {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    count: usize,
    /// The bytes of the last component with its slash: the first one pushed.
    first: usize,
}

impl Names {
    fn push(&mut self, name: &[u8]) {
        if self.count == 0 {
            self.first = name.len() + 1;
        }
        self.count += 1;
        self.bytes.push(b'/');
        self.bytes.extend_from_slice(name);
        self.ends.push(self.bytes.len());
    }

    /// `base` and all names, the last one pushed first.
    fn join(&self, base: &[u8]) -> Vec<u8> {
        let mut text = Vec::with_capacity(base.len() + self.bytes.len());
        text.extend_from_slice(base);
        let mut end = self.bytes.len();
        for start in self.ends.iter().rev().skip(1).copied().chain([0]) {
            text.extend_from_slice(self.bytes.get(start..end).unwrap_or_default());
            end = start;
        }
        text
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

fn kernel_pointer(what: &'static str, value: VirtualAddress) -> Result<VirtualAddress, PathError> {
    if is_kernel_pointer(value) {
        Ok(value)
    } else {
        Err(PathError::Pointer { what, value })
    }
}

/// The pointer `member` of the structure at `base`, which is `what`.
fn pointer(
    guest: &Guest,
    what: &'static str,
    base: VirtualAddress,
    member: &Member,
) -> Result<VirtualAddress, PathError> {
    let base = kernel_pointer(what, base)?;
    guest
        .pointer(base, member)
        .map_err(|source| PathError::Read {
            what,
            address: base,
            source,
        })
}

/// The short string at `address`.
fn c_string(guest: &Guest, what: &'static str, address: VirtualAddress) -> Result<Text, PathError> {
    let address = kernel_pointer(what, address)?;
    let bytes = guest
        .space()
        .read_c_string(address, 256)
        .map_err(|source| PathError::Read {
            what,
            address,
            source,
        })?;
    Ok(Text::new(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_names_from_their_end() {
        let mut names = Names::default();
        assert_eq!(names.join(b""), b"");
        assert_eq!(names.join(b"/base"), b"/base");
        names.push(b"file");
        assert_eq!(names.join(b""), b"/file");
        names.push(b"b");
        names.push(b"a");
        assert_eq!(names.join(b"/mnt"), b"/mnt/a/b/file");
        assert_eq!(names.first, "/file".len());
    }

    #[test]
    fn tells_pointers_from_error_numbers() {
        let address = VirtualAddress::new;
        assert!(is_error(address(-22_i64 as u64)));
        assert!(!is_kernel_pointer(address(-22_i64 as u64)));
        assert!(!is_kernel_pointer(address(0)));
        assert!(!is_kernel_pointer(address(0x7fff_ffff_f000)));
        assert!(is_kernel_pointer(address(0xffff_8880_0000_1000)));
    }
}

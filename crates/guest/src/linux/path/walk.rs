//! The way up: from a dentry to the root, again while the guest changes it.

use std::sync::Arc;

use secmon_memory::{AddressSpace, VirtualAddress};

use super::view::{View, kernel_pointer};
use super::{
    Attempt, Directory, Mount, Path, PathError, PathPointer, Paths, Reach, is_kernel_pointer,
};
use crate::Text;
use crate::linux::span::Copied;

/// The longest path made, in bytes. `PATH_MAX` bounds one system call only;
/// a path can grow past it by relative steps.
const LENGTH_LIMIT: usize = 1 << 16;

/// The most steps up: each takes at least two bytes of a path or a mount.
const DEPTH_LIMIT: usize = 1 << 15;

/// The longest name of one dentry: `NAME_MAX` is 255, names of pseudo files
/// are shorter than a page.
const NAME_LIMIT: u64 = 4096;

/// How often a path that changed under the reader is read again.
pub(super) const ATTEMPTS: usize = 8;

impl Paths {
    /// Reads until nothing moved meanwhile.
    pub(super) fn attempts(
        &self,
        view: View<'_>,
        pointer: PathPointer,
    ) -> Result<Attempt, PathError> {
        let space = view.space;
        let mut trail = Vec::new();
        let mut outcome = Err(PathError::Torn {
            dentry: pointer.dentry,
            attempts: ATTEMPTS,
        });
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                view.diagnostics.count_torn_read();
                self.patience.wait(attempt);
                // Mounts may be what moved.
                self.memory().mounts.clear();
            }
            trail.clear();
            let before = self.sequence(space);
            outcome = self.attempt(view, pointer, &mut trail);
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
        view: View<'_>,
        start: PathPointer,
        trail: &mut Vec<(VirtualAddress, Copied)>,
    ) -> Result<Attempt, PathError> {
        let first = self.dentry(view, start.dentry, trail)?;
        if let Some(path) = self.pseudo(view, start, &first)? {
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
        let mut steps: usize = 0;
        // A place met before, set at each power of two: a circle comes back
        // to it.
        let mut mark = None;
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
            let circle = mark == Some(here);
            if steps.is_power_of_two() {
                mark = Some(here);
            }
            if circle || steps > DEPTH_LIMIT {
                let dentry = start.dentry;
                return Err(PathError::Endless { dentry, steps });
            }
            let mount = self.mount(view, here.mount)?;
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
                None => self.dentry(view, here.dentry, trail)?,
            };
            let parent = dentry.pointer(&self.dentry.parent);
            if parent == here.dentry {
                break Reach::Escaped;
            }
            let name = self.name(view, here.dentry, &dentry)?;
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
    pub(super) fn dentry(
        &self,
        view: View<'_>,
        address: VirtualAddress,
        trail: &mut Vec<(VirtualAddress, Copied)>,
    ) -> Result<Copied, PathError> {
        let address = kernel_pointer("dentry", address)?;
        let copied = self
            .dentry_span
            .read(view.space, address)
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
    pub(super) fn name(
        &self,
        view: View<'_>,
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
        view.space
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
    pub(super) fn mount(
        &self,
        view: View<'_>,
        address: VirtualAddress,
    ) -> Result<Mount, PathError> {
        if let Some(mount) = self.memory().mounts.get(&address) {
            return Ok(*mount);
        }
        let layout = &*self.mount;
        let base = kernel_pointer("vfsmount", address)?.wrapping_sub(layout.vfsmount.offset);
        let copied = self
            .mount_span
            .read(view.space, base)
            .map_err(|source| PathError::Read {
                what: "mount",
                address: base,
                source,
            })?;
        let namespace = copied.pointer(&layout.namespace);
        // NULL once unmounted, an error number for the kernel's own.
        let in_namespace = is_kernel_pointer(namespace) && !self.is_anonymous(view, namespace);
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
    fn is_anonymous(&self, view: View<'_>, namespace: VirtualAddress) -> bool {
        let layout = &self.mount_namespace;
        let number = |member| view.number(namespace, member).ok();
        match (&layout.is_anonymous, &layout.sequence) {
            (Some(member), _) => number(member).is_some_and(|value| value != 0),
            (None, Some(member)) => number(member) == Some(0),
            (None, None) => false,
        }
    }

    pub(super) fn climb(&self, view: View<'_>, start: VirtualAddress) -> Result<Text, PathError> {
        let mut names = Names::default();
        let mut here = start;
        let mut deleted = false;
        for step in 0..DEPTH_LIMIT {
            let copied = self.dentry(view, here, &mut Vec::new())?;
            let parent = copied.pointer(&self.dentry.parent);
            if parent == here {
                let mut text = names.join(b"");
                if text.is_empty() {
                    let kind =
                        self.file_system_name(view, copied.pointer(&self.dentry.superblock))?;
                    if kind.as_bytes() == b"nsfs" {
                        return self.namespace_name(view, copied.pointer(&self.dentry.inode));
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
            names.push(&self.name(view, here, &copied)?);
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
}

/// The names of a path, collected from its end.
#[derive(Default)]
pub(super) struct Names {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    count: usize,
    /// The bytes of the last component with its slash: the first one pushed.
    pub(super) first: usize,
}

impl Names {
    pub(super) fn push(&mut self, name: &[u8]) {
        if self.count == 0 {
            self.first = name.len() + 1;
        }
        self.count += 1;
        self.bytes.push(b'/');
        self.bytes.extend_from_slice(name);
        self.ends.push(self.bytes.len());
    }

    /// `base` and all names, the last one pushed first.
    pub(super) fn join(&self, base: &[u8]) -> Vec<u8> {
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

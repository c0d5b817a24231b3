//! What the kernel's cache of names (dentries) holds of a folder: names that a
//! program in the guest looked up, listed or made, whatever a listing of the
//! folder shows. On a file system in memory (tmpfs) that is all of them.
//!
//! A name that is not in the cache may exist nevertheless; this is no listing.

use std::sync::Arc;

use secmon_memory::VirtualAddress;
use secmon_profile::Member;

use super::file::initial_root;
use super::list::{self, chain};
use super::mount::MountModel;
use super::mounts::initial_namespace;
use super::path::{PathPointer, Paths, Reach};
use crate::{Diagnostic, Guest, TableError, Text, layout};

/// Under which name diagnostics are recorded.
const TABLE: &str = "folders";
/// More names are not read of one folder.
const MOST: usize = 1 << 16;
/// The longest name.
const NAME_LIMIT: u64 = 255;
/// More parts of a path are not followed.
const DEEPEST: usize = 64;

layout! {
    /// `include/linux/dcache.h`
    struct FolderLayout: "dentry" {
        hash_pprev: "d_hash.pprev",
        name_length: "d_name.len",
        name: "d_name.name",
        inode: "d_inode",
    } optional {
        /// Since 6.8 a chain of children,
        first_child: "d_children.first",
        /// with this in each of them;
        sibling: "d_sib",
        /// before, a list,
        children: "d_subdirs",
        /// with this.
        child: "d_child",
    }
}

/// A name in a folder, behind which a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// The name.
    pub name: Text,
    /// Its `struct dentry`.
    pub dentry: VirtualAddress,
    /// Its `struct inode`.
    pub inode: VirtualAddress,
}

/// Reads folders by their paths as process 1 sees them.
pub struct Folders {
    layout: Arc<FolderLayout>,
    /// Where something is mounted, in the order of the mounts.
    mounts: Vec<(Text, PathPointer)>,
}

impl Folders {
    /// Learns what is mounted where.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types are not known or lack a member.
    pub fn new(guest: &Guest) -> Result<Self, TableError> {
        let paths = Paths::new(guest, TABLE, initial_root(guest, TABLE)?)?;
        let model = MountModel::new(guest, TABLE)?;
        let (found, errors) = model.mounts(guest, initial_namespace(guest)?);
        for error in errors {
            record(guest, "mounts", None, error.to_string());
        }
        let mut mounts = Vec::new();
        for mount in found {
            match paths.resolve(guest, mount.top) {
                Ok(path) if path.reach == Reach::Root => {
                    mounts.push((path.text.clone(), mount.top));
                }
                Ok(_) => {}
                Err(error) => record(guest, "mounts", Some(mount.address), error.to_string()),
            }
        }
        Ok(Self {
            layout: guest.layout(TABLE)?,
            mounts,
        })
    }

    /// The names that the cache holds of the folder with this absolute path;
    /// none if it does not know the folder itself. Links are not followed.
    #[must_use]
    pub fn names(&self, guest: &Guest, path: &[u8]) -> Option<Vec<Name>> {
        let parts: Vec<&[u8]> = path
            .split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty())
            .take(DEEPEST)
            .collect();
        let (depth, mut folder) = self.last_mount(&parts)?;
        for part in parts.get(depth..)? {
            let names = self.children(guest, folder);
            let found = names.into_iter().find(|name| name.name.as_bytes() == *part);
            folder = found?.dentry;
        }
        Some(self.children(guest, folder))
    }

    /// The mount that the path leads through last: how many of its parts lead
    /// there, and its root.
    fn last_mount(&self, parts: &[&[u8]]) -> Option<(usize, VirtualAddress)> {
        let mut last: Option<(usize, VirtualAddress)> = None;
        for (place, top) in &self.mounts {
            let place = place.as_bytes().split(|byte| *byte == b'/');
            let place: Vec<&[u8]> = place.filter(|part| !part.is_empty()).collect();
            // Of two at one place the later one covers the other.
            if parts.starts_with(&place) && last.is_none_or(|(depth, _)| depth <= place.len()) {
                last = Some((place.len(), top.dentry));
            }
        }
        last
    }

    /// The names below a dentry that are in use.
    fn children(&self, guest: &Guest, folder: VirtualAddress) -> Vec<Name> {
        let layout = &self.layout;
        let at = |member: &Member| folder.wrapping_add(member.offset);
        let mut names = Vec::new();
        let mut note = |dentry: VirtualAddress| {
            match self.name(guest, dentry) {
                Ok(Some(name)) => names.push(name),
                Ok(None) => {}
                Err(reason) => record(guest, "a folder's child", Some(dentry), reason),
            };
        };
        let (space, diagnostics) = (guest.space(), guest.diagnostics());
        match (&layout.first_child, &layout.sibling) {
            (Some(first), Some(sibling)) => {
                let end = chain::ChainEnd::Null;
                let nodes = chain::chain_nodes(space, diagnostics, at(first), end, MOST);
                for node in nodes {
                    match node {
                        Ok(node) => note(node.wrapping_sub(sibling.offset)),
                        Err(error) => record(guest, "d_children", Some(folder), error.to_string()),
                    }
                }
            }
            _ => {
                let (Some(children), Some(child)) = (&layout.children, &layout.child) else {
                    record(
                        guest,
                        "d_subdirs",
                        None,
                        "the kernel has no such list".into(),
                    );
                    return names;
                };
                for node in list::nodes(space, diagnostics, at(children), MOST) {
                    match node {
                        Ok(node) => note(node.wrapping_sub(child.offset)),
                        Err(error) => record(guest, "d_subdirs", Some(folder), error.to_string()),
                    }
                }
            }
        }
        names
    }

    /// What is at a dentry; nothing if there is no file behind its name, or it
    /// was taken out of the folder.
    fn name(&self, guest: &Guest, dentry: VirtualAddress) -> Result<Option<Name>, String> {
        let layout = &self.layout;
        let pointer = |member| guest.pointer(dentry, member).map_err(|e| e.to_string());
        let inode = pointer(&layout.inode)?;
        if inode.is_null() || pointer(&layout.hash_pprev)?.is_null() {
            return Ok(None);
        }
        let length = guest
            .number(dentry, &layout.name_length)
            .map_err(|error| error.to_string())?;
        let length = usize::try_from(length.min(NAME_LIMIT + 1)).unwrap_or(0);
        if length == 0 || length as u64 > NAME_LIMIT {
            return Err("its name has an impossible length".to_owned());
        }
        let mut bytes = vec![0; length];
        let address = pointer(&layout.name)?;
        guest
            .space()
            .read(address, &mut bytes)
            .map_err(|error| error.to_string())?;
        Ok(Some(Name {
            name: Text::new(bytes),
            dentry,
            inode,
        }))
    }
}

fn record(guest: &Guest, subject: &str, address: Option<VirtualAddress>, reason: String) {
    guest.diagnostics().record(Diagnostic {
        table: TABLE,
        subject: subject.to_owned(),
        address,
        reason,
    });
}

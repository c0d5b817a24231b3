//! Tables of open files and pairs of directories that are in use, of all that
//! there are in memory: what holds open sockets (`files_struct`) and mounts
//! (`fs_struct`). Each belongs to a task that lives; `exit` gives both up
//! before it says that the task has ended.

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::is_object_address;
use crate::{Guest, TableError, layout};

/// More users have no such structure: `PID_MAX_LIMIT`
/// (`include/linux/threads.h`).
const MOST_USERS: u64 = 1 << 22;
/// More descriptors has no process (`fs.nr_open`).
const MOST_DESCRIPTORS: u64 = 1 << 20;
/// Descriptors that are looked at, in words of the bitmap.
const MOST_WORDS: u64 = 16;

layout! {
    /// `include/linux/fdtable.h`
    struct FilesLayout: "files_struct" {
        users: "count",
        table: "fdt",
    }
}

layout! {
    /// `include/linux/fdtable.h`
    struct TableLayout: "fdtable" {
        count: "max_fds",
        files: "fd",
        open: "open_fds",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct FileLayout: "file" {
        operations: "f_op",
        inode: "f_inode",
    }
}

layout! {
    /// `include/linux/fs_struct.h`
    struct DirectoriesLayout: "fs_struct" {
        users: "users",
        root_mount: "root.mnt",
        root: "root.dentry",
        current_mount: "pwd.mnt",
        current: "pwd.dentry",
    }
}

layout! {
    /// `include/linux/mount.h`
    struct MountLayout: "vfsmount" {
        superblock: "mnt_sb",
    }
}

layout! {
    /// `include/linux/dcache.h`
    struct EntryLayout: "dentry" {
        superblock: "d_sb",
    }
}

/// What a task must own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// A table of open files.
    Files {
        /// How many of its first descriptors are open.
        open: u32,
        /// How many of these are sockets.
        sockets: u32,
    },
    /// The root and the current directory.
    Directories,
}

/// Something that a task must own, and that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Where it lies.
    pub address: VirtualAddress,
    /// What it is.
    pub held: Held,
    /// What tells it from what lies there later: the first file, or the root.
    first: VirtualAddress,
}

/// The `files_struct` at this address, if one is there that is in use and has
/// open files.
///
/// # Errors
/// [`TableError`] if the kernel's types lack something.
pub fn files(
    guest: &Guest,
    table: &'static str,
    address: VirtualAddress,
) -> Result<Option<Holding>, TableError> {
    let layouts = (
        guest.layout::<FilesLayout>(table)?,
        guest.layout::<TableLayout>(table)?,
        guest.layout::<FileLayout>(table)?,
    );
    let (files, table, file) = (&layouts.0, &layouts.1, &layouts.2);
    let sockets = guest.address("socket_file_ops");
    let read = || -> Result<Option<Holding>, ReadError> {
        let is_object = |address| is_object_address(guest.space(), address);
        let users = guest.number(address, &files.users)?;
        let descriptors = guest.pointer(address, &files.table)?;
        if !(1..=MOST_USERS).contains(&users) || !is_object(descriptors) {
            return Ok(None);
        }
        let count = guest.number(descriptors, &table.count)?;
        let pointers = guest.pointer(descriptors, &table.files)?;
        let bitmap = guest.pointer(descriptors, &table.open)?;
        let sound = count != 0 && count % 64 == 0 && count <= MOST_DESCRIPTORS;
        if !sound || !is_object(pointers) || !is_object(bitmap) {
            return Ok(None);
        }
        let (mut open, mut of_sockets, mut first) = (0, 0, None);
        for word in 0..(count / 64).min(MOST_WORDS) {
            let bits = guest.space().read_u64(bitmap.wrapping_add(word * 8))?;
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                let slot = pointers.wrapping_add((word * 64 + bit) * 8);
                let opened = guest.space().read_pointer(slot)?;
                // A descriptor that is reserved, and not yet in use.
                if opened.is_null() {
                    continue;
                }
                if !is_object(opened) {
                    return Ok(None);
                }
                let operations = guest.pointer(opened, &file.operations)?;
                let inode = guest.pointer(opened, &file.inode)?;
                if !is_object(operations) || !is_object(inode) {
                    return Ok(None);
                }
                first.get_or_insert(opened);
                open += 1;
                of_sockets += u32::from(Some(operations) == sockets);
            }
        }
        let held = Held::Files {
            open,
            sockets: of_sockets,
        };
        Ok(first.map(|first| Holding {
            address,
            held,
            first,
        }))
    };
    // What can't be read is no table.
    Ok(read().unwrap_or(None))
}

/// The `fs_struct` at this address, if one is there that is in use.
///
/// # Errors
/// [`TableError`] if the kernel's types lack something.
pub fn directories(
    guest: &Guest,
    table: &'static str,
    address: VirtualAddress,
) -> Result<Option<Holding>, TableError> {
    let layout = guest.layout::<DirectoriesLayout>(table)?;
    let mount = guest.layout::<MountLayout>(table)?;
    let entry = guest.layout::<EntryLayout>(table)?;
    let read = || -> Result<Option<Holding>, ReadError> {
        let is_object = |address| is_object_address(guest.space(), address);
        if !(1..=MOST_USERS).contains(&guest.number(address, &layout.users)?) {
            return Ok(None);
        }
        let pairs = [
            (&layout.root_mount, &layout.root),
            (&layout.current_mount, &layout.current),
        ];
        for (mounted, directory) in pairs {
            let mounted = guest.pointer(address, mounted)?;
            let directory = guest.pointer(address, directory)?;
            if !is_object(mounted) || !is_object(directory) {
                return Ok(None);
            }
            // Both are of one file system.
            let superblock = guest.pointer(mounted, &mount.superblock)?;
            let same = guest.pointer(directory, &entry.superblock)? == superblock;
            if !same || !is_object(superblock) {
                return Ok(None);
            }
        }
        Ok(Some(Holding {
            address,
            held: Held::Directories,
            first: guest.pointer(address, &layout.root)?,
        }))
    };
    Ok(read().unwrap_or(None))
}

impl Holding {
    /// It, if it still is in use as it was.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types lack something.
    pub fn now(&self, guest: &Guest, table: &'static str) -> Result<Option<Self>, TableError> {
        let found = match self.held {
            Held::Files { .. } => files(guest, table, self.address)?,
            Held::Directories => directories(guest, table, self.address)?,
        };
        Ok(found.filter(|found| found.first == self.first))
    }
}

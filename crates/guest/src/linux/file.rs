//! `struct file`, its inode and its file system (`include/linux/fs.h`).

use std::borrow::Cow;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};

use super::path::{Path, PathError, PathPointer, Paths, is_kernel_pointer};
use super::span::Span;
use super::task::leaders;
use crate::{Guest, TableError, Text, layout};

layout! {
    /// `include/linux/fs.h`
    struct FileLayout: "file" {
        mount: "f_path.mnt",
        dentry: "f_path.dentry",
        inode: "f_inode",
        flags: "f_flags",
        mode: "f_mode",
        position: "f_pos",
        mapping: "f_mapping",
    } optional {
        /// Until 6.12.
        count: "f_count",
        /// Since 6.13: one less than there are references.
        count_less_one: "f_ref",
    }
}

layout! {
    /// `fs/file_table.c`: a file that stands behind one of a stacked file
    /// system, since 6.5.
    struct BackingFileLayout: "backing_file" {
        file: "file",
        user_mount: "user_path.mnt",
        user_dentry: "user_path.dentry",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct InodeLayout: "inode" {
        mode: "i_mode",
        superblock: "i_sb",
        number: "i_ino",
        links: "i_nlink" | "__i_nlink",
        rdev: "i_rdev",
        bytes: "i_size",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct DeviceLayout: "super_block" {
        device: "s_dev",
        flags: "s_flags",
    }
}

layout! {
    /// `include/linux/fs_struct.h`
    struct FsLayout: "fs_struct" {
        root: "root",
    }
}

/// `S_IFMT` and what it can hold (`include/uapi/linux/stat.h`).
const S_IFMT: u32 = 0o170_000;
const S_IFSOCK: u32 = 0o140_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFREG: u32 = 0o100_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFIFO: u32 = 0o010_000;

/// `FMODE_BACKING` has been bit 25 at first and bit 24 later, and each of the
/// two means something else at other times (`include/linux/fs.h`).
const FMODE_BACKING: u32 = 1 << 24 | 1 << 25;

/// `SB_KERNMOUNT` and `SB_NOUSER`: file systems that the kernel mounts for
/// itself (`include/linux/fs.h`).
const SB_KERNEL_ONLY: u64 = 1 << 22 | 1 << 31;

/// A device number (`include/linux/kdev_t.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device(pub u32);

impl std::fmt::Display for Device {
    /// `major:minor` in decimal.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.0 >> 20, self.0 & 0xf_ffff)
    }
}

/// An open file, without what it refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// `struct file *`.
    pub address: VirtualAddress,
    /// `f_path`.
    pub path: PathPointer,
    /// `f_inode`.
    pub inode: VirtualAddress,
    /// `f_flags`: `O_…`.
    pub flags: u32,
    /// `f_mode`: `FMODE_…`.
    pub mode: u32,
    /// `f_pos`.
    pub position: i64,
    /// `f_mapping`: the `struct address_space *`.
    pub mapping: VirtualAddress,
    /// How many references there are to it, by its own count.
    pub references: i64,
}

/// What is shown of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// `struct inode *`.
    pub address: VirtualAddress,
    /// Type and permission bits.
    pub mode: u32,
    /// Number, unique in its file system.
    pub number: u64,
    /// Names that it has.
    pub links: u32,
    /// The device that it stands for, if it is a device node.
    pub rdev: Device,
    /// Bytes.
    pub size: u64,
    /// `struct super_block *`.
    pub superblock: VirtualAddress,
    /// The device of its file system.
    pub device: Device,
}

/// Reads files for one listing.
pub struct Files {
    file: Arc<FileLayout>,
    file_span: Span,
    backing: Option<Arc<BackingFileLayout>>,
    inode: Arc<InodeLayout>,
    inode_span: Span,
    device: Arc<DeviceLayout>,
    /// The paths of the same listing.
    pub paths: Paths,
}

impl Files {
    /// A reader for `table`; paths start at `root`, see [`Paths::new`].
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types are not known or lack a member.
    pub fn new(
        guest: &Guest,
        table: &'static str,
        root: Option<PathPointer>,
    ) -> Result<Self, TableError> {
        let file = guest.layout::<FileLayout>(table)?;
        let inode = guest.layout::<InodeLayout>(table)?;
        Ok(Self {
            file_span: Span::of(
                [
                    &file.mount,
                    &file.dentry,
                    &file.inode,
                    &file.flags,
                    &file.mode,
                    &file.position,
                    &file.mapping,
                ]
                .into_iter()
                .chain(&file.count)
                .chain(&file.count_less_one),
            ),
            inode_span: Span::of([
                &inode.mode,
                &inode.superblock,
                &inode.number,
                &inode.links,
                &inode.rdev,
                &inode.bytes,
            ]),
            file,
            inode,
            backing: guest.layout(table).ok(),
            device: guest.layout(table)?,
            paths: Paths::new(guest, table, root)?,
        })
    }

    /// The `struct file` at `address`.
    ///
    /// # Errors
    /// [`PathError`] if there can be none.
    pub fn open_file(&self, guest: &Guest, address: VirtualAddress) -> Result<OpenFile, PathError> {
        let what = "file";
        let address = kernel_pointer(what, address)?;
        let copied = self
            .file_span
            .read(guest.space(), address)
            .map_err(|source| read_error(what, address, source))?;
        Ok(OpenFile {
            address,
            path: PathPointer {
                mount: copied.pointer(&self.file.mount),
                dentry: copied.pointer(&self.file.dentry),
            },
            inode: copied.pointer(&self.file.inode),
            flags: copied.number(&self.file.flags) as u32,
            mode: copied.number(&self.file.mode) as u32,
            position: copied.number(&self.file.position) as i64,
            mapping: copied.pointer(&self.file.mapping),
            references: match (&self.file.count, &self.file.count_less_one) {
                (Some(count), _) => copied.number(count) as i64,
                (None, Some(count)) => (copied.number(count) as i64).saturating_add(1),
                (None, None) => i64::MAX,
            },
        })
    }

    /// The `struct inode` at `address`.
    ///
    /// # Errors
    /// [`PathError`] if there can be none.
    pub fn inode(&self, guest: &Guest, address: VirtualAddress) -> Result<Inode, PathError> {
        let what = "inode";
        let address = kernel_pointer(what, address)?;
        let copied = self
            .inode_span
            .read(guest.space(), address)
            .map_err(|source| read_error(what, address, source))?;
        let superblock = kernel_pointer("inode.i_sb", copied.pointer(&self.inode.superblock))?;
        Ok(Inode {
            address,
            mode: copied.number(&self.inode.mode) as u32,
            number: copied.number(&self.inode.number),
            links: copied.number(&self.inode.links) as u32,
            rdev: Device(copied.number(&self.inode.rdev) as u32),
            size: copied.number(&self.inode.bytes),
            superblock,
            device: self.device(guest, superblock)?,
        })
    }

    /// The device number of the file system at `superblock`.
    fn device(&self, guest: &Guest, superblock: VirtualAddress) -> Result<Device, PathError> {
        guest
            .number(superblock, &self.device.device)
            .map(|device| Device(device as u32))
            .map_err(|source| read_error("super_block.s_dev", superblock, source))
    }

    /// The path and inode that a user knows `file` by (`file_user_path` and
    /// `file_user_inode`): those of the overlay for a file that stands behind
    /// one of an overlay, as mapped ones do since 6.5.
    pub fn seen_by_user(&self, guest: &Guest, file: &OpenFile) -> (PathPointer, VirtualAddress) {
        self.backing_path(guest, file)
            .and_then(|path| Some((path, self.paths.inode_of(guest, path.dentry)?)))
            .unwrap_or((file.path, file.inode))
    }

    /// Whether the kernel opened the file for itself, as a stacked file system
    /// opens those of its layers: on a mount of its own of a file system which
    /// is for all, or, until 6.4, under the path of another inode. No
    /// descriptor leads to such a file.
    pub fn is_private(&self, guest: &Guest, file: &OpenFile, inode: &Inode) -> bool {
        let named = self.paths.inode_of(guest, file.path.dentry);
        if named.is_some_and(|named| named != file.inode) {
            return true;
        }
        self.paths.is_kernel_mount(guest, file.path.mount)
            && guest
                .number(inode.superblock, &self.device.flags)
                .is_ok_and(|flags| flags & SB_KERNEL_ONLY == 0)
    }

    fn backing_path(&self, guest: &Guest, file: &OpenFile) -> Option<PathPointer> {
        let layout = self.backing.as_ref()?;
        if file.mode & FMODE_BACKING == 0 {
            return None;
        }
        let base = file.address.wrapping_sub(layout.file.offset);
        let path = PathPointer {
            mount: guest.pointer(base, &layout.user_mount).ok()?,
            dentry: guest.pointer(base, &layout.user_dentry).ok()?,
        };
        // The bits alone don't tell: the file must be on one of the kernel's
        // own mounts, and what follows it must be a path.
        let own = self.paths.is_kernel_mount(guest, file.path.mount);
        (own && self.paths.agrees(guest, path)).then_some(path)
    }
}

/// What an open file is, in one word.
///
/// Files without a type of their own are told by the file system that makes
/// them, and among those by the name their maker gave them (`text` is their
/// path).
pub fn file_kind(inode: &Inode, file_system: &[u8], path: Option<&Path>) -> Cow<'static, str> {
    let text = path.map_or(&[][..], |path| path.text.as_bytes());
    match file_system {
        b"anon_inodefs" => return anonymous_kind(text),
        b"pidfs" => return "pidfd".into(),
        b"nsfs" => return "namespace".into(),
        b"dmabuf" => return "dmabuf".into(),
        b"secretmem" => return "secretmem".into(),
        _ => {}
    }
    match inode.mode & S_IFMT {
        S_IFREG if text.starts_with(b"/memfd:") => "memfd",
        S_IFREG => "regular",
        S_IFDIR => "directory",
        S_IFLNK => "symlink",
        S_IFCHR => "character",
        S_IFBLK => "block",
        S_IFSOCK => "socket",
        S_IFIFO if file_system == b"pipefs" => "pipe",
        S_IFIFO => "fifo",
        _ => "unknown",
    }
    .into()
}

/// The kind of an anonymous inode, from `anon_inode:[eventfd]`.
fn anonymous_kind(text: &[u8]) -> Cow<'static, str> {
    let name = text.strip_prefix(b"anon_inode:").unwrap_or(text);
    let name = name
        .strip_prefix(b"[")
        .and_then(|name| name.strip_suffix(b"]"))
        .unwrap_or(name);
    match name {
        b"eventpoll" => "epoll".into(),
        b"" => "anon_inode".into(),
        name => Text::new(name).to_display().into_owned().into(),
    }
}

/// The root directory of the `fs_struct` at `fs`.
///
/// # Errors
/// [`TableError`] if the kernel's types are not known; the inner error if
/// there is no root.
pub fn root_directory(
    guest: &Guest,
    table: &'static str,
    fs: VirtualAddress,
) -> Result<Result<PathPointer, PathError>, TableError> {
    let layout = guest.layout::<FsLayout>(table)?;
    Ok(kernel_pointer("task_struct.fs", fs).and_then(|fs| {
        let address = fs.wrapping_add(layout.root.offset);
        let root = PathPointer::read(guest.space(), address)
            .map_err(|source| read_error("fs_struct.root", address, source))?;
        kernel_pointer("fs_struct.root", root.dentry)?;
        Ok(root)
    }))
}

/// The root directory of process 1, where paths start for who reads the
/// guest's `/proc` as its administrator. `None` if there is no such process
/// (yet), or its root can't be read: paths then start at the root of their
/// mount tree.
///
/// # Errors
/// [`TableError`] if the kernel's types are not known.
pub fn initial_root(guest: &Guest, table: &'static str) -> Result<Option<PathPointer>, TableError> {
    let Some(init) = leaders(guest, table)?.find(|task| task.pid == 1) else {
        return Ok(None);
    };
    Ok(root_directory(guest, table, init.fs)?.ok())
}

pub(crate) fn kernel_pointer(
    what: &'static str,
    value: VirtualAddress,
) -> Result<VirtualAddress, PathError> {
    if is_kernel_pointer(value) {
        Ok(value)
    } else {
        Err(PathError::Pointer { what, value })
    }
}

fn read_error(what: &'static str, address: VirtualAddress, source: ReadError) -> PathError {
    PathError::Read {
        what,
        address,
        source,
    }
}

/// The names of the bits of `f_flags` (`include/uapi/asm-generic/fcntl.h`,
/// as on x86), longer sets first.
const FLAG_NAMES: &[(u32, &str)] = &[
    (0o20_200_000, "O_TMPFILE"),
    (0o4_010_000, "O_SYNC"),
    (0o100, "O_CREAT"),
    (0o200, "O_EXCL"),
    (0o400, "O_NOCTTY"),
    (0o1_000, "O_TRUNC"),
    (0o2_000, "O_APPEND"),
    (0o4_000, "O_NONBLOCK"),
    (0o10_000, "O_DSYNC"),
    (0o20_000, "O_ASYNC"),
    (0o40_000, "O_DIRECT"),
    (0o100_000, "O_LARGEFILE"),
    (0o200_000, "O_DIRECTORY"),
    (0o400_000, "O_NOFOLLOW"),
    (0o1_000_000, "O_NOATIME"),
    (O_CLOEXEC, "O_CLOEXEC"),
    (0o10_000_000, "O_PATH"),
];

/// Close the descriptor on execve: kept beside the descriptor, not in the
/// file.
pub const O_CLOEXEC: u32 = 0o2_000_000;

/// The names of the flags, the access mode first; bits without a name come
/// last, in hexadecimal.
pub fn flag_names(flags: u32) -> Vec<Cow<'static, str>> {
    const ACCESS: u32 = 3;
    let access = match flags & ACCESS {
        0 => "O_RDONLY",
        1 => "O_WRONLY",
        2 => "O_RDWR",
        _ => "O_ACCMODE",
    };
    let mut names = vec![access.into()];
    let mut left = flags & !ACCESS;
    for (bits, name) in FLAG_NAMES {
        if left & bits == *bits {
            names.push((*name).into());
            left &= !bits;
        }
    }
    if left != 0 {
        names.push(format!("{left:#x}").into());
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_flags() {
        assert_eq!(flag_names(0), ["O_RDONLY"]);
        assert_eq!(
            flag_names(0o100_002 | O_CLOEXEC),
            ["O_RDWR", "O_LARGEFILE", "O_CLOEXEC"]
        );
        assert_eq!(flag_names(0o4_010_001), ["O_WRONLY", "O_SYNC"]);
        assert_eq!(flag_names(0o20_200_002), ["O_RDWR", "O_TMPFILE"]);
        assert_eq!(flag_names(0x8000_0003), ["O_ACCMODE", "0x80000000"]);
    }

    #[test]
    fn names_devices() {
        assert_eq!(Device(8 << 20 | 17).to_string(), "8:17");
        assert_eq!(Device(u32::MAX).to_string(), "4095:1048575");
    }

    #[test]
    fn names_anonymous_inodes() {
        assert_eq!(anonymous_kind(b"anon_inode:[eventfd]"), "eventfd");
        assert_eq!(anonymous_kind(b"anon_inode:[eventpoll]"), "epoll");
        assert_eq!(anonymous_kind(b"anon_inode:inotify"), "inotify");
        assert_eq!(anonymous_kind(b"anon_inode:bpf-map"), "bpf-map");
        assert_eq!(anonymous_kind(b""), "anon_inode");
    }
}

//! The table `files`: what processes have open.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::sync::Arc;

use secmon_memory::{VirtualAddress, Volatility};

use super::file::{
    Files, Inode, O_CLOEXEC, OpenFile, file_kind, flag_names, initial_root, kernel_pointer,
};
use super::path::{Path, PathError, is_kernel_pointer};
use super::references::{FileReferences, Sharers};
use super::task::{Task, leaders};
use super::tree::Patience;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Value, layout,
};

const TABLE: &str = "files";

/// More descriptors than these are read of no process: the kernel's usual
/// limit (`fs.nr_open`).
const DESCRIPTOR_LIMIT: u64 = 1 << 20;
/// So many descriptors of one process that can't be right, and what was taken
/// for its table is none: the rest is given up.
const MOST_BROKEN: usize = 256;

/// Descriptors whose pointers are copied at once: a page of them.
const CHUNK: usize = 512;

/// How often what changed during the read is read again.
const ATTEMPTS: usize = 8;

layout! {
    /// `include/linux/fdtable.h`
    struct FilesStructLayout: "files_struct" {
        users: "count",
        table: "fdt",
    }
}

layout! {
    /// `include/linux/fdtable.h`
    struct FdTableLayout: "fdtable" {
        count: "max_fds",
        files: "fd",
        open: "open_fds",
        close_on_exec: "close_on_exec",
    }
}

/// An open file of a process.
pub struct Descriptor {
    pid: u64,
    fd: u64,
    close_on_exec: bool,
    file: OpenFile,
    inode: Result<Inode, PathError>,
    path: Result<Arc<Path>, PathError>,
    kind: Option<Cow<'static, str>>,
}

impl Descriptor {
    fn inode(&self, value: impl FnOnce(&Inode) -> Value) -> Value {
        Value::from_read(self.inode.as_ref(), value)
    }

    fn path(&self, value: impl FnOnce(&Path) -> Value) -> Value {
        Value::from_read(self.path.as_ref(), |path| value(path))
    }

    fn flags(&self) -> u32 {
        // fdinfo adds the descriptor's own flag in the same way.
        self.file.flags | if self.close_on_exec { O_CLOEXEC } else { 0 }
    }
}

/// The table.
pub static FILES: TableOf<Descriptor> = TableOf {
    name: TABLE,
    aliases: &["lsof"],
    meaning: "What processes have open: a row for each descriptor, as /proc/PID/fd and \
              /proc/PID/fdinfo show them.",
    columns: &[
        Column {
            name: "pid",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Process id in the initial pid namespace.",
            value: |_, row| row.pid.into(),
        },
        Column {
            name: "fd",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "File descriptor.",
            value: |_, row| row.fd.into(),
        },
        Column {
            name: "type",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "What it is: regular, directory, symlink, character, block, fifo, pipe, \
                      socket, memfd, namespace, pidfd, dmabuf, secretmem, or for an anonymous \
                      inode the name its maker gave it: eventfd, epoll, timerfd, signalfd, \
                      inotify, fanotify, userfaultfd, io_uring, perf_event, bpf-map, bpf-prog, ….",
            value: |_, row| match &row.kind {
                Some(kind) => Value::text(kind.as_bytes()),
                None => row.inode(|_| Value::unreadable("the type of its file system")),
            },
        },
        Column {
            name: "path",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Path from the guest's root directory, or from the root of its own mount \
                      namespace; without the suffix \" (deleted)\". What has no path has a name: \
                      pipe:[INODE], socket:[INODE], anon_inode:[eventfd], /memfd:NAME.",
            value: |_, row| row.path(|path| path.text.clone().into()),
        },
        Column {
            name: "deleted",
            kind: Kind::Boolean,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Whether the path's last component was removed, or the file never had a \
                      place in a directory as with memfd_create.",
            value: |_, row| row.path(|path| path.deleted.into()),
        },
        Column {
            name: "flags",
            kind: Kind::List,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Access mode and flags of the open file, by their names for open(2); bits \
                      without a name as one hexadecimal number.",
            value: |_, row| {
                let text = |name: Cow<'static, str>| Value::text(name.as_bytes());
                Value::List(flag_names(row.flags()).into_iter().map(text).collect())
            },
        },
        Column {
            name: "position",
            kind: Kind::Signed,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Offset of the next read or write, in bytes.",
            value: |_, row| row.file.position.into(),
        },
        Column {
            name: "size",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Size of the file in bytes, as its inode has it.",
            value: |_, row| row.inode(|inode| inode.size.into()),
        },
        Column {
            name: "mode",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Permission bits of the inode, in octal: 0644.",
            value: |_, row| row.inode(|inode| format!("{:04o}", inode.mode & 0o7777).into()),
        },
        Column {
            name: "inode",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Inode number; for a socket the one that the table of sockets has.",
            value: |_, row| row.inode(|inode| inode.number.into()),
        },
        Column {
            name: "device",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Device of the file system, MAJOR:MINOR in decimal.",
            value: |_, row| row.inode(|inode| inode.device.to_string().into()),
        },
        Column {
            name: "node",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Which device a character or block device node stands for, MAJOR:MINOR in \
                      decimal; null for anything else.",
            value: |_, row| match row.kind.as_deref() {
                Some("character" | "block") => row.inode(|inode| inode.rdev.to_string().into()),
                _ => Value::Null,
            },
        },
        Column {
            name: "links",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Names that the inode has; 0 for a file deleted everywhere, 1 for a folder on \
                      an overlay file system.",
            value: |_, row| row.inode(|inode| inode.links.into()),
        },
        Column {
            name: "address",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Address of the struct file; descriptors that share it have one position.",
            value: |_, row| row.file.address.into(),
        },
    ],
    items,
};

fn items(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Descriptor>,
) -> Result<(), TableError> {
    let mut reader = Reader {
        guest,
        sharers: Sharers::new(guest, TABLE, "files_struct.count"),
        references: FileReferences::new(guest, TABLE)?,
        files: Files::new(guest, TABLE, initial_root(guest, TABLE)?)?,
        files_struct: guest.layout(TABLE)?,
        table: guest.layout(TABLE)?,
        live: guest.space().memory().volatility() == Volatility::Live,
        patience: Patience::default(),
    };
    for task in leaders(guest, TABLE)? {
        if !selection.wants_pid(task.tgid.into()) || task.files.is_null() {
            continue;
        }
        if reader.descriptors_of(&task, sink).is_break() {
            return Ok(());
        }
    }
    if let Some(references) = &reader.references {
        references.report();
    }
    Ok(())
}

struct Reader<'g> {
    guest: &'g Guest,
    sharers: Sharers<'g>,
    references: Option<FileReferences<'g>>,
    files: Files,
    files_struct: Arc<FilesStructLayout>,
    table: Arc<FdTableLayout>,
    live: bool,
    patience: Patience,
}

/// A descriptor table as it was at one moment.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Table {
    count: u64,
    files: VirtualAddress,
    open: VirtualAddress,
    close_on_exec: VirtualAddress,
}

impl Reader<'_> {
    fn descriptors_of(&mut self, task: &Task, sink: &mut Items<'_, Descriptor>) -> ControlFlow<()> {
        let mut entries = Vec::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.guest.diagnostics().count_torn_read();
                self.patience.wait(attempt);
            }
            let table = match self.table(task.files) {
                Ok(table) => table,
                Err(error) => {
                    if !self.is_gone(task) {
                        self.record(task, "files_struct.fdt", Some(task.files), &error);
                    }
                    return ControlFlow::Continue(());
                }
            };
            entries.clear();
            let failures = self.entries(&table, &mut entries);
            // The kernel frees a table that was outgrown.
            if self.live && self.table(task.files) != Ok(table) && attempt + 1 < ATTEMPTS {
                continue;
            }
            if !self.is_gone(task) {
                for (address, error) in failures {
                    self.record(task, "fdtable.fd", Some(address), &error);
                }
            }
            break;
        }
        let users = self.guest.number(task.files, &self.files_struct.users);
        let first = self.sharers.note(task, task.files, users.unwrap_or(0));
        if let Some(references) = &mut self.references {
            references.program_of(task);
        }
        let mut broken = 0;
        for (fd, file, close_on_exec) in entries {
            if broken > MOST_BROKEN {
                let reason = format!("given up at descriptor {fd}: {broken} before it led nowhere");
                self.record(task, "fdtable.fd", Some(task.files), &reason);
                break;
            }
            let row = self.descriptor(task, fd, file, close_on_exec);
            // One that is closed meanwhile has no row on a running guest.
            let lost = match &row {
                Some(row) => row.inode.is_err(),
                None => !self.live,
            };
            broken += usize::from(lost);
            let Some(row) = row else {
                continue;
            };
            if let Some(references) = self.references.as_mut().filter(|_| first) {
                references.descriptor(task, fd, &row.file);
            }
            // On a running guest another file may be there by now.
            if let Ok(inode) = &row.inode
                && !self.live
                && self.files.is_private(self.guest, &row.file, inode)
            {
                self.guest.diagnostics().record(Diagnostic {
                    table: TABLE,
                    subject: format!("pid {} fd {fd}", task.tgid),
                    address: Some(row.file.address),
                    reason: "it leads to a file that the kernel opened for itself".into(),
                });
            }
            sink(row)?;
        }
        ControlFlow::Continue(())
    }

    fn record(
        &self,
        task: &Task,
        what: &str,
        address: Option<VirtualAddress>,
        error: &dyn std::fmt::Display,
    ) {
        self.guest.diagnostics().record(Diagnostic {
            table: TABLE,
            subject: format!("pid {} {what}", task.tgid),
            address,
            reason: format!("descriptors are missing: {error}"),
        });
    }

    /// Whether the process no longer uses the descriptors that it was found
    /// with.
    fn is_gone(&self, task: &Task) -> bool {
        let member = &task.model().layout.files;
        self.live && self.guest.pointer(task.address, member) != Ok(task.files)
    }

    fn table(&self, files: VirtualAddress) -> Result<Table, PathError> {
        let read = |what, address| {
            move |source| PathError::Read {
                what,
                address,
                source,
            }
        };
        let address = self
            .guest
            .pointer(files, &self.files_struct.table)
            .map_err(read("files_struct", files))?;
        let address = kernel_pointer("files_struct.fdt", address)?;
        let pointer = |member| {
            self.guest
                .pointer(address, member)
                .map_err(read("fdtable", address))
        };
        Ok(Table {
            count: self
                .guest
                .number(address, &self.table.count)
                .map_err(read("fdtable", address))?,
            files: kernel_pointer("fdtable.fd", pointer(&self.table.files)?)?,
            open: kernel_pointer("fdtable.open_fds", pointer(&self.table.open)?)?,
            close_on_exec: kernel_pointer(
                "fdtable.close_on_exec",
                pointer(&self.table.close_on_exec)?,
            )?,
        })
    }

    /// The open descriptors of `table`, and what could not be read of it.
    fn entries(
        &self,
        table: &Table,
        entries: &mut Vec<(u64, VirtualAddress, bool)>,
    ) -> Vec<(VirtualAddress, String)> {
        let space = self.guest.space();
        let mut failures = Vec::new();
        // The maps of open descriptors and of those that execve closes lie
        // side by side, a bit each for every descriptor that there is room
        // for.
        let between = table.open.as_u64().abs_diff(table.close_on_exec.as_u64());
        let room = between.saturating_mul(8);
        let mut count = table.count;
        if room != count && room.is_power_of_two() && (64..=DESCRIPTOR_LIMIT).contains(&room) {
            count = room;
        }
        count = count.min(DESCRIPTOR_LIMIT);
        if table.count != room || table.count != count {
            let reason = format!(
                "max_fds is {}, but there is room for {room} in the map of open descriptors; \
                 {count} are read",
                table.count,
            );
            failures.push((table.files, reason));
        }
        let mut pointers = [[0; 8]; CHUNK];
        for first in (0..count).step_by(CHUNK) {
            if failures.len() > MOST_BROKEN {
                let reason = format!("given up at descriptor {first} of {count}");
                failures.push((table.files, reason));
                break;
            }
            let length = (count - first).min(CHUNK as u64) as usize;
            let address = table.files.wrapping_add(first * 8);
            let Some(chunk) = pointers.get_mut(..length) else {
                break;
            };
            if let Err(error) = space.read(address, chunk.as_flattened_mut()) {
                failures.push((address, error.to_string()));
                // One hole is told; a table with nothing behind it ends here.
                if failures.len() > 16 {
                    break;
                }
                continue;
            }
            for (fd, pointer) in (first..).zip(chunk.iter()) {
                let file = VirtualAddress::new(u64::from_le_bytes(*pointer));
                if file.is_null() {
                    continue;
                }
                let bit = |map: VirtualAddress| {
                    let bits = space.read_u64(map.wrapping_add(fd / 64 * 8));
                    bits.is_ok_and(|bits| bits >> (fd % 64) & 1 == 1)
                };
                let close_on_exec = bit(table.close_on_exec);
                // A number is taken before its file is set and given back
                // after it is cleared; a running guest may do so between the
                // two reads.
                if !self.live && !bit(table.open) {
                    let reason = format!("descriptor {fd} has a file, but is not in open_fds");
                    failures.push((table.open, reason));
                }
                entries.push((fd, file, close_on_exec));
            }
        }
        failures
    }

    /// The file of descriptor `fd`, if there is one.
    fn slot(&self, task: &Task, fd: u64) -> Option<VirtualAddress> {
        let table = self.table(task.files).ok()?;
        let address = table.files.wrapping_add(fd.checked_mul(8)?);
        let file = self.guest.space().read_pointer(address).ok()?;
        (fd < table.count && !file.is_null()).then_some(file)
    }

    /// The row of descriptor `fd`, or none if it was closed meanwhile.
    fn descriptor(
        &self,
        task: &Task,
        fd: u64,
        mut file: VirtualAddress,
        close_on_exec: bool,
    ) -> Option<Descriptor> {
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.patience.wait(attempt);
            }
            let row = self.read(task, fd, file, close_on_exec);
            if !self.live {
                return match row {
                    Ok(row) => Some(row),
                    Err(error) => {
                        self.record(task, &format!("fd {fd}"), Some(file), &error);
                        None
                    }
                };
            }
            // Files are freed and used again at once; only what the
            // descriptor still refers to was its file.
            let now = if self.is_gone(task) {
                None
            } else {
                self.slot(task, fd)
            };
            match (now, row) {
                (Some(now), Ok(row)) if now == file => return Some(row),
                (Some(now), Err(error)) if now == file && !is_kernel_pointer(now) => {
                    self.record(task, &format!("fd {fd}"), Some(file), &error);
                    return None;
                }
                (Some(now), _) => file = now,
                (None, _) => {
                    self.guest.diagnostics().count_torn_read();
                    return None;
                }
            }
            self.guest.diagnostics().count_torn_read();
        }
        let reason = format!("it changed during each of {ATTEMPTS} reads");
        self.record(task, &format!("fd {fd}"), Some(file), &reason);
        None
    }

    fn read(
        &self,
        task: &Task,
        fd: u64,
        address: VirtualAddress,
        close_on_exec: bool,
    ) -> Result<Descriptor, PathError> {
        let file = self.files.open_file(self.guest, address)?;
        let inode = self.files.inode(self.guest, file.inode);
        let path = self.files.paths.resolve(self.guest, file.path);
        let kind = inode.as_ref().ok().and_then(|inode| {
            let system = self.files.paths.file_system(self.guest, inode.superblock);
            let path = path.as_deref().ok();
            Some(file_kind(inode, system.ok()?.as_bytes(), path))
        });
        Ok(Descriptor {
            pid: task.tgid.into(),
            fd,
            close_on_exec,
            file,
            inode,
            path,
            kind,
        })
    }
}

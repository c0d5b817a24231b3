//! Which processes hold which objects of one kind, sockets, namespaces or BPF
//! programs say: through their file descriptors (`files_struct`,
//! `include/linux/fdtable.h`; `struct file`, `include/linux/fs.h`). The kind
//! is told by the file's operations, the object by the private data of the file
//! or of its inode.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::is_object_address;
use crate::linux::task::{Task, leaders, threads};
use crate::{Diagnostic, Guest, TableError, layout};

/// More descriptors are read of no process: the usual `fs.nr_open`.
const MOST_DESCRIPTORS: u64 = 1 << 20;
/// More are not read of all processes together, nor are more kept: tables of
/// descriptors whose sizes are lies would else take hours, and all memory.
const MOST_READ: u64 = 1 << 23;
const MOST_KEPT: u64 = 1 << 18;
/// Descriptors that are read at once.
const CHUNK: u64 = 512;
/// How often a table that was outgrown during the read is read again.
const ATTEMPTS: u32 = 8;

layout! {
    /// `include/linux/fdtable.h`
    struct FilesLayout: "files_struct" {
        table: "fdt",
    }
}

layout! {
    /// `include/linux/fdtable.h`
    struct DescriptorTableLayout: "fdtable" {
        count: "max_fds",
        files: "fd",
        open: "open_fds",
        close_on_exec: "close_on_exec",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct FileLayout: "file" {
        operations: "f_op",
        private_data: "private_data",
        inode: "f_inode",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct InodeLayout: "inode" {
        private: "i_private",
    }
}

/// What of a file leads to the object behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// `file.private_data`.
    File,
    /// `inode.i_private`.
    Inode,
}

/// A process that has an object open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The process.
    pub pid: u32,
    /// The process's name.
    pub comm: Arc<[u8]>,
    /// The descriptor's number.
    pub fd: u64,
    /// The open file.
    pub file: VirtualAddress,
}

/// All objects of a kind behind file descriptors, with who holds them.
#[derive(Debug, Default)]
pub struct Owners {
    by_object: HashMap<VirtualAddress, Vec<Owner>>,
    /// In the order in which they were met.
    order: Vec<VirtualAddress>,
}

impl Owners {
    /// Looks through the descriptors of all processes for files that have one
    /// of these operations; of several names of operations a kernel need not
    /// have all, but the first.
    ///
    /// # Errors
    /// [`TableError`] if the list of processes can't be found, or types lack
    /// a member.
    pub fn read(
        guest: &Guest,
        table: &'static str,
        behind: Behind,
        first: &'static str,
        others: &[&'static str],
    ) -> Result<Self, TableError> {
        let mut operations = vec![guest.symbol(table, first)?];
        let others = others.iter();
        operations.extend(others.filter_map(|name| guest.address(name)));
        let reader = Reader {
            guest,
            table,
            files: guest.layout::<FilesLayout>(table)?,
            descriptors: guest.layout::<DescriptorTableLayout>(table)?,
            file: guest.layout::<FileLayout>(table)?,
            inode: match behind {
                Behind::File => None,
                Behind::Inode => Some(guest.layout::<InodeLayout>(table)?),
            },
            operations,
            read: Cell::new(0),
            kept: Cell::new(0),
        };
        let mut owners = Self::default();
        for leader in leaders(guest, table)? {
            if leader.is_kernel_thread() {
                continue;
            }
            // Threads share their descriptors unless they asked not to.
            let mut seen = HashSet::new();
            reader.process(&leader, &leader, &mut seen, &mut owners);
            for thread in threads(guest, table, &leader)? {
                reader.process(&leader, &thread, &mut seen, &mut owners);
            }
        }
        Ok(owners)
    }

    /// Who holds the object at `object`.
    pub fn of(&self, object: VirtualAddress) -> &[Owner] {
        self.by_object.get(&object).map_or(&[], Vec::as_slice)
    }

    /// All objects that are held, each once.
    pub fn objects(&self) -> impl Iterator<Item = VirtualAddress> + '_ {
        self.order.iter().copied()
    }

    fn add(&mut self, object: VirtualAddress, owner: Owner) {
        let owners = self.by_object.entry(object).or_default();
        if owners.is_empty() {
            self.order.push(object);
        }
        owners.push(owner);
    }
}

struct Reader<'g> {
    guest: &'g Guest,
    table: &'static str,
    files: Arc<FilesLayout>,
    descriptors: Arc<DescriptorTableLayout>,
    file: Arc<FileLayout>,
    /// Where the object is behind the inode.
    inode: Option<Arc<InodeLayout>>,
    operations: Vec<VirtualAddress>,
    /// How many descriptors have been read, and how many kept.
    read: Cell<u64>,
    kept: Cell<u64>,
}

/// Where a process's descriptors are.
#[derive(Clone, Copy, PartialEq, Eq)]
struct DescriptorTable {
    count: u64,
    files: VirtualAddress,
    /// How many descriptors there are bits for: the maps of open ones and of
    /// those that execve closes lie side by side.
    room: u64,
}

/// An open file with an object of the kind.
struct Held {
    fd: u64,
    file: VirtualAddress,
    object: VirtualAddress,
}

impl Reader<'_> {
    /// Looks through the descriptors of `task`, a thread of `leader`, unless
    /// they are among those that were `seen`.
    fn process(
        &self,
        leader: &Task,
        task: &Task,
        seen: &mut HashSet<VirtualAddress>,
        owners: &mut Owners,
    ) {
        if task.files.is_null() || !seen.insert(task.files) {
            return;
        }
        let comm: Arc<[u8]> = leader.comm().into();
        let record = |reason: String| {
            self.guest.diagnostics().record(Diagnostic {
                table: self.table,
                subject: format!("pid {} files_struct", leader.tgid),
                address: Some(task.files),
                reason,
            });
        };
        match self.descriptors(task.files) {
            Ok((held, cut_short)) => {
                for Held { fd, file, object } in held {
                    let comm = comm.clone();
                    let pid = leader.tgid;
                    let owner = Owner {
                        pid,
                        comm,
                        fd,
                        file,
                    };
                    owners.add(object, owner);
                }
                if let Some(reason) = cut_short {
                    record(reason);
                }
            }
            // A process that ends lets go of its descriptors first.
            Err(error) if task.is_unchanged(self.guest) => {
                record(format!("what it holds is without its owner: {error}"));
            }
            Err(_) => self.guest.diagnostics().count_torn_read(),
        }
    }

    fn table_of(&self, files: VirtualAddress) -> Result<DescriptorTable, ReadError> {
        let table = self.guest.pointer(files, &self.files.table)?;
        let open = self.guest.pointer(table, &self.descriptors.open)?;
        let close_on_exec = self.guest.pointer(table, &self.descriptors.close_on_exec)?;
        let between = open.as_u64().abs_diff(close_on_exec.as_u64());
        Ok(DescriptorTable {
            count: self.guest.number(table, &self.descriptors.count)?,
            files: self.guest.pointer(table, &self.descriptors.files)?,
            room: between.saturating_mul(8),
        })
    }

    /// The objects of the kind, and why not all descriptors were read.
    fn descriptors(&self, files: VirtualAddress) -> Result<(Vec<Held>, Option<String>), ReadError> {
        let mut held = Vec::new();
        let mut cut_short = None;
        let kept = self.kept.get();
        for _ in 0..ATTEMPTS {
            let table = self.table_of(files)?;
            held.clear();
            let left = MOST_READ.saturating_sub(self.read.get());
            let count = table.count.min(table.room).min(MOST_DESCRIPTORS).min(left);
            cut_short = (count < table.count).then(|| {
                format!(
                    "max_fds is {}, but there is room for {} in the map of open descriptors; \
                     {count} are read",
                    table.count, table.room
                )
            });
            self.read.set(self.read.get().saturating_add(count));
            let mut bytes = [0; (CHUNK * 8) as usize];
            let mut first = 0;
            while first < count {
                let now = CHUNK.min(count - first);
                let part = bytes.get_mut(..(now * 8) as usize).unwrap_or_default();
                self.guest
                    .space()
                    .read(table.files.wrapping_add(first * 8), part)?;
                for (fd, pointer) in (first..).zip(part.chunks_exact(8)) {
                    let file =
                        VirtualAddress::new(pointer.try_into().map_or(0, u64::from_le_bytes));
                    let Some(object) = self.object(file) else {
                        continue;
                    };
                    if kept.saturating_add(held.len() as u64) >= MOST_KEPT {
                        cut_short = Some(format!("more than {MOST_KEPT} are held by processes"));
                        break;
                    }
                    held.push(Held { fd, file, object });
                }
                first += now;
            }
            if self.table_of(files)? == table {
                break;
            }
            self.guest.diagnostics().count_torn_read();
        }
        self.kept.set(kept.saturating_add(held.len() as u64));
        Ok((held, cut_short))
    }

    /// The object behind an open file, if it is of the kind.
    fn object(&self, file: VirtualAddress) -> Option<VirtualAddress> {
        if !is_object_address(self.guest.space(), file) {
            return None;
        }
        let operations = self.guest.pointer(file, &self.file.operations).ok()?;
        if !self.operations.contains(&operations) {
            return None;
        }
        let object = match &self.inode {
            None => self.guest.pointer(file, &self.file.private_data).ok()?,
            Some(layout) => {
                let inode = self.guest.pointer(file, &self.file.inode).ok()?;
                self.guest.pointer(inode, &layout.private).ok()?
            }
        };
        is_object_address(self.guest.space(), object).then_some(object)
    }
}

//! Which processes hold which objects of one kind, sockets, namespaces or BPF
//! programs say: through their file descriptors (`files_struct`,
//! `include/linux/fdtable.h`; `struct file`, `include/linux/fs.h`). The kind
//! is told by the file's operations, the object by the private data of the file
//! or of its inode.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::is_object_address;
use crate::linux::task::{Task, leaders, threads};
use crate::{Diagnostic, Guest, TableError, layout};

/// No process has more descriptors: the largest `fs.nr_open` is 2^30, the
/// usual 2^20.
const MOST_DESCRIPTORS: u64 = 1 << 22;
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
        others: &[&str],
    ) -> Result<Self, TableError> {
        let mut operations = vec![guest.symbol(table, first)?];
        let others = others.iter();
        operations.extend(others.filter_map(|name| guest.symbols().address(name)));
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
        let outcome = self.descriptors(task.files, &mut |fd, file| {
            if let Some(object) = self.object(file) {
                owners.add(
                    object,
                    Owner {
                        pid: leader.tgid,
                        comm: comm.clone(),
                        fd,
                        file,
                    },
                );
            }
        });
        if let Err(error) = outcome {
            // A process that ends lets go of its descriptors first.
            if task.is_unchanged(self.guest) {
                self.guest.diagnostics().record(Diagnostic {
                    table: self.table,
                    subject: format!("pid {} files_struct", leader.tgid),
                    address: Some(task.files),
                    reason: format!("what it holds is without its owner: {error}"),
                });
            } else {
                self.guest.diagnostics().count_torn_read();
            }
        }
    }

    fn table_of(&self, files: VirtualAddress) -> Result<(u64, VirtualAddress), ReadError> {
        let table = self.guest.pointer(files, &self.files.table)?;
        let count = self.guest.number(table, &self.descriptors.count)?;
        let array = self.guest.pointer(table, &self.descriptors.files)?;
        Ok((count, array))
    }

    fn descriptors(
        &self,
        files: VirtualAddress,
        visit: &mut dyn FnMut(u64, VirtualAddress),
    ) -> Result<(), ReadError> {
        let mut pointers = Vec::new();
        for _ in 0..ATTEMPTS {
            let (count, array) = self.table_of(files)?;
            pointers.clear();
            let mut bytes = [0; (CHUNK * 8) as usize];
            let count = count.min(MOST_DESCRIPTORS);
            let mut first = 0;
            while first < count {
                let now = CHUNK.min(count - first);
                let part = bytes.get_mut(..(now * 8) as usize).unwrap_or_default();
                self.guest
                    .space()
                    .read(array.wrapping_add(first * 8), part)?;
                for (fd, pointer) in (first..).zip(part.chunks_exact(8)) {
                    let pointer = pointer.try_into().map_or(0, u64::from_le_bytes);
                    if pointer != 0 {
                        pointers.push((fd, VirtualAddress::new(pointer)));
                    }
                }
                first += now;
            }
            if self.table_of(files)? == (count, array) {
                break;
            }
            self.guest.diagnostics().count_torn_read();
        }
        for (fd, file) in pointers {
            visit(fd, file);
        }
        Ok(())
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

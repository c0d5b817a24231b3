//! Lies in a guest's memory: a real guest's image, changed where a monitor
//! looks.
//!
//! Where things lie is read from the image itself, which stays as it was; the
//! changes go to a copy, which is what the monitor sees.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use secmon_memory::VirtualAddress;
use secmon_tests::open::{self, Opened};

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Pages below this hold the real-mode trampoline, which leads to the kernel.
const LOW: u64 = 1 << 20;

/// An image, and a copy of it that lies.
pub struct Liar {
    opened: Opened,
    pristine: PathBuf,
    copy: File,
    size: u64,
    random: u64,
}

/// A lie, and what it is.
pub struct Lie {
    /// The attempt it belongs to.
    pub name: &'static str,
    /// Tells it.
    pub tell: fn(&mut Liar) -> Result<()>,
}

/// All of them.
pub const LIES: &[Lie] = &[
    Lie {
        name: "cyclic_lists",
        tell: cyclic_lists,
    },
    Lie {
        name: "cyclic_trees",
        tell: cyclic_trees,
    },
    Lie {
        name: "huge_counts",
        tell: huge_counts,
    },
    Lie {
        name: "page_tables",
        tell: page_tables,
    },
    Lie {
        name: "pointers_everywhere",
        tell: pointers_everywhere,
    },
    Lie {
        name: "random_words",
        tell: random_words,
    },
    Lie {
        name: "random_memory",
        tell: random_memory,
    },
    Lie {
        name: "no_memory",
        tell: no_memory,
    },
];

impl Liar {
    /// An image whose bytes lie at their physical addresses, and its copy,
    /// which is made here.
    ///
    /// # Errors
    /// If the image holds no kernel, or the copy can't be made.
    pub fn new(pristine: &Path, copy: &Path) -> Result<Self> {
        fs::copy(pristine, copy)?;
        Ok(Self {
            opened: open::image(pristine)?,
            pristine: pristine.to_owned(),
            copy: File::options().read(true).write(true).open(copy)?,
            size: fs::metadata(pristine)?.len(),
            random: 0x9e37_79b9_7f4a_7c15,
        })
    }

    /// Makes the copy what the image is. It is written in place, as a monitor
    /// has it mapped.
    ///
    /// # Errors
    /// The system's.
    pub fn restore(&mut self) -> Result<()> {
        let mut from = File::open(&self.pristine)?;
        let mut chunk = vec![0; 4 << 20];
        self.copy.seek(SeekFrom::Start(0))?;
        loop {
            let count = from.read(&mut chunk)?;
            if count == 0 {
                return Ok(());
            }
            self.copy.write_all(&chunk[..count])?;
        }
    }

    /// The next of some arbitrary numbers, the same ones each time.
    pub fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The bytes of the image.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The copy, for another writer.
    ///
    /// # Errors
    /// The system's.
    pub fn copy(&self) -> Result<File> {
        Ok(self.copy.try_clone()?)
    }

    fn symbol(&self, name: &str) -> Result<u64> {
        let address = self.opened.kernel.profile.symbols().address(name);
        Ok(address.with_context(|| name.to_owned())?.as_u64())
    }

    fn member(&self, structure: &str, path: &str) -> Result<u64> {
        let types = self.opened.kernel.profile.types()?;
        Ok(types.member(structure, path)?.offset)
    }

    /// Where an address lies in the image.
    fn place(&self, address: u64) -> Result<u64> {
        let space = &self.opened.kernel.space;
        let found = space.translate(VirtualAddress::new(address))?;
        Ok(found.physical.as_u64())
    }

    fn read(&self, address: u64) -> Result<u64> {
        let space = &self.opened.kernel.space;
        Ok(space.read_u64(VirtualAddress::new(address))?)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.copy.write_all_at(bytes, self.place(address)?)?)
    }

    fn set(&self, address: u64, value: u64) -> Result<()> {
        self.write(address, &value.to_le_bytes())
    }

    /// The addresses of all processes' `task_struct`s.
    fn tasks(&self) -> Result<Vec<u64>> {
        let first = self.symbol("init_task")?;
        let next = self.member("task_struct", "tasks.next")?;
        let mut tasks = vec![first];
        for _ in 0..10_000 {
            let last = *tasks.last().context("one")?;
            let task = self.read(last + next)? - next;
            if task == first {
                return Ok(tasks);
            }
            tasks.push(task);
        }
        anyhow::bail!("the list of processes has no end")
    }
}

/// Lists that come back to their second entry, or stay where they are.
fn cyclic_lists(liar: &mut Liar) -> Result<()> {
    let tasks = liar.tasks()?;
    let next = liar.member("task_struct", "tasks.next")?;
    let half = tasks[tasks.len() / 2];
    liar.set(half + next, tasks[1] + next)?;
    for list in ["thread_node", "sibling", "children"] {
        let offset = liar.member("task_struct", &format!("{list}.next"))?;
        for task in tasks.iter().skip(1).step_by(2) {
            liar.set(task + offset, task + offset)?;
        }
    }
    let modules = liar.symbol("modules")?;
    let first = liar.read(modules)?;
    liar.set(first, first)?;
    let mounts = liar.member("task_struct", "nsproxy")?;
    let namespace = liar.read(tasks[1] + mounts)?;
    let namespace = liar.read(namespace + liar.member("nsproxy", "mnt_ns")?)?;
    let list = namespace + liar.member("mnt_namespace", "list")?;
    let first = liar.read(list)?;
    liar.set(first, first)?;
    Ok(())
}

/// Nodes of trees whose slots all lead to the node itself.
fn cyclic_trees(liar: &mut Liar) -> Result<()> {
    let mut changed = 0;
    let maps = liar.member("task_struct", "mm")?;
    let root = liar.member("mm_struct", "mm_mt.ma_root")?;
    for task in liar.tasks()? {
        let memory = liar.read(task + maps)?;
        if memory == 0 {
            continue;
        }
        let link = liar.read(memory + root)?;
        // A node's address, its kind in the low bits; 2 marks a node.
        let node = link & !0xff;
        if link & 2 == 0 || node == 0 {
            continue;
        }
        for slot in (0..256).step_by(8) {
            liar.set(node + slot, link)?;
        }
        changed += 1;
    }
    ensure!(changed > 3, "only {changed} trees of memory areas");
    // The processes' numbers are in a radix tree.
    let head = liar.symbol("init_pid_ns")?
        + liar.member("pid_namespace", "idr")?
        + liar.member("idr", "idr_rt")?
        + liar.member("xarray", "xa_head")?;
    let link = liar.read(head)?;
    let node = link & !3;
    let slots = liar.member("xa_node", "slots")?;
    for slot in 0..64 {
        liar.set(node + slots + slot * 8, link)?;
    }
    Ok(())
}

/// Numbers of everything as large as they get, strings without end.
fn huge_counts(liar: &mut Liar) -> Result<()> {
    let files = liar.member("task_struct", "files")?;
    let table = liar.member("files_struct", "fdt")?;
    let count = liar.member("fdtable", "max_fds")?;
    let memory = liar.member("task_struct", "mm")?;
    let top = 0x7fff_ffff_f000_u64;
    for task in liar.tasks()? {
        let open = liar.read(task + files)?;
        if open != 0 {
            let table = liar.read(open + table)?;
            liar.write(table + count, &u32::MAX.to_le_bytes())?;
        }
        let memory = liar.read(task + memory)?;
        if memory != 0 {
            for (member, value) in [
                ("arg_start", 0),
                ("arg_end", top),
                ("env_start", 0),
                ("env_end", top),
                ("total_vm", u64::MAX),
            ] {
                let offset = liar.member("mm_struct", member)?;
                liar.set(memory + offset, value)?;
            }
            let offset = liar.member("mm_struct", "map_count")?;
            liar.write(memory + offset, &i32::MAX.to_le_bytes())?;
        }
    }
    // Modules of four gigabytes with names that do not end.
    let head = liar.symbol("modules")?;
    let (list, name) = (
        liar.member("module", "list")?,
        liar.member("module", "name")?,
    );
    let mut module = liar.read(head)?;
    while module != head {
        liar.write(module - list + name, &[b'A'; 56])?;
        module = liar.read(module)?;
    }
    for symbol in ["log_buf_len", "nr_cpu_ids", "nr_threads", "__log_buf_len"] {
        if let Ok(address) = liar.symbol(symbol) {
            liar.write(address, &u32::MAX.to_le_bytes())?;
        }
    }
    // The descriptors of the log: 2^31 of them.
    if let Ok(ring) = liar.symbol("prb") {
        let ring = liar.read(ring)?;
        for member in ["desc_ring.count_bits", "text_data_ring.size_bits"] {
            let offset = liar.member("printk_ringbuffer", member)?;
            liar.write(ring + offset, &31_u32.to_le_bytes())?;
        }
    }
    Ok(())
}

/// Page tables whose entries all lead to the table itself: each process's
/// lower half, and the kernel's own but for its image and direct map.
fn page_tables(liar: &mut Liar) -> Result<()> {
    let (memory, root) = (
        liar.member("task_struct", "mm")?,
        liar.member("mm_struct", "pgd")?,
    );
    let mut changed = 0;
    for task in liar.tasks()? {
        let memory = liar.read(task + memory)?;
        if memory == 0 {
            continue;
        }
        let table = liar.place(liar.read(memory + root)?)?;
        // Present, writable, user.
        let entry = (table | 7).to_le_bytes();
        let entries: Vec<u8> = entry.iter().copied().cycle().take(2048).collect();
        liar.copy.write_all_at(&entries, table)?;
        changed += 1;
    }
    ensure!(changed > 3, "only {changed} page tables");
    let table = liar.opened.kernel.space.root().as_u64();
    let mut entries = [0; PAGE as usize];
    liar.copy.read_exact_at(&mut entries, table)?;
    for (index, entry) in entries.chunks_exact_mut(8).enumerate() {
        // vmalloc and the array of pages lie between direct map and image.
        if (400..500).contains(&index) {
            entry.copy_from_slice(&(table | 3).to_le_bytes());
        }
    }
    Ok(liar.copy.write_all_at(&entries, table)?)
}

/// All memory but the kernel's image and the first megabyte is pointers to the
/// first process.
fn pointers_everywhere(liar: &mut Liar) -> Result<()> {
    let image = liar.opened.kernel.image;
    let start = image.physical_base.as_u64();
    let kept = start..start + image.size;
    let pointer = liar.symbol("init_task")?.to_le_bytes();
    let page: Vec<u8> = pointer
        .iter()
        .copied()
        .cycle()
        .take(PAGE as usize)
        .collect();
    for at in (LOW..liar.size).step_by(PAGE as usize) {
        // Tables of pages stay, or there is no kernel to be misled about.
        if !kept.contains(&at) && !liar.is_page_table(at)? {
            liar.copy.write_all_at(&page, at)?;
        }
    }
    Ok(())
}

impl Liar {
    /// Whether a page looks like a table of pages: entries that are present
    /// and lead into memory.
    fn is_page_table(&self, at: u64) -> Result<bool> {
        let mut page = [0; PAGE as usize];
        self.copy.read_exact_at(&mut page, at)?;
        let entries = page.chunks_exact(8).filter_map(|bytes| {
            let entry = u64::from_le_bytes(bytes.try_into().ok()?);
            (entry != 0).then_some(entry)
        });
        let (mut some, mut all) = (false, true);
        for entry in entries {
            some = true;
            all &= entry & 1 == 1 && (entry & 0x000f_ffff_ffff_f000) < 1 << 40;
        }
        Ok(some && all)
    }
}

/// One word in each 64 pages, anywhere.
fn random_words(liar: &mut Liar) -> Result<()> {
    let size = liar.size;
    for _ in 0..size / PAGE / 8 {
        let (place, value) = (liar.random() % (size - 8), liar.random());
        // Half of them are addresses of the kernel's.
        let value = if value & 1 == 0 {
            value
        } else {
            liar.opened.kernel.direct_map.as_u64() + value % size
        };
        liar.copy.write_all_at(&value.to_le_bytes(), place)?;
    }
    Ok(())
}

/// Not one byte as it was.
fn random_memory(liar: &mut Liar) -> Result<()> {
    let mut chunk = Vec::with_capacity(1 << 20);
    for at in (0..liar.size).step_by(1 << 20) {
        chunk.clear();
        while chunk.len() < 1 << 20 {
            chunk.extend(liar.random().to_le_bytes());
        }
        liar.copy.write_all_at(&chunk, at)?;
    }
    Ok(())
}

/// Zeros.
fn no_memory(liar: &mut Liar) -> Result<()> {
    let zeros = vec![0; 4 << 20];
    for at in (0..liar.size).step_by(zeros.len()) {
        liar.copy.write_all_at(&zeros, at)?;
    }
    Ok(())
}

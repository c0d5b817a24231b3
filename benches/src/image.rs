//! The image of a real guest with 1,000 tasks and 512 MiB, and its kernel.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use secmon_lab::{Backing, Guest, Suite, Workload};
use secmon_memory::{AddressSpace, PhysicalMemory, VirtualAddress};
use secmon_platform::target::{OpenOptions, OpenedTarget, Target};
use secmon_profile::{Cache, FindOptions, Kernel};
use secmon_reference::KernelFile;

/// Tasks in the image, at least.
pub const TASKS: usize = 1000;
/// Of them those that the lab's workload is asked for; kernel threads and the
/// rest of the workload make up more than the rest.
const PROCESSES: u32 = 960;
/// Processes of the image with truth that do nothing; the rich workload and
/// kernel threads bring the number above 1,000.
const PLAIN_PROCESSES: u32 = 830;
/// Processes of the image for detectors that do nothing; the rich workload and
/// kernel threads bring the number above 300.
const CHECKED_PROCESSES: u32 = 130;

/// Where guest physical memory is free of holes: above the BIOS's first MiB.
pub const FIRST: u64 = 16 << 20;
/// The bytes that random and sequential reads go over.
pub const SPAN: u64 = 480 << 20;

/// The image, made by booting a guest the first time, then kept in the build
/// folder. `SECMON_BENCH_IMAGE` names another one.
///
/// # Errors
/// If the guest can't be booted or the image not be written.
pub fn path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SECMON_BENCH_IMAGE") {
        return Ok(path.into());
    }
    let workload = Workload {
        processes: PROCESSES,
        rich: false,
        ..Workload::small()
    };
    kept("linux-6.12-1000-tasks.raw", workload)
}

/// The image of a guest with 300 processes of all kinds and 512 MiB, kept as
/// well, for detectors.
///
/// # Errors
/// As [`path`].
pub fn with_300_processes() -> Result<PathBuf> {
    let workload = Workload {
        processes: CHECKED_PROCESSES,
        ..Workload::rich()
    };
    kept("linux-6.12-300-processes.raw", workload)
}

/// The file of the kernel in the image for detectors, unpacked.
///
/// # Errors
/// If it can't be fetched or read. An image that was kept while the archive
/// went on to a newer kernel has to be removed, to be made anew.
pub fn kernel_file() -> Result<Arc<KernelFile>> {
    let path = secmon_lab::Kernel::fetch(Suite::Trixie)?.image();
    let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(Arc::new(KernelFile::parse(&bytes)?))
}

/// The image of this name in the build folder, made of a guest with that
/// workload if it is not there.
fn kept(name: &str, workload: Workload) -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = manifest.join("../target/bench-images");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = folder.join(name);
    if path.exists() {
        return Ok(path);
    }
    let guest = Guest::builder(Suite::Trixie)
        .backing(Backing::File)
        .workload(workload)
        .boot()?;
    let ram = guest.ram_file().context("a RAM file")?;
    let partial = path.with_extension("partial");
    guest.while_stopped(|_| Ok(std::fs::copy(&ram, &partial)?))?;
    std::fs::rename(&partial, &path)?;
    Ok(path)
}

/// A folder with `ram.raw`, the memory of a guest of 1,000 processes of all
/// kinds, and with what that guest itself said just before and just after
/// (`truth.json`, `truth-after.json`). Made the first time, then kept.
/// `SECMON_PEERS_IMAGE` names another one.
///
/// # Errors
/// If the guest can't be booted or the image not be written.
pub fn with_truth() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("SECMON_PEERS_IMAGE") {
        return Ok(folder.into());
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place = manifest.join("../target/bench-images/linux-6.12-1000-processes");
    if place.is_dir() {
        return Ok(place);
    }
    let workload = Workload {
        processes: PLAIN_PROCESSES,
        ..Workload::rich()
    };
    let guest = Guest::builder(Suite::Trixie)
        .backing(Backing::File)
        .workload(workload)
        .boot()?;
    let draft = place.with_extension("partial");
    secmon_lab::write_image(&guest, &draft)?;
    // The same memory once more, in a format that no one asks for here.
    std::fs::remove_file(draft.join("vmcore.elf"))?;
    std::fs::rename(&draft, &place)?;
    Ok(place)
}

/// The opened image.
pub struct Image {
    /// Its kernel.
    pub kernel: Kernel,
    /// Its memory.
    pub memory: Arc<dyn PhysicalMemory>,
    _target: OpenedTarget,
}

impl Image {
    /// Opens the image as `secmon` does.
    ///
    /// # Errors
    /// If it can't be made or opened.
    pub fn open() -> Result<Self> {
        Self::open_at(&path()?)
    }

    /// Opens another image as `secmon` does.
    ///
    /// # Errors
    /// If it can't be opened.
    pub fn open_at(path: &Path) -> Result<Self> {
        let target: Target = format!("file:{}", path.display()).parse()?;
        let opened = target.open(&OpenOptions::default())?;
        let options = FindOptions {
            cache: Cache::Off,
            ..FindOptions::default()
        };
        let kernel = secmon_profile::find(&opened.memory, &options)?;
        Ok(Self {
            kernel,
            memory: opened.memory.clone(),
            _target: opened,
        })
    }

    /// The kernel's address space as tables read it.
    pub fn space(&self) -> &AddressSpace {
        &self.kernel.space
    }

    /// The kernel's own address of the byte at `offset` in the span.
    pub fn address(&self, offset: u64) -> VirtualAddress {
        self.kernel.direct_map.wrapping_add(FIRST + offset)
    }

    /// `count` addresses of 8-byte integers all over the span, in no order.
    pub fn scattered(&self, count: usize) -> Vec<VirtualAddress> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        (0..count)
            .map(|_| self.address((next() % SPAN) & !7))
            .collect()
    }
}

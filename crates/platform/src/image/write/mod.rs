//! Writing guest memory to files: raw, LiME or ELF core.
//!
//! Memory is streamed; what is zero becomes a hole of the file. A dump that
//! ends early — stopped, the disk full, the machine off — leaves a file that
//! [`open`](super::open) reads as cut, and a small file beside it with which
//! the dump goes on where it ended.

mod plan;
mod resume;

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use secmon_memory::{
    MemoryRegion, PAGE_SIZE, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility,
};
use sha2::{Digest, Sha256};

use plan::{Content, Plan};
use resume::{State, StateFile};

/// Bytes that are read and written at once.
const STEP: usize = 1 << 20;
/// Bytes after which the state of the dump is made safe on disk.
const CHECKPOINT: u64 = 256 << 20;
/// The most unreadable ranges that are listed one by one.
const MAX_UNREADABLE: usize = 4096;

/// The formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriteFormat {
    /// File offset = physical address, the holes of the machine included as
    /// holes of the file.
    Raw,
    /// LiME version 1.
    Lime,
    /// An ELF core, as QEMU's `dump-guest-memory` writes it.
    ElfCore,
}

/// Whether a dump starts or goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The file must not exist.
    New,
    /// The file is an unfinished dump of the same memory in the same format.
    Resume,
}

/// How far a dump is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the file that are done, holes included.
    pub done: u64,
    /// Bytes of the whole file, holes included.
    pub total: u64,
}

/// How a dump is to be written.
pub struct WriteOptions<'a> {
    /// The format.
    pub format: WriteFormat,
    /// Anew or on.
    pub start: Start,
    /// The kernel's VMCOREINFO text, kept as a note where the format has notes.
    pub vmcoreinfo: Option<&'a [u8]>,
    /// Called about once a MiB; `Break` ends the dump, to be resumed.
    pub progress: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
}

/// A finished dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The file's length, holes included.
    pub length: u64,
    /// The bytes that are not holes of the file.
    pub stored: u64,
    /// SHA-256 of the file, as `sha256sum` gives it.
    pub sha256: [u8; 32],
    /// Memory that could not be read; it is zero in the file.
    pub unreadable: Vec<(MemoryRegion, PhysicalReadError)>,
    /// Bytes of unreadable memory beyond what `unreadable` lists.
    pub unreadable_unlisted: u64,
    /// Where a resumed dump went on.
    pub resumed_at: Option<u64>,
}

impl Written {
    /// [`sha256`](Self::sha256) in hexadecimal.
    pub fn sha256_hexadecimal(&self) -> String {
        resume::hexadecimal(&self.sha256)
    }
}

/// Why a dump was not finished.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The memory has no regions.
    #[error("there is no memory to write")]
    NoMemory,
    /// The file would be longer than files can be.
    #[error("the memory reaches too high for this format; write LiME or ELF instead of raw")]
    TooLarge,
    /// The file exists.
    #[error(
        "{} exists and is left as it is; remove it, choose another name, or resume it if it is an \
         unfinished dump",
        path.display()
    )]
    Exists {
        /// The dump's path.
        path: PathBuf,
    },
    /// A file could not be opened, created or removed.
    #[error("{}: {source}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// There is nothing to go on with.
    #[error("{} can't be resumed: {reason}; write the dump anew", path.display())]
    NotResumable {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The disk is full.
    #[error(
        "no space left for {}: {done} of {total} bytes are written and can be used; make room for \
         up to {} bytes more and resume",
        path.display(),
        total - done
    )]
    Full {
        /// The dump's path.
        path: PathBuf,
        /// The file is whole up to here.
        done: u64,
        /// The bytes of the whole file, holes included.
        total: u64,
    },
    /// The host refused a write for another reason.
    #[error("writing {} at offset {offset:#x}: {source}", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The memory is not what the unfinished dump was made of.
    #[error(
        "{} at offset {offset:#x} is not what the memory holds, which can't have changed: it is a \
         dump of something else; write the dump anew",
        path.display()
    )]
    Differs {
        /// The dump's path.
        path: PathBuf,
        /// The start of the part that differs.
        offset: u64,
    },
    /// The progress callback ended it.
    #[error("stopped after {done} of {total} bytes; resume to go on")]
    Stopped {
        /// The file is whole up to here.
        done: u64,
        /// The bytes of the whole file, holes included.
        total: u64,
    },
}

/// Writes `memory` to a file at `path`, readable by its owner alone.
///
/// # Errors
/// [`WriteError`]; after [`Full`](WriteError::Full),
/// [`Stopped`](WriteError::Stopped) and [`Write`](WriteError::Write) the dump
/// can be resumed.
pub fn write(
    memory: &dyn PhysicalMemory,
    path: &Path,
    options: &mut WriteOptions<'_>,
) -> Result<Written, WriteError> {
    let plan = Plan::new(memory, options.format, options.vmcoreinfo)?;
    let fingerprint = plan.fingerprint();
    let (file, state_file, position) = match options.start {
        Start::New => {
            let file = create(path)?;
            let state = State {
                plan: fingerprint,
                position: 0,
            };
            (file, StateFile::create(path, &state)?, 0)
        }
        Start::Resume => resume_at(path, &plan, fingerprint)?,
    };
    let mut dump = Dump {
        memory,
        path,
        file,
        plan: &plan,
        fingerprint,
        state_file,
        hash: Sha256::new(),
        written: Written {
            length: plan.length,
            stored: 0,
            sha256: [0; 32],
            unreadable: Vec::new(),
            unreadable_unlisted: 0,
            resumed_at: (options.start == Start::Resume).then_some(position),
        },
        done: 0,
        safe: position,
        present: position,
    };
    if let Err(error) = dump.run(options.progress) {
        // What is written is worth keeping; should this fail as well, the
        // state file still says how far the last checkpoint came.
        if let WriteError::Full { .. } | WriteError::Write { .. } = error {
            let _ = dump.checkpoint();
        }
        return Err(error);
    }
    let Dump {
        state_file,
        hash,
        mut written,
        ..
    } = dump;
    state_file.remove()?;
    written.sha256 = hash.finalize().into();
    Ok(written)
}

fn create(path: &Path) -> Result<File, WriteError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| {
            let path = path.to_owned();
            if source.kind() == ErrorKind::AlreadyExists {
                WriteError::Exists { path }
            } else {
                WriteError::Open { path, source }
            }
        })
}

/// The unfinished dump at `path`, if it is one of this plan.
fn resume_at(
    path: &Path,
    plan: &Plan,
    fingerprint: [u8; 32],
) -> Result<(File, StateFile, u64), WriteError> {
    let not = |reason| WriteError::NotResumable {
        path: path.to_owned(),
        reason,
    };
    let open = |source| WriteError::Open {
        path: path.to_owned(),
        source,
    };
    let (state_file, state) =
        StateFile::open(path)?.ok_or_else(|| not("no unfinished dump of this name"))?;
    if state.plan != fingerprint {
        return Err(not("it is of other memory or of another format"));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(open)?;
    let length = file.metadata().map_err(open)?.len();
    if state.position > length || state.position > plan.length {
        return Err(not("it is shorter than its state file says"));
    }
    Ok((file, state_file, state.position))
}

/// A dump that is being written.
struct Dump<'a> {
    memory: &'a dyn PhysicalMemory,
    path: &'a Path,
    file: File,
    plan: &'a Plan,
    fingerprint: [u8; 32],
    state_file: StateFile,
    hash: Sha256,
    written: Written,
    /// The file is whole up to here.
    done: u64,
    /// The state file says that it is whole up to here.
    safe: u64,
    /// Up to here an earlier run wrote it.
    present: u64,
}

impl Dump<'_> {
    fn run(
        &mut self,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), WriteError> {
        let mut buffer = vec![0; STEP];
        let mut found = Vec::new();
        let plan = self.plan;
        for extent in &plan.extents {
            while self.done < extent.offset {
                let count = STEP.min(usize::try_from(extent.offset - self.done).unwrap_or(STEP));
                let zeros = buffer.get_mut(..count).unwrap_or_default();
                zeros.fill(0);
                self.step(zeros, &mut found, progress)?;
            }
            let mut inside = 0;
            while inside < extent.length() {
                let count = STEP.min(usize::try_from(extent.length() - inside).unwrap_or(STEP));
                let part = buffer.get_mut(..count).unwrap_or_default();
                match &extent.content {
                    Content::Bytes(bytes) => {
                        let from = inside as usize;
                        if let Some(bytes) = bytes.get(from..from + count) {
                            part.copy_from_slice(bytes);
                        }
                    }
                    Content::Memory(region) => {
                        self.read_memory(region.start.wrapping_add(inside), part);
                    }
                }
                self.step(part, &mut found, progress)?;
                inside += count as u64;
            }
        }
        // A file that ends in zeros has its length, too.
        self.end_at(plan.length)?;
        self.file
            .sync_data()
            .map_err(|source| self.write_error(source))
    }

    /// Reads memory; what can't be read is zero, and listed.
    fn read_memory(&mut self, start: PhysicalAddress, part: &mut [u8]) {
        if self.memory.read(start, part).is_ok() {
            return;
        }
        let mut address = start;
        let mut rest = part;
        while !rest.is_empty() {
            let left = (PAGE_SIZE - address.page_offset()) as usize;
            let count = left.min(rest.len());
            let (page, later) = rest.split_at_mut(count);
            if let Err(error) = self.memory.read(address, page) {
                page.fill(0);
                self.unreadable(MemoryRegion::new(address, count as u64), error);
            }
            address = address.wrapping_add(count as u64);
            rest = later;
        }
    }

    fn unreadable(&mut self, region: MemoryRegion, error: PhysicalReadError) {
        use PhysicalReadError::{Excluded, Hole};
        let list = &mut self.written.unreadable;
        if let Some((last, known)) = list.last_mut()
            && last.end() == region.start
        {
            // The same reason on the next page: one range.
            let same = match (&*known, &error) {
                (Excluded { reason: a, .. }, Excluded { reason: b, .. }) => a == b,
                (Hole { .. }, Hole { .. }) => true,
                _ => false,
            };
            if same {
                last.length += region.length;
                return;
            }
        }
        if list.len() < MAX_UNREADABLE {
            list.push((region, error));
        } else {
            self.written.unreadable_unlisted += region.length;
        }
    }

    /// Puts `bytes` where the file ends now: writes them, leaves a hole for
    /// zeros, or compares them with what an earlier run wrote.
    fn step(
        &mut self,
        bytes: &[u8],
        found: &mut Vec<u8>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<(), WriteError> {
        // An earlier run's part is hashed as it is: live memory has changed
        // since, and what is in the file counts.
        let old = usize::try_from(self.present.saturating_sub(self.done))
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let (earlier, new) = bytes.split_at(old);
        if !earlier.is_empty() {
            found.resize(earlier.len(), 0);
            self.file
                .read_exact_at(found, self.done)
                .map_err(|source| self.write_error(source))?;
            if self.memory.volatility() == Volatility::Static && found != earlier {
                return Err(WriteError::Differs {
                    path: self.path.to_owned(),
                    offset: self.done,
                });
            }
            self.hash.update(&*found);
            self.written.stored += stored(found);
            self.done += earlier.len() as u64;
        }
        self.hash.update(new);
        // Zeros of whole pages are left out, so they cost no space.
        for part in runs(new) {
            let length = part.len() as u64;
            if !is_zero(part) {
                self.file
                    .write_all_at(part, self.done)
                    .map_err(|source| self.write_error(source))?;
                self.written.stored += length;
            }
            self.done += length;
        }
        if self.done >= self.safe + CHECKPOINT {
            self.checkpoint()?;
        }
        let now = Progress {
            done: self.done,
            total: self.plan.length,
        };
        if progress(now).is_break() && self.done < self.plan.length {
            self.checkpoint()?;
            return Err(WriteError::Stopped {
                done: self.done,
                total: self.plan.length,
            });
        }
        Ok(())
    }

    /// Makes what is written safe, then says so in the state file.
    fn checkpoint(&mut self) -> Result<(), WriteError> {
        if self.done <= self.safe {
            return Ok(());
        }
        self.end_at(self.done)?;
        self.file
            .sync_data()
            .map_err(|source| self.write_error(source))?;
        self.state_file.update(&State {
            plan: self.fingerprint,
            position: self.done,
        })?;
        self.safe = self.done;
        Ok(())
    }

    /// Lets the file reach `length`, should it end in a hole.
    fn end_at(&self, length: u64) -> Result<(), WriteError> {
        let extend = || {
            if self.file.metadata()?.len() < length {
                self.file.set_len(length)?;
            }
            Ok(())
        };
        extend().map_err(|source| self.write_error(source))
    }

    /// The error of a write; the state file then says how far it came.
    fn write_error(&self, source: std::io::Error) -> WriteError {
        if matches!(
            source.kind(),
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
        ) {
            return WriteError::Full {
                path: self.path.to_owned(),
                done: self.done,
                total: self.plan.length,
            };
        }
        WriteError::Write {
            path: self.path.to_owned(),
            offset: self.done,
            source,
        }
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// Cuts `bytes` into runs of pages that are all zero or all not.
fn runs(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let mut pages = rest.chunks(PAGE_SIZE as usize);
        let first = pages.next()?;
        let zero = is_zero(first);
        let alike = pages.take_while(|page| is_zero(page) == zero);
        let count = first.len() + alike.map(<[u8]>::len).sum::<usize>();
        let (run, later) = rest.split_at(count);
        rest = later;
        Some(run)
    })
}

/// The bytes in pages that are not zero.
fn stored(bytes: &[u8]) -> u64 {
    let kept = runs(bytes).filter(|run| !is_zero(run));
    kept.map(|run| run.len() as u64).sum()
}

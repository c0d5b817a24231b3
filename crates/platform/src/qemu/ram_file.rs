//! The file that is a running QEMU's guest RAM, for handing it to another
//! process that may read it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::discovery::QemuProcess;
use super::locate;
use super::process;
use crate::layout::{Machine, RamLayout};

/// What kind of file the RAM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamFileKind {
    /// A file with a name: of tmpfs, hugetlbfs or a disk.
    Named,
    /// A memfd, which has none.
    Anonymous,
}

/// A shared file with all of a guest's RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamFile {
    /// Where it can be opened, as long as QEMU runs: its entry among QEMU's
    /// open files, which leads to the same file when the name was given to
    /// another one or is gone.
    pub path: PathBuf,
    /// The name that QEMU's memory map shows, for people.
    pub shown: PathBuf,
    /// What kind of file it is.
    pub kind: RamFileKind,
    /// The device number and the inode by which it is known again.
    pub identity: (u64, u64),
    /// How many bytes of RAM there are, from the start of the file on.
    pub ram_size: u64,
    /// Which guest physical address lies at which offset; `None` for a machine
    /// whose layout isn't known.
    pub layout: Option<RamLayout>,
}

/// Why a guest's RAM can't be shared with another process.
#[derive(Debug, thiserror::Error)]
pub enum RamFileError {
    /// RAM is QEMU's own memory.
    #[error("the RAM of QEMU process {pid} is its own memory, not a file that can be shared")]
    NotShared {
        /// The process.
        pid: u32,
    },
    /// RAM is in several files, or not at the start of one.
    #[error("the RAM of QEMU process {pid} can't be shared as one file: {reason}")]
    NotOneFile {
        /// The process.
        pid: u32,
        /// What it is instead.
        reason: String,
    },
    /// The guest's memory is encrypted.
    #[error(
        "the guest of QEMU process {pid} is a confidential VM: its memory is encrypted, or not in QEMU at all"
    )]
    Confidential {
        /// The process.
        pid: u32,
    },
    /// The host forbids to look.
    #[error("QEMU process {pid}: {what}: {source}")]
    Host {
        /// The process.
        pid: u32,
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
}

impl RamFile {
    /// Finds the RAM file of a running QEMU.
    ///
    /// # Errors
    /// [`RamFileError::NotShared`] if the guest's RAM is no shared file, and
    /// the others if it can't be told or used.
    pub fn of(qemu: &QemuProcess) -> Result<Self, RamFileError> {
        let pid = qemu.id.pid;
        if qemu.command_line.confidential {
            return Err(RamFileError::Confidential { pid });
        }
        let failed = |what| move |source| RamFileError::Host { pid, what, source };
        let blocks = qemu.command_line.main_blocks().unwrap_or_default();
        let [(_, ram_size)] = blocks.as_slice() else {
            return Err(RamFileError::NotOneFile {
                pid,
                reason: format!("it has {} blocks of RAM (NUMA nodes)", blocks.len()),
            });
        };
        let mappings = process::mappings(pid).map_err(failed("reading its memory map"))?;
        let Some((mapping, offset)) = locate::shared_ram(&mappings, &qemu.command_line, *ram_size)
        else {
            return Err(RamFileError::NotShared { pid });
        };
        if offset != 0 {
            return Err(RamFileError::NotOneFile {
                pid,
                reason: format!("it begins at offset {offset:#x} of its file"),
            });
        }
        let descriptors = process::descriptors(pid).map_err(failed("listing its open files"))?;
        let mut found = None;
        for (number, _) in descriptors {
            let path = process::folder(pid).join("fd").join(number.to_string());
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            if metadata.is_file() && metadata.ino() == mapping.inode {
                let device = metadata.dev();
                let numbers = (rustix::fs::major(device), rustix::fs::minor(device));
                if numbers == mapping.device {
                    found = Some((path, (device, metadata.ino())));
                    break;
                }
            }
        }
        let shown = PathBuf::from(String::from_utf8_lossy(&mapping.path).into_owned());
        let kind = if mapping.path.starts_with(b"/memfd:") {
            RamFileKind::Anonymous
        } else {
            RamFileKind::Named
        };
        let Some((path, identity)) = found else {
            return Err(RamFileError::NotOneFile {
                pid,
                reason: format!("QEMU no longer holds {} open", shown.display()),
            });
        };
        let line = &qemu.command_line;
        let layout = line.machine_type().and_then(|machine: Machine| {
            RamLayout::for_machine_with(machine, *ram_size, line.max_ram_below_4g).ok()
        });
        Ok(Self {
            path,
            shown,
            kind,
            identity,
            ram_size: *ram_size,
            layout,
        })
    }

    /// Opens it, for reading only.
    ///
    /// # Errors
    /// The host's; `NotFound` if the place leads to another file by now.
    pub fn open(&self) -> io::Result<File> {
        let file = File::open(&self.path)?;
        let metadata = file.metadata()?;
        if (metadata.dev(), metadata.ino()) == self.identity {
            Ok(file)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }
}

//! RAM that is a shared file: the very file that QEMU has mapped, or the one
//! that its command line names.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use secmon_memory::{MemoryRegion, PhysicalMemory};

use super::error::denied;
use super::{Access, LayoutSource, Opening, QemuError, QemuOptions, QemuTarget, handle};
use crate::SharedRam;
use crate::layout::RamLayout;
use crate::qemu::discovery::{self, QemuProcess};
use crate::qemu::locate;
use crate::qemu::memory::{HostRegion, ProcessMemory};
use crate::qemu::process::{self, Mapping};

impl Opening<'_> {
    /// Maps the file behind all pieces if there is one and it can be had, else
    /// reads the process.
    pub(super) fn map_or_read(
        &mut self,
        pieces: &[HostRegion],
    ) -> Result<(Arc<dyn PhysicalMemory>, Access), QemuError> {
        let pid = self.pid();
        if self.options.map_files
            && let Some((mapping, layout)) = self.common_file(pieces)
        {
            let path = PathBuf::from(String::from_utf8_lossy(&mapping.path).into_owned());
            match open_mapped_file(pid, mapping) {
                Ok(file) => {
                    let memory = SharedRam::map(file, &layout)
                        .map_err(|source| QemuError::Map { pid, source })?;
                    return Ok((Arc::new(memory), Access::MappedFile(path)));
                }
                Err(error) => self.notes.push(format!(
                    "RAM is the shared file {}, which can't be opened ({error}): it is read out of the process instead",
                    path.display()
                )),
            }
        }
        let memory = ProcessMemory::open(self.process.id, pieces.to_vec())
            .map_err(|error| denied(self.process.id, error))?;
        let method = memory.method();
        Ok((Arc::new(memory), Access::ProcessMemory { method }))
    }

    /// The one file that all pieces are shared mappings of, with each region's
    /// offset in it.
    fn common_file(&self, pieces: &[HostRegion]) -> Option<(&Mapping, Vec<(MemoryRegion, u64)>)> {
        let mut file: Option<&Mapping> = None;
        let mut layout = Vec::new();
        for piece in pieces {
            let length = piece.region.length;
            let (mapping, offset) =
                locate::shared_file(&self.mappings, piece.host_address, length)?;
            let same =
                |other: &Mapping| (other.device, other.inode) == (mapping.device, mapping.inode);
            if !file.is_none_or(same) {
                return None;
            }
            file = Some(mapping);
            layout.push((piece.region, offset));
        }
        Some((file?, layout))
    }
}

/// Opens the very file that a process has mapped.
fn open_mapped_file(pid: u32, mapping: &Mapping) -> io::Result<File> {
    // The link of the mapping itself can't be mistaken, but needs
    // CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
    let folder = process::folder(pid);
    let link = format!("map_files/{:x}-{:x}", mapping.start, mapping.end);
    let refused = match File::open(folder.join(link)) {
        Ok(file) => return Ok(file),
        Err(error) => error,
    };
    // QEMU keeps its backend's file open.
    for (number, _) in process::descriptors(pid)? {
        let link = folder.join("fd").join(number.to_string());
        let Ok(metadata) = std::fs::metadata(&link) else {
            continue;
        };
        let device = metadata.dev();
        let numbers = (rustix::fs::major(device), rustix::fs::minor(device));
        if metadata.is_file() && metadata.ino() == mapping.inode && numbers == mapping.device {
            return File::open(&link);
        }
    }
    Err(refused)
}

/// Without permission to look into the process, a shared file that the command
/// line names still can be mapped.
pub(super) fn open_stated_file(
    process: QemuProcess,
    options: &QemuOptions,
    refused: &io::Error,
) -> Result<QemuTarget, QemuError> {
    let pid = process.id.pid;
    let no_permission = || QemuError::Denied {
        pid,
        advice: discovery::advice(process.id, refused),
    };
    let (path, size) = discovery::stated_file(&process.command_line).ok_or_else(no_permission)?;
    let file = File::open(&path).map_err(|_| no_permission())?;
    let (layout, layout_source) = match (&options.layout, process.command_line.machine_type()) {
        (Some(layout), _) => (layout.clone(), LayoutSource::Stated),
        (None, Some(machine)) => {
            let limit = process.command_line.max_ram_below_4g;
            let layout = RamLayout::for_machine_with(machine, size, limit)
                .map_err(|source| QemuError::Layout { pid, source })?;
            (layout, LayoutSource::Machine(machine))
        }
        (None, None) => {
            return Err(QemuError::UnknownMachine {
                pid,
                machine: process
                    .command_line
                    .machine_name
                    .clone()
                    .unwrap_or_default(),
            });
        }
    };
    let memory =
        SharedRam::map(file, layout.entries()).map_err(|source| QemuError::Map { pid, source })?;
    let notes = vec![format!(
        "{} is the file that QEMU's command line names; that QEMU has this very file mapped could not be checked ({refused})",
        path.display()
    )];
    Ok(QemuTarget {
        handle: handle(process.id)?,
        process,
        memory: Arc::new(memory),
        access: Access::MappedFile(path),
        layout_source,
        page_table_roots: Vec::new(),
        registers: Vec::new(),
        notes,
    })
}

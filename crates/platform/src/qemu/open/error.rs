//! Why a QEMU could not be opened.

use std::io;

use secmon_memory::MapError;

use crate::layout::MtreeError;
use crate::qemu::discovery;
use crate::qemu::process::ProcessId;
use crate::qemu::qmp::QmpError;

/// Why a QEMU could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// No such QEMU runs.
    #[error("no running QEMU is called {selector:?}; {running}")]
    NotFound {
        /// What was looked for.
        selector: String,
        /// Those that run.
        running: String,
    },
    /// Several are called so.
    #[error("{count} running QEMUs are called {name:?}: name one by its process id: {pids}")]
    Ambiguous {
        /// The name.
        name: String,
        /// How many.
        count: usize,
        /// Their process ids.
        pids: String,
    },
    /// The process is no QEMU with an x86-64 guest.
    #[error("process {pid} can't be watched: {reason}")]
    NotATarget {
        /// The process.
        pid: u32,
        /// What it is.
        reason: String,
    },
    /// The host does not let this process look into QEMU.
    #[error("{advice}")]
    Denied {
        /// The process.
        pid: u32,
        /// What to do about it.
        advice: String,
    },
    /// The host failed otherwise.
    #[error("QEMU process {pid}: {what}: {source}")]
    Host {
        /// The process.
        pid: u32,
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// Neither QMP nor the command line says where RAM lies.
    #[error(
        "QEMU process {pid}: the RAM layout of its machine {machine:?} is not known and QMP did not tell it; state it as START-END@OFFSET,…"
    )]
    UnknownMachine {
        /// The process.
        pid: u32,
        /// The machine type, if the command line has one.
        machine: String,
    },
    /// RAM was not found in the process.
    #[error("QEMU process {pid}: RAM block {block:?} of {size:#x} bytes was not found: {reason}")]
    RamNotFound {
        /// The process.
        pid: u32,
        /// The block's name.
        block: String,
        /// How large it should be.
        size: u64,
        /// What was looked at.
        reason: String,
    },
    /// The layout does not fit the RAM.
    #[error(
        "QEMU process {pid}: the memory layout needs {needed:#x} bytes of RAM, it has {size:#x}"
    )]
    LayoutTooLarge {
        /// The process.
        pid: u32,
        /// One past the last byte of RAM that the layout names.
        needed: u64,
        /// The size of main RAM.
        size: u64,
    },
    /// The layout contradicts itself.
    #[error("QEMU process {pid}: {source}")]
    Layout {
        /// The process.
        pid: u32,
        /// How.
        source: secmon_memory::LayoutError,
    },
    /// QMP was asked for and failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// What QMP says of the memory makes no sense.
    #[error("{0}")]
    Mtree(#[from] MtreeError),
    /// The shared file can't be mapped.
    #[error("mapping the RAM of QEMU process {pid}: {source}")]
    Map {
        /// The process.
        pid: u32,
        /// Why.
        source: MapError,
    },
}

/// The error for a refused look into a process.
pub(super) fn denied(id: ProcessId, source: io::Error) -> QemuError {
    let pid = id.pid;
    if source.kind() == io::ErrorKind::PermissionDenied {
        let advice = discovery::advice(id, &source);
        return QemuError::Denied { pid, advice };
    }
    QemuError::Host {
        pid,
        what: "opening its memory",
        source,
    }
}

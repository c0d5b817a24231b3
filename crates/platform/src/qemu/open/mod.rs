//! Opening a running QEMU's guest RAM, the best way there is.

mod ask;
mod error;
mod file;
mod look;
mod selector;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use secmon_memory::{CpuRegisters, PhysicalAddress, PhysicalMemory};

use super::discovery::QemuProcess;
use super::process::{self, Mapping, ProcessHandle, ProcessId};
use super::qmp::DEFAULT_TIMEOUT;
use crate::layout::{Machine, RamLayout};

pub use error::QemuError;
use file::open_stated_file;
pub use selector::{Selector, find};

/// Whether QMP is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum QmpUse {
    /// If the command line names a socket and it answers; what it does not
    /// answer is found without.
    #[default]
    IfAvailable,
    /// Not at all.
    Never,
    /// Through this socket, and it must answer.
    Socket(PathBuf),
}

/// How a QEMU is opened.
#[derive(Clone, Debug)]
pub struct QemuOptions {
    /// Where RAM lies, if it is known better. Offsets count in main RAM.
    pub layout: Option<RamLayout>,
    /// Whether QMP is used.
    pub qmp: QmpUse,
    /// How long each answer of QMP may take.
    pub timeout: Duration,
    /// Whether RAM that is a shared file may be mapped; otherwise it is read
    /// like other memory of the process.
    pub map_files: bool,
}

impl Default for QemuOptions {
    fn default() -> Self {
        Self {
            layout: None,
            qmp: QmpUse::IfAvailable,
            timeout: DEFAULT_TIMEOUT,
            map_files: true,
        }
    }
}

/// How an opened target's memory is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// RAM is a shared file, mapped read-only. It keeps the last state after
    /// QEMU has ended: see [`QemuTarget::is_alive`].
    MappedFile(PathBuf),
    /// RAM is read out of the process; reads fail once it has ended.
    ProcessMemory {
        /// `/proc/PID/mem` or `process_vm_readv`.
        method: &'static str,
    },
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MappedFile(path) => write!(f, "shared file {}, mapped", path.display()),
            Self::ProcessMemory { method } => f.write_str(method),
        }
    }
}

/// Who said where RAM lies in guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutSource {
    /// The user.
    Stated,
    /// QEMU, asked through QMP.
    Qmp,
    /// The machine type on the command line.
    Machine(Machine),
}

impl fmt::Display for LayoutSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stated => f.write_str("stated"),
            Self::Qmp => f.write_str("from QMP"),
            Self::Machine(machine) => write!(f, "of a {machine} machine"),
        }
    }
}

/// A running QEMU whose guest's memory can be read.
pub struct QemuTarget {
    /// The process, as it was when it was opened.
    pub process: QemuProcess,
    /// The guest's memory.
    pub memory: Arc<dyn PhysicalMemory>,
    /// How it is read.
    pub access: Access,
    /// Who said where it lies.
    pub layout_source: LayoutSource,
    /// The page-table roots of the vCPUs that have paging on, without
    /// repetition, where QMP was asked for them.
    pub page_table_roots: Vec<PhysicalAddress>,
    /// The registers of the vCPUs at that moment, where QMP was asked for them.
    pub registers: Vec<CpuRegisters>,
    /// What a user should know: what could not be confirmed, what is missing.
    pub notes: Vec<String>,
    handle: ProcessHandle,
}

impl fmt::Debug for QemuTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QemuTarget")
            .field("process", &self.process.id)
            .field("regions", &self.memory.regions())
            .field("access", &self.access)
            .field("layout_source", &self.layout_source)
            .field("notes", &self.notes)
            .finish()
    }
}

impl QemuTarget {
    /// Whether QEMU still runs. A mapped file goes on giving the guest's last
    /// memory after its end.
    pub fn is_alive(&self) -> bool {
        self.handle.is_alive()
    }
}

/// Finds a running QEMU and opens its guest's memory.
///
/// # Errors
/// [`QemuError`], which says what to do where the host forbids it.
pub fn open(selector: &Selector, options: &QemuOptions) -> Result<QemuTarget, QemuError> {
    open_process(find(selector)?, options)
}

/// Opens the memory of a QEMU's guest.
///
/// # Errors
/// As [`open`].
pub fn open_process(process: QemuProcess, options: &QemuOptions) -> Result<QemuTarget, QemuError> {
    let pid = process.id.pid;
    let mappings = match process::mappings(pid) {
        Ok(mappings) => mappings,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return open_stated_file(process, options, &error);
        }
        Err(source) => {
            return Err(QemuError::Host {
                pid,
                what: "reading its memory map",
                source,
            });
        }
    };
    let mut opening = Opening {
        process: &process,
        options,
        mappings,
        notes: Vec::new(),
        page_table_roots: Vec::new(),
        registers: Vec::new(),
    };
    if process.command_line.confidential {
        opening.notes.push(
            "the guest is a confidential VM: its memory is encrypted, or not in QEMU at all"
                .to_owned(),
        );
    }
    let (pieces, layout_source) = match opening.ask_qmp()? {
        Some(pieces) => {
            let source = match options.layout {
                Some(_) => LayoutSource::Stated,
                None => LayoutSource::Qmp,
            };
            (pieces, source)
        }
        None => opening.look()?,
    };
    let (memory, access) = opening.map_or_read(&pieces)?;
    let notes = opening.notes;
    let page_table_roots = opening.page_table_roots;
    let registers = opening.registers;
    Ok(QemuTarget {
        handle: handle(process.id)?,
        process,
        memory,
        access,
        layout_source,
        page_table_roots,
        registers,
        notes,
    })
}

/// One attempt at opening a process.
struct Opening<'a> {
    process: &'a QemuProcess,
    options: &'a QemuOptions,
    mappings: Vec<Mapping>,
    notes: Vec<String>,
    page_table_roots: Vec<PhysicalAddress>,
    registers: Vec<CpuRegisters>,
}

/// Where a block of main RAM was found.
struct LocatedBlock {
    host_address: u64,
    length: u64,
}

impl Opening<'_> {
    fn pid(&self) -> u32 {
        self.process.id.pid
    }
}

/// A hold on the process that tells whether it still runs.
fn handle(id: ProcessId) -> Result<ProcessHandle, QemuError> {
    ProcessHandle::open(id).map_err(|source| QemuError::Host {
        pid: id.pid,
        what: "taking hold of it",
        source,
    })
}

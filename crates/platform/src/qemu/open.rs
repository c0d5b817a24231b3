//! Opening a running QEMU's guest RAM, the best way there is.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use secmon_memory::{MapError, MemoryRegion, PhysicalAddress, PhysicalMemory};

use super::discovery::{self, Inspection, QemuProcess};
use super::locate::{self, BlockRecord};
use super::memory::{ForeignMemory, HostRegion, ProcessMemory};
use super::process::{self, Mapping, ProcessHandle, ProcessId};
use super::qmp::{DEFAULT_TIMEOUT, QmpClient, QmpError};
use crate::SharedRam;
use crate::layout::{Machine, MtreeError, RamLayout, block_layout, parse_mtree};

/// A RAM block of this size or more that is not in the layout is worth a note.
const NOTEWORTHY: u64 = 64 << 20;

/// Which QEMU is meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    /// The guest's name (`-name`); digits alone are a process id if there is
    /// such a QEMU.
    Name(String),
    /// The process.
    Pid(u32),
}

impl FromStr for Selector {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        Ok(match text.parse() {
            Ok(pid) if digits => Self::Pid(pid),
            _ => Self::Name(text.to_owned()),
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Pid(pid) => write!(f, "{pid}"),
        }
    }
}

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

/// Finds the running QEMU that is meant.
///
/// # Errors
/// [`QemuError::NotFound`], [`QemuError::Ambiguous`],
/// [`QemuError::NotATarget`].
pub fn find(selector: &Selector) -> Result<QemuProcess, QemuError> {
    if let Selector::Pid(pid) = selector {
        match discovery::inspect(*pid) {
            Ok(Inspection::Guest(process)) => return Ok(*process),
            Ok(Inspection::NoGuest(_, reason)) => {
                let reason = reason.to_string();
                return Err(QemuError::NotATarget { pid: *pid, reason });
            }
            // A guest's name may be a number, too.
            Ok(Inspection::NotQemu) | Err(_) => {}
        }
    }
    let name = selector.to_string();
    let discovery = discovery::discover().map_err(|source| QemuError::Host {
        pid: 0,
        what: "listing processes",
        source,
    })?;
    let (mut named, others): (Vec<_>, Vec<_>) = discovery
        .processes
        .into_iter()
        .partition(|process| process.command_line.name.as_deref() == Some(&name));
    if named.len() > 1 {
        let pids: Vec<String> = named.iter().map(|p| p.id.pid.to_string()).collect();
        return Err(QemuError::Ambiguous {
            name,
            count: pids.len(),
            pids: pids.join(", "),
        });
    }
    named.pop().ok_or_else(|| {
        if let Selector::Pid(pid) = selector
            && ProcessId::of(*pid).is_ok()
        {
            return QemuError::NotATarget {
                pid: *pid,
                reason: "it is not a QEMU system emulator".to_owned(),
            };
        }
        let running: Vec<String> = others
            .iter()
            .map(|process| match &process.command_line.name {
                Some(name) => format!("{name} (process {})", process.id.pid),
                None => format!("process {}", process.id.pid),
            })
            .collect();
        QemuError::NotFound {
            selector: name,
            running: if running.is_empty() {
                "none runs here".to_owned()
            } else {
                format!("running: {}", running.join(", "))
            },
        }
    })
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
    Ok(QemuTarget {
        handle: handle(process.id)?,
        process,
        memory,
        access,
        layout_source,
        page_table_roots,
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

    /// The pieces of RAM as QEMU reports them, or `None` where it can't be
    /// asked.
    fn ask_qmp(&mut self) -> Result<Option<Vec<HostRegion>>, QemuError> {
        let monitors = match &self.options.qmp {
            QmpUse::Never => return Ok(None),
            QmpUse::Socket(path) => return self.ask_qmp_at(path).map(Some),
            QmpUse::IfAvailable => &self.process.monitors,
        };
        let mut failures = Vec::new();
        for monitor in monitors {
            if monitor.busy {
                let path = monitor.path.display();
                failures.push(format!(
                    "QMP at {path} is in use by another client; RAM was located without it"
                ));
                continue;
            }
            match self.ask_qmp_at(&monitor.path) {
                Ok(pieces) => return Ok(Some(pieces)),
                Err(error) => failures.push(format!("{error}; RAM was located without it")),
            }
        }
        self.notes.extend(failures);
        Ok(None)
    }

    fn ask_qmp_at(&mut self, path: &Path) -> Result<Vec<HostRegion>, QemuError> {
        let mut client = QmpClient::connect(path, self.options.timeout)?;
        let notes = self.notes.len();
        let pieces = self.pieces_from_qmp(&mut client);
        match &pieces {
            Ok(_) => self.ask_page_table_roots(&mut client),
            // What it said is not what is used.
            Err(_) => self.notes.truncate(notes),
        }
        pieces
    }

    /// A hint, no more: a QEMU that does not tell is no worse a target.
    fn ask_page_table_roots(&mut self, client: &mut QmpClient) {
        for registers in client.registers().unwrap_or_default() {
            let root = PhysicalAddress::new(registers.cr3);
            // CR0.PG
            if registers.cr0 & (1 << 31) != 0 && !self.page_table_roots.contains(&root) {
                self.page_table_roots.push(root);
            }
        }
    }

    fn pieces_from_qmp(&mut self, client: &mut QmpClient) -> Result<Vec<HostRegion>, QemuError> {
        let ranges = parse_mtree(&client.monitor_command("info mtree -f")?)?;
        let (base_size, plugged_size) = client.memory_size()?;
        if let Some(layout) = &self.options.layout {
            let first = self.host_address(client, 0, base_size)?;
            let block = LocatedBlock {
                host_address: first,
                length: base_size,
            };
            return self.pieces(layout, &[block]);
        }
        let main = ranges
            .iter()
            .find(|range| range.region.start.is_null())
            .map(|range| range.name.clone())
            .ok_or(MtreeError::NoRam)?;
        let mut names = vec![main];
        names.extend(self.process.command_line.numa_backends.iter().cloned());
        names.extend(client.memory_device_backends()?);
        names.sort();
        names.dedup();
        let mut pieces = Vec::new();
        for name in &names {
            let layout = match block_layout(&ranges, name) {
                Ok(layout) => layout,
                // A backend that the machine does not show the guest now.
                Err(MtreeError::NoRam) => continue,
                Err(error) => return Err(error.into()),
            };
            for (region, _) in layout.entries() {
                let start = region.start.as_u64();
                pieces.push(HostRegion {
                    region: *region,
                    host_address: self.host_address(client, start, region.length)?,
                });
            }
        }
        let found: u64 = pieces
            .iter()
            .fold(0, |sum: u64, piece| sum.saturating_add(piece.region.length));
        let expected = base_size.saturating_add(plugged_size);
        if found != expected {
            self.notes.push(format!(
                "QEMU has {expected:#x} bytes of RAM, its memory map shows {found:#x}: the rest is a hole here"
            ));
        }
        Ok(pieces)
    }

    /// Where QEMU says the RAM at a physical address lies, checked against the
    /// process's mappings.
    fn host_address(
        &self,
        client: &mut QmpClient,
        physical: u64,
        length: u64,
    ) -> Result<u64, QemuError> {
        let not_found = |reason: String| QemuError::RamNotFound {
            pid: self.pid(),
            block: format!("at physical address {physical:#x}"),
            size: length,
            reason,
        };
        let (_, host_address) = client
            .host_address(physical)?
            .ok_or_else(|| not_found("QEMU's gpa2hva knows no RAM there".to_owned()))?;
        if !locate::is_writable(&self.mappings, host_address, length) {
            return Err(not_found(format!(
                "QEMU's gpa2hva says {host_address:#x}, where the process has no such memory"
            )));
        }
        Ok(host_address)
    }

    /// Finds RAM by the command line, QEMU's own records and the mappings.
    fn look(&mut self) -> Result<(Vec<HostRegion>, LayoutSource), QemuError> {
        let pid = self.pid();
        let command_line = &self.process.command_line;
        let probe = self.mappings.iter().find(|mapping| mapping.readable);
        let probe = probe.map_or(0, |mapping| mapping.start);
        let memory = ForeignMemory::open(self.process.id, probe)
            .map_err(|error| denied(self.process.id, error))?;
        let records = locate::block_records(&memory, &self.mappings);
        let blocks = match command_line.main_blocks() {
            Some(blocks) => blocks,
            // The sizes are in a file; the records have them.
            None => {
                let main = records
                    .iter()
                    .find(|record| record.name == "pc.ram")
                    .or_else(|| records.iter().max_by_key(|record| record.length));
                let main = main.ok_or_else(|| QemuError::RamNotFound {
                    pid,
                    block: "pc.ram".to_owned(),
                    size: 0,
                    reason: "neither the command line nor QEMU's heap says how large it is"
                        .to_owned(),
                })?;
                vec![(main.name.clone(), main.length)]
            }
        };
        let located = blocks
            .iter()
            .map(|(name, size)| self.locate(&memory, &records, name, *size))
            .collect::<Result<Vec<LocatedBlock>, QemuError>>()?;
        self.note_other_blocks(&records, &blocks);
        let size = located
            .iter()
            .fold(0, |sum: u64, block| sum.saturating_add(block.length));
        if let Some(layout) = &self.options.layout {
            return Ok((self.pieces(layout, &located)?, LayoutSource::Stated));
        }
        let machine = self.process.command_line.machine_type();
        let machine = machine.ok_or_else(|| QemuError::UnknownMachine {
            pid,
            machine: self
                .process
                .command_line
                .machine_name
                .clone()
                .unwrap_or_default(),
        })?;
        let limit = self.process.command_line.max_ram_below_4g;
        let layout = RamLayout::for_machine_with(machine, size, limit)
            .map_err(|source| QemuError::Layout { pid, source })?;
        Ok((
            self.pieces(&layout, &located)?,
            LayoutSource::Machine(machine),
        ))
    }

    /// Finds one block.
    fn locate(
        &mut self,
        memory: &ForeignMemory,
        records: &[BlockRecord],
        name: &str,
        size: u64,
    ) -> Result<LocatedBlock, QemuError> {
        let pid = self.pid();
        let length = size.next_multiple_of(4096);
        let found = |host_address| LocatedBlock {
            host_address,
            length: size,
        };
        let not_found = |reason: String| QemuError::RamNotFound {
            pid,
            block: name.to_owned(),
            size,
            reason,
        };
        // Old machine types call a backend's block by its path.
        let path = format!("/objects/{name}");
        let mut of_this_name: Vec<u64> = records
            .iter()
            .filter(|record| record.name == name || record.name == path)
            .filter(|record| record.length == length)
            .map(|record| record.host_address)
            .collect();
        of_this_name.sort_unstable();
        of_this_name.dedup();
        if let [host_address] = of_this_name.as_slice() {
            return Ok(found(*host_address));
        }
        let backend = self.process.command_line.backend(name);
        let candidates = match backend.map(|backend| (backend.kind.as_str(), &backend.path)) {
            Some(("memory-backend-file", Some(path))) => {
                let path = path.to_string_lossy();
                locate::file_candidates(&self.mappings, path.as_bytes(), length)
            }
            Some(("memory-backend-memfd", _)) => {
                let path = b"/memfd:memory-backend-memfd";
                locate::file_candidates(&self.mappings, path, length)
            }
            _ => locate::anonymous_candidates(&self.mappings, length),
        };
        let with_signs: Vec<(u64, Vec<&'static str>)> = candidates
            .iter()
            .map(|host_address| {
                let mut bytes = vec![0; 1 << 20];
                let count = memory.read(*host_address, &mut bytes);
                bytes.truncate(count);
                (*host_address, locate::signs_of_low_ram(&bytes))
            })
            .filter(|(_, signs)| !signs.is_empty())
            .collect();
        match (candidates.as_slice(), with_signs.as_slice()) {
            ([], _) => Err(not_found(
                "QEMU's heap has no record of it, and the process has no mapping of that size; \
                 give access to QMP"
                    .to_owned(),
            )),
            (_, [(host_address, signs)]) => {
                self.notes.push(format!(
                    "RAM block {name:?} was located by its size and confirmed by {}",
                    signs.join(", ")
                ));
                Ok(found(*host_address))
            }
            ([host_address], []) => {
                self.notes.push(format!(
                    "RAM block {name:?} was located by its size alone: QEMU's heap has no record of it, and no firmware has left its marks in it yet"
                ));
                Ok(found(*host_address))
            }
            (candidates, _) => {
                let addresses: Vec<String> = candidates
                    .iter()
                    .map(|address| format!("{address:#x}"))
                    .collect();
                Err(not_found(format!(
                    "it could lie at any of {} and nothing tells which; give access to QMP",
                    addresses.join(", ")
                )))
            }
        }
    }

    /// Says which large blocks are not part of main RAM.
    fn note_other_blocks(&mut self, records: &[BlockRecord], main: &[(String, u64)]) {
        let command_line = &self.process.command_line;
        let mut names: Vec<&str> = Vec::new();
        for record in records {
            let name = record
                .name
                .strip_prefix("/objects/")
                .unwrap_or(&record.name);
            let is_main = main.iter().any(|(main, _)| main == name);
            // Devices' memory and ROMs are named by the device, with a slash
            // or a dot.
            let is_backend = !name.contains(['/', '.']);
            if !is_main && is_backend && record.length >= NOTEWORTHY && !names.contains(&name) {
                names.push(name);
                self.notes.push(format!(
                    "RAM block {name:?} of {:#x} bytes is not in the layout (a memory device plugged in, or RAM of a device): it is a hole here; with QMP its place would be known",
                    record.length
                ));
            }
        }
        for name in &command_line.device_backends {
            if !names.contains(&name.as_str()) {
                self.notes.push(format!(
                    "the memory device of backend {name:?} is not in the layout: it is a hole here; with QMP its place would be known"
                ));
            }
        }
    }

    /// The layout's regions as pieces of the located blocks, which follow each
    /// other in RAM.
    fn pieces(
        &self,
        layout: &RamLayout,
        blocks: &[LocatedBlock],
    ) -> Result<Vec<HostRegion>, QemuError> {
        let size = blocks
            .iter()
            .fold(0, |sum: u64, block| sum.saturating_add(block.length));
        if layout.needed() > size {
            return Err(QemuError::LayoutTooLarge {
                pid: self.pid(),
                needed: layout.needed(),
                size,
            });
        }
        let mut pieces = Vec::new();
        for (region, offset) in layout.entries() {
            let mut block_start = 0_u64;
            for block in blocks {
                let block_end = block_start.saturating_add(block.length);
                let start = (*offset).max(block_start);
                let end = offset.saturating_add(region.length).min(block_end);
                if start < end {
                    pieces.push(HostRegion {
                        region: MemoryRegion::new(
                            region.start.wrapping_add(start - offset),
                            end - start,
                        ),
                        host_address: block.host_address.wrapping_add(start - block_start),
                    });
                }
                block_start = block_end;
            }
        }
        Ok(pieces)
    }

    /// Maps the file behind all pieces if there is one and it can be had, else
    /// reads the process.
    fn map_or_read(
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
fn open_stated_file(
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
        notes,
    })
}

/// A hold on the process that tells whether it still runs.
fn handle(id: ProcessId) -> Result<ProcessHandle, QemuError> {
    ProcessHandle::open(id).map_err(|source| QemuError::Host {
        pid: id.pid,
        what: "taking hold of it",
        source,
    })
}

/// The error for a refused look into a process.
fn denied(id: ProcessId, source: io::Error) -> QemuError {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::machine::Machine;
    use super::*;

    #[test]
    fn a_selector_is_a_number_or_a_name() {
        let parse = |text: &str| {
            let Ok(selector) = text.parse::<Selector>();
            selector
        };
        assert_eq!(parse("12"), Selector::Pid(12));
        for name in ["", "+12", "-1", "12a", "99999999999", "web 1"] {
            assert_eq!(parse(name), Selector::Name(name.to_owned()));
        }
    }

    /// Without QEMU's records and without QMP: the mappings and what the
    /// firmware left must do.
    #[test]
    fn ram_is_found_without_records_too() {
        let cases: [(&str, u64, &[&str]); 6] = [
            ("pc.ram", 512, &[]),
            ("pc.ram", 3072, &["-machine", "q35"]),
            // As large as video memory.
            ("pc.ram", 16, &[]),
            (
                "m",
                256,
                &[
                    "-object",
                    "memory-backend-ram,id=m,size=256M",
                    "-machine",
                    "memory-backend=m",
                ],
            ),
            (
                "m",
                256,
                &[
                    "-object",
                    "memory-backend-memfd,id=m,size=256M",
                    "-machine",
                    "memory-backend=m",
                ],
            ),
            (
                "m",
                256,
                &[
                    "-object",
                    "memory-backend-file,id=m,size=256M,mem-path=ram,share=off",
                    "-machine",
                    "memory-backend=m",
                ],
            ),
        ];
        for (name, size, arguments) in cases {
            let size_argument = size.to_string();
            let all = [&["-m", &size_argument], arguments].concat();
            let mut machine = Machine::start(&all);
            machine.run_firmware();
            let process = find(&Selector::Pid(machine.pid())).expect("a QEMU");
            let mappings = process::mappings(machine.pid()).expect("mappings");
            let memory = ForeignMemory::open(process.id, mappings[0].start).expect("memory");
            let records = locate::block_records(&memory, &mappings);
            let truth = records.iter().find(|record| record.name == name);
            let truth = truth.expect("QEMU's record").host_address;
            let mut opening = Opening {
                process: &process,
                options: &QemuOptions::default(),
                mappings,
                notes: Vec::new(),
                page_table_roots: Vec::new(),
            };
            let located = opening.locate(&memory, &[], name, size << 20);
            let located = located.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
            assert_eq!(located.host_address, truth, "{arguments:?}");
            assert!(
                opening.notes[0].contains("confirmed by"),
                "{:?}",
                opening.notes
            );
        }
    }

    proptest! {
        #[test]
        fn pieces_cover_the_layout(
            sizes in prop::collection::vec(1_u64..64, 1..5),
            cut in 0_u64..256,
        ) {
            const MIB: u64 = 1 << 20;
            let process = QemuProcess {
                id: ProcessId { pid: 1, start_time: 0 },
                executable: PathBuf::new(),
                command_line: Default::default(),
                monitors: Vec::new(),
                reach: discovery::Reach::ProcessMemory,
            };
            let opening = Opening {
                process: &process,
                options: &QemuOptions::default(),
                mappings: Vec::new(),
                notes: Vec::new(),
                page_table_roots: Vec::new(),
            };
            // Blocks whose offset in RAM can be told from their address.
            let total: u64 = sizes.iter().sum();
            let mut offset = 0;
            let blocks: Vec<LocatedBlock> = sizes
                .iter()
                .enumerate()
                .map(|(index, size)| {
                    let host_address = ((index as u64) << 40) + offset * MIB;
                    offset += size;
                    LocatedBlock { host_address, length: size * MIB }
                })
                .collect();
            let limit = Some((cut % total).max(1) * MIB);
            let layout = RamLayout::for_machine_with(Machine_::Q35, total * MIB, limit)
                .expect("a layout");
            let pieces = opening.pieces(&layout, &blocks).expect("pieces");
            let length: u64 = pieces.iter().map(|piece| piece.region.length).sum();
            prop_assert_eq!(length, total * MIB);
            for piece in pieces {
                let start = piece.region.start.as_u64();
                let (region, offset) = layout
                    .entries()
                    .iter()
                    .find(|(region, _)| region.contains(piece.region.start))
                    .expect("inside of the layout");
                let in_ram = offset + (start - region.start.as_u64());
                prop_assert_eq!(piece.host_address & ((1 << 40) - 1), in_ram);
            }
        }
    }

    use crate::layout::Machine as Machine_;
}

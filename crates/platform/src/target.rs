//! The names of targets, what can be watched here, and the one way to open any
//! of them.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use secmon_memory::{CpuRegisters, PhysicalAddress, PhysicalMemory};

use crate::image::{self, ImageError, ImageFormat, ImageOptions, Judge};
use crate::ivshmem::{self, IvshmemError, IvshmemOptions, PciAddress, PciAddressError};
use crate::layout::RamLayout;
use crate::qemu::{
    self, Access, DEFAULT_TIMEOUT, PauseMethod, QemuError, QemuOptions, QemuTarget, QmpUse, Reach,
    Selector,
};

/// A target, as it is named on the command line.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// `file:PATH`, an image of memory.
    File(PathBuf),
    /// `qemu:NAME` or `qemu:PID`, a running QEMU.
    Qemu(Selector),
    /// `ivshmem:PCI-ADDRESS`, a device of the monitoring VM.
    Ivshmem(PciAddress),
}

/// Why a text names no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetParseError {
    /// Nothing before the first colon that is a kind of target.
    #[error("{text:?} is no target: its kind is missing; a target is one of {FORMS}{suggestion}")]
    NoKind {
        /// What was given.
        text: String,
        /// A likely meaning.
        suggestion: String,
    },
    /// An unknown kind.
    #[error("{kind:?} is no kind of target; a target is one of {FORMS}")]
    UnknownKind {
        /// What stands before the colon.
        kind: String,
    },
    /// Nothing after the colon.
    #[error("target {kind}: names nothing; it takes {form}")]
    Empty {
        /// The kind.
        kind: &'static str,
        /// What should follow.
        form: &'static str,
    },
    /// Not a PCI address.
    #[error("target ivshmem: {0}")]
    PciAddress(#[from] PciAddressError),
    /// A kind that this program does not open.
    #[error(
        "target xen: domains of Xen can't be opened by this version; a dump (`xl dump-core`) is no substitute, as its format is not read"
    )]
    Xen,
}

const FORMS: &str = "file:PATH, qemu:NAME, qemu:PID, ivshmem:PCI-ADDRESS";

impl FromStr for Target {
    type Err = TargetParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((kind, rest)) = text.split_once(':') else {
            let suggestion = match text {
                "" | "file" | "qemu" | "ivshmem" | "xen" => String::new(),
                _ if text.contains(['/', '.']) => format!("; perhaps file:{text}"),
                _ => format!("; perhaps qemu:{text}"),
            };
            return Err(TargetParseError::NoKind {
                text: text.to_owned(),
                suggestion,
            });
        };
        let empty = |kind, form| Err(TargetParseError::Empty { kind, form });
        match (kind, rest) {
            ("file", "") => empty("file", "the path of a memory image"),
            ("qemu", "") => empty("qemu", "a guest's name or a process id"),
            ("ivshmem", "") => empty("ivshmem", "a PCI address such as 0000:00:04.0"),
            ("file", path) => Ok(Self::File(PathBuf::from(path))),
            ("qemu", selector) => {
                let Ok(selector) = selector.parse();
                Ok(Self::Qemu(selector))
            }
            ("ivshmem", address) => Ok(Self::Ivshmem(address.parse()?)),
            ("xen", _) => Err(TargetParseError::Xen),
            _ => Err(TargetParseError::UnknownKind {
                kind: kind.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Qemu(selector) => write!(f, "qemu:{selector}"),
            Self::Ivshmem(address) => write!(f, "ivshmem:{address}"),
        }
    }
}

/// How a target is opened; the default suits most.
#[derive(Clone)]
pub struct OpenOptions<'a> {
    /// Where RAM lies, if it is known better.
    pub layout: Option<RamLayout>,
    /// Asked which of several possible layouts fits the guest, where neither
    /// the target nor the user says.
    pub validate: Option<Judge<'a>>,
    /// Of a running QEMU: whether QMP is used.
    pub qmp: QmpUse,
    /// How long each answer of QMP may take.
    pub timeout: Duration,
    /// Of an image: its format, where content misleads.
    pub format: Option<ImageFormat>,
    /// Where the PCI devices of this machine are shown.
    pub pci_devices: PathBuf,
}

impl Default for OpenOptions<'_> {
    fn default() -> Self {
        Self {
            layout: None,
            validate: None,
            qmp: QmpUse::default(),
            timeout: DEFAULT_TIMEOUT,
            format: None,
            pci_devices: PathBuf::from(ivshmem::PCI_DEVICES),
        }
    }
}

/// What a target says about its guest besides memory. The guest may have had
/// its hand in it: hints are to be checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// The kernel's VMCOREINFO text.
    pub vmcoreinfo: Option<Vec<u8>>,
    /// The page-table roots of vCPUs that have paging on, without repetition.
    pub page_table_roots: Vec<PhysicalAddress>,
    /// The registers of the vCPUs when the target was opened or the image was
    /// written, where it tells them.
    pub registers: Vec<CpuRegisters>,
}

/// An open target.
pub struct OpenedTarget {
    /// Its memory.
    pub memory: Arc<dyn PhysicalMemory>,
    /// What it is and how it is read, in one line.
    pub description: String,
    /// What is known of the guest besides.
    pub hints: Hints,
    /// How the guest can be paused; `None` for an image and for a device.
    pub pause: Option<PauseMethod>,
    /// What its user should know: what was assumed, what is missing.
    pub notes: Vec<String>,
    /// The running QEMU behind it.
    pub qemu: Option<QemuTarget>,
}

impl fmt::Debug for OpenedTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenedTarget")
            .field("description", &self.description)
            .field("regions", &self.memory.regions())
            .field("hints", &self.hints)
            .field("pause", &self.pause)
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}

impl OpenedTarget {
    /// Whether the guest's QEMU still runs; `None` where there is no such
    /// process to ask: an image, a device.
    pub fn is_alive(&self) -> Option<bool> {
        self.qemu.as_ref().map(QemuTarget::is_alive)
    }
}

/// Why a target could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The image.
    #[error("file {path}: {source}")]
    Image {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: ImageError,
    },
    /// The running QEMU.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// The device.
    #[error(transparent)]
    Ivshmem(#[from] IvshmemError),
}

impl Target {
    /// Opens the target's memory.
    ///
    /// A file that is the RAM of a running QEMU is opened as that QEMU, which
    /// knows more about it.
    ///
    /// # Errors
    /// [`OpenError`] says what failed, on what, and what to do about it.
    pub fn open(&self, options: &OpenOptions<'_>) -> Result<OpenedTarget, OpenError> {
        match self {
            Self::File(path) => open_file(path, options),
            Self::Qemu(selector) => {
                let target = qemu::open(selector, &qemu_options(options))?;
                Ok(opened_qemu(target))
            }
            Self::Ivshmem(address) => {
                let device = ivshmem::open(
                    &options.pci_devices,
                    *address,
                    &IvshmemOptions {
                        layout: options.layout.as_ref(),
                        ram_size: None,
                        validate: options.validate,
                    },
                )?;
                Ok(OpenedTarget {
                    memory: device.memory,
                    description: format!("ivshmem device {address}, mapped"),
                    hints: Hints::default(),
                    pause: None,
                    notes: device.notes,
                    qemu: None,
                })
            }
        }
    }
}

fn qemu_options(options: &OpenOptions<'_>) -> QemuOptions {
    QemuOptions {
        layout: options.layout.clone(),
        qmp: options.qmp.clone(),
        timeout: options.timeout,
        ..QemuOptions::default()
    }
}

fn opened_qemu(target: QemuTarget) -> OpenedTarget {
    let process = &target.process;
    let name = match &process.command_line.name {
        Some(name) => format!("QEMU guest {name:?} (process {})", process.id.pid),
        None => format!("QEMU process {}", process.id.pid),
    };
    let free = process.monitors.iter().find(|monitor| !monitor.busy);
    let pause = match free {
        Some(monitor) => PauseMethod::Qmp(monitor.path.clone()),
        None => PauseMethod::Signal(process.id),
    };
    OpenedTarget {
        memory: target.memory.clone(),
        description: format!("{name}, {}, layout {}", target.access, target.layout_source),
        hints: Hints {
            vmcoreinfo: None,
            page_table_roots: target.page_table_roots.clone(),
            registers: target.registers.clone(),
        },
        pause: Some(pause),
        notes: target.notes.clone(),
        qemu: Some(target),
    }
}

fn open_file(path: &Path, options: &OpenOptions<'_>) -> Result<OpenedTarget, OpenError> {
    if let Some(target) = open_ram_of_qemu(path, options) {
        return Ok(target);
    }
    let image = image::open(
        path,
        &ImageOptions {
            format: options.format,
            layout: options.layout.as_ref(),
            validate: options.validate,
            ..ImageOptions::default()
        },
    )
    .map_err(|source| OpenError::Image {
        path: path.to_owned(),
        source,
    })?;
    Ok(OpenedTarget {
        description: format!("{} image {}", image.format, path.display()),
        hints: Hints {
            page_table_roots: image.hints.page_table_roots(),
            registers: image.hints.vcpus.iter().map(Into::into).collect(),
            vmcoreinfo: image.hints.vmcoreinfo,
        },
        pause: None,
        notes: image.notes.iter().map(ToString::to_string).collect(),
        memory: image.memory,
        qemu: None,
    })
}

/// The running QEMU whose RAM this file is, if there is one that can be
/// opened.
fn open_ram_of_qemu(path: &Path, options: &OpenOptions<'_>) -> Option<OpenedTarget> {
    if options
        .format
        .is_some_and(|format| format != ImageFormat::Raw)
    {
        return None;
    }
    let file = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    // A QEMU that can't be looked into can't be told to have it, either.
    let processes = qemu::discover().ok()?.processes;
    let process = processes.into_iter().find(|process| {
        let Reach::SharedFile(ram) = &process.reach else {
            return false;
        };
        fs::metadata(ram).is_ok_and(|ram| (ram.dev(), ram.ino()) == (file.dev(), file.ino()))
    })?;
    let target = qemu::open_process(process, &qemu_options(options)).ok()?;
    if !matches!(target.access, Access::MappedFile(_)) {
        return None;
    }
    let pid = target.process.id.pid;
    let mut opened = opened_qemu(target);
    opened.notes.push(format!(
        "{} is the RAM of running QEMU process {pid}: it is live",
        path.display()
    ));
    Some(opened)
}

/// Something that can be watched here, or could be: a row of
/// `secmon targets`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetRow {
    /// What to give to `-t`; `None` for what is no target.
    pub target: Option<String>,
    /// `qemu` or `ivshmem`.
    pub kind: &'static str,
    /// The guest's name.
    pub name: Option<String>,
    /// The guest's UUID.
    pub uuid: Option<String>,
    /// The process.
    pub pid: Option<u32>,
    /// The machine type as it was given.
    pub machine: Option<String>,
    /// Bytes of RAM, as far as the target says.
    pub ram: Option<u64>,
    /// How its memory would be read; `None` if it can't be.
    pub access: Option<String>,
    /// How the guest would be paused; `None` if it can't be.
    pub pause: Option<String>,
    /// Why it can't be watched, or not so well, and what to do about it.
    pub problem: Option<String>,
}

/// What can be watched on this machine. `pci_devices` is
/// [`ivshmem::PCI_DEVICES`], but for tests.
///
/// What could not be looked for is a row, too.
pub fn targets(pci_devices: &Path) -> Vec<TargetRow> {
    let mut rows = Vec::new();
    match qemu::discover() {
        Ok(discovery) => {
            let names: Vec<Option<String>> = discovery
                .processes
                .iter()
                .map(|process| process.command_line.name.clone())
                .collect();
            for process in &discovery.processes {
                let name = &process.command_line.name;
                let unique = names.iter().filter(|other| *other == name).count() == 1;
                rows.push(qemu_row(process, unique));
            }
            for skipped in discovery.skipped {
                rows.push(TargetRow {
                    pid: Some(skipped.pid),
                    problem: Some(skipped.reason.to_string()),
                    ..empty_row("qemu")
                });
            }
        }
        Err(error) => rows.push(TargetRow {
            problem: Some(format!("processes can't be listed: {error}")),
            ..empty_row("qemu")
        }),
    }
    match ivshmem::list(pci_devices) {
        Ok(devices) => rows.extend(devices.into_iter().map(|device| TargetRow {
            target: Some(Target::Ivshmem(device.address).to_string()),
            ram: Some(device.size).filter(|size| *size > 0),
            access: device.problem.is_none().then(|| "mapped".to_owned()),
            problem: device.problem,
            ..empty_row("ivshmem")
        })),
        Err(error) => rows.push(TargetRow {
            problem: Some(format!("PCI devices can't be listed: {error}")),
            ..empty_row("ivshmem")
        }),
    }
    rows
}

fn empty_row(kind: &'static str) -> TargetRow {
    TargetRow {
        target: None,
        kind,
        name: None,
        uuid: None,
        pid: None,
        machine: None,
        ram: None,
        access: None,
        pause: None,
        problem: None,
    }
}

fn qemu_row(process: &qemu::QemuProcess, unique: bool) -> TargetRow {
    let command_line = &process.command_line;
    let pid = process.id.pid;
    // A name that others share, or that is a number, is no good to tell it by.
    let selector = match &command_line.name {
        Some(name) if unique && name.parse::<u32>().is_err() && !name.is_empty() => {
            Selector::Name(name.clone())
        }
        _ => Selector::Pid(pid),
    };
    let (access, problem) = match &process.reach {
        Reach::SharedFile(path) => (Some(format!("shared file {}", path.display())), None),
        Reach::ProcessMemory => (Some("process memory".to_owned()), None),
        Reach::Denied { advice } => (None, Some(advice.clone())),
    };
    let problem = problem.or_else(|| {
        command_line
            .confidential
            .then(|| "a confidential VM: its memory is encrypted, or not in QEMU at all".to_owned())
    });
    let pause = match process.monitors.iter().find(|monitor| !monitor.busy) {
        Some(_) => "QMP",
        None => "signal",
    };
    TargetRow {
        target: Some(Target::Qemu(selector).to_string()),
        kind: "qemu",
        name: command_line.name.clone(),
        uuid: command_line.uuid.clone(),
        pid: Some(pid),
        machine: command_line.machine_name.clone(),
        ram: command_line
            .main_blocks()
            .map(|blocks| blocks.iter().map(|(_, size)| size).sum()),
        pause: access.is_some().then(|| pause.to_owned()),
        access,
        problem,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(text: &str) -> String {
        text.parse::<Target>().expect_err(text).to_string()
    }

    #[test]
    fn each_kind_has_its_form() {
        for text in [
            "file:/a b:c",
            "qemu:web1",
            "qemu:123",
            "ivshmem:0000:00:04.0",
        ] {
            let target: Target = text.parse().expect(text);
            assert_eq!(target.to_string(), text);
        }
        assert_eq!("qemu:123".parse(), Ok(Target::Qemu(Selector::Pid(123))));
        let name = Selector::Name("12x".into());
        assert_eq!("qemu:12x".parse(), Ok(Target::Qemu(name)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(error("memory.raw").contains("perhaps file:memory.raw"));
        assert!(error("web1").contains("perhaps qemu:web1"));
        assert!(error("").contains("kind is missing"));
        assert!(error("files:x").contains("\"files\""));
        assert!(error("file:").contains("path"));
        assert!(error("qemu:").contains("process id"));
        assert!(error("ivshmem:4").contains("PCI address"));
        assert!(error("xen:3").contains("Xen"));
    }

    proptest! {
        #[test]
        fn any_text_is_a_target_or_an_error(text in "(file|qemu|ivshmem|xen|)(:|)\\PC{0,20}") {
            if let Ok(target) = text.parse::<Target>() {
                prop_assert_eq!(target.to_string().parse(), Ok(target));
            }
        }
    }
}

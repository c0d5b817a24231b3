//! Targets of a monitor: running QEMUs on this host whose RAM is a shared file.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use secmon_platform::qemu::{
    self, QemuError, QemuProcess, RamFile, RamFileError, RamFileKind, Selector,
};
use serde::{Deserialize, Serialize};

use super::command_line::MAX_TARGET_RAM;
use super::process::ProcessRecord;

/// A target as the user names it: `qemu:NAME` or `qemu:PID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TargetName(Selector);

/// Why a text names no target of a monitor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no target of a monitor: name a running QEMU as qemu:NAME or qemu:PID")]
pub struct TargetNameError {
    /// What was given.
    pub text: String,
}

impl FromStr for TargetName {
    type Err = TargetNameError;

    fn from_str(text: &str) -> Result<Self, TargetNameError> {
        let error = || TargetNameError {
            text: text.to_owned(),
        };
        let selector = text.strip_prefix("qemu:").ok_or_else(error)?;
        if selector.is_empty() {
            return Err(error());
        }
        let Ok(selector) = selector.parse();
        Ok(Self(selector))
    }
}

impl TryFrom<String> for TargetName {
    type Error = TargetNameError;

    fn try_from(text: String) -> Result<Self, TargetNameError> {
        text.parse()
    }
}

impl From<TargetName> for String {
    fn from(name: TargetName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "qemu:{}", self.0)
    }
}

impl TargetName {
    /// The name by which a monitor knows the target: QEMU's, with what is no
    /// letter, digit, `.`, `_` or `-` replaced.
    #[must_use]
    pub fn short(&self) -> String {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let text = self.0.to_string();
        let short: String = text
            .chars()
            .map(|c| if fits(c) { c } else { '_' })
            .take(64)
            .collect();
        short
    }
}

/// A target that runs and can be shown to a monitor.
#[derive(Clone, Debug)]
pub struct RunningTarget {
    /// Its QEMU.
    pub process: ProcessRecord,
    /// Its RAM.
    pub ram: RamFile,
    /// Where its QEMU is controlled.
    pub control: ControlSockets,
}

/// The sockets on which a QEMU is controlled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlSockets {
    /// Where it speaks QMP, in the order of its command line.
    pub qmp: Vec<qemu::Monitor>,
    /// Where its gdbstub listens.
    pub gdb: Option<PathBuf>,
}

/// Why a gate has no way to a QEMU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// There is no QMP socket.
    #[error(
        "its QEMU has no QMP socket: start it with `-qmp unix:PATH,server=on,wait=off` \
         (with libvirt: <qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:PATH,server=on,wait=off'/></qemu:commandline>)"
    )]
    Missing,
    /// All are in use.
    #[error(
        "{paths}: in use by another client (libvirt, a management tool); QEMU serves one client a socket: \
         start it with a further `-qmp unix:PATH,server=on,wait=off` for the gate alone"
    )]
    Busy {
        /// The sockets.
        paths: String,
    },
}

impl ControlSockets {
    /// A QMP socket that nobody uses.
    ///
    /// # Errors
    /// [`ControlError`], which says what to do about it.
    pub fn free(&self) -> Result<&Path, ControlError> {
        if let Some(free) = self.qmp.iter().find(|monitor| !monitor.busy) {
            return Ok(&free.path);
        }
        if self.qmp.is_empty() {
            return Err(ControlError::Missing);
        }
        let paths: Vec<String> = self
            .qmp
            .iter()
            .map(|monitor| monitor.path.display().to_string())
            .collect();
        Err(ControlError::Busy {
            paths: paths.join(", "),
        })
    }
}

/// Why a target can't be shown to a monitor.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// It doesn't run, or is not to be looked at.
    #[error(transparent)]
    Qemu(#[from] QemuError),
    /// Its RAM is no shared file.
    #[error("{target}: {source}\n{}", advice(.process))]
    NotShared {
        /// The target.
        target: String,
        /// What its RAM is.
        source: RamFileError,
        /// Its QEMU.
        process: Box<QemuProcess>,
    },
    /// Its RAM can't be shared for another reason.
    #[error("{target}: {source}")]
    Ram {
        /// The target.
        target: String,
        /// Why.
        source: RamFileError,
    },
    /// Its RAM is larger than a monitor's device can show.
    #[error(
        "{target} has {size:#x} bytes of RAM; a monitor's device shows at most {MAX_TARGET_RAM:#x}"
    )]
    TooLarge {
        /// The target.
        target: String,
        /// Its RAM.
        size: u64,
    },
    /// The file can't be made as large as the device's memory.
    #[error(
        "{target}: its RAM of {size:#x} bytes is no power of two, and its file {file} can't be extended to {wanted:#x}: {source}; {}",
        power_advice(.kind)
    )]
    Extend {
        /// The target.
        target: String,
        /// Its RAM.
        size: u64,
        /// The next power of two.
        wanted: u64,
        /// The file.
        file: String,
        /// What kind it is.
        kind: RamFileKind,
        /// The system's reason.
        source: io::Error,
    },
    /// The file does not hold all of the RAM any more.
    #[error(
        "{target}: its RAM file {file} has {length:#x} bytes, its RAM {size:#x}: somebody shortened it, and reading what is cut off would end the monitoring VM; start the target's QEMU anew"
    )]
    Shortened {
        /// The target.
        target: String,
        /// The file.
        file: String,
        /// Its bytes.
        length: u64,
        /// The target's RAM.
        size: u64,
    },
    /// The file can't be opened.
    #[error("{target}: opening its RAM file {file}: {source}")]
    Open {
        /// The target.
        target: String,
        /// The file.
        file: String,
        /// The system's reason.
        source: io::Error,
    },
}

fn power_advice(kind: &RamFileKind) -> &'static str {
    match kind {
        RamFileKind::Anonymous => {
            "a memfd of QEMU is sealed against it: give the guest 512M, 1G, 2G, 4G … of RAM, start QEMU with memory-backend-memfd,seal=off, or use memory-backend-file"
        }
        RamFileKind::Named => "see that its file system has room for a sparse file of that size",
    }
}

/// What to add to a QEMU's command line so that its RAM is shared.
fn advice(process: &QemuProcess) -> String {
    let line = &process.command_line;
    let size = line.main_ram_size().unwrap_or(128 << 20);
    let size = match size {
        size if size % (1 << 30) == 0 => format!("{}G", size >> 30),
        size if size % (1 << 20) == 0 => format!("{}M", size >> 20),
        size => size.to_string(),
    };
    let machine = line.machine_name.as_deref().unwrap_or("pc");
    let name = line.name.as_deref().unwrap_or("NAME");
    format!(
        "  a monitor sees RAM that QEMU shares. Add to its command line, and start it anew:\n\
         \x20   -object memory-backend-memfd,id=ram,size={size},share=on,seal=off -machine {machine},memory-backend=ram\n\
         \x20 with libvirt, change the domain (or let `virsh dumpxml {name} | secmon monitor libvirt-xml --convert -` do it):\n\
         \x20   <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
    )
}

impl TargetName {
    /// Finds the target as it runs now.
    ///
    /// # Errors
    /// [`TargetError`], which says what to change where its RAM isn't shared.
    pub fn find(&self) -> Result<RunningTarget, TargetError> {
        let process = qemu::find(&self.0)?;
        let ram = match RamFile::of(&process) {
            Ok(ram) => ram,
            Err(source @ RamFileError::NotShared { .. }) => {
                return Err(TargetError::NotShared {
                    target: self.to_string(),
                    source,
                    process: Box::new(process),
                });
            }
            Err(source) => {
                return Err(TargetError::Ram {
                    target: self.to_string(),
                    source,
                });
            }
        };
        if ram.ram_size > MAX_TARGET_RAM {
            return Err(TargetError::TooLarge {
                target: self.to_string(),
                size: ram.ram_size,
            });
        }
        let gdb = process.gdb_socket();
        Ok(RunningTarget {
            process: process.id.into(),
            ram,
            control: ControlSockets {
                qmp: process.monitors,
                gdb,
            },
        })
    }

    /// Opens the target's RAM for a device's memory, whose size is a power of
    /// two: the file is made so long, sparsely, where it isn't. Gives the file,
    /// open for reading, and that size.
    ///
    /// The target does not notice: its QEMU has the RAM's own length mapped,
    /// and no page is allocated behind it unless somebody touches one.
    ///
    /// # Errors
    /// [`TargetError`].
    pub fn open_ram(&self, target: &RunningTarget) -> Result<(File, u64), TargetError> {
        let ram = &target.ram;
        let shown = ram.shown.display().to_string();
        let open = |source| TargetError::Open {
            target: self.to_string(),
            file: shown.clone(),
            source,
        };
        let file = ram.open().map_err(open)?;
        let length = file.metadata().map_err(open)?.len();
        if length < ram.ram_size {
            return Err(TargetError::Shortened {
                target: self.to_string(),
                file: shown.clone(),
                length,
                size: ram.ram_size,
            });
        }
        let wanted = device_size(ram.ram_size);
        if length < wanted {
            let extend = || File::options().write(true).open(&ram.path)?.set_len(wanted);
            extend().map_err(|source| TargetError::Extend {
                target: self.to_string(),
                size: ram.ram_size,
                wanted,
                file: shown.clone(),
                kind: ram.kind,
                source,
            })?;
        }
        Ok((file, wanted))
    }
}

/// The memory of a PCI device that shows so much RAM.
#[must_use]
pub fn device_size(ram_size: u64) -> u64 {
    ram_size
        .checked_next_power_of_two()
        .unwrap_or(u64::MAX)
        .max(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_qemu_is_a_target_of_a_monitor() {
        let name: TargetName = "qemu:web 1".parse().expect("a target");
        assert_eq!(name.to_string(), "qemu:web 1");
        assert_eq!(name.short(), "web_1");
        for bad in ["web1", "file:x", "qemu:", "ivshmem:0000:00:04.0", ""] {
            assert!(bad.parse::<TargetName>().is_err(), "{bad}");
        }
        let text = serde_json::to_string(&name).expect("JSON");
        assert_eq!(
            serde_json::from_str::<TargetName>(&text).expect("back"),
            name
        );
    }

    #[test]
    fn a_gate_takes_a_socket_that_nobody_uses() {
        let monitor = |path: &str, busy| qemu::Monitor {
            path: PathBuf::from(path),
            busy,
        };
        let sockets = |qmp| ControlSockets { qmp, gdb: None };
        assert_eq!(sockets(Vec::new()).free(), Err(ControlError::Missing));
        let one = sockets(vec![monitor("/a", true), monitor("/b", false)]);
        assert_eq!(one.free(), Ok(Path::new("/b")));
        let none = sockets(vec![monitor("/a", true)]);
        let error = none.free().expect_err("in use").to_string();
        assert!(
            error.contains("/a") && error.contains("a further"),
            "{error}"
        );
    }

    #[test]
    fn a_device_is_as_large_as_the_next_power_of_two() {
        for (ram, device) in [(512, 512), (1536, 2048), (6144, 8192), (3000, 4096)] {
            assert_eq!(device_size(ram << 20), device << 20);
        }
    }
}

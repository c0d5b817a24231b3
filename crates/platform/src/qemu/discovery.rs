//! The QEMU processes that run on this machine, and what they say of
//! themselves.

use std::io;
use std::path::{Path, PathBuf};

use super::command_line::{CommandLine, MonitorSocket};
use super::locate;
use super::memory::ForeignMemory;
use super::process::{self, ProcessId};

/// A running QEMU that has a guest.
#[derive(Clone, Debug)]
pub struct QemuProcess {
    /// The process.
    pub id: ProcessId,
    /// The program it runs, or the name it was called by where that can't be
    /// seen.
    pub executable: PathBuf,
    /// What its arguments say.
    pub command_line: CommandLine,
    /// Its QMP sockets, in the order of the command line.
    pub monitors: Vec<Monitor>,
    /// Whether and how its memory can be read.
    pub reach: Reach,
}

impl QemuProcess {
    /// Where its gdbstub listens, if on a socket with a name.
    #[must_use]
    pub fn gdb_socket(&self) -> Option<PathBuf> {
        match &self.command_line.gdb {
            Some(MonitorSocket::Path(path)) => Some(reachable_path(self.id.pid, path)),
            _ => None,
        }
    }
}

/// A UNIX socket on which a QEMU speaks QMP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Monitor {
    /// Where to connect.
    pub path: PathBuf,
    /// A client is connected already; QEMU would not answer another one.
    pub busy: bool,
}

/// How the guest's memory can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// RAM is a file shared with others: it can be mapped.
    SharedFile(PathBuf),
    /// RAM is QEMU's own, read through `/proc/PID/mem` or `process_vm_readv`.
    ProcessMemory,
    /// This process may not look into QEMU.
    Denied {
        /// What to do about it.
        advice: String,
    },
}

/// A process that is a QEMU and yet no target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The process.
    pub pid: u32,
    /// Its program.
    pub executable: PathBuf,
    /// Why it is none.
    pub reason: SkipReason,
}

/// Why a QEMU is no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SkipReason {
    /// It emulates another architecture than x86-64.
    #[error("its guest is not x86-64 but {0}")]
    Architecture(String),
    /// It has no guest: management tools ask QEMU for its abilities that way.
    #[error("it has no guest (-machine none)")]
    NoGuest,
    /// It can't be looked at.
    #[error("{0}")]
    Host(String),
}

/// What [`discover`] found.
#[derive(Clone, Debug, Default)]
pub struct Discovery {
    /// The QEMUs that have a guest, by ascending process id.
    pub processes: Vec<QemuProcess>,
    /// The others, and why.
    pub skipped: Vec<Skipped>,
}

/// Looks for running QEMUs.
///
/// A QEMU is known by the program it runs (`/proc/PID/exe`), not by its
/// command's name, which anybody may choose; where the program can't be seen
/// for lack of permission, by the first argument.
///
/// # Errors
/// The host's, if there is no `/proc`.
pub fn discover() -> io::Result<Discovery> {
    let mut discovery = Discovery::default();
    for pid in process::all()? {
        match inspect(pid) {
            Ok(Inspection::Guest(process)) => discovery.processes.push(*process),
            Ok(Inspection::NoGuest(executable, reason)) => discovery.skipped.push(Skipped {
                pid,
                executable,
                reason,
            }),
            // Other programs, and processes that ended meanwhile.
            Ok(Inspection::NotQemu) | Err(_) => {}
        }
    }
    Ok(discovery)
}

/// What a process turned out to be.
pub(super) enum Inspection {
    Guest(Box<QemuProcess>),
    NoGuest(PathBuf, SkipReason),
    NotQemu,
}

/// Looks at one process.
pub(super) fn inspect(pid: u32) -> io::Result<Inspection> {
    let executable = match process::executable(pid) {
        Ok(executable) => executable,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let arguments = process::arguments(pid)?;
            let Some(first) = arguments.first() else {
                return Ok(Inspection::NotQemu);
            };
            PathBuf::from(String::from_utf8_lossy(first).into_owned())
        }
        Err(error) => return Err(error),
    };
    let Some(architecture) = emulated_architecture(&executable) else {
        return Ok(Inspection::NotQemu);
    };
    if architecture != "x86_64" {
        let reason = SkipReason::Architecture(architecture);
        return Ok(Inspection::NoGuest(executable, reason));
    }
    let id = match ProcessId::of(pid) {
        Ok(id) => id,
        Err(error) => {
            let reason = SkipReason::Host(error.to_string());
            return Ok(Inspection::NoGuest(executable, reason));
        }
    };
    let command_line = CommandLine::parse(&process::arguments(pid)?);
    if command_line.machine_name.as_deref() == Some("none") {
        return Ok(Inspection::NoGuest(executable, SkipReason::NoGuest));
    }
    Ok(Inspection::Guest(Box::new(QemuProcess {
        id,
        executable,
        monitors: monitors(pid, &command_line.monitors),
        reach: reach(id, &command_line),
        command_line,
    })))
}

/// The guest's architecture, by the program's name; `None` if it is no system
/// emulator of QEMU.
fn emulated_architecture(executable: &Path) -> Option<String> {
    let name = executable.file_name()?.to_str()?;
    match name {
        // Distributions' names; they are for the host's own architecture.
        "qemu-kvm" | "kvm" | "qemu" => Some(std::env::consts::ARCH.to_owned()),
        _ => {
            let rest = name.strip_prefix("qemu-system-")?;
            let architecture = rest.split(['-', '.']).next().unwrap_or(rest);
            Some(architecture.to_owned())
        }
    }
}

/// The command line's QMP sockets as paths that can be connected to.
fn monitors(pid: u32, sockets: &[MonitorSocket]) -> Vec<Monitor> {
    if sockets.is_empty() {
        return Vec::new();
    }
    // Without permission nothing is known of them but the command line.
    let open = process::unix_sockets(pid).unwrap_or_default();
    let monitors = sockets.iter().filter_map(|socket| {
        let bound = match socket {
            MonitorSocket::Path(path) => path.clone(),
            MonitorSocket::Descriptor(number) => open
                .iter()
                .find(|(descriptor, socket)| descriptor == number && socket.listening)
                .map(|(_, socket)| socket.path.clone())?,
        };
        let busy = open
            .iter()
            .any(|(_, socket)| socket.connected && socket.path == bound);
        let path = reachable_path(pid, &bound);
        Some(Monitor { path, busy })
    });
    monitors.collect()
}

/// A path of another process as this one can use it: relative ones lie in the
/// other's working folder, and absolute ones may lie in its own file system.
fn reachable_path(pid: u32, path: &Path) -> PathBuf {
    let folder = process::folder(pid);
    let Ok(below_root) = path.strip_prefix("/") else {
        return folder.join("cwd").join(path);
    };
    if path.exists() {
        return path.to_owned();
    }
    let in_its_root = folder.join("root").join(below_root);
    if in_its_root.exists() {
        return in_its_root;
    }
    path.to_owned()
}

/// Whether and how the memory can be read, without reading any of it.
fn reach(id: ProcessId, command_line: &CommandLine) -> Reach {
    let mappings = match process::mappings(id.pid) {
        Ok(mappings) => mappings,
        Err(error) => {
            return match stated_file(command_line) {
                Some((path, _)) if std::fs::File::open(&path).is_ok() => Reach::SharedFile(path),
                _ => denied(id, &error),
            };
        }
    };
    let shared = command_line
        .main_blocks()
        .and_then(|blocks| match blocks.as_slice() {
            [(_, size)] => {
                let (file, _) = locate::shared_ram(&mappings, command_line, *size)?;
                Some(PathBuf::from(
                    String::from_utf8_lossy(&file.path).into_owned(),
                ))
            }
            _ => None,
        });
    if let Some(path) = shared {
        return Reach::SharedFile(path);
    }
    let Some(probe) = mappings.iter().find(|mapping| mapping.readable) else {
        return Reach::Denied {
            advice: "the process has no memory: it is ending".to_owned(),
        };
    };
    match ForeignMemory::open(id, probe.start) {
        Ok(_) => Reach::ProcessMemory,
        Err(error) => denied(id, &error),
    }
}

/// The file that the command line names as the one block of main RAM, shared,
/// and its size.
pub(super) fn stated_file(command_line: &CommandLine) -> Option<(PathBuf, u64)> {
    let blocks = command_line.main_blocks()?;
    let [(name, size)] = blocks.as_slice() else {
        return None;
    };
    let backend = command_line.backend(name)?;
    let path = backend.path.clone().filter(|path| path.is_absolute())?;
    (backend.share && path.is_file()).then_some((path, *size))
}

fn denied(id: ProcessId, error: &io::Error) -> Reach {
    Reach::Denied {
        advice: advice(id, error),
    }
}

/// What to do when the host forbids looking into a process.
pub(super) fn advice(id: ProcessId, error: &io::Error) -> String {
    let ours = rustix::process::geteuid().as_raw();
    let pid = id.pid;
    match process::owner(pid) {
        Some(owner) if owner != ours => format!(
            "{error}: QEMU process {pid} belongs to user {owner}, this is user {ours}; run secmon as that user or as root, or give it the capability CAP_SYS_PTRACE"
        ),
        _ => match process::ptrace_scope() {
            Some(scope) if scope > 0 => format!(
                "{error}: kernel.yama.ptrace_scope is {scope}, which keeps processes of the same user apart; run secmon as root, or give it the capability CAP_SYS_PTRACE, or set the scope to 0"
            ),
            _ => format!(
                "{error}: QEMU process {pid} is protected from its own user (it changed its user, or a security module forbids it); run secmon as root or with the capability CAP_SYS_PTRACE"
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_by_their_name() {
        let architecture = |path: &str| emulated_architecture(Path::new(path));
        assert_eq!(
            architecture("/usr/bin/qemu-system-x86_64").as_deref(),
            Some("x86_64")
        );
        assert_eq!(
            architecture("/usr/bin/qemu-system-x86_64-spice").as_deref(),
            Some("x86_64")
        );
        assert_eq!(
            architecture("/usr/libexec/qemu-kvm").as_deref(),
            Some(std::env::consts::ARCH)
        );
        assert_eq!(
            architecture("qemu-system-aarch64").as_deref(),
            Some("aarch64")
        );
        for other in ["/bin/bash", "/usr/bin/qemu-img", "/usr/bin/qemu-x86_64", ""] {
            assert_eq!(architecture(other), None, "{other}");
        }
    }

    #[test]
    fn a_process_that_mentions_qemu_is_none() {
        let mut child = std::process::Command::new("sleep")
            .arg0("qemu-system-x86_64")
            .arg("30")
            .spawn()
            .expect("sleep");
        let inspection = inspect(child.id()).expect("a process");
        assert!(matches!(inspection, Inspection::NotQemu));
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    use std::os::unix::process::CommandExt;
}

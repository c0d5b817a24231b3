//! The process that becomes QEMU: opens what the VM starts from, gives up
//! every right, and runs QEMU in its place.
//!
//! It is a program of its own (a hidden command of `secmon`) because a process
//! that has threads can't confine itself as a whole. In this order:
//!
//! 1. open the kernel, the initramfs and the configuration; bind the sockets;
//! 2. become the monitor's own user, if there is one;
//! 3. landlock: read the system's programs and libraries and the targets' RAM
//!    files; write no file, listen on and connect to no TCP port;
//! 4. run QEMU, whose `-sandbox` filters system calls.
//!
//! The configuration holds the monitor's secret key; it reaches QEMU as an
//! anonymous file that no other process can open.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use landlock::{AccessFs, BitFlags, PathBeneath, PathFd, RulesetCreatedAttr, RulesetStatus};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, Signal, getppid, set_parent_process_death_signal};
use rustix::thread::{Gid, Uid};
use serde::{Deserialize, Serialize};

use super::account::Account;
use super::command_line::{Descriptors, Machine};
use super::process::ProcessRecord;

/// The most of a file that is copied to QEMU: an image's limit is 25 MiB.
const MAX_COPY: u64 = 256 << 20;

/// What becomes QEMU, and from what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPlan {
    /// QEMU.
    pub program: PathBuf,
    /// The machine.
    pub machine: Machine,
    /// The user it runs as; the caller's own if there is none.
    pub account: Option<Account>,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The monitor's configuration.
    pub configuration: PathBuf,
    /// Where QMP is to listen.
    pub qmp_socket: PathBuf,
    /// Where the monitor's channels are to listen.
    pub channel_sockets: Vec<PathBuf>,
    /// Where it writes down which process it is, before anything else: whoever
    /// started it may be killed before that is known.
    pub record: PathBuf,
    /// RAM files that QEMU may open for reading.
    pub ram_files: Vec<PathBuf>,
    /// Ends with its parent. A monitor outlives the process that started it,
    /// a trial does not.
    pub ends_with_parent: bool,
}

/// Why QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The plan can't be read.
    #[error("the plan {path}: {reason}")]
    Plan {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file or socket.
    #[error("{what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Rights could not be given up.
    #[error("{what}: {reason}; QEMU is not run with more rights than it needs")]
    Confinement {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        reason: String,
    },
    /// The program does not run.
    #[error("running {program}: {source}; is qemu-system-x86 installed?")]
    Program {
        /// QEMU.
        program: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Reads the plan in the file `plan` and runs QEMU in this process's place.
/// Only comes back with an error.
#[must_use]
pub fn become_qemu(plan: &Path) -> StartError {
    match prepare(plan) {
        Ok(mut command) => {
            let program = PathBuf::from(command.get_program());
            let source = command.exec();
            StartError::Program { program, source }
        }
        Err(error) => error,
    }
}

fn prepare(plan_file: &Path) -> Result<Command, StartError> {
    let invalid = |reason: String| StartError::Plan {
        path: plan_file.to_owned(),
        reason,
    };
    let text = fs::read(plan_file).map_err(|error| invalid(error.to_string()))?;
    let plan: StartPlan =
        serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    let own = ProcessRecord::of(std::process::id());
    let text = serde_json::to_vec(&own).map_err(|error| invalid(error.to_string()))?;
    fs::write(&plan.record, text).map_err(file_error("writing", &plan.record))?;
    if plan.ends_with_parent {
        let parent = getppid();
        let set = set_parent_process_death_signal(Some(Signal::KILL));
        set.map_err(|error| confinement("asking to end with the parent", &error))?;
        if getppid() != parent || parent.is_none() {
            return Err(invalid("the process that asked for it has ended".into()));
        }
    }
    let kernel = readable(&plan, &plan.kernel)?;
    let initramfs = readable(&plan, &plan.initramfs)?;
    let configuration = copy(&plan.configuration)?;
    let qmp = listen(&plan.qmp_socket)?;
    let channels = plan.channel_sockets.iter().map(|path| listen(path));
    let channels: Vec<UnixListener> = channels.collect::<Result<_, _>>()?;
    let descriptors = Descriptors {
        kernel: kept(&kernel)?,
        initramfs: kept(&initramfs)?,
        configuration: kept(&configuration)?,
        // Standard input, output and error are the console's socket.
        console: 0,
        qmp: kept(&qmp)?,
        channels: channels.iter().map(kept).collect::<Result<_, _>>()?,
    };
    let open = [&kernel, &initramfs].map(|file| OpenFile { file });
    limit()?;
    // The rules name files that only a privileged process may look at.
    let ruleset = rules(&plan, &open)?;
    if let Some(account) = plan.account {
        become_user(account)?;
    }
    let status = ruleset
        .restrict_self()
        .map_err(|error| confinement("landlock", &error))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        eprintln!("secmon: this kernel has no landlock: QEMU is confined by its user alone");
    }
    let mut command = Command::new(&plan.program);
    command.args(plan.machine.arguments(&descriptors));
    command.env_clear();
    command.env("PATH", "/usr/bin:/bin");
    command.current_dir("/");
    // Open in QEMU under the same numbers; this process ends as QEMU begins.
    let files = [kernel, initramfs, configuration].map(OwnedFd::from);
    let sockets = channels.into_iter().chain([qmp]).map(OwnedFd::from);
    for descriptor in sockets.chain(files) {
        std::mem::forget(descriptor);
    }
    Ok(command)
}

struct OpenFile<'a> {
    file: &'a File,
}

fn confinement(what: &'static str, error: &dyn std::fmt::Display) -> StartError {
    StartError::Confinement {
        what,
        reason: error.to_string(),
    }
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_owned();
    move |source| StartError::File { what, path, source }
}

/// A file that the monitor's user will be able to open again by its
/// descriptor, a copy of it where it could not.
fn readable(plan: &StartPlan, path: &Path) -> Result<File, StartError> {
    let file = File::open(path).map_err(file_error("opening", path))?;
    let metadata = file.metadata().map_err(file_error("opening", path))?;
    if plan.account.is_none() || metadata.mode() & 0o004 != 0 {
        Ok(file)
    } else {
        copy(path)
    }
}

/// The file's bytes in an anonymous file.
fn copy(path: &Path) -> Result<File, StartError> {
    let failed = |source: io::Error| StartError::File {
        what: "copying",
        path: path.to_owned(),
        source,
    };
    let memory =
        memfd_create("secmon", MemfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let mut memory = File::from(memory);
    let file = File::open(path).map_err(failed)?;
    io::copy(&mut file.take(MAX_COPY), &mut memory).map_err(failed)?;
    memory.flush().map_err(failed)?;
    Ok(memory)
}

fn listen(path: &Path) -> Result<UnixListener, StartError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(file_error("removing", path)(source));
        }
        _ => {}
    }
    UnixListener::bind(path).map_err(file_error("binding", path))
}

/// The descriptor's number, once it stays open in the program that is run.
fn kept(descriptor: &impl AsFd) -> Result<i32, StartError> {
    let descriptor = descriptor.as_fd();
    fcntl_setfd(descriptor, FdFlags::empty())
        .map_err(|error| confinement("keeping a descriptor", &error))?;
    Ok(descriptor.as_raw_fd())
}

/// No core file, which would hold keys; and not more open files than needed.
fn limit() -> Result<(), StartError> {
    let both = |value| Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    let set = |resource, value| {
        rustix::process::setrlimit(resource, both(value))
            .map_err(|error| confinement("setting limits", &error))
    };
    set(Resource::Core, 0)?;
    set(Resource::Nofile, 512)
}

/// What QEMU may still open: programs, libraries and firmware where they lie,
/// the kernel and initramfs, the targets' RAM, and its own entries in `/proc`.
fn rules(plan: &StartPlan, open: &[OpenFile<'_>]) -> Result<landlock::RulesetCreated, StartError> {
    let failed = |error: landlock::RulesetError| confinement("landlock", &error);
    let mut ruleset = secmon_sandbox::deny_all().map_err(failed)?;
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let run = read | AccessFs::Execute;
    let program = fs::canonicalize(&plan.program).unwrap_or_else(|_| plan.program.clone());
    // `bin` and `share` of wherever QEMU is installed.
    let installed = program.parent().and_then(Path::parent).map(Path::to_owned);
    let folders = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"]
        .map(PathBuf::from)
        .into_iter()
        .chain(installed.filter(|folder| folder != Path::new("/")))
        .map(|path| (path, run));
    let others = [
        "/proc/self",
        "/sys/devices/system",
        "/dev/urandom",
        "/dev/null",
    ]
    .map(PathBuf::from)
    .into_iter()
    .chain(plan.ram_files.iter().cloned())
    .map(|path| (path, read));
    let device = ["/dev/kvm", "/dev/null"].map(|path| {
        let access = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        (PathBuf::from(path), access)
    });
    for (path, mut access) in folders.chain(others).chain(device) {
        // What is not there can't be opened either.
        let Ok(opened) = PathFd::new(&path) else {
            continue;
        };
        if !path.is_dir() {
            access &= AccessFs::from_file(secmon_sandbox::KNOWN_RIGHTS);
        }
        ruleset = ruleset
            .add_rule(PathBeneath::new(opened, access))
            .map_err(failed)?;
    }
    for OpenFile { file } in open {
        // An anonymous copy lies in no folder and needs no rule.
        let named = file.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
        if named {
            ruleset = ruleset
                .add_rule(PathBeneath::new(file.as_fd(), AccessFs::ReadFile))
                .map_err(failed)?;
        }
    }
    Ok(ruleset)
}

/// Gives up root for good.
fn become_user(account: Account) -> Result<(), StartError> {
    let failed = |error: rustix::io::Errno| confinement("becoming the monitor's user", &error);
    let id = account.id;
    if id == 0 {
        return Err(confinement("becoming the monitor's user", &"it is root"));
    }
    let mut groups = Vec::new();
    if let Ok(device) = fs::metadata("/dev/kvm")
        && device.gid() != 0
    {
        groups.push(Gid::from_raw(device.gid()));
    }
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::thread::set_thread_groups(&groups).map_err(failed)?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(failed)?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(failed)?;
    if rustix::process::geteuid().is_root() || rustix::process::getuid().is_root() {
        return Err(confinement("becoming the monitor's user", &"still root"));
    }
    Ok(())
}

//! Process 1: prepares the machine and keeps the worker alive.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, wait};
use rustix::system::finit_module;
use secmon_platform::ivshmem::{self, IvshmemDevice, PCI_DEVICES};

use super::{WORKER, log};
use crate::appliance::MODULE_FOLDER;
use crate::protocol::CONFIGURATION_NAME;

/// How long the worker may be without a pulse. A watcher that searches all
/// memory of a large target takes minutes under emulation, and the worker's
/// own limits are below this.
const NO_PULSE: Duration = Duration::from_secs(30);
/// The longest wait before the worker is started again.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A worker that lived this long is started again at once.
const LIVED: Duration = Duration::from_secs(60);

/// How often the devices are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// What the next worker is told.
pub(super) const DEVICES_CHANGED: &str = "the targets' devices changed";

/// Runs until the machine ends. Process 1 must not return: the kernel would
/// panic, and the machine start again, which is what is wanted if this fails.
pub(super) fn main() -> ExitCode {
    log(format_args!("monitor {} starts", env!("CARGO_PKG_VERSION")));
    if let Err(error) = prepare() {
        log(error);
        return ExitCode::FAILURE;
    }
    let configuration = match configuration() {
        Ok(configuration) => configuration,
        Err(error) => {
            log(error);
            return ExitCode::FAILURE;
        }
    };
    let mut restarts: u32 = 0;
    let mut pause = Duration::from_millis(100);
    let mut reason = String::new();
    loop {
        let started = Instant::now();
        reason = match start_worker(&configuration, restarts, &reason) {
            Ok(worker) => match watch(worker) {
                // It opens what is there now, and nothing went wrong.
                End::DevicesChanged => {
                    log(DEVICES_CHANGED);
                    reason = DEVICES_CHANGED.to_owned();
                    continue;
                }
                End::Failed(reason) => reason,
            },
            Err(error) => format!("it can't be started: {error}"),
        };
        if started.elapsed() >= LIVED {
            pause = Duration::from_millis(100);
        }
        log(format_args!(
            "the worker ended: {reason}; starting it again"
        ));
        std::thread::sleep(pause);
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        restarts = restarts.saturating_add(1);
    }
}

/// Why the machine can't be prepared.
#[derive(Debug, thiserror::Error)]
enum PrepareError {
    #[error("mounting {what} on {place}: {source}")]
    Mount {
        what: &'static str,
        place: &'static str,
        source: Errno,
    },
    #[error("{path}: {source}", path = path.display())]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("loading module {path}: {source}", path = path.display())]
    Module { path: PathBuf, source: Errno },
    #[error(
        "no configuration: start QEMU with -fw_cfg name={CONFIGURATION_NAME},file=FILE ({path}: {source})", path = path.display()
    )]
    NoConfiguration {
        path: PathBuf,
        source: std::io::Error,
    },
}

fn prepare() -> Result<(), PrepareError> {
    let nothing = MountFlags::NOSUID | MountFlags::NOEXEC;
    for (what, place, flags) in [
        ("proc", "/proc", nothing | MountFlags::NODEV),
        ("sysfs", "/sys", nothing | MountFlags::NODEV),
        ("devtmpfs", "/dev", nothing),
    ] {
        mount(what, place, what, flags, None).map_err(|source| PrepareError::Mount {
            what,
            place,
            source,
        })?;
    }
    load_modules()?;
    // Nothing more is to be loaded, whoever asks.
    let switch = Path::new("/proc/sys/kernel/modules_disabled");
    if let Err(error) = fs::write(switch, "1\n") {
        log(format_args!("modules can still be loaded: {error}"));
    }
    Ok(())
}

/// Loads the modules of the initial file system, in the order of their names.
fn load_modules() -> Result<(), PrepareError> {
    let folder = Path::new("/").join(MODULE_FOLDER);
    let failed = |source| PrepareError::File {
        path: folder.clone(),
        source,
    };
    let mut paths = Vec::new();
    for entry in fs::read_dir(&folder).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    let no_parameters = CString::default();
    for path in paths {
        let file = File::open(&path).map_err(|source| PrepareError::File {
            path: path.clone(),
            source,
        })?;
        match finit_module(&file, &no_parameters, 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(source) => return Err(PrepareError::Module { path, source }),
        }
        // Its memory is wanted for better things.
        drop(file);
        let _ = fs::remove_file(&path);
    }
    Ok(())
}

fn configuration() -> Result<Vec<u8>, PrepareError> {
    let path = Path::new("/sys/firmware/qemu_fw_cfg/by_name")
        .join(CONFIGURATION_NAME)
        .join("raw");
    fs::read(&path).map_err(|source| PrepareError::NoConfiguration { path, source })
}

/// A running worker: its process, and its pulse.
struct Worker {
    child: Child,
    pulse: OwnedFd,
    /// The devices that were there when it started.
    devices: Vec<IvshmemDevice>,
}

fn start_worker(
    configuration: &[u8],
    restarts: u32,
    reason: &str,
) -> Result<Worker, std::io::Error> {
    let devices = devices();
    let mut child = Command::new("/init")
        .arg(WORKER)
        .arg(restarts.to_string())
        .arg(reason)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().ok_or(std::io::ErrorKind::BrokenPipe)?;
    input.write_all(configuration)?;
    drop(input);
    let pulse = child.stdout.take().ok_or(std::io::ErrorKind::BrokenPipe)?;
    Ok(Worker {
        child,
        pulse: pulse.into(),
        devices,
    })
}

/// Why a worker is not there any more.
enum End {
    /// It was ended as the targets' devices are others now: a worker that has
    /// confined itself can't open new ones.
    DevicesChanged,
    /// It died or hung.
    Failed(String),
}

/// The devices with targets' memory, for a change to be noticed.
fn devices() -> Vec<IvshmemDevice> {
    ivshmem::list(Path::new(PCI_DEVICES)).unwrap_or_default()
}

/// Waits until the worker ends, or ends it when its pulse stops or the devices
/// change; says why.
fn watch(worker: Worker) -> End {
    let Worker {
        child,
        pulse,
        devices: opened,
    } = worker;
    let Some(id) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        return End::Failed("it has no process number".to_owned());
    };
    let mut last = Instant::now();
    let mut looked = Instant::now();
    let mut seen = opened.clone();
    let mut hung = false;
    let mut changed = false;
    let mut open = true;
    let mut buffer = [0; 64];
    loop {
        if let Some(status) = reap(id) {
            if changed || devices() != opened {
                // Memory that is taken away under a worker's feet ends it.
                return End::DevicesChanged;
            }
            let reason = match (hung, status.terminating_signal(), status.exit_status()) {
                (true, ..) => format!("it had no pulse for {} s", NO_PULSE.as_secs()),
                (_, Some(signal), _) => format!("signal {signal}"),
                (_, _, Some(code)) => format!("exit status {code}"),
                _ => "unknown".to_owned(),
            };
            return End::Failed(reason);
        }
        if looked.elapsed() >= LOOK && !changed {
            looked = Instant::now();
            let now = devices();
            // Twice the same: a device that is just coming has no size yet.
            if now != opened && now == seen {
                changed = true;
                let _ = kill_process(id, Signal::KILL);
            }
            seen = now;
        }
        if open {
            let second = Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let mut polled = [PollFd::new(&pulse, PollFlags::IN)];
            if matches!(poll(&mut polled, Some(&second)), Ok(1..)) {
                match rustix::io::read(&pulse, &mut buffer) {
                    Ok(1..) => last = Instant::now(),
                    // It closed its end: it is about to be reaped.
                    _ => open = false,
                }
            }
        } else {
            std::thread::sleep(Duration::from_millis(20));
        }
        if last.elapsed() > NO_PULSE && !hung {
            hung = true;
            let _ = kill_process(id, Signal::KILL);
        }
    }
}

/// Takes whatever has ended; gives the worker's status if it did.
fn reap(worker: Pid) -> Option<WaitStatus> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((id, status))) if id == worker => return Some(status),
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return None,
        }
    }
}

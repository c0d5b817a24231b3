//! A running guest, and its end.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use rustix::fs::{FlockOperation, flock};

use crate::acceleration::Acceleration;
use crate::builder::{Backing, GuestBuilder, QMP_SOCKET, QmpAccess, RAM_FILE, SERIAL_LOG};
use crate::kernel::Kernel;
use crate::qmp::Qmp;
use crate::suite::Suite;
use crate::truth_channel::TruthChannel;

/// How much of the serial log an error shows.
const LOG_TAIL: usize = 3000;

/// Why a guest did not come up.
#[derive(Debug, thiserror::Error)]
#[error("{report}")]
pub(crate) struct NotReady {
    /// Whether it was emulated and its own kernel gave up.
    pub(crate) panicked: bool,
    /// What happened, with what QEMU and the console said.
    report: String,
}

/// A guest that runs until this value is dropped.
#[derive(Debug)]
pub struct Guest {
    // Fields are dropped in this order: the channels, then QEMU, then its
    // folder.
    truth: TruthChannel,
    control: Mutex<Qmp>,
    running: Running,
}

/// The QEMU process and what belongs to it.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) folder: Folder,
    pub(crate) name: String,
    pub(crate) kernel: Kernel,
    pub(crate) acceleration: Acceleration,
    pub(crate) memory_mib: u32,
    pub(crate) backing: Backing,
    pub(crate) qmp: QmpAccess,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; both calls then just say so.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    /// Describes a guest with the suite's kernel.
    #[must_use]
    pub fn builder(suite: Suite) -> GuestBuilder {
        GuestBuilder::new(suite)
    }

    pub(crate) fn wait_until_ready(
        mut running: Running,
        truth: UnixStream,
        control: UnixStream,
        timeout: Duration,
    ) -> Result<Self> {
        let start = Instant::now();
        let opened = Qmp::new(control).and_then(|mut control| {
            Ok((wait_for_greeting(&mut control, truth, timeout)?, control))
        });
        match opened {
            Ok((truth, control)) => Ok(Self {
                truth,
                control: Mutex::new(control),
                running,
            }),
            Err(error) => {
                let ended = end_within(&mut running.child, Duration::from_secs(2));
                let state = ended.map_or_else(
                    || "QEMU still ran".to_owned(),
                    |status| format!("QEMU ended with {status}"),
                );
                let console = tail(&running.folder.path().join(SERIAL_LOG));
                Err(error.context(NotReady {
                    panicked: running.acceleration == Acceleration::Tcg
                        && console.contains("Kernel panic - not syncing"),
                    report: format!(
                        "the guest {} ({}, {}) wasn't ready after {:.1} s; {state}\n--- QEMU\n{}\n--- console\n{console}",
                        running.name,
                        running.kernel.release(),
                        running.acceleration.name(),
                        start.elapsed().as_secs_f32(),
                        tail(&running.folder.path().join("qemu.log")),
                    ),
                }))
            }
        }
    }

    /// The name QEMU was given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.running.name
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.child.id()
    }

    /// The kernel it runs.
    #[must_use]
    pub fn kernel(&self) -> &Kernel {
        &self.running.kernel
    }

    /// How it runs.
    #[must_use]
    pub fn acceleration(&self) -> Acceleration {
        self.running.acceleration
    }

    /// The size of its memory in MiB.
    #[must_use]
    pub fn memory_mib(&self) -> u32 {
        self.running.memory_mib
    }

    /// The public QMP socket, if it was asked for.
    #[must_use]
    pub fn qmp_socket(&self) -> Option<PathBuf> {
        (self.running.qmp == QmpAccess::Socket).then(|| self.file(QMP_SOCKET))
    }

    /// The file that holds its memory, with [`Backing::File`].
    #[must_use]
    pub fn ram_file(&self) -> Option<PathBuf> {
        (self.running.backing == Backing::File).then(|| self.file(RAM_FILE))
    }

    /// What the guest wrote on its console so far.
    #[must_use]
    pub fn serial_log(&self) -> PathBuf {
        self.file(SERIAL_LOG)
    }

    /// A folder for the caller's own files about this guest, removed with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.running.folder.path()
    }

    /// The guest's own truth.
    #[must_use]
    pub fn truth(&self) -> &TruthChannel {
        &self.truth
    }

    /// The lab's own monitor.
    pub fn control(&self) -> MutexGuard<'_, Qmp> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `body` while all vCPUs stand still.
    pub fn while_stopped<T>(&self, body: impl FnOnce(&mut Qmp) -> Result<T>) -> Result<T> {
        let mut control = self.control();
        control.stop()?;
        let result = body(&mut control);
        control.resume()?;
        result
    }

    fn file(&self, name: &str) -> PathBuf {
        self.running.folder.path().join(name)
    }
}

/// Waits for the guest's greeting; gives up early when the vCPUs have
/// stopped for good, which is how KVM fails where it can't run a guest.
fn wait_for_greeting(
    control: &mut Qmp,
    truth: UnixStream,
    timeout: Duration,
) -> Result<TruthChannel> {
    let start = Instant::now();
    truth.set_read_timeout(Some(Duration::from_millis(500)))?;
    loop {
        // One byte is left where it is: the greeting is read in one piece.
        let mut byte = [0];
        let peeked = rustix::net::recv(&truth, &mut byte, rustix::net::RecvFlags::PEEK);
        match peeked {
            Ok((0, _)) => return Err(anyhow!("QEMU closed the truth port")),
            Ok(_) => {
                let left = timeout.saturating_sub(start.elapsed());
                return TruthChannel::open(truth, left.max(Duration::from_secs(1)));
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let status = control.status()?;
        if status != "running" {
            return Err(anyhow!("the guest stopped in the state {status:?}"));
        }
        if start.elapsed() > timeout {
            return Err(anyhow!("no greeting in {:.0} s", timeout.as_secs_f32()));
        }
    }
}

/// The exit status, if the process ends in time: when a channel to QEMU
/// closes, its process needs a moment more.
fn end_within(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        let ended = child.try_wait().ok().flatten();
        if ended.is_some() || start.elapsed() > patience {
            return ended;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn tail(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(LOG_TAIL);
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}

/// A guest's folder: on the memory file system where there is room, else
/// among temporary files.
///
/// It goes away with this value; when this process is killed, a small shell
/// that notices it removes it; when that is killed as well, the next lab
/// does, by the lock that nobody holds any more.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    reaper: Option<(Child, ChildStdin)>,
    _lock: File,
}

const FOLDER_PREFIX: &str = "secmon-lab-";
const LOCK_FILE: &str = "owner.lock";

impl Folder {
    pub(crate) fn make(memory_mib: u32) -> Result<Self> {
        let base = base(memory_mib);
        sweep(&base);
        let folder = tempfile::Builder::new()
            .prefix(FOLDER_PREFIX)
            .tempdir_in(&base)
            .with_context(|| format!("cannot make a folder in {}", base.display()))?;
        let lock = File::create(folder.path().join(LOCK_FILE))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        // In its own group, so that a terminal's interrupt doesn't end it.
        let mut reaper = Command::new("/bin/sh")
            .args(["-c", "read -r _; rm -rf -- \"$1\"", "sh"])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start /bin/sh")?;
        let stdin = reaper.stdin.take().context("the shell has no input")?;
        Ok(Self {
            path: folder.keep(),
            reaper: Some((reaper, stdin)),
            _lock: lock,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // The end of its input is the shell's sign to remove the folder.
        if let Some((mut reaper, stdin)) = self.reaper.take() {
            drop(stdin);
            let _ = reaper.wait();
        }
    }
}

fn base(memory_mib: u32) -> PathBuf {
    let shared_memory = Path::new("/dev/shm");
    // Twice the size: RAM and an image of it, or a second guest.
    let wanted = u64::from(memory_mib) << 21;
    let room = rustix::fs::statvfs(shared_memory)
        .map_or(0, |statistics| statistics.f_bavail * statistics.f_frsize);
    if room > wanted {
        shared_memory.to_owned()
    } else {
        std::env::temp_dir()
    }
}

/// Removes folders whose owner is gone.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else {
        return;
    };
    for entry in entries.flatten() {
        let ours = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(FOLDER_PREFIX));
        if !ours {
            continue;
        }
        // One without a lock file is being made at this moment.
        if let Ok(lock) = File::open(entry.path().join(LOCK_FILE))
            && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

//! The process that a user or a service manager starts. It starts the gate
//! and the keeper, and starts them again when they die. It hears nobody else:
//! whatever a monitor or a QEMU sends never reaches it.
//!
//! When it dies itself, the gate and the keeper notice by the end of their
//! sockets, let the target run, and end as well.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::configuration::Configuration;
use crate::descriptors;
use crate::sandbox::{self, SandboxError};

/// A process that the supervisor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// [`crate::gate::run`], with the configuration as JSON in its one
    /// argument and its standard input connected to the supervisor.
    Gate,
    /// [`crate::keeper::run`], with its standard input connected to the gate.
    Keeper,
}

impl Part {
    /// The first argument by which a program becomes this part, and by which
    /// the part is known among processes.
    #[must_use]
    pub fn command(self) -> &'static str {
        match self {
            Self::Gate => "__gate",
            Self::Keeper => "__gate-keeper",
        }
    }
}

/// What is sent to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Given {
    /// The socket on which monitors are accepted.
    Listener = b'l',
    /// The gate's end of the pair with a new keeper.
    Keeper = b'k',
}

/// The exit status of a gate that would fail again.
pub(crate) const HOPELESS: u8 = 2;

/// How long a gate has to live to be started again at once.
const HEALTHY: Duration = Duration::from_secs(2);

/// The longest wait before the next start.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How long the keeper may take after the gate's end; it is far quicker.
const KEEPER_END: Duration = Duration::from_secs(5);

/// Why there is no gate, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The socket for monitors can't be made.
    #[error("making the socket {path}: {source}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Rights can't be dropped.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A process can't be started or waited for.
    #[error("{what}: {source}")]
    Process {
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// The gate ended with an error that another start would not mend.
    #[error("the gate can't run, see its message above")]
    Hopeless,
}

/// Runs a gate until it can't be run any more. `command` makes the command
/// for a part.
///
/// # Errors
/// [`SupervisorError`]; it never ends otherwise.
pub fn run(
    configuration: &Configuration,
    command: impl Fn(Part) -> io::Result<Command>,
) -> Result<Infallible, SupervisorError> {
    let listener = listen(&configuration.socket)?;
    run_on(&listener, configuration, command)
}

/// As [`run`], on a socket that was made already, by [`listen`]: whoever has
/// rights to give up can give the socket to whom it is for before.
///
/// # Errors
/// [`SupervisorError`]; it never ends otherwise.
pub fn run_on(
    listener: &UnixListener,
    configuration: &Configuration,
    command: impl Fn(Part) -> io::Result<Command>,
) -> Result<Infallible, SupervisorError> {
    let failed = |what| move |source| SupervisorError::Process { what, source };
    sandbox::drop_rights(configuration.user.as_deref())?;
    let argument = serde_json::to_string(configuration)
        .map_err(|error| failed("writing the configuration")(error.into()))?;
    let mut wait = Duration::ZERO;
    loop {
        std::thread::sleep(wait);
        let started = Instant::now();
        let (control, gate_end) = descriptors::pair().map_err(failed("making a socket pair"))?;
        let mut gate_command = command(Part::Gate).map_err(failed("finding this program"))?;
        let mut gate = gate_command
            .arg(&argument)
            .stdin(Stdio::from(gate_end))
            .spawn()
            .map_err(failed("starting the gate"))?;
        // The command holds the gate's end of the pair as well.
        drop(gate_command);
        give(&control, Given::Listener, listener.as_fd())?;
        let mut keeper = start_keeper(&command, &control)?;
        let status = loop {
            wait_for_end(&[&gate, &keeper]).map_err(failed("waiting for the gate"))?;
            if let Some(status) = gate.try_wait().map_err(failed("waiting for the gate"))? {
                break status;
            }
            if let Ok(Some(_)) = keeper.try_wait() {
                keeper = start_keeper(&command, &control)?;
            }
        };
        end_keeper(&mut keeper);
        if status.code() == Some(i32::from(HOPELESS)) {
            return Err(SupervisorError::Hopeless);
        }
        wait = if started.elapsed() > HEALTHY {
            Duration::ZERO
        } else {
            (wait * 2).clamp(Duration::from_millis(100), LONGEST_WAIT)
        };
        eprintln!("secmon gate: the gate ended ({status}); it is started again");
    }
}

/// Makes the socket for monitors.
///
/// # Errors
/// [`SupervisorError::Socket`], also if another gate listens there.
pub fn listen(path: &Path) -> Result<UnixListener, SupervisorError> {
    let failed = |source| SupervisorError::Socket {
        path: path.to_owned(),
        source,
    };
    // A socket that an earlier gate left is in the way, another file is not
    // touched.
    use std::os::unix::fs::FileTypeExt;
    if let Ok(metadata) = std::fs::symlink_metadata(path)
        && metadata.file_type().is_socket()
    {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            let reason = "another gate is listening there";
            return Err(failed(io::Error::new(io::ErrorKind::AddrInUse, reason)));
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    UnixListener::bind(path).map_err(failed)
}

fn start_keeper(
    command: &impl Fn(Part) -> io::Result<Command>,
    control: &OwnedFd,
) -> Result<Child, SupervisorError> {
    let failed = |what| move |source| SupervisorError::Process { what, source };
    let (ours, theirs) = descriptors::pair().map_err(failed("making a socket pair"))?;
    let keeper = command(Part::Keeper)
        .map_err(failed("finding this program"))?
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .map_err(failed("starting the keeper"))?;
    give(control, Given::Keeper, ours.as_fd())?;
    Ok(keeper)
}

/// A gate that has just died can't be given anything; its end is seen next.
fn give(
    control: &OwnedFd,
    given: Given,
    descriptor: std::os::fd::BorrowedFd<'_>,
) -> Result<(), SupervisorError> {
    match descriptors::send(control, given as u8, Some(descriptor)) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(source) => Err(SupervisorError::Process {
            what: "speaking to the gate",
            source,
        }),
    }
}

/// Waits until one of the processes has ended.
fn wait_for_end(children: &[&Child]) -> io::Result<()> {
    let handles: Vec<OwnedFd> = children.iter().filter_map(|child| handle(child)).collect();
    if handles.len() < children.len() {
        // One has ended and been waited for already.
        return Ok(());
    }
    let mut polled: Vec<PollFd<'_>> = handles
        .iter()
        .map(|handle| PollFd::new(handle, PollFlags::IN))
        .collect();
    match poll(&mut polled, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn handle(child: &Child) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(child.id()).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// The keeper ends with the gate, after it has let the target run. Only then
/// does another gate find QEMU's sockets free.
fn end_keeper(keeper: &mut Child) {
    if let Some(handle) = handle(keeper) {
        let mut polled = [PollFd::new(&handle, PollFlags::IN)];
        let _ = poll(&mut polled, Timespec::try_from(KEEPER_END).ok().as_ref());
    }
    let _ = keeper.kill();
    let _ = keeper.wait();
}

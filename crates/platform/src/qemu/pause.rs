//! Pausing a guest such that it always runs again, also if the one who paused
//! it is killed.
//!
//! The pause is held by a second process, the *watcher*: the program runs
//! itself again with a hidden argument and calls [`watch_main`] there. The
//! watcher leaves the session of the program, shuts its ears to the signals
//! that end programs, stops the guest, says so on its standard output, and
//! waits for the end of its standard input: a pipe whose other end only the
//! program holds, and which the kernel closes with the program's end, whatever
//! ended it. Then it lets the guest run. It also does so after a limit of time,
//! for a program that hangs.
//!
//! If the watcher is killed instead, the program notices when it ends the pause
//! and resumes the guest itself. Only both killed at the same moment (as by
//! `systemctl kill --signal=KILL` of a unit that holds both) leave a guest
//! stopped.
//!
//! A guest is stopped by QMP's `stop`. Where there is no QMP, the whole QEMU
//! process is stopped by a signal, which the guest notices as little, but
//! QEMU's other clients do: its monitors and displays don't answer meanwhile.
//! A guest that was already stopped is left as it is, and so is one that
//! somebody else resumed meanwhile.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal as NixSignal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use super::process::{self, ProcessHandle, ProcessId};
use super::qmp::{DEFAULT_TIMEOUT, QmpClient, QmpError};

/// How long is tried to resume a guest whose QEMU does not answer.
const RESUME_PATIENCE: Duration = Duration::from_secs(60);

/// How long a stopped process may take until its last thread stands.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// How a guest is stopped and resumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PauseMethod {
    /// QMP's `stop` and `cont`, through this socket.
    Qmp(PathBuf),
    /// The signals SIGSTOP and SIGCONT to the whole QEMU process.
    Signal(ProcessId),
}

impl PauseMethod {
    /// The method as an argument for the watcher.
    fn to_argument(&self) -> OsString {
        match self {
            Self::Qmp(path) => {
                let mut argument = OsString::from("qmp:");
                argument.push(path);
                argument
            }
            Self::Signal(ProcessId { pid, start_time }) => {
                OsString::from(format!("signal:{pid}:{start_time}"))
            }
        }
    }

    fn from_argument(argument: &OsStr) -> Option<Self> {
        let bytes = argument.as_bytes();
        if let Some(path) = bytes.strip_prefix(b"qmp:") {
            return Some(Self::Qmp(OsString::from_vec(path.to_vec()).into()));
        }
        let rest = argument.to_str()?.strip_prefix("signal:")?;
        let (pid, start_time) = rest.split_once(':')?;
        Some(Self::Signal(ProcessId {
            pid: pid.parse().ok()?,
            start_time: start_time.parse().ok()?,
        }))
    }
}

/// Why a guest could not be paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// The watcher could not be started, or ended.
    #[error("the process that holds the pause: {0}")]
    Watcher(io::Error),
    /// The watcher did not report in time.
    #[error("the process that holds the pause did not report within {0:?}")]
    Silent(Duration),
    /// The watcher could not stop the guest.
    #[error("pausing the guest: {0}")]
    Refused(String),
    /// The watcher could not resume the guest.
    #[error("resuming the guest: {0}")]
    NotResumed(String),
    /// The limit was reached: the guest has been running again.
    #[error(
        "the guest was resumed after {0:?}, the longest pause allowed: what was read after that is not of one moment"
    )]
    LimitReached(Duration),
    /// Somebody else resumed the guest.
    #[error(
        "somebody else resumed the guest during the pause: what was read after that is not of one moment"
    )]
    ResumedByOthers,
    /// QMP failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process could not be signalled.
    #[error("signalling QEMU process {pid}: {source}")]
    Signal {
        /// The process.
        pid: u32,
        /// The host's reason.
        source: io::Error,
    },
    /// The process has threads that did not stop.
    #[error("QEMU process {pid} did not stop within {STOP_PATIENCE:?}")]
    NotStopped {
        /// The process.
        pid: u32,
    },
}

/// A pause, until it is dropped or ended.
#[derive(Debug)]
pub struct Pause {
    watcher: Child,
    /// Lines of the watcher, until its end.
    reports: Receiver<String>,
    method: PauseMethod,
    limit: Duration,
    /// The guest was stopped already, and will be left so.
    already: Option<String>,
    ended: bool,
}

impl Pause {
    /// Stops the guest. `watcher` is a command that calls [`watch_main`] with
    /// the arguments appended here: this very program with a hidden argument.
    /// After `limit` the guest is resumed in any case.
    ///
    /// # Errors
    /// [`PauseError`]; the guest then runs as before.
    pub fn begin(
        method: &PauseMethod,
        limit: Duration,
        mut watcher: Command,
    ) -> Result<Self, PauseError> {
        let mut watcher = watcher
            .arg(method.to_argument())
            .arg(limit.as_millis().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(PauseError::Watcher)?;
        let reports = watcher
            .stdout
            .take()
            .map(read_lines)
            .unwrap_or_else(|| channel().1);
        let mut pause = Self {
            watcher,
            reports,
            method: method.clone(),
            limit,
            already: None,
            ended: false,
        };
        // On an error the drop of `pause` ends the watcher, which resumes.
        let patience = DEFAULT_TIMEOUT * 3 + STOP_PATIENCE;
        match pause.report(patience)? {
            report if report == "stopped" => Ok(pause),
            report => match report.split_once(' ') {
                Some(("already", status)) => {
                    pause.already = Some(status.to_owned());
                    Ok(pause)
                }
                Some(("error", reason)) => Err(PauseError::Refused(reason.to_owned())),
                _ => Err(PauseError::Refused(format!("unexpected report {report:?}"))),
            },
        }
    }

    /// The state the guest was in, if it stood still already; it will be left
    /// so.
    pub fn already_stopped(&self) -> Option<&str> {
        self.already.as_deref()
    }

    /// Lets the guest run again and says whether it stood still all the time.
    ///
    /// # Errors
    /// [`PauseError::LimitReached`], [`PauseError::ResumedByOthers`] if it did
    /// not; other errors if it may still stand still.
    pub fn end(mut self) -> Result<(), PauseError> {
        self.finish()
    }

    fn report(&mut self, patience: Duration) -> Result<String, PauseError> {
        self.reports
            .recv_timeout(patience)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => PauseError::Silent(patience),
                RecvTimeoutError::Disconnected => {
                    PauseError::Watcher(io::Error::other("it ended without a report"))
                }
            })
    }

    fn finish(&mut self) -> Result<(), PauseError> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        drop(self.watcher.stdin.take());
        let report = self.report(RESUME_PATIENCE);
        let outcome = match report {
            Ok(report) => match report.split_once(' ').unwrap_or((&report, "")) {
                ("resumed" | "kept", _) => Ok(()),
                ("limit", _) => Err(PauseError::LimitReached(self.limit)),
                ("others", _) => Err(PauseError::ResumedByOthers),
                (_, reason) => Err(PauseError::NotResumed(reason.to_owned())),
            },
            // The watcher was killed: its task is ours.
            Err(error) if self.already.is_none() => match resume_now(&self.method) {
                Ok(()) => Ok(()),
                Err(_) => Err(error),
            },
            Err(error) => Err(error),
        };
        if matches!(outcome, Err(PauseError::Silent(_))) {
            // It tries for as long as it lives.
            return outcome;
        }
        let _ = self.watcher.wait();
        outcome
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

/// The lines of a pipe, read by a thread of their own so that they can be
/// waited for with a limit.
fn read_lines(output: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines() {
            let Ok(line) = line else { break };
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Resumes a guest that this program had stopped, without knowing more.
fn resume_now(method: &PauseMethod) -> Result<(), PauseError> {
    match method {
        PauseMethod::Qmp(path) => {
            let mut client = QmpClient::connect(path, DEFAULT_TIMEOUT)?;
            if client.status()?.status == "paused" {
                client.resume()?;
            }
            Ok(())
        }
        PauseMethod::Signal(process) => Signalled::open(*process)?.send(Signal::CONT),
    }
}

/// The watcher's whole life, for a program that was started by
/// [`Pause::begin`]: `arguments` are the two that it appended. Standard input
/// and output belong to the pause.
///
/// To be called before any thread is started.
pub fn watch_main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let method = arguments.next();
    let method = method.and_then(|argument| PauseMethod::from_argument(&argument));
    let limit = arguments.next();
    let limit = limit.and_then(|limit| limit.to_str()?.parse().ok());
    let (Some(method), Some(limit)) = (method, limit) else {
        eprintln!("this is an internal command; it takes the arguments of a pause");
        return ExitCode::from(2);
    };
    // Failing is no harm: a session of its own only keeps away the signals of
    // the terminal.
    let _ = rustix::process::setsid();
    let mut signals = SigSet::empty();
    for signal in [
        NixSignal::SIGHUP,
        NixSignal::SIGINT,
        NixSignal::SIGQUIT,
        NixSignal::SIGTERM,
    ] {
        signals.add(signal);
    }
    let _ = signals.thread_block();
    match watch(&method, Duration::from_millis(limit)) {
        Ok(report) => {
            say(report);
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("error {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Reports to the program, which may be gone.
fn say(report: &str) {
    let mut output = io::stdout();
    let _ = writeln!(output, "{}", report.replace('\n', " "));
    let _ = output.flush();
}

/// How a wait for the program ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Over,
    LimitReached,
}

/// Stops the guest, waits and resumes it; gives the last report.
fn watch(method: &PauseMethod, limit: Duration) -> Result<&'static str, PauseError> {
    match method {
        PauseMethod::Qmp(path) => {
            let mut client = QmpClient::connect(path, DEFAULT_TIMEOUT)?;
            let state = client.status()?;
            if !state.running {
                say(&format!("already {}", state.status));
                drop(client);
                wait_for_end(Duration::MAX);
                return Ok("kept");
            }
            if let Err(error) = client.stop() {
                // It may have been heard all the same.
                let _ = resume_through_qmp(client, path);
                return Err(error.into());
            }
            client.take_events();
            say("stopped");
            let wait = wait_for_end(limit);
            // Asking also brings the events of the meantime.
            let resumed_by_others = match client.status() {
                Ok(_) => client.take_events().iter().any(|event| event == "RESUME"),
                Err(_) => false,
            };
            if resumed_by_others {
                return Ok("others");
            }
            resume_through_qmp(client, path)?;
            Ok(finish(wait))
        }
        PauseMethod::Signal(process) => {
            let signalled = Signalled::open(*process)?;
            if signalled.all_stopped() {
                say("already stopped");
                wait_for_end(Duration::MAX);
                return Ok("kept");
            }
            signalled.send(Signal::STOP)?;
            let deadline = Instant::now() + STOP_PATIENCE;
            while !signalled.all_stopped() {
                if Instant::now() > deadline {
                    signalled.send(Signal::CONT)?;
                    return Err(PauseError::NotStopped { pid: process.pid });
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            say("stopped");
            let wait = wait_for_end(limit);
            let resumed_by_others = process.is_alive() && !signalled.all_stopped();
            if resumed_by_others {
                return Ok("others");
            }
            signalled.send(Signal::CONT)?;
            Ok(finish(wait))
        }
    }
}

/// The last report after a pause that was held.
fn finish(wait: Wait) -> &'static str {
    match wait {
        Wait::Over => "resumed",
        Wait::LimitReached => {
            // The program learns of it when it ends the pause.
            "limit"
        }
    }
}

/// Waits until standard input ends, or for `limit`.
fn wait_for_end(limit: Duration) -> Wait {
    let deadline = Instant::now().checked_add(limit);
    let input = io::stdin();
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Wait::LimitReached;
        }
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let descriptor = input.as_fd();
        let mut polled = [PollFd::new(&descriptor, PollFlags::IN)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            // Bytes mean nothing; the end does.
            Ok(_) => match rustix::io::read(descriptor, &mut [0; 64]) {
                Ok(0) => return Wait::Over,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return Wait::Over,
            },
            Err(_) => return Wait::Over,
        }
    }
}

/// Lets the guest run, over a new connection if the old one is no good.
fn resume_through_qmp(mut client: QmpClient, path: &std::path::Path) -> Result<(), PauseError> {
    let deadline = Instant::now() + RESUME_PATIENCE;
    loop {
        let error = match client.resume() {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        // Only one client is served: the old connection must go first.
        drop(client);
        client = loop {
            match QmpClient::connect(path, DEFAULT_TIMEOUT) {
                Ok(client) => break client,
                // QEMU has ended, and the guest with it.
                Err(QmpError::Connect { source, .. })
                    if matches!(
                        source.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) =>
                {
                    return Ok(());
                }
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(_) => return Err(error.into()),
            }
        };
        if Instant::now() > deadline {
            return Err(error.into());
        }
    }
}

/// A process that can be signalled without mistaking a later one for it.
struct Signalled(ProcessHandle);

impl Signalled {
    fn open(process: ProcessId) -> Result<Self, PauseError> {
        let handle = ProcessHandle::open(process).map_err(|source| PauseError::Signal {
            pid: process.pid,
            source,
        })?;
        Ok(Self(handle))
    }

    fn send(&self, signal: Signal) -> Result<(), PauseError> {
        match pidfd_send_signal(self.0.descriptor(), signal) {
            // It has ended: nothing to stop or resume.
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(PauseError::Signal {
                pid: self.0.id.pid,
                source: error.into(),
            }),
        }
    }

    /// Whether every thread stands still.
    fn all_stopped(&self) -> bool {
        process::all_threads_stopped(self.0.id.pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_survive_as_arguments() {
        for method in [
            PauseMethod::Qmp("/run/a b:c".into()),
            PauseMethod::Qmp(OsString::from_vec(b"/run/\xff".to_vec()).into()),
            PauseMethod::Signal(ProcessId {
                pid: 7,
                start_time: u64::MAX,
            }),
        ] {
            let argument = method.to_argument();
            assert_eq!(PauseMethod::from_argument(&argument), Some(method));
        }
        for other in ["", "qmp", "signal:", "signal:1", "signal:x:1", "signal:1:"] {
            assert_eq!(
                PauseMethod::from_argument(OsStr::new(other)),
                None,
                "{other}"
            );
        }
    }
}

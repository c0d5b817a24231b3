//! The keeper: the process that lets a target run again when its gate can't.
//!
//! It holds duplicates of the gate's connections to QEMU and one end of a
//! socket pair whose other end only the gate holds. Before the gate stops the
//! target or sets a breakpoint it tells the keeper so; when the gate dies, the
//! kernel closes its end, and the keeper undoes what was told and ends. It
//! also does so when the gate hangs: what is told has to be repeated.
//!
//! It uses the gate's own connections, because QEMU serves one client of a
//! socket at a time, and because a connection that stays open for a moment
//! keeps others from coming between.

use std::hash::RandomState;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags};

use crate::descriptors;
use crate::gdb::{Decoder, Item, RESCUE};
use crate::sandbox;

/// How long what was told holds without being repeated.
pub const PATIENCE: Duration = Duration::from_millis(900);

/// How often the gate repeats it.
pub const REPEAT: Duration = Duration::from_millis(200);

/// How long QEMU may take for each step of the rescue.
const ANSWER: Duration = Duration::from_millis(400);

/// The longest line taken from QEMU.
const MAX_LINE: usize = 1 << 20;

/// What has to be undone if the gate ends now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owed {
    /// Nothing: however the target is, the gate did not make it so.
    Nothing,
    /// The gate has stopped, or is about to stop, the target.
    Stopped,
    /// The target runs with breakpoints of the gate.
    Breakpoints,
}

/// What the gate tells the keeper; the byte of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Told {
    Qmp = b'q',
    Gdb = b'g',
    Gone = b'n',
    Nothing = b'f',
    Stopped = b'o',
    Breakpoints = b'b',
}

impl Told {
    fn of(byte: u8) -> Option<Self> {
        [
            Self::Qmp,
            Self::Gdb,
            Self::Gone,
            Self::Nothing,
            Self::Stopped,
            Self::Breakpoints,
        ]
        .into_iter()
        .find(|told| *told as u8 == byte)
    }
}

/// The gate's end of the socket pair.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
}

/// The keeper is gone, or takes no more messages.
#[derive(Debug, thiserror::Error)]
#[error("the gate's keeper: {0}")]
pub struct KeeperError(io::Error);

impl Keeper {
    /// Speaks to the keeper at the other end.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Hands over the connection to QMP.
    ///
    /// # Errors
    /// [`KeeperError`], as of all methods here.
    pub fn qmp(&self, connection: BorrowedFd<'_>) -> Result<(), KeeperError> {
        self.tell(Told::Qmp, Some(connection))
    }

    /// Hands over the connection to the gdbstub.
    ///
    /// # Errors
    /// See [`qmp`](Self::qmp).
    pub fn gdb(&self, connection: BorrowedFd<'_>) -> Result<(), KeeperError> {
        self.tell(Told::Gdb, Some(connection))
    }

    /// QEMU is gone, and nothing is owed to it.
    ///
    /// # Errors
    /// See [`qmp`](Self::qmp).
    pub fn gone(&self) -> Result<(), KeeperError> {
        self.tell(Told::Gone, None)
    }

    /// Says what has to be undone from now on.
    ///
    /// # Errors
    /// See [`qmp`](Self::qmp).
    pub fn owe(&self, owed: Owed) -> Result<(), KeeperError> {
        let told = match owed {
            Owed::Nothing => Told::Nothing,
            Owed::Stopped => Told::Stopped,
            Owed::Breakpoints => Told::Breakpoints,
        };
        self.tell(told, None)
    }

    fn tell(&self, told: Told, descriptor: Option<BorrowedFd<'_>>) -> Result<(), KeeperError> {
        descriptors::send(&self.socket, told as u8, descriptor).map_err(KeeperError)
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The keeper's whole life. `socket` is its end of the pair.
pub fn run(socket: impl AsFd) -> ExitCode {
    // The terminal's and the service manager's signals are for the gate; the
    // keeper ends with it.
    crate::signals::block_usual();
    let _ = rustix::process::setsid();
    // Half a keeper keeps its gate's connections open, and does nothing.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("secmon gate: the keeper: this is a bug in secmon: {panic}");
        std::process::abort();
    }));
    // A JSON object may be a hash map, whose first one on a thread takes random
    // numbers, and those can't be had any more when they are needed.
    let _ = RandomState::new();
    if let Err(error) = sandbox::confine_keeper() {
        eprintln!("secmon gate: the keeper: {error}");
        return ExitCode::from(2);
    }
    let mut held = Held::default();
    let mut owed = Owed::Nothing;
    let mut heard = Instant::now();
    loop {
        let left = (owed != Owed::Nothing).then(|| PATIENCE.saturating_sub(heard.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            // The gate lives and hangs.
            held.rescue(owed);
            owed = Owed::Nothing;
            continue;
        }
        match wait(socket.as_fd(), left) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => {
                // Deaf, it can only do what it would do for a gate that died.
                eprintln!("secmon gate: the keeper: {error}");
                held.rescue(owed);
                return ExitCode::from(2);
            }
        }
        match descriptors::receive(&socket, RecvFlags::DONTWAIT) {
            Ok(Some((byte, descriptor))) => {
                heard = Instant::now();
                match Told::of(byte) {
                    Some(Told::Qmp) => held.qmp = descriptor,
                    Some(Told::Gdb) => held.gdb = descriptor,
                    Some(Told::Gone) => {
                        held = Held::default();
                        owed = Owed::Nothing;
                    }
                    Some(Told::Nothing) => owed = Owed::Nothing,
                    Some(Told::Stopped) => owed = Owed::Stopped,
                    Some(Told::Breakpoints) => owed = Owed::Breakpoints,
                    None => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(None) | Err(_) => {
                held.rescue(owed);
                return ExitCode::SUCCESS;
            }
        }
    }
}

/// The connections to QEMU.
#[derive(Debug, Default)]
struct Held {
    qmp: Option<OwnedFd>,
    gdb: Option<OwnedFd>,
}

impl Held {
    fn rescue(&self, owed: Owed) {
        if owed == Owed::Nothing {
            return;
        }
        // Where only breakpoints are owed, the target may stand still for
        // another reason, which is not the gate's to end.
        let paused_before =
            owed == Owed::Breakpoints && self.status().is_some_and(|status| status == "paused");
        if let Some(gdb) = &self.gdb {
            detach(gdb);
        }
        if paused_before {
            self.command("stop");
            return;
        }
        match self.status().as_deref() {
            // Not ours to change: QEMU migrates, dumps, has shut down.
            Some(status) if !matches!(status, "paused" | "debug") => {}
            // Also if QEMU does not say how it is.
            _ => {
                self.command("cont");
            }
        }
    }

    /// QEMU's word for the target's state.
    fn status(&self) -> Option<String> {
        let answer = self.command("query-status")?;
        let status = answer.get("return")?.get("status")?.as_str()?;
        Some(status.to_owned())
    }

    /// Runs a command without arguments, whatever was under way on the
    /// connection.
    fn command(&self, command: &str) -> Option<serde_json::Value> {
        let qmp = self.qmp.as_ref()?;
        let id = format!("keeper-{command}-{:?}", Instant::now());
        // The byte 0xff is in no JSON: QEMU drops what it had of a command
        // that was cut short, and answers with an error that nobody reads.
        let mut line = b"\xff\n".to_vec();
        let request = serde_json::json!({"execute": command, "id": id});
        line.extend_from_slice(request.to_string().as_bytes());
        line.push(b'\n');
        send_all(qmp, &line);
        let deadline = Instant::now() + ANSWER;
        let mut received = Vec::new();
        loop {
            while let Some(end) = received.iter().position(|byte| *byte == b'\n') {
                let rest = received.split_off(end + 1);
                let line = std::mem::replace(&mut received, rest);
                let answer: Option<serde_json::Value> = serde_json::from_slice(&line).ok();
                if let Some(answer) = answer
                    && answer.get("id").and_then(|id| id.as_str()) == Some(&id)
                {
                    return Some(answer);
                }
            }
            if received.len() > MAX_LINE || !receive_some(qmp, &mut received, deadline) {
                return None;
            }
        }
    }
}

/// Frees the target from the stub.
fn detach(gdb: &OwnedFd) {
    send_all(gdb, RESCUE);
    let deadline = Instant::now() + ANSWER;
    let mut decoder = Decoder::default();
    let mut received = Vec::new();
    while receive_some(gdb, &mut received, deadline) {
        for byte in received.drain(..) {
            if decoder.push(byte) == Some(Item::Packet(b"OK".to_vec())) {
                return;
            }
        }
    }
}

/// A few bytes into a socket whose buffer holds far more: what does not fit
/// shows that QEMU hangs, and then nothing helps.
fn send_all(socket: &OwnedFd, bytes: &[u8]) {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = rustix::net::send(socket, bytes, flags);
}

/// Appends what comes before the deadline; `false` if nothing does.
fn receive_some(socket: &OwnedFd, received: &mut Vec<u8>, deadline: Instant) -> bool {
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        match wait(socket.as_fd(), Some(left)) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(_) => return false,
        }
        match rustix::net::recv(socket, &mut chunk, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok((count, _)) => {
                received.extend_from_slice(chunk.get(..count).unwrap_or_default());
                return true;
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => return false,
        }
    }
}

/// Waits until something can be read, or for so long.
fn wait(socket: BorrowedFd<'_>, left: Option<Duration>) -> io::Result<bool> {
    let timeout = left.and_then(|left| Timespec::try_from(left).ok());
    let mut polled = [PollFd::new(&socket, PollFlags::IN)];
    match poll(&mut polled, timeout.as_ref()) {
        Ok(count) => Ok(count > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

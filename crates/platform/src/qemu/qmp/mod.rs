//! A client of the QEMU Machine Protocol over a UNIX socket: a handful of
//! commands, each with a deadline.
//!
//! QMP is JSON, one object a line. QEMU serves one client at a time; a second
//! one waits unanswered, which [`QmpError::Busy`] stands for. Whatever QEMU
//! sends is bounded in size and time: a hung or hostile QEMU costs at most the
//! timeout.
//!
//! Source: QEMU `docs/interop/qmp-spec.rst`.

mod commands;
mod error;

use std::io::{ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde_json::{Value, json};

pub use commands::{RamBlock, RunState};
pub use error::QmpError;

/// The longest line taken from QEMU. `info mtree -f` of a machine with
/// hundreds of devices is under 1 MiB.
const MAX_LINE: usize = 16 << 20;

/// The most events remembered.
const MAX_EVENTS: usize = 1024;

/// How long a command may take where nothing else is said.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection that has left QMP's negotiation behind.
#[derive(Debug)]
pub struct QmpClient {
    stream: UnixStream,
    path: PathBuf,
    received: Vec<u8>,
    timeout: Duration,
    next_id: u64,
    events: Vec<String>,
    /// An answer did not come in time: whatever comes next can't be told from
    /// it for sure, so nothing more is asked.
    broken: bool,
}

/// A file that was handed to QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QemuDescriptor {
    /// The number it has in QEMU: `/proc/self/fd/NUMBER` there.
    pub number: u64,
    /// The set of descriptors it belongs to: `/dev/fdset/SET` for options that
    /// take one.
    pub set: u64,
}

impl QmpClient {
    /// Connects and negotiates; `timeout` is also each command's deadline.
    ///
    /// # Errors
    /// [`QmpError::Busy`] if QEMU does not greet in time, as it does to a
    /// second client.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, QmpError> {
        let connect_error = |source: std::io::Error| QmpError::Connect {
            path: path.to_owned(),
            source,
        };
        let address = SocketAddrUnix::new(path).map_err(|error| connect_error(error.into()))?;
        // Not blocking: a connect waits for ever once the queue of a socket
        // that nobody accepts from is full.
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|error| connect_error(error.into()))?;
        rustix::net::connect(&socket, &address).map_err(|error| match error {
            rustix::io::Errno::AGAIN => QmpError::Busy {
                path: path.to_owned(),
            },
            error => connect_error(error.into()),
        })?;
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false).map_err(connect_error)?;
        let mut client = Self {
            stream,
            path: path.to_owned(),
            received: Vec::new(),
            timeout,
            next_id: 0,
            events: Vec::new(),
            broken: false,
        };
        let greeting = client
            .receive("the greeting", Instant::now() + timeout)
            .map_err(|error| match error {
                QmpError::Timeout { path, .. } => QmpError::Busy { path },
                error => error,
            })?;
        if greeting.get("QMP").is_none() {
            return Err(QmpError::Protocol {
                path: path.to_owned(),
                reason: "no QMP greeting; is this a monitor for people?".to_owned(),
            });
        }
        client.execute("qmp_capabilities", &json!({}))?;
        Ok(client)
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// [`QmpError`]; after a timeout the connection answers no more.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let deadline = Instant::now() + self.timeout;
        if self.broken {
            return Err(self.closed(command, "an earlier command was not answered"));
        }
        self.next_id += 1;
        let id = self.next_id;
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        let result = self.exchange(command, &request, id, deadline);
        if !matches!(result, Ok(_) | Err(QmpError::Refused { .. })) {
            self.broken = true;
        }
        result
    }

    /// Hands QEMU an open file and gives the number of the descriptor that it
    /// has there (`add-fd`).
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn add_descriptor(&mut self, file: BorrowedFd<'_>) -> Result<QemuDescriptor, QmpError> {
        let command = "add-fd";
        // The descriptor travels with a byte of its own ahead of the command:
        // white space between two JSON values. QEMU keeps it for the next
        // command that takes one.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = [file];
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        let bytes = [std::io::IoSlice::new(b"\n")];
        rustix::net::sendmsg(&self.stream, &bytes, &mut ancillary, SendFlags::empty())
            .map_err(|error| self.failed(command, &error.into()))?;
        let added = self.execute(command, &json!({}))?;
        let number = |name| added.get(name).and_then(Value::as_u64);
        match (number("fd"), number("fdset-id")) {
            (Some(number), Some(set)) => Ok(QemuDescriptor { number, set }),
            _ => Err(self.protocol("add-fd says neither `fd` nor `fdset-id`")),
        }
    }

    /// Closes a descriptor that [`add_descriptor`](Self::add_descriptor) gave
    /// to QEMU.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub fn remove_descriptor(&mut self, descriptor: QemuDescriptor) -> Result<(), QmpError> {
        let QemuDescriptor { number, set } = descriptor;
        let arguments = json!({"fdset-id": set, "fd": number});
        self.execute("remove-fd", &arguments).map(drop)
    }

    fn exchange(
        &mut self,
        command: &str,
        request: &Value,
        id: u64,
        deadline: Instant,
    ) -> Result<Value, QmpError> {
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        self.stream
            .set_write_timeout(Some(self.timeout))
            .and_then(|()| self.stream.write_all(&line))
            .map_err(|error| self.failed(command, &error))?;
        loop {
            let mut answer = self.receive(command, deadline)?;
            if self.is_event(&answer) {
                continue;
            }
            if answer.get("id").and_then(Value::as_u64) != Some(id) {
                return Err(self.protocol("an answer to something that was not asked"));
            }
            if let Some(error) = answer.get("error") {
                let description = error.get("desc").and_then(Value::as_str);
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    description: description.unwrap_or("no reason given").to_owned(),
                });
            }
            return match answer.get_mut("return") {
                Some(value) => Ok(value.take()),
                None => Err(self.protocol("an answer with neither a result nor an error")),
            };
        }
    }

    /// Remembers the name of an event.
    fn is_event(&mut self, answer: &Value) -> bool {
        let Some(event) = answer.get("event").and_then(Value::as_str) else {
            return false;
        };
        if self.events.len() < MAX_EVENTS {
            self.events.push(event.to_owned());
        }
        true
    }

    /// Notes the events that have come since, without waiting. To be called
    /// when the descriptor is readable and no command is under way.
    ///
    /// # Errors
    /// [`QmpError::Closed`] if QEMU is gone; the connection is then of no more
    /// use, as after any error.
    pub fn receive_events(&mut self) -> Result<(), QmpError> {
        const WHILE: &str = "waiting for events";
        if self.broken {
            return Err(self.closed(WHILE, "an earlier command was not answered"));
        }
        let result = self.drain(WHILE);
        self.broken |= result.is_err();
        result
    }

    fn drain(&mut self, command: &str) -> Result<(), QmpError> {
        let mut chunk = [0; 16 << 10];
        loop {
            // Events may have come together with the last answer.
            while let Some(at) = memchr::memchr(b'\n', &self.received) {
                let line = self.take_line(at)?;
                if !self.is_event(&line) {
                    return Err(self.protocol("an answer to something that was not asked"));
                }
            }
            if self.received.len() > MAX_LINE {
                return Err(self.protocol("a line of more than 16 MiB"));
            }
            match rustix::net::recv(&self.stream, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(self.closed(command, "QEMU closed it")),
                Ok((count, _)) => self
                    .received
                    .extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(self.failed(command, &error.into())),
            }
        }
    }

    /// Takes the line whose end is at `end` of what was received.
    fn take_line(&mut self, end: usize) -> Result<Value, QmpError> {
        let rest = self.received.split_off(end + 1);
        let line = std::mem::replace(&mut self.received, rest);
        serde_json::from_slice(&line)
            .map_err(|error| self.protocol(&format!("a line that is no JSON: {error}")))
    }

    /// The next line, as JSON.
    fn receive(&mut self, command: &str, deadline: Instant) -> Result<Value, QmpError> {
        let mut searched = 0;
        loop {
            let unsearched = self.received.get(searched..).unwrap_or_default();
            if let Some(at) = memchr::memchr(b'\n', unsearched) {
                return self.take_line(searched + at);
            }
            searched = self.received.len();
            if searched > MAX_LINE {
                return Err(self.protocol("a line of more than 16 MiB"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.timed_out(command));
            }
            let mut chunk = [0; 16 << 10];
            let count = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut chunk));
            match count {
                Ok(0) => return Err(self.closed(command, "QEMU closed it")),
                Ok(count) => self
                    .received
                    .extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(command, &error)),
            }
        }
    }

    fn failed(&self, command: &str, error: &std::io::Error) -> QmpError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => self.timed_out(command),
            _ => self.closed(command, &error.to_string()),
        }
    }

    fn timed_out(&self, command: &str) -> QmpError {
        QmpError::Timeout {
            path: self.path.clone(),
            command: command.to_owned(),
            timeout: self.timeout,
        }
    }

    fn closed(&self, command: &str, reason: &str) -> QmpError {
        QmpError::Closed {
            path: self.path.clone(),
            command: command.to_owned(),
            reason: reason.to_owned(),
        }
    }

    fn protocol(&self, reason: &str) -> QmpError {
        QmpError::Protocol {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }

    /// The names of the events seen since the last call, oldest first. They
    /// are noticed while a command is run.
    pub fn take_events(&mut self) -> Vec<String> {
        std::mem::take(&mut self.events)
    }
}

/// For whoever waits until [`QmpClient::receive_events`] has something to do,
/// or keeps the connection open beyond this process's end.
impl AsFd for QmpClient {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;
    const SHORT: Duration = Duration::from_millis(200);

    /// A QEMU that greets, then answers each command with the next line.
    fn serve(
        greeting: &'static str,
        answers: &'static [&'static str],
    ) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("a socket");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut lines = BufReader::new(stream.try_clone().expect("a clone")).lines();
            let _ = stream.write_all(greeting.as_bytes());
            for answer in answers {
                let Some(Ok(_)) = lines.next() else { return };
                let _ = stream.write_all(answer.as_bytes());
            }
            let _ = lines.next();
        });
        (folder, path)
    }

    fn ready(answers: &'static [&'static str]) -> (tempfile::TempDir, QmpClient) {
        let line: &'static str = Box::leak(format!("{GREETING}\r\n").into_boxed_str());
        let (folder, path) = serve(line, answers);
        let client = QmpClient::connect(&path, SHORT).expect("a connection");
        (folder, client)
    }

    const OK: &str = "{\"return\": {}, \"id\": 1}\r\n";

    #[test]
    fn events_between_answers_are_kept() {
        let (_folder, mut client) = ready(&[
            OK,
            "{\"event\":\"STOP\"}\n{\"return\": {\"running\": false, \"status\": \"paused\"}, \"id\": 2}\n",
        ]);
        let state = client.status().expect("a state");
        assert!(!state.running);
        assert_eq!(state.status, "paused");
        assert_eq!(client.take_events(), ["STOP"]);
    }

    #[test]
    fn events_come_without_a_command_and_so_does_the_end() {
        let (_folder, mut client) = ready(&[
            OK,
            "{\"return\":{},\"id\":2}\n{\"event\":\"RESUME\"}\n{\"event\":\"SH",
        ]);
        client.receive_events().expect("nothing yet");
        client.resume().expect("answered");
        let deadline = Instant::now() + Duration::from_secs(10);
        while client.receive_events().is_ok() && client.events.is_empty() {
            assert!(Instant::now() < deadline, "no event");
        }
        assert_eq!(client.take_events(), ["RESUME"]);
        client
            .stream
            .shutdown(std::net::Shutdown::Both)
            .expect("an end");
        let error = client.receive_events().expect_err("closed");
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
    }

    #[test]
    fn a_refusal_carries_its_reason() {
        let (_folder, mut client) = ready(&[
            OK,
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"},\"id\":2}\n",
            "{\"return\":{},\"id\":3}\n",
        ]);
        let error = client.stop().expect_err("refused");
        assert!(matches!(error, QmpError::Refused { description, .. } if description == "no"));
        client.resume().expect("the connection still works");
    }

    #[test]
    fn a_silent_qemu_is_left_in_time() {
        let started = Instant::now();
        let (_folder, path) = serve("", &[]);
        let error = QmpClient::connect(&path, SHORT).expect_err("no greeting");
        assert!(matches!(error, QmpError::Busy { .. }), "{error}");
        let (_folder, mut client) = ready(&[OK, ""]);
        let error = client.stop().expect_err("no answer");
        assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
        let error = client.resume().expect_err("no longer usable");
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn a_socket_that_accepts_nobody_is_busy() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("a socket");
        // As QEMU: no place in the queue but the one being served.
        rustix::net::listen(&listener, 0).expect("a short queue");
        let waiting = UnixStream::connect(&path).expect("the first in the queue");
        let started = Instant::now();
        let error = QmpClient::connect(&path, Duration::from_secs(60)).expect_err("a full queue");
        assert!(matches!(error, QmpError::Busy { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(5), "at once");
        drop(waiting);
    }

    #[test]
    fn nonsense_is_refused() {
        for greeting in ["{}\n", "nonsense\n", "\n", "{\"QMP\":\n", "[]\n"] {
            let (_folder, path) = serve(greeting, &[]);
            let error = QmpClient::connect(&path, SHORT).expect_err(greeting);
            assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
        }
        let (_folder, mut client) = ready(&[OK, "{\"return\":{},\"id\":77}\n"]);
        let error = client.stop().expect_err("a wrong id");
        assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
    }

    #[test]
    fn a_closed_connection_and_a_missing_socket() {
        let (_folder, path) = serve("", &[]);
        let missing = QmpClient::connect(&path.with_file_name("none"), SHORT);
        assert!(matches!(missing, Err(QmpError::Connect { .. })));
        let listener = UnixListener::bind(path.with_file_name("closes")).expect("a socket");
        std::thread::spawn(move || drop(listener.accept()));
        let closed = QmpClient::connect(&path.with_file_name("closes"), SHORT);
        assert!(matches!(closed, Err(QmpError::Closed { .. })), "{closed:?}");
    }
}

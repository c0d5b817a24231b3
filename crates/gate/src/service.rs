//! Monitors' sessions: who connects, what they may, and the log of it.
//!
//! A connection is a stream that may carry several sessions one after the
//! other (a monitoring VM keeps its port open while its program starts anew).
//! Nothing is believed of a stream before the handshake, and after it nothing
//! but messages of the expected type are read. What is malformed, too long,
//! too slow or too much ends that session and no other.

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use secmon_channel::{ChannelError, Descriptor, KeyPair, Peer, Reader, Session, Stream, Writer};

use crate::grants::{Grant, Grants};
use crate::log::{Entry, Log, Outcome};
use crate::protocol::{Answer, Message, Query, ROLE, Refusal, Request, Right, Status};
use crate::rate::Rate;
use crate::steward::{Door, Job};

/// Connections at the same time.
const MAX_CONNECTIONS: usize = 16;

/// New connections a second.
const CONNECTIONS_PER_SECOND: u32 = 20;

/// How long a connection may say nothing before its first byte. A monitoring
/// VM's port is connected long before its program runs.
const IDLE: Duration = Duration::from_secs(30);

/// How long a handshake may take from its first byte on.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// Failed handshakes after which a connection is closed.
const MAX_FAILURES: u32 = 3;

/// How long a monitor in a session may be silent. One that holds something
/// loses that far sooner.
const SILENCE: Duration = Duration::from_secs(10);

/// How long a monitor may take to accept a message.
const SLOWEST: Duration = Duration::from_secs(2);

/// Bytes of the longest message from a monitor.
const MAX_QUERY: usize = 8 << 10;

/// Bytes of the longest message to a monitor.
const MAX_MESSAGE: usize = 64 << 10;

/// Messages that wait for a slow monitor.
const QUEUE: usize = 256;

/// Routine requests after which they are written down as a number.
const COUNT_AFTER: Duration = Duration::from_secs(60);

/// What all sessions share.
pub(crate) struct Service {
    grants: Grants,
    key: KeyPair,
    peers: Vec<Peer>,
    door: Door,
    log: Arc<Mutex<Log>>,
    connections: Mutex<Connections>,
    /// How often failures to connect are written down.
    failures: Mutex<Rate>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, Connection>,
}

struct Connection {
    stream: Arc<UnixStream>,
    /// The monitor, once it has proved to be it.
    monitor: Option<String>,
}

impl Service {
    pub(crate) fn new(grants: Grants, key: KeyPair, door: Door, log: Arc<Mutex<Log>>) -> Self {
        let peers = grants.monitors.iter().map(|grant| Peer {
            name: grant.name.clone(),
            key: grant.key,
        });
        Self {
            peers: peers.collect(),
            grants,
            key,
            door,
            log,
            connections: Mutex::default(),
            failures: Mutex::new(Rate::new(5)),
        }
    }

    /// Accepts connections for ever.
    pub(crate) fn run(self: &Arc<Self>, listener: &UnixListener) -> io::Error {
        let mut rate = Rate::new(CONNECTIONS_PER_SECOND);
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if is_passing(&error) => {
                    std::thread::sleep(Duration::from_millis(50));
                    continue;
                }
                Err(error) => return error,
            };
            if !rate.take() {
                // The connection is closed; whoever floods waits with the rest.
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            let Some((number, stream)) = self.admit(stream) else {
                continue;
            };
            let service = Arc::clone(self);
            let started = std::thread::Builder::new()
                .name("gate-session".to_owned())
                .spawn(move || {
                    service.serve(number, &stream);
                    service.leave(number);
                });
            if started.is_err() {
                self.leave(number);
            }
        }
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds a place for a connection, if need be that of the oldest one that
    /// has not proved who it is.
    fn admit(&self, stream: UnixStream) -> Option<(u64, Arc<UnixStream>)> {
        let mut connections = self.connections();
        if connections.open.len() >= MAX_CONNECTIONS {
            let unknown = connections.open.iter();
            let oldest = unknown
                .filter(|(_, connection)| connection.monitor.is_none())
                .map(|(number, _)| *number)
                .min()?;
            if let Some(connection) = connections.open.remove(&oldest) {
                let _ = connection.stream.shutdown(Shutdown::Both);
            }
        }
        let stream = Arc::new(stream);
        let number = connections.next;
        connections.next += 1;
        let connection = Connection {
            stream: Arc::clone(&stream),
            monitor: None,
        };
        connections.open.insert(number, connection);
        Some((number, stream))
    }

    fn leave(&self, number: u64) {
        self.connections().open.remove(&number);
    }

    /// Notes who is at the other end. A monitor has one session: an earlier
    /// one is a remnant.
    fn identify(&self, number: u64, monitor: &str) {
        let mut connections = self.connections();
        for (other, connection) in &mut connections.open {
            if *other != number && connection.monitor.as_deref() == Some(monitor) {
                let _ = connection.stream.shutdown(Shutdown::Both);
            }
        }
        if let Some(connection) = connections.open.get_mut(&number) {
            connection.monitor = Some(monitor.to_owned());
        }
    }

    fn forget(&self, number: u64) {
        if let Some(connection) = self.connections().open.get_mut(&number) {
            connection.monitor = None;
        }
    }

    /// One connection's life.
    fn serve(&self, number: u64, stream: &UnixStream) {
        let descriptor = match stream.try_clone().and_then(Descriptor::new) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                self.note("", &format!("a connection could not be served: {error}"));
                return;
            }
        };
        let channel: Arc<dyn Stream> = Arc::new(descriptor);
        let mut failures = 0;
        while failures < MAX_FAILURES && is_readable_within(stream, IDLE) {
            let deadline = Some(Instant::now() + HANDSHAKE);
            let accepted = Session::accept(&channel, &self.key, &self.peers, ROLE, deadline);
            let goes_on = match accepted {
                Ok((session, peer)) => {
                    failures = 0;
                    let grant = self.grants.of(&peer.key);
                    let error = grant.map(|grant| self.session(number, grant, session, stream));
                    // A new hello has a length that no frame has: the monitor's
                    // program was started anew behind the same port. All else
                    // ends the connection, so that the monitor notices.
                    matches!(error, Some(ChannelError::FrameLength { .. }))
                }
                Err(error) => {
                    failures += 1;
                    let ended = matches!(
                        error,
                        ChannelError::Ended { .. }
                            | ChannelError::Stream { .. }
                            | ChannelError::Deadline { .. }
                    );
                    if !matches!(error, ChannelError::Ended { .. }) {
                        self.note_failure(&error);
                    }
                    !ended
                }
            };
            if !goes_on {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// One session's life; gives why it ended.
    fn session(
        &self,
        number: u64,
        grant: &Grant,
        session: Session,
        stream: &UnixStream,
    ) -> ChannelError {
        self.identify(number, &grant.name);
        self.note(&grant.name, "the session began");
        let (reader, writer) = session.with_limits(MAX_QUERY, MAX_MESSAGE).split();
        let (messages, queue) = sync_channel(QUEUE);
        let id = next_session();
        self.door.send(Job::Begin {
            session: id,
            limits: grant.limits,
            events: messages.clone(),
        });
        let error = std::thread::scope(|scope| {
            let writing = std::thread::Builder::new()
                .name("gate-writer".to_owned())
                .spawn_scoped(scope, move || write_messages(writer, &queue, stream));
            let error = match writing {
                Ok(_) => {
                    let mut session = Conversation {
                        service: self,
                        grant,
                        id,
                        requests: Rate::new(grant.limits.requests_per_second),
                        messages,
                        routine: 0,
                        limited: 0,
                        counted: Instant::now(),
                    };
                    let error = session.listen(reader);
                    session.count();
                    error
                }
                Err(source) => ChannelError::Stream {
                    what: "starting a thread",
                    source,
                },
            };
            // The steward drops its sender, the writer ends with the last one.
            self.door.send(Job::End(id));
            error
        });
        self.forget(number);
        self.note(&grant.name, &format!("the session ended: {error}"));
        error
    }

    fn append(&self, entry: &Entry) -> Result<(), Refusal> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.append(entry)
            .map_err(|error| Refusal::NoLog(error.to_string()))
    }

    fn sync(&self) -> Result<(), Refusal> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.sync()
            .map_err(|error| Refusal::NoLog(error.to_string()))
    }

    /// Writes down something about a session. It allows nothing, so a log that
    /// is full keeps it from nothing.
    fn note(&self, monitor: &str, what: &str) {
        let entry = Entry::Session {
            monitor: monitor.to_owned(),
            what: what.to_owned(),
        };
        if let Err(refusal) = self.append(&entry) {
            eprintln!("secmon gate: {monitor}: {what} ({refusal})");
        }
    }

    fn note_failure(&self, error: &ChannelError) {
        let mut rate = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if rate.take() {
            self.note("", &format!("a connection was refused: {error}"));
        }
    }
}

fn next_session() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// One monitor's requests, one after the other.
struct Conversation<'a> {
    service: &'a Service,
    grant: &'a Grant,
    id: u64,
    requests: Rate,
    messages: SyncSender<Message>,
    routine: u64,
    limited: u64,
    counted: Instant,
}

impl Conversation<'_> {
    fn listen(&mut self, mut reader: Reader) -> ChannelError {
        loop {
            let deadline = Some(Instant::now() + SILENCE);
            let query: Query = match reader.receive(deadline) {
                Ok(query) => query,
                Err(error) => return error,
            };
            self.service.door.send(Job::Heard(self.id));
            let result = self.decide(query.request);
            let answer = Message::Answer {
                id: query.id,
                result,
            };
            // A monitor that asks and never reads stops itself here, until
            // the writer gives it up.
            if self.messages.send(answer).is_err() {
                return ChannelError::Deadline {
                    what: "taking an answer",
                };
            }
            if self.counted.elapsed() > COUNT_AFTER {
                self.count();
            }
        }
    }

    fn decide(&mut self, request: Request) -> Result<Answer, Refusal> {
        if !self.requests.take() {
            self.limited += 1;
            return Err(Refusal::Limited {
                what: "requests".to_owned(),
                per_second: self.requests.per_second(),
            });
        }
        let right = request.right();
        let allowed = self.grant.allows(right);
        if allowed && request.is_routine() {
            self.routine += 1;
            return self.ask(request);
        }
        let outcome = if allowed {
            Outcome::Allowed
        } else {
            Outcome::Denied
        };
        self.write_down(right, &request, outcome, None)?;
        if !allowed {
            return Err(Refusal::Denied(right));
        }
        if matches!(right, Right::Respond | Right::Control) {
            // What changes a target is on the disk before it is done.
            self.service.sync()?;
        }
        let result = self.ask(request.clone());
        if let Err(refusal) = &result {
            self.write_down(right, &request, Outcome::Failed, Some(refusal.to_string()))?;
        }
        result
    }

    fn ask(&self, request: Request) -> Result<Answer, Refusal> {
        let stopped = || Refusal::Failed("the gate is ending".to_owned());
        let (answer, result) = sync_channel(1);
        let sent = self.service.door.send(Job::Ask {
            session: self.id,
            request,
            answer,
        });
        if !sent {
            return Err(stopped());
        }
        let answer = result.recv().map_err(|_| stopped())??;
        Ok(match answer {
            Answer::Status(status) => Answer::Status(Status {
                target: self.service.grants.target.clone(),
                rights: self.grant.rights.iter().copied().collect(),
                ..status
            }),
            answer => answer,
        })
    }

    fn write_down(
        &self,
        right: Right,
        request: &Request,
        outcome: Outcome,
        reason: Option<String>,
    ) -> Result<(), Refusal> {
        self.service.append(&Entry::Use {
            monitor: self.grant.name.clone(),
            right,
            request: request.clone(),
            outcome,
            reason,
        })
    }

    /// Writes down how many requests were not written down one by one.
    fn count(&mut self) {
        self.counted = Instant::now();
        let (routine, limited) = (
            std::mem::take(&mut self.routine),
            std::mem::take(&mut self.limited),
        );
        if routine + limited > 0 {
            let entry = Entry::Counted {
                monitor: self.grant.name.clone(),
                routine,
                limited,
            };
            let _ = self.service.append(&entry);
        }
    }
}

/// Sends what is to be sent, until there is nobody left to send anything or
/// the monitor does not take it.
fn write_messages(mut writer: Writer, queue: &Receiver<Message>, stream: &UnixStream) {
    for message in queue {
        let deadline = Some(Instant::now() + SLOWEST);
        if writer.send(&message, deadline).is_err() {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

fn is_readable_within(stream: &UnixStream, patience: Duration) -> bool {
    let stream = stream.as_fd();
    let timeout = Timespec::try_from(patience).ok();
    let mut polled = [PollFd::new(&stream, PollFlags::IN)];
    matches!(poll(&mut polled, timeout.as_ref()), Ok(count) if count > 0)
}

/// Errors of `accept` that say nothing of the listening socket.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EINTR
                | libc::EAGAIN
                | libc::ECONNABORTED
                | libc::EMFILE
                | libc::ENFILE
                | libc::ENOBUFS
                | libc::ENOMEM
        )
    )
}

//! Decides when the target stands still and when it runs: who holds it, until
//! when, and what becomes of that when a monitor, the keeper, the supervisor
//! or QEMU goes away.
//!
//! One thread owns the target. The sessions' threads send it jobs and wait for
//! the answers; between jobs it waits for QEMU, the keeper, the supervisor and
//! the ends of leases.

mod answer;
mod dump;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;

use crate::descriptors;
use crate::keeper::Keeper;
use crate::log::{Entry, Log};
use crate::protocol::{Answer, Event, Limits, Message, Refusal, ReleaseReason, Request};
use crate::rate::Rate;
use crate::supervisor::Given;
use crate::target::{Happening, Target, TargetError};
use dump::{DUMP_POLL, Dump};
use session::Session;

/// How often an absent QEMU is looked for.
const RECONNECT: Duration = Duration::from_millis(250);

/// How often a target is told to run that did not when it was told first.
const RETRY: Duration = Duration::from_millis(100);

/// A session's number, never used twice.
pub(crate) type SessionId = u64;

/// What comes of a request.
pub(crate) type Outcome = Result<Answer, Refusal>;

/// What a session wants of the steward.
pub(crate) enum Job {
    /// A session begins.
    Begin {
        session: SessionId,
        limits: Limits,
        events: SyncSender<Message>,
    },
    /// The monitor gave a sign of life.
    Heard(SessionId),
    /// A request that the grant allows.
    Ask {
        session: SessionId,
        request: Request,
        answer: SyncSender<Outcome>,
    },
    /// The session has ended.
    End(SessionId),
}

/// The sessions' way to the steward.
#[derive(Clone)]
pub(crate) struct Door {
    jobs: Sender<Job>,
    bell: Arc<UnixStream>,
}

impl Door {
    /// Hands a job over; `false` if there is no steward any more.
    pub(crate) fn send(&self, job: Job) -> bool {
        let sent = self.jobs.send(job).is_ok();
        // A bell that is full has been rung.
        let _ = (&*self.bell).write(&[0]);
        sent
    }
}

/// What the steward is made of.
pub(crate) struct Parts {
    pub(crate) qmp: PathBuf,
    pub(crate) gdb: Option<PathBuf>,
    pub(crate) dumps: Option<PathBuf>,
    pub(crate) keeper: Keeper,
    /// The socket to the supervisor.
    pub(crate) control: OwnedFd,
    pub(crate) log: Arc<Mutex<Log>>,
}

pub(crate) struct Steward {
    target: Target,
    control: OwnedFd,
    jobs: Receiver<Job>,
    bell: UnixStream,
    sessions: BTreeMap<SessionId, Session>,
    dumps: Option<PathBuf>,
    dump: Option<Dump>,
    log: Arc<Mutex<Log>>,
    next_connect: Instant,
    /// The reason of the last failed connection, told once.
    unreachable: Option<String>,
}

impl Steward {
    pub(crate) fn new(parts: Parts) -> std::io::Result<(Self, Door)> {
        let (bell, ours) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        ours.set_nonblocking(true)?;
        let (jobs, queue) = channel();
        let door = Door {
            jobs,
            bell: Arc::new(bell),
        };
        let steward = Self {
            target: Target::new(parts.qmp, parts.gdb, parts.keeper),
            control: parts.control,
            jobs: queue,
            bell: ours,
            sessions: BTreeMap::new(),
            dumps: parts.dumps,
            dump: None,
            log: parts.log,
            next_connect: Instant::now(),
            unreachable: None,
        };
        Ok((steward, door))
    }

    /// Works until the supervisor is gone.
    pub(crate) fn run(mut self) -> ExitCode {
        loop {
            let next = self.tend();
            let ready = match self.wait(next) {
                Ok(ready) => ready,
                Err(error) => {
                    self.release_all(&ReleaseReason::SessionEnded);
                    self.note(&format!("the gate can't wait for anything: {error}"));
                    return ExitCode::FAILURE;
                }
            };
            // Before the supervisor is heard, who may bring the next keeper.
            if ready.keeper {
                // The keeper never speaks: this is its end.
                self.target.lose_keeper();
                self.release_all(&ReleaseReason::KeeperLost);
                self.note("the keeper ended; what was held is released");
            }
            if ready.control && !self.hear_supervisor() {
                self.release_all(&ReleaseReason::SessionEnded);
                self.note("the supervisor ended, and the gate with it");
                return ExitCode::SUCCESS;
            }
            if ready.target {
                self.hear_target();
            }
            self.work();
        }
    }

    /// Does what is due; gives the time at which something will be.
    fn tend(&mut self) -> Instant {
        let now = Instant::now();
        let mut next = now + Duration::from_secs(60);
        if !self.target.is_here() {
            if now >= self.next_connect {
                self.connect();
                self.next_connect = Instant::now() + RECONNECT;
            }
            if !self.target.is_here() {
                next = next.min(self.next_connect);
            }
        }
        let over: Vec<_> = self
            .sessions
            .iter()
            .filter_map(|(session, state)| Some((*session, state.ends()?)))
            .filter(|(_, (at, _))| *at <= now)
            .map(|(session, (_, reason))| (session, reason))
            .collect();
        for (session, reason) in over {
            self.release(session, &reason);
        }
        self.tend_dump();
        // A target that could not be let run the first time.
        if self.target.is_stopped_by_gate() && !self.is_held() {
            self.settle();
            if self.target.is_stopped_by_gate() {
                next = next.min(now + RETRY);
            }
        }
        for session in self.sessions.values() {
            if let Some((at, _)) = session.ends() {
                next = next.min(at);
            }
        }
        if self.dump.is_some() {
            next = next.min(now + DUMP_POLL);
        }
        if let Some(at) = self.target.remind_keeper() {
            next = next.min(at);
        }
        next
    }

    fn wait(&mut self, until: Instant) -> std::io::Result<Ready> {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let control = self.control.as_fd();
        let bell = self.bell.as_fd();
        let keeper = self.target.keeper_descriptor();
        let of_target = [self.target.qmp_descriptor(), self.target.gdb_descriptor()];
        let mut polled = vec![
            PollFd::new(&control, PollFlags::IN),
            PollFd::new(&bell, PollFlags::IN),
        ];
        let others = keeper.iter().chain(of_target.iter().flatten());
        polled.extend(others.map(|descriptor| PollFd::new(descriptor, PollFlags::IN)));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = polled.iter().map(|polled| !polled.revents().is_empty());
        let mut next = || ready.next().unwrap_or(false);
        let (control, rung) = (next(), next());
        let keeper = keeper.is_some() && next();
        let target = next() | next();
        if rung {
            let mut rings = [0; 256];
            let _ = (&self.bell).read(&mut rings);
        }
        Ok(Ready {
            control,
            keeper,
            target,
        })
    }

    /// Takes what the supervisor gives; `false` if it is gone.
    fn hear_supervisor(&mut self) -> bool {
        match descriptors::receive(&self.control, RecvFlags::DONTWAIT) {
            Ok(Some((kind, Some(descriptor)))) if kind == Given::Keeper as u8 => {
                self.target.take_keeper(Keeper::new(descriptor));
                self.note("a new keeper was started");
                true
            }
            Ok(Some(_)) => true,
            Ok(None) => false,
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }

    fn connect(&mut self) {
        match self.target.connect() {
            Ok(()) => {
                self.unreachable = None;
                let stub = match &self.target.note {
                    Some(reason) => format!("; no gdbstub: {reason}"),
                    None => String::new(),
                };
                self.note(&format!("the target's QEMU is connected{stub}"));
                self.tell_all(&Event::TargetHere);
            }
            Err(error) => {
                self.target.disconnect();
                let reason = error.to_string();
                if self.unreachable.as_ref() != Some(&reason) {
                    self.note(&format!("the target's QEMU can't be reached: {reason}"));
                    self.unreachable = Some(reason);
                }
            }
        }
    }

    /// The connection broke.
    fn lose_target(&mut self, reason: &str) {
        self.target.disconnect();
        self.next_connect = Instant::now();
        if let Some(dump) = self.dump.take() {
            let _ = dump.answer.send(Err(Refusal::TargetGone));
        }
        self.note(&format!("the target's QEMU is gone: {reason}"));
        for session in self.sessions.values_mut() {
            if session.holds_something() {
                session.hold = None;
                session.breakpoints.clear();
                session.tell(Event::Released(ReleaseReason::TargetGone));
            }
        }
        self.tell_all(&Event::TargetGone);
    }

    /// Does something with the target. A broken connection is noticed here.
    fn with_target<T>(
        &mut self,
        body: impl FnOnce(&mut Target) -> Result<T, TargetError>,
    ) -> Result<T, Refusal> {
        body(&mut self.target).map_err(|error| {
            if let TargetError::Lost(reason) = &error {
                self.lose_target(reason);
            }
            error.into()
        })
    }

    fn hear_target(&mut self) {
        if self.with_target(Target::poll).is_err() {
            return;
        }
        for happening in self.target.take_happenings() {
            match happening {
                Happening::Breakpoint { vcpu } => self.reached(vcpu),
                Happening::Reset => self.tell_all(&Event::TargetReset),
                Happening::DumpEnded => {}
                Happening::ResumedByOthers => {
                    let holders = self.sessions.iter();
                    let holders: Vec<_> = holders
                        .filter(|(_, session)| session.hold.is_some())
                        .map(|(session, _)| *session)
                        .collect();
                    for session in holders {
                        self.release(session, &ReleaseReason::ResumedByOthers);
                    }
                }
            }
        }
    }

    /// A vCPU stands at a breakpoint of the one session that has some.
    fn reached(&mut self, vcpu: u32) {
        let owner = self.sessions.iter_mut();
        let owner = owner
            .filter(|(_, session)| !session.breakpoints.is_empty())
            .map(|(session, _)| *session)
            .next();
        let Some(id) = owner else {
            self.settle();
            return;
        };
        let registers = self.with_target(|target| target.registers_now(vcpu));
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        if !session.stops.take() {
            self.release(id, &ReleaseReason::TooManyStops);
            return;
        }
        match registers {
            Ok(registers) => {
                let lease_milliseconds = session.lease(u32::MAX, Instant::now());
                session.tell(Event::Stopped {
                    vcpu,
                    registers: Box::new(registers),
                    lease_milliseconds,
                });
            }
            Err(_) => self.settle(),
        }
    }

    fn is_held(&self) -> bool {
        self.sessions.values().any(|session| session.hold.is_some())
    }

    /// Lets the target run if nobody holds it.
    fn settle(&mut self) {
        if !self.is_held() {
            let _ = self.with_target(Target::go);
        }
    }

    /// Takes away what a session holds.
    fn release(&mut self, id: SessionId, reason: &ReleaseReason) {
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        if !session.holds_something() {
            return;
        }
        session.hold = None;
        let traced = !std::mem::take(&mut session.breakpoints).is_empty();
        session.tell(Event::Released(reason.clone()));
        if traced && self.target.is_here() {
            let _ = self.with_target(Target::clear_breakpoints);
        }
        self.settle();
    }

    fn release_all(&mut self, reason: &ReleaseReason) {
        let sessions: Vec<_> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.release(session, reason);
        }
    }

    fn tell_all(&mut self, event: &Event) {
        for session in self.sessions.values_mut() {
            session.tell(event.clone());
        }
    }

    fn note(&self, what: &str) {
        let entry = Entry::Target {
            what: what.to_owned(),
        };
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = log.append(&entry) {
            eprintln!("secmon gate: {what} ({error})");
        }
    }

    /// Does the jobs that wait.
    fn work(&mut self) {
        loop {
            match self.jobs.try_recv() {
                Ok(Job::Begin {
                    session,
                    limits,
                    events,
                }) => {
                    let state = Session {
                        limits,
                        events,
                        lost_events: 0,
                        heard: Instant::now(),
                        stops: Rate::new(limits.stops_per_second),
                        hold: None,
                        breakpoints: BTreeSet::new(),
                    };
                    self.sessions.insert(session, state);
                }
                Ok(Job::Heard(session)) => {
                    if let Some(session) = self.sessions.get_mut(&session) {
                        session.heard = Instant::now();
                    }
                }
                Ok(Job::Ask {
                    session,
                    request,
                    answer,
                }) => self.ask(session, request, answer),
                Ok(Job::End(session)) => {
                    self.release(session, &ReleaseReason::SessionEnded);
                    self.sessions.remove(&session);
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn ask(&mut self, id: SessionId, request: Request, answer: SyncSender<Outcome>) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.heard = Instant::now();
        }
        if let Request::Dump { name } = request {
            self.begin_dump(id, name, answer);
            return;
        }
        let outcome = self.answer(id, request);
        // A session that does not wait any more is ending.
        let _ = answer.try_send(outcome);
        if self.target.is_here() && !self.is_held() && self.target.is_stopped_by_gate() {
            self.settle();
        }
    }

    fn session(&mut self, id: SessionId) -> Result<&mut Session, Refusal> {
        let gone = || Refusal::Invalid("the session has ended".to_owned());
        self.sessions.get_mut(&id).ok_or_else(gone)
    }
}

struct Ready {
    control: bool,
    keeper: bool,
    target: bool,
}

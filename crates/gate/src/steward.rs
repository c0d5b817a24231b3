//! Decides when the target stands still and when it runs: who holds it, until
//! when, and what becomes of that when a monitor, the keeper, the supervisor
//! or QEMU goes away.
//!
//! One thread owns the target. The sessions' threads send it jobs and wait for
//! the answers; between jobs it waits for QEMU, the keeper, the supervisor and
//! the ends of leases.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, TrySendError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;

use crate::descriptors;
use crate::keeper::Keeper;
use crate::log::{Entry, Log};
use crate::protocol::{
    AddressKind, Answer, Breakpoint, BreakpointKind, Bytes, Event, Limits, MAX_READ, MAX_WRITE,
    Message, Refusal, ReleaseReason, Request, Status, TargetState,
};
use crate::rate::Rate;
use crate::supervisor::Given;
use crate::target::{Happening, Target, TargetError};

/// How often an absent QEMU is looked for.
const RECONNECT: Duration = Duration::from_millis(250);

/// How often a dump's end is asked for.
const DUMP_POLL: Duration = Duration::from_millis(200);

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

/// What a session holds.
struct Session {
    limits: Limits,
    events: SyncSender<Message>,
    lost_events: u64,
    heard: Instant,
    stops: Rate,
    hold: Option<Hold>,
    breakpoints: BTreeSet<Breakpoint>,
}

/// A target held still.
#[derive(Clone, Copy)]
struct Hold {
    since: Instant,
    until: Instant,
}

impl Session {
    fn holds_something(&self) -> bool {
        self.hold.is_some() || !self.breakpoints.is_empty()
    }

    /// A lease from now on.
    fn lease(&mut self, wanted: u32, now: Instant) -> u32 {
        let milliseconds = wanted.min(self.limits.lease_milliseconds);
        let since = self.hold.map_or(now, |hold| hold.since);
        let until = now + Duration::from_millis(milliseconds.into());
        self.hold = Some(Hold { since, until });
        milliseconds
    }

    /// When and why the session loses what it holds, as things are.
    fn ends(&self) -> Option<(Instant, ReleaseReason)> {
        let milliseconds = |count: u32| Duration::from_millis(count.into());
        let silence = self
            .holds_something()
            .then(|| self.heard + milliseconds(self.limits.silence_milliseconds));
        let lease = self.hold.map(|hold| hold.until);
        let longest = self
            .hold
            .map(|hold| hold.since + milliseconds(self.limits.longest_stop_milliseconds));
        [
            (lease, ReleaseReason::LeaseEnded),
            (longest, ReleaseReason::LongestStop),
            (silence, ReleaseReason::Silence),
        ]
        .into_iter()
        .filter_map(|(at, reason)| Some((at?, reason)))
        .min_by_key(|(at, _)| *at)
    }

    fn tell(&mut self, event: Event) {
        if self.lost_events > 0 {
            let lost = Message::Event(Event::Lost(self.lost_events));
            if self.events.try_send(lost).is_ok() {
                self.lost_events = 0;
            }
        }
        if let Err(TrySendError::Full(_)) = self.events.try_send(Message::Event(event)) {
            self.lost_events += 1;
        }
    }
}

/// A dump that is being written.
struct Dump {
    name: String,
    file: File,
    answer: SyncSender<Outcome>,
    asked: Instant,
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

    fn answer(&mut self, id: SessionId, request: Request) -> Outcome {
        let stops = matches!(
            request,
            Request::Pause { .. }
                | Request::Registers { .. }
                | Request::ReadMemory { .. }
                | Request::SetBreakpoint(_)
                | Request::RemoveBreakpoint(_)
                | Request::Step { .. }
                | Request::WriteRegister { .. }
                | Request::WriteMemory { .. }
        );
        if stops && self.dump.is_some() {
            return Err(busy("a dump is being written"));
        }
        if stops {
            let session = self.session(id)?;
            if !session.stops.take() {
                return Err(Refusal::Limited {
                    what: "stops".to_owned(),
                    per_second: session.stops.per_second(),
                });
            }
        }
        match request {
            Request::Heartbeat => Ok(Answer::Done),
            Request::Status => self.status(id),
            Request::Layout => self.with_target(Target::layout).map(Answer::Layout),
            Request::Pause { lease_milliseconds } => {
                self.with_target(Target::stop)?;
                let session = self.session(id)?;
                let lease_milliseconds = session.lease(lease_milliseconds, Instant::now());
                Ok(Answer::Paused { lease_milliseconds })
            }
            Request::Extend { lease_milliseconds } => {
                let session = self.session(id)?;
                session.hold.ok_or(Refusal::NotHeld)?;
                let lease_milliseconds = session.lease(lease_milliseconds, Instant::now());
                Ok(Answer::Paused { lease_milliseconds })
            }
            Request::Resume => {
                let session = self.session(id)?;
                session.hold.take().ok_or(Refusal::NotHeld)?;
                if !self.is_held() {
                    self.with_target(Target::go)?;
                }
                Ok(Answer::Done)
            }
            Request::Registers { vcpu } => {
                let registers = self.with_target(|target| target.registers(vcpu))?;
                Ok(Answer::Registers(Box::new(registers)))
            }
            Request::ReadMemory {
                vcpu,
                kind,
                address,
                length,
            } => {
                if length > MAX_READ {
                    let reason = format!("{length} bytes; at most {MAX_READ} can be read at once");
                    return Err(Refusal::Invalid(reason));
                }
                let physical = kind == AddressKind::Physical;
                let bytes =
                    self.with_target(|target| target.read_memory(vcpu, physical, address, length))?;
                Ok(Answer::Memory(Bytes(bytes)))
            }
            Request::SetBreakpoint(breakpoint) => self.set_breakpoint(id, breakpoint),
            Request::RemoveBreakpoint(breakpoint) => {
                let session = self.session(id)?;
                if !session.breakpoints.remove(&breakpoint) {
                    let reason = "there is no such breakpoint of this monitor";
                    return Err(Refusal::Invalid(reason.to_owned()));
                }
                self.with_target(|target| target.remove_breakpoint(breakpoint))?;
                Ok(Answer::Done)
            }
            Request::Step { vcpu } => {
                if self.session(id)?.hold.is_none() || !self.target.is_stopped_by_gate() {
                    return Err(Refusal::NotHeld);
                }
                let registers = self.with_target(|target| target.step(vcpu))?;
                self.session(id)?.lease(u32::MAX, Instant::now());
                Ok(Answer::Registers(Box::new(registers)))
            }
            Request::Stop => {
                self.release(id, &ReleaseReason::SessionEnded);
                self.with_target(Target::stop_for_good)?;
                Ok(Answer::Done)
            }
            Request::Start => {
                if self.is_held() {
                    return Err(busy("a monitor holds the target stopped"));
                }
                self.with_target(Target::start)?;
                Ok(Answer::Done)
            }
            Request::Link { device, state } => {
                check_device(&device)?;
                self.with_target(|target| target.set_link(&device, state))?;
                Ok(Answer::Done)
            }
            Request::Reset => self.with_target(Target::reset).map(|()| Answer::Done),
            Request::Quit => self.with_target(Target::quit).map(|()| Answer::Done),
            Request::WriteRegister {
                vcpu,
                register,
                value,
            } => {
                self.with_target(|target| target.write_register(vcpu, register, value))?;
                Ok(Answer::Done)
            }
            Request::WriteMemory {
                vcpu,
                kind,
                address,
                bytes: Bytes(bytes),
            } => {
                if bytes.is_empty() || bytes.len() > MAX_WRITE {
                    let length = bytes.len();
                    let reason = format!("{length} bytes; 1 to {MAX_WRITE} can be written at once");
                    return Err(Refusal::Invalid(reason));
                }
                let physical = kind == AddressKind::Physical;
                self.with_target(|target| target.write_memory(vcpu, physical, address, bytes))?;
                Ok(Answer::Done)
            }
            // It is begun elsewhere, as its answer comes later.
            Request::Dump { .. } => Err(Refusal::Invalid("a dump within a dump".to_owned())),
        }
    }

    fn session(&mut self, id: SessionId) -> Result<&mut Session, Refusal> {
        let gone = || Refusal::Invalid("the session has ended".to_owned());
        self.sessions.get_mut(&id).ok_or_else(gone)
    }

    fn set_breakpoint(&mut self, id: SessionId, breakpoint: Breakpoint) -> Outcome {
        let fits = match breakpoint.kind {
            BreakpointKind::Execute => breakpoint.length == 1,
            BreakpointKind::Write | BreakpointKind::Access => {
                matches!(breakpoint.length, 1 | 2 | 4 | 8)
            }
        };
        if !fits {
            let reason = "a breakpoint's length is 1, for data 1, 2, 4 or 8";
            return Err(Refusal::Invalid(reason.to_owned()));
        }
        let mut others = self.sessions.iter();
        if others.any(|(other, session)| *other != id && !session.breakpoints.is_empty()) {
            return Err(busy("another monitor traces the target"));
        }
        let session = self.session(id)?;
        if session.breakpoints.contains(&breakpoint) {
            return Ok(Answer::Done);
        }
        if session.breakpoints.len() >= session.limits.breakpoints as usize {
            let most = session.limits.breakpoints;
            return Err(Refusal::Invalid(format!("more than {most} breakpoints")));
        }
        self.with_target(|target| target.set_breakpoint(breakpoint))?;
        self.session(id)?.breakpoints.insert(breakpoint);
        Ok(Answer::Done)
    }

    /// The session's thread adds what it knows better.
    fn status(&mut self, id: SessionId) -> Outcome {
        let limits = self.session(id)?.limits;
        let state = self.with_target(Target::state).unwrap_or(TargetState::Gone);
        let (qemu, memory_bytes) = self.target.version().unzip();
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Answer::Status(Status {
            version: crate::protocol::VERSION,
            target: String::new(),
            state,
            qemu,
            memory_bytes,
            gdb: self.target.has_gdb(),
            rights: Vec::new(),
            limits,
            log_head: log.head().clone(),
        }))
    }

    fn begin_dump(&mut self, id: SessionId, name: String, answer: SyncSender<Outcome>) {
        match self.try_begin_dump(id, &name) {
            Ok(file) => {
                self.dump = Some(Dump {
                    name,
                    file,
                    answer,
                    asked: Instant::now(),
                });
            }
            Err(refusal) => {
                let _ = answer.try_send(Err(refusal));
            }
        }
    }

    fn try_begin_dump(&mut self, id: SessionId, name: &str) -> Result<File, Refusal> {
        let folder = self.dumps.clone().ok_or_else(|| {
            Refusal::Invalid("the gate has no folder for dumps (--dumps)".to_owned())
        })?;
        if self.dump.is_some() {
            return Err(busy("a dump is being written"));
        }
        let mut others = self.sessions.iter();
        if others.any(|(other, session)| *other != id && session.hold.is_some()) {
            return Err(busy("another monitor holds the target stopped"));
        }
        self.release(id, &ReleaseReason::SessionEnded);
        if !self.target.is_here() {
            return Err(Refusal::TargetGone);
        }
        let file = create_dump(&folder, name)?;
        self.with_target(|target| target.begin_dump(file.as_fd()))?;
        Ok(file)
    }

    fn tend_dump(&mut self) {
        let Some(dump) = &mut self.dump else { return };
        if dump.asked.elapsed() < DUMP_POLL {
            return;
        }
        dump.asked = Instant::now();
        let outcome = match self.with_target(Target::dump_end) {
            Ok(None) => return,
            Ok(Some(Ok(()))) => Ok(()),
            Ok(Some(Err(reason))) => Err(Refusal::Failed(reason)),
            Err(refusal) => Err(refusal),
        };
        if let Some(dump) = self.dump.take() {
            let bytes = dump.file.metadata().map_or(0, |metadata| metadata.len());
            let name = dump.name;
            let answer = outcome.map(|()| Answer::Dumped { name, bytes });
            let _ = dump.answer.try_send(answer);
        }
    }
}

struct Ready {
    control: bool,
    keeper: bool,
    target: bool,
}

fn busy(reason: &str) -> Refusal {
    Refusal::Busy(reason.to_owned())
}

/// A name that QEMU could have given to a device.
fn check_device(device: &str) -> Result<(), Refusal> {
    let fits = (1..=64).contains(&device.len())
        && device
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/#".contains(&byte));
    if fits {
        Ok(())
    } else {
        let reason = "a device's name is 1 to 64 of the characters a-z A-Z 0-9 - _ . : / #";
        Err(Refusal::Invalid(reason.to_owned()))
    }
}

/// A new file that only the gate's user may read.
fn create_dump(folder: &Path, name: &str) -> Result<File, Refusal> {
    let fits = (1..=64).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if !fits {
        let reason =
            "a dump's name is 1 to 64 of the characters a-z A-Z 0-9 - _ . and begins with no dot";
        return Err(Refusal::Invalid(reason.to_owned()));
    }
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(folder.join(name))
        .map_err(|error| Refusal::Invalid(format!("making the file {name:?}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    fn session(limits: Limits) -> Session {
        Session {
            limits,
            events: sync_channel(2).0,
            lost_events: 0,
            heard: Instant::now(),
            stops: Rate::new(1),
            hold: None,
            breakpoints: BTreeSet::new(),
        }
    }

    #[test]
    fn leases_are_cut_extended_and_end_after_the_longest_stop() {
        let limits = Limits {
            lease_milliseconds: 300,
            longest_stop_milliseconds: 1000,
            silence_milliseconds: 900,
            ..Limits::default()
        };
        let mut session = session(limits);
        let start = session.heard;
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(session.ends(), None);
        assert_eq!(session.lease(200, start), 200);
        assert_eq!(session.ends(), Some((at(200), ReleaseReason::LeaseEnded)));
        assert_eq!(session.lease(5000, at(100)), 300);
        assert_eq!(session.ends(), Some((at(400), ReleaseReason::LeaseEnded)));
        session.lease(5000, at(800));
        assert_eq!(session.ends(), Some((at(900), ReleaseReason::Silence)));
        session.heard = at(800);
        assert_eq!(session.ends(), Some((at(1000), ReleaseReason::LongestStop)));
    }

    #[test]
    fn events_that_do_not_fit_are_counted() {
        let (events, queue) = sync_channel(1);
        let mut session = session(Limits::default());
        session.events = events;
        for _ in 0..4 {
            session.tell(Event::TargetReset);
        }
        assert_eq!(queue.recv(), Ok(Message::Event(Event::TargetReset)));
        session.tell(Event::TargetGone);
        assert_eq!(queue.recv(), Ok(Message::Event(Event::Lost(3))));
    }

    #[test]
    fn names_lead_nowhere_else() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".x",
            "a\0",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(create_dump(folder.path(), name).is_err(), "{name:?}");
        }
        create_dump(folder.path(), "web1-2026.elf").expect("a file");
        assert!(
            create_dump(folder.path(), "web1-2026.elf").is_err(),
            "twice"
        );
        for name in ["", "a b", "a\"", "a\n", "a,b"] {
            assert!(check_device(name).is_err(), "{name:?}");
        }
        check_device("net0").expect("a device");
    }
}

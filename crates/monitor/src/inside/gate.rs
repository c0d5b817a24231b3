//! The monitor's end of a target's gate: what the target does by its QEMU's
//! word, and holding it still for a moment.
//!
//! A thread per gate has the session. It asks for the state each second, which
//! also keeps the session; while somebody holds the target it extends the
//! lease often enough. Whoever holds it lets go by dropping the [`Hold`]; if
//! the worker dies with it, the gate hears no more and lets the target run.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use secmon_channel::{KeyPair, PublicKey, Stream};
use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{self as gate, Answer, Event, ReleaseReason, Request};
use secmon_respond::{Line, RespondError, Work};

use crate::protocol::{FindingKind, GateReport, Refusal, Severity};

/// Between two looks at the target's state.
const LOOK: Duration = Duration::from_secs(1);
/// Between two attempts to reach a gate that is not there.
const RETRY: Duration = Duration::from_secs(1);
/// How long a session may take to begin.
const BEGIN: Duration = Duration::from_secs(10);
/// How long the gate may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long somebody waits for the gate's thread.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long what a policy wants may take: a dump writes all of memory.
const WORK: Duration = Duration::from_secs(600);
/// Requests of the monitor's threads that wait for a gate.
const QUEUE: usize = 16;

/// Takes what is to be known of a target.
type Tell<'a> = dyn Fn(Severity, FindingKind, &str) + 'a;

/// What other threads ask of the gate's thread.
enum Command {
    /// Hold the target still.
    Hold(SyncSender<Result<(), Why>>),
    /// Do what a policy wants done.
    Work(Work, SyncSender<Result<String, RespondError>>),
    /// Let it go; says whether it stood still until now.
    Release(Option<SyncSender<Result<(), String>>>),
}

/// A way to the gate for what a policy wants done.
pub(super) struct GateLine(pub(super) Arc<Gate>);

impl Line for GateLine {
    fn run(&mut self, work: Work) -> Result<String, RespondError> {
        let ended = || RespondError::NoGate("the connection to the gate ended".to_owned());
        let (answer, result) = sync_channel(1);
        let sent = self.0.commands.send(Command::Work(work, answer));
        sent.map_err(|_| ended())?;
        result.recv_timeout(WORK).unwrap_or_else(|_| Err(ended()))
    }
}

/// Why the target is not held.
enum Why {
    Denied(String),
    Failed(String),
}

/// A target's gate, for the monitor's other threads.
pub(super) struct Gate {
    commands: SyncSender<Command>,
    view: RwLock<GateReport>,
}

/// The way to a gate, for the thread that goes it.
pub(super) struct Way {
    port: Result<Arc<dyn Stream>, String>,
    key: PublicKey,
    commands: Receiver<Command>,
    gate: Arc<Gate>,
    /// How many hold the target.
    holders: u32,
    /// Why it went on while somebody held it.
    lost: Option<String>,
    /// Whether the gate's being there or not was told.
    told: Option<bool>,
    /// Whether the target was migrated away.
    migrated: bool,
}

/// A target that is held still until this is dropped.
pub(super) struct Hold {
    gate: Arc<Gate>,
    let_go: bool,
}

impl Hold {
    /// Lets the target go on.
    ///
    /// # Errors
    /// Why it went on before.
    pub(super) fn release(mut self) -> Result<(), String> {
        self.let_go = true;
        let (answer, result) = sync_channel(1);
        let sent = self.gate.commands.send(Command::Release(Some(answer)));
        let ended = || "the monitor's connection to the gate ended".to_owned();
        if sent.is_err() {
            return Err(ended());
        }
        result
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| Err(ended()))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.let_go {
            let _ = self.gate.commands.send(Command::Release(None));
        }
    }
}

impl Gate {
    /// A gate behind a port, and the way that a thread is to go.
    pub(super) fn new(port: Result<Arc<dyn Stream>, String>, key: PublicKey) -> (Arc<Self>, Way) {
        let (commands, queue) = sync_channel(QUEUE);
        let gate = Arc::new(Self {
            commands,
            view: RwLock::new(GateReport::Away {
                reason: "it has not been reached yet".to_owned(),
            }),
        });
        let way = Way {
            port,
            key,
            commands: queue,
            gate: Arc::clone(&gate),
            holders: 0,
            lost: None,
            told: None,
            migrated: false,
        };
        (gate, way)
    }

    /// What is known of it.
    pub(super) fn report(&self) -> GateReport {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        view.clone()
    }

    /// Holds the target still.
    ///
    /// # Errors
    /// If that is not granted, or the gate can't.
    pub(super) fn hold(self: &Arc<Self>, target: &str) -> Result<Hold, Refusal> {
        let failed = |reason: String| Refusal::NotPaused {
            name: target.to_owned(),
            reason,
        };
        let (answer, result) = sync_channel(1);
        let sent = self.commands.send(Command::Hold(answer));
        sent.map_err(|_| failed("the connection to its gate ended".to_owned()))?;
        match result.recv_timeout(PATIENCE) {
            Ok(Ok(())) => Ok(Hold {
                gate: Arc::clone(self),
                let_go: false,
            }),
            Ok(Err(Why::Failed(reason))) => Err(failed(reason)),
            Ok(Err(Why::Denied(right))) => Err(Refusal::Denied {
                name: target.to_owned(),
                right,
            }),
            // The thread finds nobody who waits for its answer, and lets go.
            Err(_) => Err(failed("its gate does not answer".to_owned())),
        }
    }

    fn set(&self, report: GateReport) {
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = report;
    }
}

impl Way {
    /// Keeps a session with the gate, for ever. `own` is the monitor's key,
    /// `tell` takes what is to be known of the target.
    pub(super) fn run(mut self, own: &KeyPair, tell: &Tell<'_>) {
        loop {
            let reason = self.session(own, tell);
            if self.holders > 0 {
                self.lost
                    .get_or_insert_with(|| format!("the gate was lost: {reason}"));
            }
            self.tell(tell, false, &reason);
            self.gate.set(GateReport::Away {
                reason: reason.clone(),
            });
            let next = Instant::now() + RETRY;
            while let Some(left) = next.checked_duration_since(Instant::now()) {
                match self.commands.recv_timeout(left) {
                    Ok(Command::Hold(answer)) => {
                        let reason = format!("its gate can't be reached: {reason}");
                        let _ = answer.try_send(Err(Why::Failed(reason)));
                    }
                    Ok(Command::Work(_, answer)) => {
                        let reason = format!("it can't be reached: {reason}");
                        let _ = answer.try_send(Err(RespondError::NoGate(reason)));
                    }
                    Ok(Command::Release(answer)) => {
                        let _ = self.let_go(answer, None);
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                    // All that could ask are gone; so is the worker.
                    Err(RecvTimeoutError::Disconnected) => thread::sleep(left),
                }
            }
        }
    }

    fn tell(&mut self, tell: &Tell<'_>, here: bool, text: &str) {
        if self.told == Some(here) || (self.told.is_none() && !here) {
            return;
        }
        self.told = Some(here);
        let (severity, kind) = if here {
            (Severity::Information, FindingKind::GateConnected)
        } else {
            (Severity::Warning, FindingKind::GateLost)
        };
        tell(severity, kind, text);
    }

    /// One session with the gate; gives why it ended.
    fn session(&mut self, own: &KeyPair, tell: &Tell<'_>) -> String {
        let stream = match &self.port {
            Ok(stream) => Arc::clone(stream),
            Err(reason) => return reason.clone(),
        };
        match self.converse(own, tell, &stream) {
            Ok(never) => match never {},
            Err(error) => error.to_string(),
        }
    }

    fn converse(
        &mut self,
        own: &KeyPair,
        tell: &Tell<'_>,
        stream: &Arc<dyn Stream>,
    ) -> Result<std::convert::Infallible, ClientError> {
        let mut client = GateClient::connect(stream, own, &self.key, BEGIN)?;
        let status = self.look(&mut client, tell)?;
        let rights: Vec<&str> = status.rights.iter().map(|right| right.name()).collect();
        self.tell(tell, true, &format!("it grants {}", rights.join(", ")));
        let mut looked = Instant::now();
        let mut lease = LOOK;
        loop {
            let wait = if self.holders > 0 {
                lease / 3
            } else {
                LOOK.saturating_sub(looked.elapsed())
            };
            match self.commands.recv_timeout(wait) {
                Ok(Command::Hold(answer)) => {
                    self.hold(&mut client, &mut lease, &answer)?;
                }
                Ok(Command::Work(work, answer)) => {
                    let _ = answer.try_send(work(&mut client));
                }
                Ok(Command::Release(answer)) => self.let_go(answer, Some(&mut client))?,
                Err(_) if self.holders > 0 && self.lost.is_none() => {
                    let extend = Request::Extend {
                        lease_milliseconds: u32::MAX,
                    };
                    match client.ask(extend, ANSWER) {
                        Ok(_) => {}
                        Err(ClientError::Refused(refusal)) => {
                            // An event says better why, if there is one.
                            self.hear(&mut client, tell)?;
                            self.lost.get_or_insert_with(|| refusal.to_string());
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(_) => {}
            }
            if looked.elapsed() >= LOOK {
                self.look(&mut client, tell)?;
                looked = Instant::now();
            }
            self.hear(&mut client, tell)?;
        }
    }

    /// Asks how the target is.
    fn look(
        &mut self,
        client: &mut GateClient,
        tell: &Tell<'_>,
    ) -> Result<gate::Status, ClientError> {
        let Answer::Status(status) = client.ask(Request::Status, ANSWER)? else {
            let refusal = gate::Refusal::Failed("it answers something else".to_owned());
            return Err(refusal.into());
        };
        let migrated = is_migrated(&status.state);
        if migrated && !self.migrated {
            let text = "it was migrated away, by its QEMU's word: what is seen here is what it left behind";
            tell(Severity::Information, FindingKind::TargetMigrated, text);
        }
        self.migrated = migrated;
        self.gate.set(GateReport::Connected {
            state: status.state.clone(),
            rights: status.rights.clone(),
            qemu: status.qemu.clone(),
            log_head: status.log_head.clone(),
        });
        Ok(status)
    }

    /// Takes in what happened.
    fn hear(&mut self, client: &mut GateClient, tell: &Tell<'_>) -> Result<(), ClientError> {
        while let Some(event) = client.event(Duration::ZERO)? {
            let tell = |kind, text: &str| tell(Severity::Information, kind, text);
            match event {
                Event::Released(reason) => {
                    if self.holders > 0 {
                        self.lost = Some(released(&reason).to_owned());
                    }
                }
                Event::TargetReset => tell(FindingKind::TargetReset, "QEMU reset the machine"),
                Event::TargetGone => tell(FindingKind::QemuEnded, "its QEMU ended or hangs"),
                Event::TargetHere => tell(FindingKind::QemuStarted, "its QEMU is there again"),
                // Breakpoints are not set from here.
                Event::Stopped { .. } | Event::Lost(_) => {}
            }
        }
        Ok(())
    }

    fn hold(
        &mut self,
        client: &mut GateClient,
        lease: &mut Duration,
        answer: &SyncSender<Result<(), Why>>,
    ) -> Result<(), ClientError> {
        if self.holders == 0 || self.lost.is_some() {
            let pause = Request::Pause {
                lease_milliseconds: u32::MAX,
            };
            match client.ask(pause, ANSWER) {
                Ok(Answer::Paused { lease_milliseconds }) => {
                    *lease = Duration::from_millis(lease_milliseconds.into());
                }
                Ok(_) => {
                    let reason = "its gate answers something else".to_owned();
                    let _ = answer.try_send(Err(Why::Failed(reason)));
                    return Ok(());
                }
                Err(ClientError::Refused(gate::Refusal::Denied(right))) => {
                    let _ = answer.try_send(Err(Why::Denied(right.name().to_owned())));
                    return Ok(());
                }
                Err(ClientError::Refused(refusal)) => {
                    let _ = answer.try_send(Err(Why::Failed(refusal.to_string())));
                    return Ok(());
                }
                Err(error) => {
                    let _ = answer.try_send(Err(Why::Failed(error.to_string())));
                    return Err(error);
                }
            }
        }
        if self.holders == 0 {
            self.lost = None;
        }
        self.holders = self.holders.saturating_add(1);
        if answer.send(Ok(())).is_err() {
            // Nobody waits any more.
            return self.let_go(None, Some(client));
        }
        Ok(())
    }

    /// One holder less; the last one lets the target run.
    fn let_go(
        &mut self,
        answer: Option<SyncSender<Result<(), String>>>,
        client: Option<&mut GateClient>,
    ) -> Result<(), ClientError> {
        self.holders = self.holders.saturating_sub(1);
        let mut outcome = Ok(());
        if self.holders == 0
            && let Some(client) = client
        {
            match client.ask(Request::Resume, ANSWER) {
                Ok(_) => {}
                // The lease ended meanwhile.
                Err(ClientError::Refused(refusal)) => {
                    self.lost.get_or_insert_with(|| refusal.to_string());
                }
                Err(error) => {
                    self.lost.get_or_insert_with(|| error.to_string());
                    outcome = Err(error);
                }
            }
        }
        let stood_still = match &self.lost {
            None => Ok(()),
            Some(reason) => Err(reason.clone()),
        };
        if self.holders == 0 {
            self.lost = None;
        }
        if let Some(answer) = answer {
            let _ = answer.try_send(stood_still);
        }
        outcome
    }
}

/// Whether QEMU has migrated the target away: it stands still for good, unless
/// it is let run here again.
fn is_migrated(state: &gate::TargetState) -> bool {
    matches!(state, gate::TargetState::Stopped(word) if word == "postmigrate")
}

/// Why a hold ended, in words.
fn released(reason: &ReleaseReason) -> &'static str {
    match reason {
        ReleaseReason::LeaseEnded => "the lease of the pause ended before it was extended",
        ReleaseReason::Silence => "the gate did not hear of the monitor in time",
        ReleaseReason::LongestStop => "the longest pause that is granted was over",
        ReleaseReason::TooManyStops => "there were more stops than are granted",
        ReleaseReason::KeeperLost => "the gate's keeper died",
        ReleaseReason::ResumedByOthers => "somebody else let it run",
        ReleaseReason::TargetGone => "its QEMU ended",
        ReleaseReason::SessionEnded => "the session with the gate ended",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::Mutex;

    use secmon_channel::{Descriptor, Peer, Session};
    use secmon_gate::protocol::{Limits, LogHead, Message, Query, ROLE, Right, TargetState};

    use super::*;

    fn status(state: TargetState) -> Answer {
        Answer::Status(gate::Status {
            version: gate::VERSION,
            target: "web1".to_owned(),
            state,
            qemu: None,
            memory_bytes: None,
            gdb: false,
            rights: vec![Right::Observe],
            limits: Limits::default(),
            log_head: LogHead {
                sequence: 1,
                hash: String::new(),
            },
        })
    }

    /// A gate that answers as it is told to, a monitor's end of it, and what
    /// the monitor told.
    struct Bench {
        gate: Arc<Gate>,
        asked: Receiver<Request>,
        told: Arc<Mutex<Vec<FindingKind>>>,
        state: Arc<Mutex<TargetState>>,
    }

    type Reaction =
        Box<dyn FnMut(&Request) -> (Result<Answer, gate::Refusal>, Option<Event>) + Send>;

    fn bench(mut react: Reaction) -> Bench {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let stream =
            |socket| -> Arc<dyn Stream> { Arc::new(Descriptor::new(socket).expect("a stream")) };
        let (ours, theirs) = (stream(ours), stream(theirs));
        let monitor = KeyPair::generate().expect("keys");
        let keys = KeyPair::generate().expect("keys");
        let (gate, way) = Gate::new(Ok(ours), keys.public());
        let (asked, requests) = std::sync::mpsc::channel();
        let state = Arc::new(Mutex::new(TargetState::Running));
        let now = Arc::clone(&state);
        let peer = Peer {
            name: "m".to_owned(),
            key: monitor.public(),
        };
        thread::spawn(move || {
            let accepted = Session::accept(&theirs, &keys, &[peer], ROLE, None);
            let (mut session, _) = accepted.expect("a session");
            while let Ok(Query { id, request }) = session.receive(None) {
                let (result, event) = match &request {
                    Request::Status => (Ok(status(now.lock().expect("no panic").clone())), None),
                    request => react(request),
                };
                if request != Request::Status {
                    let _ = asked.send(request);
                }
                if let Some(event) = event {
                    let _ = session.send(&Message::Event(event), None);
                }
                if session.send(&Message::Answer { id, result }, None).is_err() {
                    break;
                }
            }
        });
        let told = Arc::new(Mutex::new(Vec::new()));
        let telling = Arc::clone(&told);
        thread::spawn(move || {
            way.run(&monitor, &|_, kind, _| {
                telling.lock().expect("no panic").push(kind);
            });
        });
        Bench {
            gate,
            asked: requests,
            told,
            state,
        }
    }

    fn paused() -> Result<Answer, gate::Refusal> {
        Ok(Answer::Paused {
            lease_milliseconds: 30,
        })
    }

    #[test]
    fn a_hold_is_extended_and_then_ended() {
        let bench = bench(Box::new(|request| match request {
            Request::Resume => (Ok(Answer::Done), None),
            _ => (paused(), None),
        }));
        let first = bench.gate.hold("web1").map_err(|e| e.to_string());
        let first = first.expect("granted");
        let second = bench.gate.hold("web1").map_err(|e| e.to_string());
        let next = || bench.asked.recv_timeout(PATIENCE).expect("asked");
        assert!(matches!(next(), Request::Pause { .. }));
        assert!(matches!(next(), Request::Extend { .. }));
        drop(second);
        assert!(matches!(next(), Request::Extend { .. }), "one holds it");
        assert_eq!(first.release(), Ok(()));
        let ended = std::iter::repeat_with(next).find(|asked| *asked == Request::Resume);
        assert!(ended.is_some());
        let report = bench.gate.report();
        assert!(matches!(report, GateReport::Connected { .. }), "{report:?}");
        let told = bench.told.lock().expect("no panic").clone();
        assert_eq!(told, [FindingKind::GateConnected]);
    }

    #[test]
    fn a_migration_is_told_once() {
        let bench = bench(Box::new(|_| (paused(), None)));
        let say = |state| *bench.state.lock().expect("no panic") = state;
        let seen = |wanted: &dyn Fn(&TargetState) -> bool| {
            let deadline = Instant::now() + PATIENCE;
            loop {
                if let GateReport::Connected { state, .. } = bench.gate.report()
                    && wanted(&state)
                {
                    return;
                }
                assert!(Instant::now() < deadline, "{:?}", bench.gate.report());
                thread::sleep(Duration::from_millis(10));
            }
        };
        let stopped = |word: &str| TargetState::Stopped(word.to_owned());
        for (word, migrations) in [("paused", 0), ("postmigrate", 1), ("postmigrate", 1)] {
            say(stopped(word));
            seen(&|state| *state == stopped(word));
            let told = bench.told.lock().expect("no panic").clone();
            let of_it = told
                .iter()
                .filter(|kind| **kind == FindingKind::TargetMigrated);
            assert_eq!(of_it.count(), migrations, "{word}: {told:?}");
        }
        say(TargetState::Running);
        seen(&|state| *state == TargetState::Running);
        say(stopped("postmigrate"));
        seen(&|state| *state != TargetState::Running);
        let told = bench.told.lock().expect("no panic").clone();
        let migrated = FindingKind::TargetMigrated;
        assert_eq!(told[1..], [migrated, migrated]);
    }

    #[test]
    fn what_is_not_granted_is_denied_and_a_lost_hold_is_told() {
        let mut pauses = 0;
        let bench = bench(Box::new(move |request| match request {
            Request::Pause { .. } => {
                pauses += 1;
                match pauses {
                    1 => (Err(gate::Refusal::Denied(Right::Pause)), None),
                    _ => (paused(), None),
                }
            }
            Request::Extend { .. } => (
                Err(gate::Refusal::NotHeld),
                Some(Event::Released(ReleaseReason::KeeperLost)),
            ),
            _ => (Err(gate::Refusal::NotHeld), None),
        }));
        let denied = bench.gate.hold("web1").err().expect("denied");
        assert!(
            matches!(&denied, Refusal::Denied { right, .. } if right == "pause"),
            "{denied}"
        );
        let hold = bench.gate.hold("web1").map_err(|e| e.to_string());
        let hold = hold.expect("granted");
        let asked = std::iter::repeat_with(|| bench.asked.recv_timeout(PATIENCE).expect("asked"));
        let mut extended = asked.filter(|asked| matches!(asked, Request::Extend { .. }));
        assert!(extended.next().is_some());
        let lost = hold.release().expect_err("lost");
        assert!(lost.contains("keeper"), "{lost}");
    }
}

//! The worker: opens everything, confines itself, and then looks at memory.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use secmon_channel::{Descriptor, KeyPair, Peer, Stream};
use secmon_detect::Class;
use secmon_guest::Guest;
use secmon_memory::PhysicalMemory;
use secmon_platform::ivshmem::{self, IvshmemOptions, PCI_DEVICES};
use secmon_sandbox::{Needs, Stage};
use secmon_watch::Incident;

use super::gate::{Gate, Hold, Way};
use super::health::{Health, Pulse};
use super::init::DEVICES_CHANGED;
use super::outbox::Outbox;
use super::watcher::{self, Target, Watcher};
use super::{detect, log, port, session};
use crate::protocol::{
    Configuration, Finding, FindingKind, Heartbeat, Limits, Refusal, Severity, TargetConfiguration,
    channel_port,
};

/// Where findings are kept for the next worker.
const OUTBOX: &str = "/findings";
/// How long a watcher or the server may be busy with one thing. A search of
/// all of a large target's memory under emulation takes minutes.
const BUSY: Duration = Duration::from_secs(300);
/// How long the driver may take to find another port, the first channel's
/// being there.
const NEXT_PORT: Duration = Duration::from_secs(2);
/// The most bytes of configuration.
const MAX_CONFIGURATION: u64 = 1 << 20;

/// An open virtio-serial port.
type Port = Arc<dyn Stream>;

/// What the worker's threads share.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) release: String,
    pub(super) keys: KeyPair,
    pub(super) clients: Vec<Peer>,
    pub(super) targets: Vec<Arc<Target>>,
    pub(super) limits: Limits,
    pub(super) weaknesses: Vec<String>,
    /// That the server of each channel goes on.
    pub(super) serving: Vec<Pulse>,
    /// Requests that run, of all clients.
    requests: AtomicUsize,
    restarts: u32,
    health: Health,
    outbox: Mutex<Outbox>,
    news: Condvar,
}

impl Shared {
    fn outbox(&self) -> std::sync::MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a finding.
    pub(super) fn tell(
        &self,
        target: Option<&str>,
        severity: Severity,
        kind: FindingKind,
        text: &str,
    ) {
        self.outbox().push(target, severity, kind, text);
        self.news.notify_all();
        let about = target.unwrap_or("the monitor");
        // Guests choose parts of the text.
        let harmless: String = text.chars().filter(|c| !c.is_control()).collect();
        log(format_args!("{about}: {kind:?}: {harmless}"));
    }

    /// Adds what the detectors that watch a target told.
    pub(super) fn tell_incident(&self, target: &str, incident: &Incident) {
        let severity = match incident {
            Incident::Appeared { finding } | Incident::Changed { finding, .. } => {
                match finding.class {
                    Class::Attack => Severity::Critical,
                    Class::Suspicion => Severity::Warning,
                    Class::Information => Severity::Information,
                }
            }
            _ => Severity::Information,
        };
        let text = incident.to_string();
        let Ok(json) = serde_json::to_string(incident) else {
            return self.tell(Some(target), severity, FindingKind::Watch, &text);
        };
        self.outbox().push_incident(target, severity, &text, json);
        self.news.notify_all();
    }

    pub(super) fn acknowledge(&self, through: u64) {
        self.outbox().acknowledge(through);
    }

    /// A client that is to hear of findings.
    pub(super) fn join(self: &Arc<Self>) -> Listener {
        Listener {
            client: self.outbox().join(),
            shared: Arc::clone(self),
        }
    }

    /// Room for one more request; `None` if as many as may run at once do.
    pub(super) fn room(self: &Arc<Self>) -> Option<Room> {
        let more = |running: usize| (running < self.limits.requests).then_some(running + 1);
        let taken = self
            .requests
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.ok().map(|_| Room(Arc::clone(self)))
    }

    /// How many requests run, of all clients.
    pub(super) fn running(&self) -> u32 {
        u32::try_from(self.requests.load(Ordering::Relaxed)).unwrap_or(u32::MAX)
    }

    pub(super) fn findings_after(&self, sequence: u64, count: usize) -> Vec<Finding> {
        self.outbox().after(sequence, count)
    }

    /// Waits for a finding after `sequence`; says whether there is one.
    pub(super) fn wait_for_findings(&self, sequence: u64, until: Option<Instant>) -> bool {
        let mut outbox = self.outbox();
        loop {
            if !outbox.after(sequence, 1).is_empty() {
                return true;
            }
            let left = until.and_then(|until| until.checked_duration_since(Instant::now()));
            let Some(left) = left.filter(|left| !left.is_zero()) else {
                return false;
            };
            outbox = self
                .news
                .wait_timeout(outbox, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn target(&self, name: &str) -> Result<&Arc<Target>, Refusal> {
        let target = self.targets.iter().find(|target| target.name == name);
        target.ok_or_else(|| {
            let known: Vec<&str> = self.targets.iter().map(|t| t.name.as_str()).collect();
            Refusal::UnknownTarget {
                name: name.to_owned(),
                known: known.join(", "),
            }
        })
    }

    /// Holds the target still, through its gate.
    pub(super) fn hold(&self, name: &str) -> Result<Hold, Refusal> {
        match &self.target(name)?.gate {
            Some(gate) => gate.hold(name),
            None => Err(Refusal::NotPaused {
                name: name.to_owned(),
                reason: "it has no gate".to_owned(),
            }),
        }
    }

    /// The target's guest as it is now.
    pub(super) fn guest(&self, name: &str) -> Result<Guest, Refusal> {
        let target = self.target(name)?;
        let kernel = target.kernel().map_err(|reason| Refusal::TargetNotReady {
            name: name.to_owned(),
            reason,
        })?;
        Ok(watcher::guest(&kernel))
    }

    /// The numbers of this moment.
    pub(super) fn heartbeat(&self, requests: u32) -> Heartbeat {
        let outbox = self.outbox();
        let running = self.targets.iter().filter(|target| target.is_running());
        let still = self.targets.iter().filter(|target| {
            let gate = target.gate.as_ref().map(|gate| gate.report());
            gate.is_some_and(|gate| gate.is_standing_still())
        });
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Heartbeat {
            targets_running: count(running.count()),
            targets: count(self.targets.len()),
            targets_standing_still: count(still.count()),
            requests,
            findings_kept: outbox.kept(),
            findings_lost: outbox.lost(),
            restarts: self.restarts,
            ..self.health.beat()
        }
    }
}

/// A client's place among those that hear of findings.
pub(super) struct Listener {
    shared: Arc<Shared>,
    client: u64,
}

impl Listener {
    /// It was sent findings up to this number.
    pub(super) fn sent(&self, through: u64) {
        self.shared.outbox().sent(self.client, through);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.outbox().leave(self.client);
    }
}

/// A request's place among those that may run at once.
pub(super) struct Room(Arc<Shared>);

impl Drop for Room {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs until something fails. `arguments`: how often the worker was started
/// before, and why the one before ended.
pub(super) fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    // Half a worker is worth less than a new one.
    std::panic::set_hook(Box::new(|panic| {
        log(format_args!("this is a bug in secmon: {panic}"));
        std::process::abort();
    }));
    match run(arguments) {
        Ok(never) => match never {},
        Err(error) => {
            log(error);
            ExitCode::FAILURE
        }
    }
}

/// Why the worker can't work.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Configuration(#[from] crate::protocol::ConfigurationError),
    #[error(transparent)]
    Key(#[from] secmon_channel::KeyError),
    #[error("{what}: {source}")]
    System {
        what: &'static str,
        source: std::io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> WorkerError {
    move |source| WorkerError::System { what, source }
}

fn run(
    mut arguments: impl Iterator<Item = String>,
) -> Result<std::convert::Infallible, WorkerError> {
    let restarts: u32 = arguments
        .next()
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    let reason = arguments.next().unwrap_or_default();

    let mut bytes = Vec::new();
    std::io::stdin()
        .take(MAX_CONFIGURATION)
        .read_to_end(&mut bytes)
        .map_err(system("reading the configuration"))?;
    let configuration = Configuration::parse(&bytes)?;
    drop(bytes);
    let policy = configuration.parsed_policy()?;
    let keys = KeyPair::from_secret(configuration.secret_key)?;
    let (stream, others) = open_channels(configuration.channels)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(OUTBOX)
        .map_err(system("the outbox"))?;
    let (targets, ways) = open_targets(&configuration.targets);
    let health = Health::open();
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();

    // A statically linked program takes random numbers from a file, which
    // stays open from the first time on.
    KeyPair::generate()?;

    // From here on nothing can be opened. What follows looks at memory.
    let mut weaknesses = Vec::new();
    for stage in [Stage::Opening, Stage::Reading] {
        for weakness in secmon_sandbox::confine(stage, &Needs::default()) {
            log(format_args!("{weakness}"));
            weaknesses.push(weakness.to_string());
        }
    }
    let shared = Arc::new(Shared {
        name: configuration.name,
        release,
        keys,
        clients: configuration.clients,
        targets,
        outbox: Mutex::new(Outbox::open(configuration.limits.findings, Some(file))),
        limits: configuration.limits,
        weaknesses,
        serving: (0..=others.len()).map(|_| Pulse::new()).collect(),
        requests: AtomicUsize::new(0),
        restarts,
        health,
        news: Condvar::new(),
    });
    tell_start(&shared, &reason);
    for target in &shared.targets {
        let (shared, target) = (Arc::clone(&shared), Arc::clone(target));
        let name = format!("watch {}", target.name);
        spawn(&name, move || watch(&shared, &target))?;
    }
    if let Some(policy) = policy {
        let policy = Arc::new(policy);
        for target in &shared.targets {
            let (shared, target) = (Arc::clone(&shared), Arc::clone(target));
            let policy = Arc::clone(&policy);
            let name = format!("look at {}", target.name);
            spawn(&name, move || detect::watch(&shared, &target, &policy))?;
        }
    }
    for (name, way) in ways {
        let shared = Arc::clone(&shared);
        let thread = format!("gate {name}");
        let run = move || {
            way.run(&shared.keys, &|severity, kind, text| {
                shared.tell(Some(&name), severity, kind, text);
            });
        };
        spawn(&thread, run)?;
    }
    let beating = Arc::clone(&shared);
    spawn("pulse", move || pulse(&beating))?;
    for (number, stream) in (1..).zip(others) {
        let shared = Arc::clone(&shared);
        let serve = move || session::serve(&shared, &stream, number);
        spawn(&format!("channel {number}"), serve)?;
    }
    session::serve(&shared, &stream, 0)
}

/// Opens the ports to clients: the first, and as many of the others as there
/// are.
fn open_channels(count: u32) -> Result<(Port, Vec<Port>), WorkerError> {
    let open = |number, patience| -> std::io::Result<Port> {
        let port = port::open(&channel_port(number), patience)?;
        Ok(Arc::new(Descriptor::new(port)?))
    };
    let first = open(0, port::PATIENCE).map_err(system("the channel's port"))?;
    let mut others = Vec::new();
    for number in 1..count {
        match open(number, NEXT_PORT) {
            Ok(stream) => others.push(stream),
            Err(error) => {
                log(format_args!("fewer clients at once can ask: {error}"));
                break;
            }
        }
    }
    Ok((first, others))
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), WorkerError> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .map_err(system("starting a thread"))
}

/// Maps the memory of each target, or says why it can't be, and opens the
/// ports to their gates.
fn open_targets(configured: &[TargetConfiguration]) -> (Vec<Arc<Target>>, Vec<(String, Way)>) {
    let mut ways = Vec::new();
    let folder = Path::new(PCI_DEVICES);
    let present = ivshmem::list(folder).unwrap_or_default();
    // Devices that no target names, for those that name none.
    let mut unnamed = present
        .iter()
        .map(|device| device.address)
        .filter(|address| configured.iter().all(|target| target.pci != Some(*address)));
    let targets = configured
        .iter()
        .map(|target| {
            let address = target.pci.or_else(|| unnamed.next());
            let memory = address
                .ok_or_else(|| "no ivshmem device is left for it".to_owned())
                .and_then(|address| {
                    let options = IvshmemOptions {
                        layout: target.layout.as_ref(),
                        ram_size: target.ram_size,
                        validate: None,
                    };
                    let opened = ivshmem::open(folder, address, &options)
                        .map_err(|error| error.to_string())?;
                    for note in &opened.notes {
                        log(format_args!("{}: {note}", target.name));
                    }
                    let memory: Arc<dyn PhysicalMemory> = opened.memory;
                    Ok(memory)
                });
            let pci = address.map(|address| address.to_string());
            let gate = target.gate.as_ref().map(|gate| {
                let (gate, way) = Gate::new(gate_port(&gate.port), gate.key);
                ways.push((target.name.clone(), way));
                gate
            });
            Arc::new(Target::new(target.name.clone(), pci, memory, gate))
        })
        .collect();
    (targets, ways)
}

/// Opens the port to a gate.
fn gate_port(name: &str) -> Result<Arc<dyn Stream>, String> {
    let port = port::open(name, NEXT_PORT).and_then(Descriptor::new);
    let port = port.map_err(|error| error.to_string())?;
    Ok(Arc::new(port))
}

fn tell_start(shared: &Shared, reason: &str) {
    if reason == DEVICES_CHANGED {
        log("looking at the targets anew");
    } else if shared.restarts == 0 {
        let text = format!("version {}", env!("CARGO_PKG_VERSION"));
        shared.tell(
            None,
            Severity::Information,
            FindingKind::MonitorStarted,
            &text,
        );
    } else {
        let text = format!("start {} after: {reason}", shared.restarts);
        shared.tell(None, Severity::Warning, FindingKind::WorkerRestarted, &text);
    }
    for target in &shared.targets {
        if let Err(reason) = &target.memory {
            let kind = FindingKind::TargetUnreachable;
            shared.tell(Some(&target.name), Severity::Warning, kind, reason);
        }
    }
}

/// Follows a target for ever.
fn watch(shared: &Shared, target: &Arc<Target>) {
    let pause = Duration::from_millis(shared.limits.poll_ms);
    let before = shared.outbox().boot(&target.name);
    let mut watcher = Watcher::new(Arc::clone(target), before);
    loop {
        for told in watcher.look() {
            shared.tell(Some(&target.name), told.severity, told.kind, &told.text);
        }
        shared.outbox().set_boot(&target.name, watcher.boot());
        thread::sleep(pause);
    }
}

/// Tells process 1 that all threads go on, as long as they do.
fn pulse(shared: &Shared) {
    loop {
        let ages = shared.targets.iter().map(|target| target.pulse.age());
        let serving = shared.serving.iter().map(Pulse::age);
        let oldest = ages.chain(serving).max();
        if oldest.is_some_and(|oldest| oldest < BUSY) {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(b".").and_then(|()| out.flush());
        }
        thread::sleep(Duration::from_secs(1));
    }
}

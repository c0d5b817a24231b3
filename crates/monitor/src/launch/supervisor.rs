//! The process that keeps a monitor going: starts its VM, starts it again with
//! back-off when it dies, plugs targets in as they come and out as they go,
//! and writes down what it sees.
//!
//! It may die at any moment, by `kill -9` too: the VM and the targets go on,
//! and the next supervisor finds the VM by its number and start time and takes
//! it over, as it does the gates. It holds no connection to a target and stops
//! none.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use secmon_channel::{KeyError, KeyPair, Peer};
use secmon_platform::qemu::{QmpError, RamFileKind};
use serde::{Deserialize, Serialize};

use super::command_line::{Machine, USUAL_TARGET_RAM, guest_name, memory_for, pci_address};
use super::console::Console;
use super::gates::{self, Gates, Place};
use super::hotplug::{Plug, PlugError};
use super::process::ProcessRecord;
use super::read_access;
use super::run_directory::{Lock, RunDirectory, RunDirectoryError};
use super::starter::StartPlan;
use super::state::{Processes, Settings, State, TargetState, now};
use super::target::{RunningTarget, TargetError, TargetName, device_size};
use super::{MonitorName, files};
use crate::protocol::{
    CHANNELS, Configuration, ConfigurationError, GateConfiguration, Limits, TargetConfiguration,
};

/// How often it looks around.
const TICK: Duration = Duration::from_millis(250);
/// How often it looks for targets.
const LOOK: Duration = Duration::from_secs(1);
/// How often the state is written where nothing has changed.
const WRITE: Duration = Duration::from_secs(5);
/// How long QEMU may take until it speaks QMP.
const START: Duration = Duration::from_secs(60);
/// The first and the longest wait before a VM that died is started again.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A VM that ran this long has the first wait again.
const STEADY: Duration = Duration::from_secs(120);

/// A VM whose QEMU has not answered for so long is ended.
const SILENT: Duration = Duration::from_secs(120);
/// What is said of a target that ended the VM.
const DISTRUSTED: &str = "its RAM file was shortened while it was watched, which ended the monitoring VM: start its QEMU anew";

/// Why a supervisor can't do its work.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The folder.
    #[error(transparent)]
    RunDirectory(#[from] RunDirectoryError),
    /// Another one does it.
    #[error("monitor {0} has a supervisor already")]
    Twice(MonitorName),
    /// The folder lacks what a monitor is started with.
    #[error("monitor {0} was not set up: start it with `secmon monitor up`")]
    NotSetUp(MonitorName),
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The configuration.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The VM can't be started.
    #[error("starting the monitoring VM: {0}")]
    Start(io::Error),
    /// QEMU ended at once.
    #[error("QEMU ended as soon as it was started ({status}); {log} says why")]
    Ended {
        /// How.
        status: String,
        /// The log.
        log: PathBuf,
    },
    /// QEMU does not answer.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

/// A running VM.
struct Running {
    process: ProcessRecord,
    /// Of a VM that this supervisor started.
    child: Option<Child>,
    console: Option<Console>,
    plug: Plug,
    since: Instant,
    /// What the configuration of this VM says of each slot's RAM.
    shapes: Vec<Shape>,
    /// The RAM files that its confinement lets it open.
    openable: Vec<(u64, u64)>,
    /// How much of targets' RAM it can map.
    room: u64,
    /// Since when it has not answered.
    silent: Option<Instant>,
}

/// A target's RAM file as it was when it was plugged in.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mark {
    process: ProcessRecord,
    length: u64,
    /// When its length was last changed. Only a file in memory says so: one on a
    /// disk is modified by what the guest writes, too.
    modified: Option<(i64, i64)>,
}

/// What a monitor must know of a target's RAM before it starts.
type Shape = Option<(u64, Option<String>)>;

/// What a running VM was made for, which the next supervisor has to know.
#[derive(Default, Serialize, Deserialize)]
struct Made {
    shapes: Vec<Shape>,
    openable: Vec<(u64, u64)>,
    #[serde(default)]
    room: u64,
}

/// Why a VM has to be started anew for a target.
enum Misfit {
    Shape,
    Confinement,
    Memory,
}

struct Supervisor {
    name: MonitorName,
    directory: RunDirectory,
    settings: Settings,
    state: State,
    _lock: Lock,
    machine: Option<Running>,
    gates: Gates,
    back_off: Duration,
    start_at: Instant,
    /// By slot.
    marks: Vec<Option<Mark>>,
    /// The QEMUs whose RAM files ended the VM: they are watched no more.
    distrusted: Vec<ProcessRecord>,
}

/// Runs the supervisor of the monitor `name`. Only comes back with an error:
/// it is ended by a signal.
///
/// # Errors
/// [`SupervisorError`].
pub fn supervise(name: &MonitorName) -> Result<std::convert::Infallible, SupervisorError> {
    // Of a terminal's session no more, so that its end isn't this one's.
    let _ = rustix::process::setsid();
    let directory = RunDirectory::of(name)?;
    let lock = directory.lock(files::LOCK)?;
    let lock = lock.ok_or_else(|| SupervisorError::Twice(name.clone()))?;
    let settings: Option<Settings> = directory.read(files::SETTINGS)?;
    let settings = settings.ok_or_else(|| SupervisorError::NotSetUp(name.clone()))?;
    let state: State = directory.read(files::STATE)?.unwrap_or_default();
    let processes: Processes = directory.read(files::PROCESSES)?.unwrap_or_default();
    let gates = Gates::adopt(&settings, &processes.gates);
    let mut supervisor = Supervisor {
        name: name.clone(),
        directory,
        settings,
        state,
        _lock: lock,
        machine: None,
        gates,
        back_off: BACK_OFF.0,
        start_at: Instant::now(),
        marks: Vec::new(),
        distrusted: Vec::new(),
    };
    supervisor.adopt()?;
    supervisor.run()
}

impl Supervisor {
    fn run(&mut self) -> Result<std::convert::Infallible, SupervisorError> {
        let mut looked: Option<Instant> = None;
        let mut written: Option<Instant> = None;
        loop {
            let before = self.state.clone();
            self.reap();
            if self.machine.is_none() && Instant::now() >= self.start_at {
                self.start_or_wait();
                self.tend_gates()?;
                looked = Some(Instant::now());
            }
            if let Some(console) = self.machine.as_mut().and_then(|m| m.console.as_mut()) {
                // A full disk must not end the watch.
                let _ = console.drain();
            }
            if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
                self.check();
                self.look();
                self.tend_gates()?;
                looked = Some(Instant::now());
            }
            let stale = written.is_none_or(|written| written.elapsed() >= WRITE);
            if stale || self.state != before {
                self.state.updated = now();
                self.directory.write(files::STATE, &self.state)?;
                written = Some(Instant::now());
            }
            std::thread::sleep(TICK);
        }
    }

    /// Takes over the VM that an earlier supervisor left.
    fn adopt(&mut self) -> Result<(), SupervisorError> {
        let mut processes: Processes = self.directory.read(files::PROCESSES)?.unwrap_or_default();
        let own = ProcessRecord::of(std::process::id());
        processes.supervisor = own;
        self.state.supervisor = own;
        let machine = processes.machine.filter(|machine| machine.is_alive());
        // Its own word, if the supervisor before had no time to write it down.
        let stray: Option<ProcessRecord> = self.directory.read(files::MACHINE)?;
        if let Some(stray) = stray.filter(|stray| machine != Some(*stray) && stray.is_alive()) {
            self.state
                .note("a monitoring VM that had just been started is ended");
            let _ = stray.end(Duration::from_secs(5));
        }
        processes.machine = machine;
        self.directory.write(files::PROCESSES, &processes)?;
        self.state.targets = self.absent();
        let Some(process) = machine else {
            self.state.machine_since = None;
            return Ok(());
        };
        let connected = Plug::connect(&self.directory.qmp_socket()).and_then(|mut plug| {
            let state = plug.run_state()?;
            Ok((plug, state))
        });
        match connected {
            Ok((plug, state)) if state.running => {
                self.state
                    .note("a new supervisor took over the running monitoring VM");
                let made: Option<Made> = self.directory.read(files::SHAPES)?;
                let Made {
                    shapes,
                    openable,
                    room,
                } = made.unwrap_or_default();
                self.machine = Some(Running {
                    process,
                    child: None,
                    console: None,
                    plug,
                    since: Instant::now(),
                    shapes,
                    openable,
                    room: room.max(USUAL_TARGET_RAM),
                    silent: None,
                });
                self.replug();
            }
            Ok((_, state)) => {
                // Nobody knows how far its supervisor had come with it.
                self.state.note(format!(
                    "the monitoring VM left by an earlier supervisor does not run ({}); another one is started",
                    state.status
                ));
                let _ = process.end(Duration::from_secs(5));
                self.forget_machine()?;
            }
            Err(error) => {
                self.state.note(format!(
                    "the monitoring VM left by an earlier supervisor does not answer ({error}); it is ended"
                ));
                let _ = process.end(Duration::from_secs(5));
                self.forget_machine()?;
            }
        }
        Ok(())
    }

    /// After a take-over: what is plugged in is taken for what runs, slot by
    /// slot, and whatever is doubtful is plugged in anew.
    fn replug(&mut self) {
        let slots = self.settings.targets.len();
        for slot in 0..slots {
            let number = u32::try_from(slot).unwrap_or(u32::MAX);
            if let Some(machine) = &mut self.machine
                && let Err(error) = machine.plug.unplug(number)
            {
                self.state.note(format!("slot {slot}: {error}"));
            }
        }
        self.look();
    }

    fn absent(&self) -> Vec<(String, TargetState)> {
        let targets = self.settings.targets.iter();
        targets
            .map(|target| (target.to_string(), TargetState::Absent))
            .collect()
    }

    /// Notices a VM that ended.
    fn reap(&mut self) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let (status, by_fault) = match &mut machine.child {
            Some(child) => match child.try_wait() {
                Ok(Some(status)) => {
                    let bus = status.signal() == Some(Signal::BUS.as_raw());
                    (status.to_string(), bus)
                }
                _ => return,
            },
            None if machine.process.is_alive() => return,
            None => ("of which nothing is known".to_owned(), false),
        };
        if let Some(console) = &mut machine.console {
            let _ = console.drain();
        }
        if machine.since.elapsed() > STEADY {
            self.back_off = BACK_OFF.0;
        }
        self.state.note(format!(
            "the monitoring VM ended ({status}); it is started again in {:?}",
            self.back_off
        ));
        self.look_for_changed_files(by_fault);
        self.machine_ended();
    }

    /// Notices a VM that stands still: QEMU stops it when the processor can't
    /// read memory that it maps, and when it answers no more.
    fn check(&mut self) {
        let socket = self.directory.qmp_socket();
        let Some(machine) = &mut self.machine else {
            return;
        };
        let (why, by_fault) = match machine.plug.run_state() {
            Ok(state) if state.running => {
                machine.silent = None;
                return;
            }
            Ok(state) => {
                let fault = state.status == "internal-error";
                (format!("stands still ({})", state.status), fault)
            }
            Err(error) => {
                let since = *machine.silent.get_or_insert_with(Instant::now);
                if since.elapsed() < SILENT {
                    // What is wrong is noted if it stays so.
                    let _ = machine.plug.reconnect(&socket);
                    return;
                }
                (format!("does not answer ({error})"), false)
            }
        };
        self.state.note(format!(
            "the monitoring VM {why}; it is ended and started again in {:?}",
            self.back_off
        ));
        if !machine.process.end(Duration::from_secs(5)) {
            self.state.note("the monitoring VM can't be ended");
            return;
        }
        if let Some(child) = &mut machine.child {
            let _ = child.wait();
        }
        self.look_for_changed_files(by_fault);
        self.machine_ended();
    }

    /// After the VM's end: was it a RAM file that was shortened while the VM
    /// read it? The target's QEMU then is not watched any more, so that it can't
    /// end the VM again. `by_fault`: whether it ended as if so.
    fn look_for_changed_files(&mut self, by_fault: bool) {
        let mut shortened = Vec::new();
        let mut modified = Vec::new();
        for (mark, name) in self.marks.iter().zip(&self.settings.targets) {
            let Some(mark) = mark else {
                continue;
            };
            let Ok(target) = name.find() else {
                continue;
            };
            if target.process != mark.process {
                continue;
            }
            let Some(now) = mark_of(&target) else {
                continue;
            };
            if now.length < mark.length {
                shortened.push((name.to_string(), mark.process));
            } else if now != *mark {
                modified.push((name.to_string(), mark.process));
            }
        }
        let (blamed, what) = match (shortened.is_empty(), by_fault) {
            (false, _) => (shortened, "was shortened"),
            (true, true) => (modified, "was changed in length"),
            (true, false) => return,
        };
        for (name, process) in blamed {
            self.state.note(format!(
                "the RAM file of {name} {what} while the monitoring VM had it mapped: it is not watched until its QEMU is started anew"
            ));
            self.distrusted.push(process);
        }
    }

    fn machine_ended(&mut self) {
        if let Err(error) = self.forget_machine() {
            self.state.note(error.to_string());
        }
        self.start_at = Instant::now() + self.back_off;
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
    }

    fn forget_machine(&mut self) -> Result<(), RunDirectoryError> {
        self.machine = None;
        self.state.machine_since = None;
        self.state.targets = self.absent();
        let mut processes: Processes = self.directory.read(files::PROCESSES)?.unwrap_or_default();
        processes.machine = None;
        self.directory.write(files::PROCESSES, &processes)
    }

    fn start_or_wait(&mut self) {
        if self.state.machine_since.is_none() && !self.state.events.is_empty() {
            self.state.restarts += 1;
        }
        match self.start() {
            Ok(machine) => {
                self.state.machine_since = Some(now());
                self.state.note(format!(
                    "the monitoring VM was started: process {}",
                    machine.process.pid
                ));
                self.machine = Some(machine);
            }
            Err(error) => {
                self.state
                    .note(format!("{error}; it is tried again in {:?}", self.back_off));
                self.machine_ended();
            }
        }
    }

    /// Starts the VM with every target that runs.
    fn start(&mut self) -> Result<Running, SupervisorError> {
        let found: Vec<Result<RunningTarget, TargetError>> =
            self.settings.targets.iter().map(TargetName::find).collect();
        let shapes: Vec<Shape> = found
            .iter()
            .map(|target| target.as_ref().ok().map(shape))
            .collect();
        let running = found.iter().filter_map(|target| target.as_ref().ok());
        let sizes = running.map(|target| device_size(target.ram.ram_size));
        let room = sizes.fold(0, u64::saturating_add).max(USUAL_TARGET_RAM);
        self.write_configuration(&shapes)?;
        // An anonymous file lies in no folder, which is all that landlock guards.
        let named = found
            .iter()
            .filter_map(|target| target.as_ref().ok())
            .filter(|target| target.ram.kind == RamFileKind::Named);
        let plan = StartPlan {
            program: self.settings.program.clone(),
            machine: Machine {
                name: guest_name(&self.name),
                accelerator: self.settings.accelerator,
                memory_mib: memory_for(self.settings.memory_mib, room),
                kernel_arguments: self.settings.kernel_arguments.clone(),
                target_slots: u32::try_from(self.settings.targets.len()).unwrap_or(u32::MAX),
                gates: gates::ports(&self.directory, &self.settings.gates),
                reconnect: self.settings.reconnect,
            },
            account: self.settings.account,
            kernel: self.settings.kernel.clone(),
            initramfs: self.settings.initramfs.clone(),
            configuration: self.directory.file(files::CONFIGURATION),
            qmp_socket: self.directory.qmp_socket(),
            channel_sockets: self.directory.channel_sockets(),
            record: self.directory.file(files::MACHINE),
            ram_files: named
                .clone()
                .map(|target| target.ram.path.clone())
                .collect(),
            ends_with_parent: false,
        };
        let made = Made {
            openable: named.map(|target| target.ram.identity).collect(),
            shapes,
            room,
        };
        self.directory.write(files::SHAPES, &made)?;
        let Made {
            shapes, openable, ..
        } = made;
        self.directory.write(files::PLAN, &plan)?;
        let (console, qemu_end) = UnixStream::pair().map_err(SupervisorError::Start)?;
        let end = |stream: &UnixStream| {
            let end = stream.try_clone().map_err(SupervisorError::Start)?;
            Ok::<_, SupervisorError>(Stdio::from(OwnedFd::from(end)))
        };
        let program = std::env::current_exe().map_err(SupervisorError::Start)?;
        let mut child = Command::new(program)
            .arg(super::START_COMMAND)
            .arg(self.directory.file(files::PLAN))
            .stdin(end(&qemu_end)?)
            .stdout(end(&qemu_end)?)
            .stderr(end(&qemu_end)?)
            .spawn()
            .map_err(SupervisorError::Start)?;
        drop(qemu_end);
        let log = self.directory.file(files::CONSOLE_LOG);
        let mut console = Console::new(console, log).map_err(SupervisorError::Start)?;
        let process = ProcessRecord::of(child.id());
        let mut processes: Processes = self.directory.read(files::PROCESSES)?.unwrap_or_default();
        processes.machine = process;
        self.directory.write(files::PROCESSES, &processes)?;
        let plug = self.connect(&mut child, &mut console);
        let (Ok(mut plug), Some(process)) = (plug, process) else {
            let _ = child.kill();
            let status = child
                .wait()
                .map_or_else(|e| e.to_string(), |s| s.to_string());
            let _ = console.drain();
            let log = self.directory.file(files::CONSOLE_LOG);
            return Err(SupervisorError::Ended { status, log });
        };
        for (slot, target) in found.into_iter().enumerate() {
            let state = match target {
                Ok(target) => self.plug_in(&mut plug, slot, &target),
                Err(error) => without(&error),
            };
            self.set(slot, state);
        }
        plug.start()?;
        Ok(Running {
            process,
            child: Some(child),
            console: Some(console),
            plug,
            since: Instant::now(),
            shapes,
            openable,
            room,
            silent: None,
        })
    }

    /// Waits until QEMU speaks QMP.
    fn connect(&self, child: &mut Child, console: &mut Console) -> Result<Plug, SupervisorError> {
        let deadline = Instant::now() + START;
        loop {
            let _ = console.drain();
            match Plug::connect(&self.directory.qmp_socket()) {
                Ok(plug) => return Ok(plug),
                Err(error) => {
                    let ended = child.try_wait().ok().flatten();
                    if ended.is_some() || Instant::now() > deadline {
                        return Err(error.into());
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn write_configuration(&self, shapes: &[Shape]) -> Result<(), SupervisorError> {
        let monitor = KeyPair::read(&self.directory.file(files::MONITOR_KEY))?;
        let client = KeyPair::read(&self.directory.file(files::CLIENT_KEY))?;
        let targets = self.settings.targets.iter().zip(shapes).enumerate();
        let configuration = Configuration {
            version: 1,
            name: self.name.to_string(),
            secret_key: monitor.secret().clone(),
            clients: vec![Peer {
                name: "host".into(),
                key: client.public(),
            }],
            targets: targets
                .map(|(slot, (target, shape))| {
                    let slot = u32::try_from(slot).unwrap_or(u32::MAX);
                    let gate = self.settings.gates.get(slot as usize);
                    let layout = shape.as_ref().and_then(|(_, layout)| layout.as_ref());
                    TargetConfiguration {
                        name: target.short(),
                        pci: pci_address(slot).parse().ok(),
                        ram_size: shape.as_ref().map(|(size, _)| *size),
                        layout: layout.and_then(|layout| layout.parse().ok()),
                        gate: gate.map(|gate| GateConfiguration {
                            port: gates::port_name(slot),
                            key: gate.key,
                        }),
                    }
                })
                .collect(),
            channels: CHANNELS,
            limits: Limits::default(),
        };
        configuration.check()?;
        let file = files::CONFIGURATION;
        Ok(self.directory.write(file, &configuration)?)
    }

    /// Plugs a target in and says what it is now.
    fn plug_in(&mut self, plug: &mut Plug, slot: usize, target: &RunningTarget) -> TargetState {
        let Some(name) = self.settings.targets.get(slot) else {
            return TargetState::Absent;
        };
        let refused = |reason: String| TargetState::Refused { reason };
        if self.distrusted.contains(&target.process) {
            return refused(DISTRUSTED.to_owned());
        }
        let (file, size) = match name.open_ram(target) {
            Ok(opened) => opened,
            Err(error) => return refused(error.to_string()),
        };
        if let Some(account) = self.settings.account
            && let Err(error) = read_access::allow_reading(&file, account)
        {
            let shown = target.ram.shown.display();
            return refused(format!(
                "giving the monitor's user reading of {shown}: {error}"
            ));
        }
        if self.marks.len() <= slot {
            self.marks.resize(slot + 1, None);
        }
        if let Some(mark) = self.marks.get_mut(slot) {
            *mark = mark_of(target);
        }
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        match plug.plug(slot, &file, size) {
            Ok(()) => TargetState::Watched {
                process: target.process,
                file: target.ram.shown.display().to_string(),
                ram_size: target.ram.ram_size,
            },
            Err(error) => refused(error.to_string()),
        }
    }

    fn set(&mut self, slot: usize, state: TargetState) {
        let Some((name, old)) = self.state.targets.get_mut(slot) else {
            return;
        };
        if *old == state {
            return;
        }
        let text = match &state {
            TargetState::Watched { process, .. } => {
                format!("{name} is watched: process {}", process.pid)
            }
            TargetState::Absent => format!("{name} does not run"),
            TargetState::Refused { reason } => format!("{name} can't be watched: {reason}"),
        };
        *old = state;
        self.state.note(text);
    }

    /// Looks which targets came and went.
    fn look(&mut self) {
        let Some(mut machine) = self.machine.take() else {
            return;
        };
        let mut misfit = None;
        for slot in 0..self.settings.targets.len() {
            let Some((_, current)) = self.state.targets.get(slot).cloned() else {
                continue;
            };
            if let TargetState::Watched { process, .. } = &current {
                if process.is_alive() {
                    continue;
                }
                let number = u32::try_from(slot).unwrap_or(u32::MAX);
                match machine.plug.unplug(number) {
                    Ok(()) => self.set(slot, TargetState::Absent),
                    // Tried again at the next look.
                    Err(PlugError::Held { .. }) => continue,
                    Err(error) => {
                        self.state.note(format!("slot {slot}: {error}"));
                        continue;
                    }
                }
            }
            let Some(found) = self.settings.targets.get(slot).map(TargetName::find) else {
                continue;
            };
            let state = match found {
                Err(error) => without(&error),
                Ok(target) if self.distrusted.contains(&target.process) => TargetState::Refused {
                    reason: DISTRUSTED.to_owned(),
                },
                Ok(target) => match fits(&machine, slot, &target, self.mapped()) {
                    Ok(()) => self.plug_in(&mut machine.plug, slot, &target),
                    Err(why) => {
                        misfit = Some((slot, why));
                        continue;
                    }
                },
            };
            self.set(slot, state);
        }
        self.machine = Some(machine);
        if let Some((slot, why)) = misfit {
            self.start_anew(slot, &why);
        }
    }

    /// How much of targets' RAM is plugged in.
    fn mapped(&self) -> u64 {
        let sizes = self.state.targets.iter().map(|(_, state)| match state {
            TargetState::Watched { ram_size, .. } => device_size(*ram_size),
            TargetState::Absent | TargetState::Refused { .. } => 0,
        });
        sizes.fold(0, u64::saturating_add)
    }

    /// Starts gates for targets that are there, ends those of targets that went,
    /// and writes down which run.
    fn tend_gates(&mut self) -> Result<(), RunDirectoryError> {
        let before = self.gates.records();
        let slots = self.settings.gates.iter().zip(&self.settings.targets);
        let mut states = Vec::new();
        let mut notes = Vec::new();
        for ((settings, name), slot) in slots.zip(0_u32..) {
            let target = match self.state.targets.get(slot as usize) {
                Some((_, TargetState::Watched { process, .. })) => Some(*process),
                _ => None,
            };
            let place = Place {
                directory: &self.directory,
                settings,
                client: self.settings.account,
                slot,
                name,
            };
            let old = self.state.gates.get(slot as usize).cloned();
            let old = old.unwrap_or_default();
            let mut note = |text| notes.push(text);
            states.push(self.gates.tend(&place, target, &old, &mut note));
        }
        self.state.gates = states;
        for note in notes {
            self.state.note(note);
        }
        let records = self.gates.records();
        if records != before {
            let mut processes: Processes =
                self.directory.read(files::PROCESSES)?.unwrap_or_default();
            processes.gates = records;
            self.directory.write(files::PROCESSES, &processes)?;
        }
        Ok(())
    }

    /// Ends the VM, to start one that knows the target as it is now.
    fn start_anew(&mut self, slot: usize, why: &Misfit) {
        let name = self.settings.targets.get(slot).map(ToString::to_string);
        let name = name.unwrap_or_default();
        let why = match why {
            Misfit::Shape => "has RAM of another size or layout than the monitoring VM was told",
            Misfit::Confinement => "has a RAM file that the monitoring VM's QEMU may not open",
            Misfit::Memory => "has more RAM than the monitoring VM has memory to map",
        };
        self.state
            .note(format!("{name} {why}: the monitoring VM is started anew"));
        let Some(mut machine) = self.machine.take() else {
            return;
        };
        let _ = machine.plug.quit();
        if !machine.process.end(Duration::from_secs(5)) {
            self.state.note("the monitoring VM can't be ended");
        }
        if let Some(child) = &mut machine.child {
            let _ = child.wait();
        }
        if let Err(error) = self.forget_machine() {
            self.state.note(error.to_string());
        }
        self.start_at = Instant::now();
    }
}

/// tmpfs, which memfds are of, and hugetlbfs (`linux/magic.h`).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x9584_58f6];

/// A target's RAM file as it is now.
fn mark_of(target: &RunningTarget) -> Option<Mark> {
    let metadata = fs::metadata(&target.ram.path).ok()?;
    let system = rustix::fs::statfs(&target.ram.path).ok()?;
    let in_memory = u64::try_from(system.f_type).is_ok_and(|kind| IN_MEMORY.contains(&kind));
    Some(Mark {
        process: target.process,
        length: metadata.len(),
        modified: in_memory.then(|| (metadata.mtime(), metadata.mtime_nsec())),
    })
}

fn shape(target: &RunningTarget) -> (u64, Option<String>) {
    let layout = target.ram.layout.as_ref().map(ToString::to_string);
    (target.ram.ram_size, layout)
}

/// Whether the target's RAM is what the monitor takes a device's memory for
/// that it was told nothing of: all of it, in one piece from address 0 on.
fn fills_its_device(target: &RunningTarget) -> bool {
    let size = target.ram.ram_size;
    let whole = format!("0x0-{size:#x}@0x0");
    let layout = target.ram.layout.as_ref().map(ToString::to_string);
    device_size(size) == size && layout == Some(whole)
}

/// Whether the running VM can take the target as it is.
fn fits(machine: &Running, slot: usize, target: &RunningTarget, mapped: u64) -> Result<(), Misfit> {
    if mapped.saturating_add(device_size(target.ram.ram_size)) > machine.room {
        return Err(Misfit::Memory);
    }
    match machine.shapes.get(slot).cloned().flatten() {
        Some(known) if known == shape(target) => {}
        None if fills_its_device(target) => {}
        _ => return Err(Misfit::Shape),
    }
    if target.ram.kind == RamFileKind::Anonymous || machine.openable.contains(&target.ram.identity)
    {
        return Ok(());
    }
    Err(Misfit::Confinement)
}

fn without(error: &TargetError) -> TargetState {
    use secmon_platform::qemu::QemuError;
    match error {
        TargetError::Qemu(QemuError::NotFound { .. } | QemuError::NotATarget { .. }) => {
            TargetState::Absent
        }
        error => TargetState::Refused {
            reason: error.to_string(),
        },
    }
}

/// Takes back what the users of a monitor and of its gates were allowed, as
/// far as the targets still run.
pub(super) fn forbid(settings: &Settings) {
    gates::forbid(settings);
    let Some(account) = settings.account else {
        return;
    };
    for target in &settings.targets {
        if let Ok(running) = target.find()
            && let Ok(file) = fs::File::open(&running.ram.path)
        {
            // The file may be gone, and its entry with it.
            let _ = read_access::forbid_reading(&file, account);
        }
    }
}

//! The process that keeps a monitor going: starts its VM, starts it again with
//! back-off when it dies, plugs targets in as they come and out as they go,
//! and writes down what it sees.
//!
//! It may die at any moment, by `kill -9` too: the VM and the targets go on,
//! and the next supervisor finds the VM by its number and start time and takes
//! it over, as it does the gates. It holds no connection to a target and stops
//! none.

mod end;
mod slots;
mod start;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use secmon_channel::KeyError;
use secmon_platform::qemu::QmpError;
use serde::{Deserialize, Serialize};

use super::command_line::USUAL_TARGET_RAM;
use super::console::Console;
use super::gates::{self, Gates};
use super::hotplug::Plug;
use super::process::ProcessRecord;
use super::run_directory::{Lock, RunDirectory, RunDirectoryError};
use super::state::{Processes, Settings, State, TargetState, now};
use super::{MonitorName, files, read_access};
use crate::protocol::ConfigurationError;
use end::Mark;

/// How often it looks around.
const TICK: Duration = Duration::from_millis(250);
/// How often it looks for targets.
const LOOK: Duration = Duration::from_secs(1);
/// How often the state is written where nothing has changed.
const WRITE: Duration = Duration::from_secs(5);
/// The first and the longest wait before a VM that died is started again.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

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

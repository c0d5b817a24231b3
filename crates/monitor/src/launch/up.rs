//! Bringing a monitor up, and ending it.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use secmon_channel::{KeyError, KeyPair, PublicKey};
use secmon_gate::grants::{GrantError, Grants};

use super::account::{Account, AccountError};
use super::command_line::{Accelerator, MAX_TARGETS};
use super::emulator::{Emulator, EmulatorError};
use super::gates::{self, GateFilesError};
use super::process::ProcessRecord;
use super::run_directory::{self, RunDirectory, RunDirectoryError};
use super::state::{GateSettings, GateState, Processes, Settings, State, TargetState};
use super::target::{RunningTarget, TargetError, TargetName};
use super::{MonitorName, SUPERVISE_COMMAND, files, supervisor};

/// How long a monitor's QEMU may take until it runs.
const START: Duration = Duration::from_secs(90);
/// How long a process may take to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to start.
#[derive(Clone, Debug)]
pub struct UpOptions {
    /// The monitor's name.
    pub name: MonitorName,
    /// Its targets.
    pub targets: Vec<TargetName>,
    /// Whether targets that don't run are waited for.
    pub absent: AbsentTargets,
    /// QEMU, if not the installed one.
    pub program: Option<PathBuf>,
    /// What runs the VM, if that is not to be found out.
    pub accelerator: Option<Accelerator>,
    /// The appliance's kernel.
    pub kernel: PathBuf,
    /// The appliance's initramfs.
    pub initramfs: PathBuf,
    /// The VM's RAM, in MiB.
    pub memory_mib: u32,
    /// What the kernel is told.
    pub kernel_arguments: String,
    /// The policy by which the monitor watches its targets, as TOML; without
    /// one its detectors look only when they are asked to.
    pub policy: Option<String>,
    /// Whether targets get gates.
    pub gates: GateUse,
}

/// Whether targets get gates, and what is granted through them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GateUse {
    /// None: their QMP sockets are left to others.
    None,
    /// Each target with a QMP socket gets one.
    Granting {
        /// Grant files; what is granted over a target that none of them names is
        /// to observe it.
        files: Vec<PathBuf>,
        /// The folder of the gates' logs, if not the usual one.
        logs: Option<PathBuf>,
    },
}

/// What becomes of a target that doesn't run yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbsentTargets {
    /// It is an error, as a wrong name would be.
    Refused,
    /// It is picked up when it starts.
    Awaited,
}

/// Why a monitor was not started.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    /// No targets, or too many.
    #[error("a monitor has 1 to {MAX_TARGETS} targets; {0} were named")]
    Count(usize),
    /// One named twice.
    #[error("target {0} is named twice")]
    Twice(String),
    /// The name belongs to a monitor of other targets.
    #[error(
        "there is a monitor {name} already, with {targets}; choose another --name, or end it with `secmon monitor down {name}`"
    )]
    NameInUse {
        /// The name.
        name: MonitorName,
        /// Its targets.
        targets: String,
    },
    /// Somebody else brings it up at this moment.
    #[error("monitor {0} is being started or ended by another process at this moment")]
    Busy(MonitorName),
    /// A target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// QEMU.
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
    /// A user for it.
    #[error(transparent)]
    Account(#[from] AccountError),
    /// Its folder.
    #[error(transparent)]
    RunDirectory(#[from] RunDirectoryError),
    /// Its keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A grant file.
    #[error("{path}: {source}")]
    Grants {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: GrantError,
    },
    /// A grant file for another target.
    #[error("{path} grants rights over target {target:?}; this monitor has {known}")]
    GrantedOver {
        /// The file.
        path: PathBuf,
        /// The target that it names.
        target: String,
        /// The monitor's targets.
        known: String,
    },
    /// Two grant files for one target.
    #[error("two grant files are for target {0:?}")]
    GrantedTwice(String),
    /// The monitor runs, with other grants.
    #[error(
        "monitor {name} runs with other grants over {target}: end it with `secmon monitor down {name}` first"
    )]
    OtherGrants {
        /// The name.
        name: MonitorName,
        /// The target.
        target: String,
    },
    /// A gate's files.
    #[error("the gate's files: {0}")]
    GateFiles(#[from] GateFilesError),
    /// There is no place for logs.
    #[error(
        "there is no place for the gates' logs: set XDG_STATE_HOME or HOME, or name a folder with --gate-logs"
    )]
    NoLogs,
    /// Its supervisor.
    #[error("starting the supervisor: {0}")]
    Supervisor(io::Error),
    /// It did not come up; all that was started is ended.
    #[error("monitor {name} did not start: {reason}{log}")]
    Failed {
        /// The name.
        name: MonitorName,
        /// What the supervisor says.
        reason: String,
        /// The end of the console.
        log: String,
    },
}

/// A monitor that runs.
#[derive(Clone, Debug)]
pub struct Up {
    /// What it was started with.
    pub settings: Settings,
    /// Its processes.
    pub processes: Processes,
    /// What its supervisor last saw.
    pub state: State,
    /// Whether it was there already.
    pub origin: Origin,
}

/// How a monitor came to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was started now.
    Started,
    /// It ran already.
    Found,
    /// Its VM ran; its supervisor had died and there is a new one.
    Recovered,
    /// Its supervisor had died, and its VM with it or before it ran: both are
    /// new.
    Replaced,
}

/// Starts a monitor, or finds that it runs.
///
/// # Errors
/// [`UpError`]; nothing is left of a monitor that did not start.
pub fn up(options: &UpOptions) -> Result<Up, UpError> {
    let count = options.targets.len();
    if count == 0 || count > MAX_TARGETS as usize {
        return Err(UpError::Count(count));
    }
    let mut names: Vec<String> = options.targets.iter().map(TargetName::short).collect();
    names.sort();
    if let Some([name, _]) = names
        .windows(2)
        .find(|pair| matches!(pair, [a, b] if a == b))
    {
        return Err(UpError::Twice(name.clone()));
    }
    let directory = RunDirectory::of(&options.name)?;
    let there = directory.exists();
    directory.make()?;
    let lock = directory.lock(files::UP_LOCK)?;
    let _lock = lock.ok_or_else(|| UpError::Busy(options.name.clone()))?;
    let known: Option<Settings> = directory.read(files::SETTINGS)?;
    if let Some(settings) = known.filter(|_| there) {
        return find(options, &directory, settings);
    }
    let started = start(options, &directory);
    if started.is_err() {
        // What was wrong is told; a second failure on the way out is not.
        let _ = end(&directory);
    }
    started
}

/// The monitor is there: nothing to do, or a supervisor to start again.
fn find(options: &UpOptions, directory: &RunDirectory, settings: Settings) -> Result<Up, UpError> {
    if settings.targets != options.targets {
        let targets: Vec<String> = settings.targets.iter().map(ToString::to_string).collect();
        return Err(UpError::NameInUse {
            name: options.name.clone(),
            targets: targets.join(", "),
        });
    }
    if let GateUse::Granting { files, .. } = &options.gates {
        let key = KeyPair::read(&directory.file(files::MONITOR_KEY))?.public();
        for (slot, wanted) in grants(options, files, key)?.into_iter().enumerate() {
            let now = settings.gates.get(slot);
            if wanted.is_some() && now.map(|gate| &gate.grants) != wanted.as_ref() {
                let target = settings.targets.get(slot).map(ToString::to_string);
                return Err(UpError::OtherGrants {
                    name: options.name.clone(),
                    target: target.unwrap_or_default(),
                });
            }
        }
    }
    let processes: Processes = directory.read(files::PROCESSES)?.unwrap_or_default();
    if processes.supervisor.is_some_and(ProcessRecord::is_alive) {
        return Ok(Up {
            settings,
            processes,
            state: directory.read(files::STATE)?.unwrap_or_default(),
            origin: Origin::Found,
        });
    }
    let before = processes.machine;
    spawn(&options.name, directory)?;
    let mut up = wait(&options.name, directory, settings, Origin::Recovered)?;
    if up.processes.machine != before {
        up.origin = Origin::Replaced;
    }
    Ok(up)
}

fn start(options: &UpOptions, directory: &RunDirectory) -> Result<Up, UpError> {
    for target in &options.targets {
        let running = target.find().and_then(|running| openable(target, &running));
        match running {
            Ok(()) => {}
            Err(TargetError::Qemu(_)) if options.absent == AbsentTargets::Awaited => {}
            Err(error) => return Err(error.into()),
        }
    }
    let emulator = Emulator::find(options.program.as_deref())?;
    let account = if rustix::process::geteuid().is_root() {
        Some(Account::unused(&options.name, 0, &[])?)
    } else {
        None
    };
    for file in [files::CLIENT_KEY, files::MONITOR_KEY] {
        KeyPair::generate()?.write_new(&directory.file(file))?;
    }
    let gates = gates_of(options, directory, account)?;
    let cache = run_directory::base()?.join(".cache");
    let tried = || emulator.accelerator(&options.kernel, &cache);
    let settings = Settings {
        targets: options.targets.clone(),
        accelerator: options.accelerator.unwrap_or_else(tried),
        reconnect: emulator.reconnect(),
        program: emulator.program,
        memory_mib: options.memory_mib,
        kernel: options.kernel.clone(),
        initramfs: options.initramfs.clone(),
        kernel_arguments: options.kernel_arguments.clone(),
        policy: options.policy.clone(),
        account,
        gates,
    };
    if let Some(account) = account {
        directory.let_pass(account.id)?;
    }
    directory.write(files::SETTINGS, &settings)?;
    spawn(&options.name, directory)?;
    wait(&options.name, directory, settings, Origin::Started)
}

/// What is granted over each target by a file; `None` where none is for it.
fn grants(
    options: &UpOptions,
    paths: &[PathBuf],
    key: PublicKey,
) -> Result<Vec<Option<Grants>>, UpError> {
    let targets: Vec<String> = options.targets.iter().map(TargetName::short).collect();
    let mut found = vec![None; targets.len()];
    for path in paths {
        let read = Grants::read_text(path)
            .and_then(|text| Grants::parse_for(&text, options.name.as_str(), key));
        let grants = read.map_err(|source| UpError::Grants {
            path: path.clone(),
            source,
        })?;
        let mut slots = targets.iter().zip(&mut found);
        let Some((_, place)) = slots.find(|(target, _)| **target == grants.target) else {
            return Err(UpError::GrantedOver {
                path: path.clone(),
                target: grants.target,
                known: targets.join(", "),
            });
        };
        if place.is_some() {
            return Err(UpError::GrantedTwice(grants.target));
        }
        *place = Some(grants);
    }
    Ok(found)
}

/// Makes the files of each target's gate, and a user for it.
fn gates_of(
    options: &UpOptions,
    directory: &RunDirectory,
    account: Option<Account>,
) -> Result<Vec<GateSettings>, UpError> {
    let GateUse::Granting { files, logs } = &options.gates else {
        return Ok(Vec::new());
    };
    let key = KeyPair::read(&directory.file(files::MONITOR_KEY))?.public();
    let logs = logs.clone().or_else(|| gates::default_logs(&options.name));
    let logs = logs.ok_or(UpError::NoLogs)?;
    let mut taken: Vec<u32> = account.iter().map(|account| account.id).collect();
    let mut made = Vec::new();
    let granted = grants(options, files, key)?;
    for ((target, granted), slot) in options.targets.iter().zip(granted).zip(0_u32..) {
        let grants = granted
            .unwrap_or_else(|| Grants::observe_alone(&target.short(), options.name.as_str(), key));
        let own = match account {
            Some(_) => Some(Account::unused(&options.name, slot + 1, &taken)?),
            None => None,
        };
        taken.extend(own.iter().map(|own| own.id));
        made.push(gates::prepare(directory, slot, grants, &logs, own)?);
    }
    Ok(made)
}

/// A target's RAM is tried before anything is started.
fn openable(target: &TargetName, running: &RunningTarget) -> Result<(), TargetError> {
    target.open_ram(running).map(drop)
}

/// Starts the supervisor, which outlives this process.
fn spawn(name: &MonitorName, directory: &RunDirectory) -> Result<(), UpError> {
    let log = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(directory.file(files::SUPERVISOR_LOG))
        .map_err(UpError::Supervisor)?;
    let errors = log.try_clone().map_err(UpError::Supervisor)?;
    let program = std::env::current_exe().map_err(UpError::Supervisor)?;
    Command::new(program)
        .arg(SUPERVISE_COMMAND)
        .arg(name.as_str())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors)
        .spawn()
        .map(drop)
        .map_err(UpError::Supervisor)
}

/// Waits until the VM runs.
fn wait(
    name: &MonitorName,
    directory: &RunDirectory,
    settings: Settings,
    origin: Origin,
) -> Result<Up, UpError> {
    let deadline = Instant::now() + START;
    let mut seen = None;
    loop {
        let state: State = directory.read(files::STATE)?.unwrap_or_default();
        let processes: Processes = directory.read(files::PROCESSES)?.unwrap_or_default();
        let supervisor = processes.supervisor.filter(|process| process.is_alive());
        seen = seen.or(supervisor);
        let runs = supervisor.is_some() && processes.machine.is_some_and(ProcessRecord::is_alive);
        let gates = state.gates.len() == settings.gates.len();
        let own = state.supervisor == supervisor;
        if runs && own && gates && state.machine_since.is_some() {
            return Ok(Up {
                settings,
                processes,
                state,
                origin,
            });
        }
        let gone = seen.is_some() && supervisor.is_none();
        let failed = origin == Origin::Started && state.machine_since.is_none();
        let reason = match state.events.last() {
            // The first attempt failed; another one would fail the same way.
            Some(event) if failed && processes.machine.is_none() && supervisor.is_some() => {
                event.text.clone()
            }
            _ if gone || Instant::now() > deadline => {
                let said = tail(&directory.file(files::SUPERVISOR_LOG));
                format!("its supervisor does not bring it up{said}")
            }
            _ => {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        return Err(UpError::Failed {
            name: name.clone(),
            reason,
            log: tail(&directory.file(files::CONSOLE_LOG)),
        });
    }
}

/// The end of a log, with what could act on a terminal taken out.
fn tail(path: &Path) -> String {
    const LONGEST: usize = 1000;
    let bytes = std::fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(LONGEST);
    let text = String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned();
    let shown: String = text
        .chars()
        .filter(|c| *c == '\n' || !c.is_control())
        .collect();
    match shown.trim() {
        "" => String::new(),
        shown => format!("\n{shown}"),
    }
}

/// What was ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Down {
    /// The processes that ran, each with what it was.
    pub ended: Vec<(&'static str, u32)>,
    /// Those that could not be ended.
    pub left: Vec<(&'static str, u32)>,
}

/// Why a monitor was not ended.
#[derive(Debug, thiserror::Error)]
pub enum DownError {
    /// There is none of this name.
    #[error("there is no monitor {name}; {known}")]
    Unknown {
        /// The name.
        name: MonitorName,
        /// Those that there are.
        known: Known,
    },
    /// Somebody else starts or ends it.
    #[error("monitor {0} is being started or ended by another process at this moment")]
    Busy(MonitorName),
    /// Its folder.
    #[error(transparent)]
    RunDirectory(#[from] RunDirectoryError),
}

/// The monitors that there are.
#[derive(Clone, Debug)]
pub struct Known(pub Vec<MonitorName>);

impl fmt::Display for Known {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return formatter.write_str("none runs here");
        }
        let names: Vec<&str> = self.0.iter().map(MonitorName::as_str).collect();
        write!(formatter, "there is {}", names.join(", "))
    }
}

/// Ends a monitor and removes its folder.
///
/// # Errors
/// [`DownError`].
pub fn down(name: &MonitorName) -> Result<Down, DownError> {
    let directory = RunDirectory::of(name)?;
    if !directory.exists() {
        return Err(DownError::Unknown {
            name: name.clone(),
            known: Known(RunDirectory::names().unwrap_or_default()),
        });
    }
    directory.make()?;
    let lock = directory.lock(files::UP_LOCK)?;
    let _lock = lock.ok_or_else(|| DownError::Busy(name.clone()))?;
    Ok(end(&directory)?)
}

/// Ends what a folder says was started, the supervisor first, which would
/// start the rest again.
fn end(directory: &RunDirectory) -> Result<Down, RunDirectoryError> {
    let mut down = Down::default();
    let mut end = |what, process: ProcessRecord| {
        if !process.is_alive() {
            return;
        }
        if process.end(PATIENCE) {
            down.ended.push((what, process.pid));
        } else {
            down.left.push((what, process.pid));
        }
    };
    // A damaged file is no reason to keep the folder.
    let processes = |directory: &RunDirectory| -> Processes {
        let processes = directory.read(files::PROCESSES);
        processes.ok().flatten().unwrap_or_default()
    };
    if let Some(supervisor) = processes(directory).supervisor {
        end("supervisor", supervisor);
    }
    // What it started last.
    let processes = processes(directory);
    // Its own word, if the supervisor had no time to write it down.
    let own: Option<ProcessRecord> = directory.read(files::MACHINE).ok().flatten();
    for machine in processes.machine.into_iter().chain(own) {
        end("monitoring VM", machine);
    }
    for gate in processes.gates {
        if !gate.process.is_alive() {
            continue;
        }
        if gates::end(gate.process) {
            down.ended.push(("gate", gate.process.pid));
        } else {
            down.left.push(("gate", gate.process.pid));
        }
    }
    let settings: Option<Settings> = directory.read(files::SETTINGS).ok().flatten();
    if let Some(settings) = settings {
        supervisor::forbid(&settings);
    }
    if down.left.is_empty() {
        directory.remove()?;
    }
    Ok(down)
}

/// What a monitor may do to a target, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetRights {
    /// The target.
    pub target: String,
    /// To its memory.
    pub memory: String,
    /// Through its gate, or why there is none.
    pub gate: String,
}

impl Up {
    /// What the monitor may do to each target.
    #[must_use]
    pub fn rights(&self, monitor: &MonitorName) -> Vec<TargetRights> {
        let user = match self.settings.account {
            Some(account) => format!("user {}, who has nothing else", account.id),
            None => "your own user".to_owned(),
        };
        let of_target = |(slot, (name, state)): (usize, &(String, TargetState))| {
            let memory = match state {
                TargetState::Watched { file, ram_size, .. } => format!(
                    "observe: read its {} MiB of RAM ({file}, opened read-only by {user}); it can't write it or reach anything else",
                    ram_size >> 20
                ),
                TargetState::Absent => "observe, as soon as it starts: it does not run".to_owned(),
                TargetState::Refused { reason } => format!("nothing: {reason}"),
            };
            let settings = self.settings.gates.get(slot);
            let gate = match (settings, self.state.gates.get(slot)) {
                (None, _) => "none: it was not wanted (--no-gate)".to_owned(),
                (Some(settings), Some(GateState::Running { .. })) => format!(
                    "{}; every use is in {}",
                    gates::rights(settings, monitor),
                    settings.log.display()
                ),
                (Some(_), Some(GateState::Without { reason, .. })) => format!("none: {reason}"),
                (Some(settings), Some(GateState::Idle) | None) => format!(
                    "as soon as it is watched and has a QMP socket: {}",
                    gates::rights(settings, monitor)
                ),
            };
            TargetRights {
                target: name.clone(),
                memory,
                gate,
            }
        };
        let targets = self.state.targets.iter().enumerate();
        targets.map(of_target).collect()
    }
}

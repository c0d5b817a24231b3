//! What the host knows of a monitor without asking it.

use std::fmt;
use std::path::PathBuf;

use super::gates;
use super::process::ProcessRecord;
use super::run_directory::{RunDirectory, RunDirectoryError};
use super::state::{GateState, Processes, Settings, State, TargetState};
use super::up::{DownError, Known};
use super::{MonitorName, files};

/// Whether a process of a monitor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It runs.
    Running(ProcessRecord),
    /// It was there and is no more.
    Died(ProcessRecord),
    /// There is none at this moment.
    None,
}

impl Life {
    fn of(process: Option<ProcessRecord>) -> Self {
        match process {
            Some(process) if process.is_alive() => Self::Running(process),
            Some(process) => Self::Died(process),
            None => Self::None,
        }
    }

    /// Whether it runs.
    #[must_use]
    pub fn is_running(self) -> bool {
        matches!(self, Self::Running(_))
    }
}

impl fmt::Display for Life {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running(process) => write!(formatter, "running (process {})", process.pid),
            Self::Died(process) => write!(formatter, "died (was process {})", process.pid),
            Self::None => formatter.write_str("not running"),
        }
    }
}

impl fmt::Display for TargetState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Watched {
                process,
                file,
                ram_size,
            } => write!(
                formatter,
                "watched (process {}, {} MiB in {file})",
                process.pid,
                ram_size >> 20
            ),
            Self::Absent => formatter.write_str("does not run; picked up when it starts"),
            Self::Refused { reason } => write!(formatter, "not watched: {reason}"),
        }
    }
}

/// A target's gate, as the host sees it.
#[derive(Clone, Debug)]
pub struct GateStatus {
    /// What was last seen of it.
    pub state: GateState,
    /// Its supervisor.
    pub supervisor: Life,
    /// What the monitor may do through it, in words.
    pub rights: String,
    /// Its log.
    pub log: PathBuf,
}

impl fmt::Display for GateStatus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.state, self.supervisor) {
            (GateState::Running { .. }, Life::Died(process)) => write!(
                formatter,
                "died (its supervisor was process {})",
                process.pid
            ),
            (
                GateState::Running {
                    qmp,
                    gate,
                    keeper,
                    restarts,
                },
                supervisor,
            ) => {
                write!(formatter, "{supervisor}")?;
                for (what, pid) in [("gate", gate), ("keeper", keeper)] {
                    match pid {
                        Some(pid) => write!(formatter, ", {what} {pid}")?,
                        None => write!(formatter, ", no {what}")?,
                    }
                }
                if !qmp.is_empty() {
                    write!(formatter, ", holds {qmp}")?;
                }
                write!(formatter, ", {restarts} restarts")
            }
            (GateState::Without { reason, .. }, _) => write!(formatter, "none: {reason}"),
            (GateState::Idle, _) => formatter.write_str("none: its target is not watched"),
        }
    }
}

/// A monitor, as the host sees it.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its name.
    pub name: MonitorName,
    /// Its folder.
    pub folder: PathBuf,
    /// What it was started with, if that much was done.
    pub settings: Option<Settings>,
    /// Its supervisor.
    pub supervisor: Life,
    /// Its VM.
    pub machine: Life,
    /// What the supervisor last saw.
    pub state: State,
    /// The targets' gates, in the targets' order; none if it was started
    /// without.
    pub gates: Vec<GateStatus>,
}

/// Reads what is known of a monitor.
///
/// # Errors
/// [`DownError::Unknown`] if there is none of this name, else the folder's.
pub fn read(name: &MonitorName) -> Result<Status, DownError> {
    let directory = RunDirectory::of(name)?;
    if !directory.exists() {
        return Err(DownError::Unknown {
            name: name.clone(),
            known: Known(RunDirectory::names().unwrap_or_default()),
        });
    }
    let read = || -> Result<Status, RunDirectoryError> {
        let processes: Processes = directory.read(files::PROCESSES)?.unwrap_or_default();
        let settings: Option<Settings> = directory.read(files::SETTINGS)?;
        let state: State = directory.read(files::STATE)?.unwrap_or_default();
        let gates = settings.iter().flat_map(|settings| &settings.gates);
        let gates = gates.enumerate().map(|(slot, gate)| {
            let mut records = processes.gates.iter();
            let record = records.find(|record| record.slot as usize == slot);
            let mut seen = state.gates.get(slot).cloned().unwrap_or_default();
            if let (GateState::Running { gate, keeper, .. }, Some(record)) = (&mut seen, record) {
                let parts = gates::parts(record.process);
                (*gate, *keeper) = (parts.gate, parts.keeper);
            }
            GateStatus {
                state: seen,
                supervisor: Life::of(record.map(|record| record.process)),
                rights: gates::rights(gate, name),
                log: gate.log.clone(),
            }
        });
        Ok(Status {
            name: name.clone(),
            folder: directory.path().to_owned(),
            gates: gates.collect(),
            settings,
            supervisor: Life::of(processes.supervisor),
            machine: Life::of(processes.machine),
            state,
        })
    };
    Ok(read()?)
}

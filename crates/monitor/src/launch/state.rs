//! What is written down about a monitor: what it was started with, which
//! processes belong to it, and what its supervisor last saw.

use std::path::PathBuf;

use secmon_channel::PublicKey;
use secmon_gate::grants::Grants;
use serde::{Deserialize, Serialize};

use super::account::Account;
use super::command_line::{Accelerator, Reconnect};
use super::gates::GateRecord;
use super::process::ProcessRecord;
use super::target::TargetName;

/// The most events that are kept.
const EVENTS: usize = 64;

/// What a monitor was started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Its targets; the place in the list is the target's slot.
    pub targets: Vec<TargetName>,
    /// QEMU.
    pub program: PathBuf,
    /// What runs the VM.
    pub accelerator: Accelerator,
    /// The VM's RAM, in MiB.
    pub memory_mib: u32,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// What the kernel is told.
    pub kernel_arguments: String,
    /// The policy by which the monitor watches its targets, as TOML.
    #[serde(default)]
    pub policy: Option<String>,
    /// The user the VM's QEMU runs as; the caller's own if there is none.
    pub account: Option<Account>,
    /// How sockets are connected again.
    pub reconnect: Reconnect,
    /// The targets' gates, in the targets' order; none if the monitor was
    /// started without.
    #[serde(default)]
    pub gates: Vec<GateSettings>,
}

/// What a target's gate is started with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateSettings {
    /// The user it runs as; the caller's own if there is none.
    pub account: Option<Account>,
    /// Its public key.
    pub key: PublicKey,
    /// Who may do what.
    pub grants: Grants,
    /// Its log.
    pub log: PathBuf,
    /// The folder of the dumps that it writes, if anybody may ask for some.
    pub dumps: Option<PathBuf>,
}

/// The processes of a monitor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// The supervisor.
    pub supervisor: Option<ProcessRecord>,
    /// The monitoring VM's QEMU.
    pub machine: Option<ProcessRecord>,
    /// The gates.
    #[serde(default)]
    pub gates: Vec<GateRecord>,
}

/// What became of a target's gate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum GateState {
    /// The target is not watched, so there is none.
    #[default]
    Idle,
    /// It runs.
    Running {
        /// The target's QMP socket that it holds.
        qmp: String,
        /// The gate's own process, when it was last seen.
        gate: Option<u32>,
        /// Its keeper, when it was last seen.
        keeper: Option<u32>,
        /// How often one of its processes was started again.
        restarts: u32,
    },
    /// There is none.
    Without {
        /// Why, and what to do about it.
        reason: String,
        /// How often one of its processes was started again.
        restarts: u32,
    },
}

impl GateState {
    /// How often one of its processes was started again.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        match self {
            Self::Idle => 0,
            Self::Running { restarts, .. } | Self::Without { restarts, .. } => *restarts,
        }
    }
}

/// What became of a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum TargetState {
    /// Its RAM is plugged into the monitoring VM.
    Watched {
        /// Its QEMU.
        process: ProcessRecord,
        /// Its RAM file.
        file: String,
        /// The bytes of its RAM.
        ram_size: u64,
    },
    /// It doesn't run. It is picked up when it starts.
    Absent,
    /// It runs and can't be watched.
    Refused {
        /// Why, and what to do about it.
        reason: String,
    },
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in seconds since 1970.
    pub time: u64,
    /// What.
    pub text: String,
}

/// What the supervisor last saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// When it was written, in seconds since 1970.
    pub updated: u64,
    /// Who wrote it: what an earlier supervisor saw may be true no more.
    #[serde(default)]
    pub supervisor: Option<ProcessRecord>,
    /// When the VM was started, in seconds since 1970; `None` while none runs.
    pub machine_since: Option<u64>,
    /// How often the VM was started again.
    pub restarts: u32,
    /// The targets, in the order of the settings.
    pub targets: Vec<(String, TargetState)>,
    /// Their gates, in the same order.
    #[serde(default)]
    pub gates: Vec<GateState>,
    /// What happened, oldest first; old ones are dropped.
    pub events: Vec<Event>,
    /// How many events were dropped.
    pub events_dropped: u64,
}

impl State {
    /// Notes that something happened.
    pub fn note(&mut self, text: impl Into<String>) {
        self.events.push(Event {
            time: now(),
            text: text.into(),
        });
        if self.events.len() > EVENTS {
            let surplus = self.events.len() - EVENTS;
            self.events.drain(..surplus);
            self.events_dropped += surplus as u64;
        }
    }
}

/// Seconds since 1970.
#[must_use]
pub fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_bounded_and_what_is_dropped_is_counted() {
        let mut state = State::default();
        for number in 0..100 {
            state.note(number.to_string());
        }
        assert_eq!(state.events.len(), EVENTS);
        assert_eq!(state.events_dropped, 36);
        assert_eq!(state.events[0].text, "36");
    }

    #[test]
    fn a_state_survives_its_file() {
        let mut state = State::default();
        state.note("x");
        state.targets.push(("qemu:a".into(), TargetState::Absent));
        let refused = TargetState::Refused {
            reason: "no".into(),
        };
        state.targets.push(("qemu:b".into(), refused));
        state.gates.push(GateState::Idle);
        state.gates.push(GateState::Without {
            reason: "no".into(),
            restarts: 2,
        });
        let text = serde_json::to_string(&state).expect("JSON");
        assert_eq!(serde_json::from_str::<State>(&text).expect("back"), state);
    }
}

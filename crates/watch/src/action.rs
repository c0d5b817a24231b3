//! What can be done about a finding, and who does it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::FindingRecord;

/// What a policy can want done about a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nothing but that it is an event, which all sinks take.
    Log,
    /// An event of its own that says: a person should look at this now.
    Alert,
    /// The target's vCPUs stand still until somebody lets them run.
    Pause,
    /// The target's network devices lose their link.
    DisconnectNetwork,
    /// The target's memory is written to a file on its host.
    DumpMemory,
    /// The process that the finding is about can't run any more.
    KillProcess,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Log,
        Self::Alert,
        Self::Pause,
        Self::DisconnectNetwork,
        Self::DumpMemory,
        Self::KillProcess,
    ];

    /// Its name, as it stands in a policy.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Alert => "alert",
            Self::Pause => "pause",
            Self::DisconnectNetwork => "disconnect_network",
            Self::DumpMemory => "dump_memory",
            Self::KillProcess => "kill_process",
        }
    }

    /// Whether it acts on the target, for which a gate has to grant it.
    #[must_use]
    pub const fn needs_gate(self) -> bool {
        !matches!(self, Self::Log | Self::Alert)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Does what a policy wants done.
///
/// Only actions that [need a gate](Action::needs_gate) reach one. It is called
/// on a thread of its own, one action at a time, and may take as long as the
/// action takes.
pub trait Responder: Send {
    /// Does `action` about `finding`.
    ///
    /// # Errors
    /// [`Refused`] if it was not done; that becomes an event.
    fn respond(&mut self, action: Action, finding: &FindingRecord) -> Result<Done, Refused>;
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// In a sentence: what, and how it is undone.
    pub what: String,
}

/// Why an action was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// In a sentence, with what to do.
    pub reason: String,
}

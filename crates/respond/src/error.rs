//! Why an action was not done, or not in full.

use secmon_gate::client::ClientError;

use crate::VictimError;

/// Why an action was not done.
#[derive(Debug, thiserror::Error)]
pub enum RespondError {
    /// The gate refused, or can't be reached.
    #[error("the gate: {0}")]
    Gate(#[from] ClientError),
    /// The gate answered something else than was asked.
    #[error("the gate answered {0}, which is no answer to what was asked")]
    Answer(String),
    /// The process that is to end is not what it was taken for, or must not be
    /// ended.
    #[error(transparent)]
    Victim(#[from] VictimError),
    /// The guest is not as its kernel's own code needs it; nothing was written.
    #[error("nothing was changed in the guest: {0}")]
    Unsuited(String),
    /// Some devices' links were switched, then one could not be.
    #[error("{done} of {all} network devices were switched, {device} was not: {source}")]
    Partly {
        /// How many were.
        done: usize,
        /// How many there are.
        all: usize,
        /// The one that was not.
        device: String,
        /// Why.
        source: ClientError,
    },
    /// There is no session with a gate.
    #[error("no gate: {0}")]
    NoGate(String),
    /// The finding is not about a process.
    #[error("the finding is about {about}, not about a process that could be ended")]
    NoProcess {
        /// What it is about.
        about: String,
    },
    /// The guest's kernel is not known at this moment.
    #[error("the guest's kernel is not known at this moment")]
    NoGuest,
    /// There was a dump a moment ago.
    #[error("the last dump is too new; another one in {seconds} s at the earliest")]
    TooSoon {
        /// How long it is until another.
        seconds: u64,
    },
    /// There is nothing to switch.
    #[error("the target has no network device that QEMU knows of")]
    NoNetwork,
    /// The guest's kernel was made to end the process, and it is still there.
    #[error("the guest's kernel was told to end process {pid}, which did not die of it: {what}")]
    Alive {
        /// The process.
        pid: u32,
        /// What is seen of it.
        what: String,
    },
}

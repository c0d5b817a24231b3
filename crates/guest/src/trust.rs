//! How far the monitor that makes a statement is itself protected.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The protection of the monitor. No statement about a guest is worth more
/// than that; each row that leaves the program carries it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum TrustLevel {
    /// A process on the host: whoever has the host has the monitor.
    #[default]
    L0,
    /// A virtual machine of its own, which sees the target's memory read-only
    /// and which the target can't reach.
    L1,
}

impl TrustLevel {
    /// Its name, `L0` or `L1`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::L0 => "L0",
            Self::L1 => "L1",
        }
    }

    /// What it means, in a few words.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::L0 => "a process on the host",
            Self::L1 => "a monitoring VM",
        }
    }
}

impl fmt::Display for TrustLevel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

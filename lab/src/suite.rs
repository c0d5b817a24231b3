//! The kernels, by the suite of Debian's archive that carries them.

use std::fmt;
use std::str::FromStr;

/// A suite of Debian's archive, standing for the kernel series in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Suite {
    /// Linux 5.10.
    Bullseye,
    /// Linux 6.1.
    Bookworm,
    /// Linux 6.12.
    Trixie,
    /// The newest, 7.2 at the time of writing.
    Sid,
}

impl Suite {
    /// All four, oldest first.
    pub const ALL: [Suite; 4] = [Suite::Bullseye, Suite::Bookworm, Suite::Trixie, Suite::Sid];

    /// The suite's name in the archive.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Suite::Bullseye => "bullseye",
            Suite::Bookworm => "bookworm",
            Suite::Trixie => "trixie",
            Suite::Sid => "sid",
        }
    }

    /// The kernel series expected there, for names of tests and folders.
    #[must_use]
    pub fn series(self) -> &'static str {
        match self {
            Suite::Bullseye => "5.10",
            Suite::Bookworm => "6.1",
            Suite::Trixie => "6.12",
            Suite::Sid => "7.2",
        }
    }

    /// Whether Debian builds its cloud kernel with five-level paging: 5.10's
    /// is built without.
    #[must_use]
    pub fn has_five_level_paging(self) -> bool {
        self != Suite::Bullseye
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.series())
    }
}

impl FromStr for Suite {
    type Err = anyhow::Error;

    /// A suite's name or its kernel series.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        Suite::ALL
            .into_iter()
            .find(|suite| suite.name() == text || suite.series() == text)
            .ok_or_else(|| {
                anyhow::anyhow!("unknown suite {text:?}: one of 5.10, 6.1, 6.12, 7.2 is meant")
            })
    }
}

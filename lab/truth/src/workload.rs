//! How much a guest's workload makes.

use serde::{Deserialize, Serialize};

/// What the guest's PID 1 makes before it says it is ready.
///
/// The lab writes it into the initramfs as `/etc/workload.json`, so that the
/// kernel's command line stays what the test asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Plain processes, in sessions and trees of several depths.
    pub processes: u32,
    /// Everything else of note: threads, identities, containers, sockets,
    /// files, odd names, mappings, eBPF. Off, the guest boots fastest.
    pub rich: bool,
    /// Load the modules that the workload itself doesn't need.
    pub extra_modules: bool,
    /// Milliseconds between two rounds of the busy mode once it is resumed;
    /// each round forks and reaps three processes, and makes and ends a
    /// thread, a file, two sockets and a mapping. What it makes lives for up
    /// to a tenth of a second.
    pub busy_interval_ms: u32,
}

impl Workload {
    /// A dozen processes and nothing else: the fastest boot.
    #[must_use]
    pub fn small() -> Self {
        Self {
            processes: 12,
            rich: false,
            extra_modules: false,
            busy_interval_ms: 5,
        }
    }

    /// Every kind of object the tables know, and 200 plain processes.
    #[must_use]
    pub fn rich() -> Self {
        Self {
            processes: 200,
            rich: true,
            extra_modules: true,
            busy_interval_ms: 5,
        }
    }
}

impl Default for Workload {
    fn default() -> Self {
        Self::small()
    }
}

//! Processes that outlive the one that started them, known by number and
//! start time: a number that was given to another process since is never
//! signalled.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use secmon_platform::qemu::ProcessId;
use serde::{Deserialize, Serialize};

/// A process, as it is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since the host's boot.
    pub start_time: u64,
}

impl From<ProcessId> for ProcessRecord {
    fn from(id: ProcessId) -> Self {
        Self {
            pid: id.pid,
            start_time: id.start_time,
        }
    }
}

impl ProcessRecord {
    /// The process that has this number now; `None` if there is none.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        ProcessId::of(pid).ok().map(Self::from)
    }

    /// Whether this very process still runs.
    #[must_use]
    pub fn is_alive(self) -> bool {
        self.id().is_alive()
    }

    /// The user that it runs as; `None` if that can't be told.
    #[must_use]
    pub fn user(self) -> Option<u32> {
        self.id().user()
    }

    fn id(self) -> ProcessId {
        ProcessId {
            pid: self.pid,
            start_time: self.start_time,
        }
    }

    /// Ends this very process: asks it to, and kills it if it is still there
    /// after `patience`. Gives whether it is gone.
    #[must_use]
    pub fn end(self, patience: Duration) -> bool {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let Some(handle) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            return !self.is_alive();
        };
        // The handle is of whoever has the number now; it is the one meant if
        // the start time says so after it was opened.
        if !self.is_alive() {
            return true;
        }
        for signal in [Signal::TERM, Signal::KILL] {
            if pidfd_send_signal(&handle, signal).is_err() {
                return !self.is_alive();
            }
            let deadline = Instant::now() + patience;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                let left = Timespec::try_from(left).unwrap_or(Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                });
                let mut polled = [PollFd::new(&handle, PollFlags::IN)];
                match poll(&mut polled, Some(&left)) {
                    Ok(0) => break,
                    Ok(_) => return true,
                    Err(_) => {}
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn only_the_process_meant_is_ended() {
        let mut child = Command::new("sleep").arg("600").spawn().expect("sleep");
        let record = ProcessRecord::of(child.id()).expect("it runs");
        let other = ProcessRecord {
            start_time: record.start_time + 1,
            ..record
        };
        assert!(other.end(Duration::from_secs(1)), "it is not there");
        assert!(record.is_alive(), "the one with its number is left alone");
        assert!(record.end(Duration::from_secs(30)));
        assert!(!record.is_alive());
        child.wait().expect("reaped");
    }
}

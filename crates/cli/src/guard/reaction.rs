//! What is done about what was found.

use std::time::{Duration, Instant};

use anyhow::Result;
use secmon_monitor::launch::MonitorName;
use secmon_monitor::launch::process::ProcessRecord;
use secmon_monitor::launch::up;

use super::Reaction;

/// How often a VM is started anew at most, in how long: a cause that stays must
/// not keep the monitor from ever working.
const MOST: usize = 3;
const WITHIN: Duration = Duration::from_secs(600);
/// How long QEMU may take to end before it is killed.
const PATIENCE: Duration = Duration::from_secs(1);

/// The reactions so far.
pub struct Reactions {
    reaction: Reaction,
    made: Vec<Instant>,
    stopped: bool,
}

impl Reactions {
    /// None was made yet.
    pub fn new(reaction: Reaction) -> Self {
        Self {
            reaction,
            made: Vec::new(),
            stopped: false,
        }
    }

    /// Whether the monitor was ended for good.
    pub fn has_stopped(&self) -> bool {
        self.stopped
    }

    /// Does what was wanted; says what was done.
    ///
    /// # Errors
    /// If the monitor can't be ended.
    pub fn react(&mut self, name: &MonitorName, machine: ProcessRecord) -> Result<Option<String>> {
        match self.reaction {
            Reaction::Alert => Ok(None),
            Reaction::Restart => {
                self.made.retain(|made| made.elapsed() < WITHIN);
                if self.made.len() >= MOST {
                    return Ok(Some(format!(
                        "the VM was started anew {MOST} times already in the last {} minutes: it is left as it is",
                        WITHIN.as_secs() / 60
                    )));
                }
                self.made.push(Instant::now());
                let gone = machine.end(PATIENCE);
                Ok(Some(match gone {
                    true => format!(
                        "the VM (process {}) was ended; its supervisor starts it anew",
                        machine.pid
                    ),
                    false => format!("the VM (process {}) could not be ended", machine.pid),
                }))
            }
            Reaction::Stop => {
                self.stopped = true;
                up::down(name)?;
                Ok(Some(format!("monitor {name} was ended")))
            }
        }
    }
}

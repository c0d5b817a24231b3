//! What a policy wants done, done through a gate.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use secmon_guest::Guest;
use secmon_watch::{Action, Done, FindingRecord, Refused, Responder};

use crate::line::{Line, Work};
use crate::{
    Killed, Patience, RespondError, Victim, connect_network, disconnect_network, dump, kill, pause,
    resume,
};

/// Between two dumps: each is as large as the target's memory, and a hostile
/// guest decides when there is another finding.
const BETWEEN_DUMPS: Duration = Duration::from_secs(600);

/// Gives the guest as it is known now, if there is a kernel.
pub type CurrentGuest = Box<dyn Fn() -> Option<Arc<Guest>> + Send>;

/// Does what a policy wants through a gate.
pub struct GateResponder<L> {
    line: L,
    guest: CurrentGuest,
    dumped: Option<Instant>,
}

impl<L: Line> GateResponder<L> {
    /// A responder over this line, for the guest that `guest` gives.
    pub fn new(line: L, guest: CurrentGuest) -> Self {
        Self {
            line,
            guest,
            dumped: None,
        }
    }

    fn act(&mut self, action: Action, finding: &FindingRecord) -> Result<String, RespondError> {
        let work = match action {
            Action::Log | Action::Alert => return Ok("nothing is done at the target".to_owned()),
            Action::Pause => pause_work(),
            Action::DisconnectNetwork => disconnect_work(Vec::new()),
            Action::DumpMemory => {
                let early = |at: &Instant| BETWEEN_DUMPS.checked_sub(at.elapsed());
                if let Some(left) = self.dumped.as_ref().and_then(early) {
                    return Err(RespondError::TooSoon {
                        seconds: left.as_secs() + 1,
                    });
                }
                dump_work(dump_name(&finding.detector))
            }
            Action::KillProcess => {
                let process = finding.process().ok_or_else(|| RespondError::NoProcess {
                    about: finding.about.clone(),
                })?;
                let guest = (self.guest)().ok_or(RespondError::NoGuest)?;
                let victim = Victim {
                    task: process.task,
                    pid: process.pid,
                    started: process.started,
                };
                kill_work(guest, victim)
            }
        };
        let outcome = self.line.run(work);
        if action == Action::DumpMemory && outcome.is_ok() {
            self.dumped = Some(Instant::now());
        }
        outcome
    }
}

impl<L: Line> Responder for GateResponder<L> {
    fn respond(&mut self, action: Action, finding: &FindingRecord) -> Result<Done, Refused> {
        match self.act(action, finding) {
            Ok(what) => Ok(Done { what }),
            Err(error) => Err(Refused {
                reason: error.to_string(),
            }),
        }
    }
}

/// Pauses until somebody lets the target run.
#[must_use]
pub fn pause_work() -> Work {
    Box::new(|client| {
        pause(client)?;
        Ok("the target stands still until it is let run: `secmon respond resume`, or `cont` in QEMU's monitor".to_owned())
    })
}

/// Lets a paused target run.
#[must_use]
pub fn resume_work() -> Work {
    Box::new(|client| {
        resume(client)?;
        Ok("the target runs".to_owned())
    })
}

/// Gives the network's link back; of all devices if none is named.
#[must_use]
pub fn connect_work(devices: Vec<String>) -> Work {
    Box::new(move |client| {
        let devices = connect_network(client, &devices)?;
        Ok(format!("linked: {}", devices.join(", ")))
    })
}

/// Takes the network's link; of all devices if none is named.
#[must_use]
pub fn disconnect_work(devices: Vec<String>) -> Work {
    Box::new(move |client| {
        let devices = disconnect_network(client, &devices)?;
        Ok(format!(
            "no link any more: {}; `secmon respond connect` gives it back",
            devices.join(", ")
        ))
    })
}

/// Has the memory dumped to this file in the gate's folder.
#[must_use]
pub fn dump_work(name: String) -> Work {
    Box::new(move |client| {
        let dumped = dump(client, &name)?;
        Ok(format!(
            "the target's memory is in {} ({} bytes), in the folder that its gate was given for dumps",
            dumped.name, dumped.bytes
        ))
    })
}

/// Ends a process.
#[must_use]
pub fn kill_work(guest: Arc<Guest>, victim: Victim) -> Work {
    Box::new(move |client| {
        let pid = victim.pid;
        Ok(match kill(client, &guest, &victim, &Patience::default())? {
            Killed::Ended => format!("process {pid} was ended by the guest's kernel"),
            Killed::WhenItWakes { threads } => format!(
                "process {pid} is marked to end; {threads} of its threads wait in the kernel where no signal wakes them, run nothing of it any more, and end as they wake"
            ),
        })
    })
}

/// A name for a dump that no other one has: `DETECTOR-MILLISECONDS.elf`.
#[must_use]
pub fn dump_name(prefix: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let milliseconds = since.map_or(0, |since| since.as_millis());
    let prefix: String = prefix
        .chars()
        .filter(|character| character.is_ascii_alphanumeric() || *character == '_')
        .take(32)
        .collect();
    let prefix = if prefix.is_empty() { "dump" } else { &prefix };
    format!("{prefix}-{milliseconds}.elf")
}

#[cfg(test)]
mod tests {
    use secmon_detect::{Class, Severity};
    use serde_json::Map;

    use super::*;

    struct Nobody;

    impl Line for Nobody {
        fn run(&mut self, _: Work) -> Result<String, RespondError> {
            Err(RespondError::NoGate("refused".to_owned()))
        }
    }

    fn finding() -> FindingRecord {
        FindingRecord {
            id: "network/x 1".to_owned(),
            detector: "network".to_owned(),
            name: "x".to_owned(),
            class: Class::Attack,
            severity: Severity::High,
            technique: None,
            subject: Map::new(),
            about: "interface eth0".to_owned(),
            summary: "it listens".to_owned(),
            evidence: Vec::new(),
        }
    }

    #[test]
    fn what_can_not_be_done_is_said() {
        let mut responder = GateResponder::new(Nobody, Box::new(|| None));
        let refused = responder.respond(Action::KillProcess, &finding());
        let reason = refused.expect_err("no process").reason;
        assert!(reason.contains("interface eth0"), "{reason}");
        for action in [Action::Pause, Action::DisconnectNetwork, Action::DumpMemory] {
            let refused = responder.respond(action, &finding());
            let reason = refused.expect_err("no gate").reason;
            assert!(reason.contains("refused"), "{reason}");
        }
    }

    #[test]
    fn names_of_dumps_are_names_that_a_gate_takes() {
        for (prefix, begins) in [("modules", "modules-"), ("../x", "x-"), ("", "dump-")] {
            let name = dump_name(prefix);
            assert!(name.starts_with(begins) && name.len() <= 64, "{name}");
        }
    }
}

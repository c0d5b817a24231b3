//! Has done what the policy wants done about findings, one thing after the
//! other, on a thread of its own: a dump takes its time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::policy::Policy;
use crate::{Action, Done, FindingRecord, Incident, Refused, Responder};

/// The most actions that wait.
const MOST_WAITING: usize = 64;
const HOUR: Duration = Duration::from_secs(3600);

/// Where it is told what became of an action.
pub type Tell = Arc<dyn Fn(Incident) + Send + Sync>;

/// Reacts to findings as a policy says.
pub struct Reactions {
    /// When each response acted within the last hour.
    times: Vec<VecDeque<Instant>>,
    work: Option<SyncSender<(Action, FindingRecord)>>,
    thread: Option<JoinHandle<()>>,
    tell: Tell,
}

impl Reactions {
    /// With a responder, or without one: then what needs one is refused.
    pub fn new(policy: &Policy, responder: Option<Box<dyn Responder>>, tell: Tell) -> Self {
        let (work, thread) = match responder {
            None => (None, None),
            Some(responder) => {
                let (sender, receiver) = mpsc::sync_channel(MOST_WAITING);
                let telling = Arc::clone(&tell);
                let thread = std::thread::Builder::new()
                    .name("respond".to_owned())
                    .spawn(move || work_off(responder, &receiver, &telling));
                match thread {
                    Ok(thread) => (Some(sender), Some(thread)),
                    Err(_) => (None, None),
                }
            }
        };
        Self {
            times: vec![VecDeque::new(); policy.responses.len()],
            work,
            thread,
            tell,
        }
    }

    /// Reacts to what happened, if it is a finding that appeared or changed.
    pub fn react(&mut self, incident: &Incident, policy: &Policy, now: Instant) {
        let (Incident::Appeared { finding } | Incident::Changed { finding, .. }) = incident else {
            return;
        };
        let mut decided = BTreeMap::new();
        for (response, action) in policy.responses_to(finding) {
            let most = policy
                .responses
                .get(response)
                .map_or(0, |response| response.at_most_per_hour);
            let number = response.saturating_add(1);
            let times = self.times.get_mut(response);
            let allowed = *decided
                .entry(response)
                .or_insert_with(|| times.is_some_and(|times| allow(times, most, now)));
            let refusal = if !allowed {
                Some(format!(
                    "response {number} of the policy acts at most {most} times within an hour"
                ))
            } else if action.needs_gate() {
                self.hand_on(action, finding)
            } else {
                if action == Action::Alert {
                    (self.tell)(done(action, finding, finding.summary.clone()));
                }
                None
            };
            if let Some(reason) = refusal {
                (self.tell)(refused(action, finding, reason));
            }
        }
    }

    /// Why it could not be handed on.
    fn hand_on(&self, action: Action, finding: &FindingRecord) -> Option<String> {
        let Some(work) = &self.work else {
            return Some(
                "no gate is there that grants it: name one with --gate, or have `secmon monitor \
                 up` start one"
                    .to_owned(),
            );
        };
        match work.try_send((action, finding.clone())) {
            Ok(()) => None,
            Err(TrySendError::Full(_)) => Some(format!("{MOST_WAITING} actions wait already")),
            Err(TrySendError::Disconnected(_)) => Some("what responds has ended".to_owned()),
        }
    }
}

impl Drop for Reactions {
    /// What was begun is done first.
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked that was said.
            let _ = thread.join();
        }
    }
}

fn work_off(
    mut responder: Box<dyn Responder>,
    work: &mpsc::Receiver<(Action, FindingRecord)>,
    tell: &Tell,
) {
    while let Ok((action, finding)) = work.recv() {
        tell(match responder.respond(action, &finding) {
            Ok(Done { what }) => done(action, &finding, what),
            Err(Refused { reason }) => refused(action, &finding, reason),
        });
    }
}

fn done(action: Action, finding: &FindingRecord, detail: String) -> Incident {
    Incident::ActionDone {
        action,
        finding: finding.id.clone(),
        detail,
    }
}

fn refused(action: Action, finding: &FindingRecord, reason: String) -> Incident {
    Incident::ActionRefused {
        action,
        finding: finding.id.clone(),
        reason,
    }
}

/// Whether one more is allowed within an hour; notes it.
fn allow(times: &mut VecDeque<Instant>, most: u32, now: Instant) -> bool {
    while times
        .front()
        .is_some_and(|time| now.saturating_duration_since(*time) >= HOUR)
    {
        times.pop_front();
    }
    if times.len() >= most as usize {
        return false;
    }
    times.push_back(now);
    true
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use secmon_detect::{Class, Finding, Severity, Subject};
    use secmon_memory::VirtualAddress;

    use super::*;

    struct Obedient;

    impl Responder for Obedient {
        fn respond(&mut self, action: Action, _: &FindingRecord) -> Result<Done, Refused> {
            match action {
                Action::Pause => Ok(Done {
                    what: "it stands still".to_owned(),
                }),
                _ => Err(Refused {
                    reason: "not granted".to_owned(),
                }),
            }
        }
    }

    fn told(responder: Option<Box<dyn Responder>>, times: u32) -> Vec<String> {
        let policy = Policy::parse(
            "version = 1\n[[response]]\nactions = [\"log\", \"alert\", \"pause\", \"dump_memory\"]\n\
             at_most_per_hour = 1\n",
            "p",
        )
        .expect("a policy");
        let subject = Subject::Module {
            address: VirtualAddress::new(1),
            name: "m".into(),
        };
        let finding = Finding::new(
            "modules",
            "hidden_module",
            Class::Attack,
            Severity::High,
            subject,
            "hidden",
        );
        let incident = Incident::Appeared {
            finding: Box::new((&finding).into()),
        };
        let lines = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&lines);
        let tell: Tell = Arc::new(move |incident| {
            into.lock().expect("lines").push(incident.to_string());
        });
        let mut reactions = Reactions::new(&policy, responder, tell);
        for _ in 0..times {
            reactions.react(&incident, &policy, Instant::now());
        }
        drop(reactions);
        let lines = lines.lock().expect("lines");
        lines.clone()
    }

    #[test]
    fn actions_are_done_or_refused_and_both_are_told() {
        let told = told(Some(Box::new(Obedient)), 1);
        for line in [
            "alert: hidden",
            "pause: it stands still",
            "dump_memory was not done: not granted",
        ] {
            assert!(told.iter().any(|told| told == line), "{line}: {told:?}");
        }
        assert_eq!(told.len(), 3);
    }

    #[test]
    fn without_a_gate_and_beyond_the_limit_actions_are_refused() {
        let told = told(None, 2);
        let count = |word: &str| told.iter().filter(|line| line.contains(word)).count();
        assert_eq!(count("no gate"), 2);
        assert_eq!(count("at most 1 times"), 4);
    }
}

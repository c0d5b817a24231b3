//! What sinks are told.

use std::fmt;

use secmon_detect::Class;
use secmon_guest::TrustLevel;
use serde::{Deserialize, Serialize};

use crate::{Action, FindingRecord};

/// Something that happened while a target was watched. In JSON one object, with
/// the [`Incident`]'s fields beside these and its name as `event`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its number in this run of the watch, from 1 on.
    pub sequence: u64,
    /// Milliseconds since 1970-01-01T00:00:00Z by the watcher's clock.
    pub time_ms: u64,
    /// The target's name.
    pub target: String,
    /// How well the monitor that says so was protected.
    pub trust_level: TrustLevel,
    /// What happened.
    #[serde(flatten)]
    pub incident: Incident,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Incident {
    /// The watch began: nothing is known of the target yet.
    Started {
        /// The program's version.
        version: String,
        /// The detectors that will look.
        detectors: Vec<String>,
        /// The share of one core that may be used, in percent.
        budget_percent: f64,
    },
    /// The watch ended.
    Stopped {
        /// Why.
        reason: String,
        /// What it did.
        tally: Tally,
    },
    /// The target started, stopped, rebooted, or can't be seen any more. With
    /// another boot all findings of the one before are gone.
    Target {
        /// What it did.
        change: TargetChange,
        /// In words.
        detail: String,
    },
    /// A monitoring VM tells something of itself.
    Monitor {
        /// What, in `snake_case`.
        kind: String,
        /// In words.
        detail: String,
    },
    /// A finding that was not there before.
    Appeared {
        /// The finding.
        finding: Box<FindingRecord>,
    },
    /// A finding that is now of another class or severity.
    Changed {
        /// The finding as it is now.
        finding: Box<FindingRecord>,
        /// Its class until now.
        was: Class,
    },
    /// A finding that is not there any more.
    Gone {
        /// The finding as it was seen last.
        finding: Box<FindingRecord>,
        /// Milliseconds from when it was told until it was seen last.
        lasted_ms: u64,
        /// Why it is taken for gone.
        reason: String,
    },
    /// A detector can't look; what it found before stays as it was.
    Blind {
        /// The detector.
        detector: String,
        /// Why.
        reason: String,
    },
    /// A detector that could not look, can.
    Sighted {
        /// The detector.
        detector: String,
    },
    /// A detector looks less often than the policy wants.
    Behind {
        /// The detector.
        detector: String,
        /// Why, in words.
        reason: String,
    },
    /// What the poller has seen of what there was.
    Coverage {
        /// What is counted: `tasks`.
        what: String,
        /// How many the kernel says were made since the last such event.
        created: u64,
        /// How many of these were seen.
        seen: u64,
        /// Milliseconds since the last such event.
        interval_ms: u64,
        /// What the counts do not say.
        note: String,
    },
    /// Findings that exceptions of the policy hid for the first time.
    Excepted {
        /// The exception's number in the policy, from 1 on.
        exception: usize,
        /// Its reason.
        reason: String,
        /// The finding that it hid.
        finding: Box<FindingRecord>,
    },
    /// An exception of the policy has expired: it hides nothing any more.
    ExceptionExpired {
        /// Its number in the policy, from 1 on.
        exception: usize,
        /// Its reason.
        reason: String,
        /// The last day of its life, as `YYYY-MM-DD`.
        expired: String,
    },
    /// What the policy wanted was done.
    ActionDone {
        /// What.
        action: Action,
        /// About which finding, by its `id`.
        finding: String,
        /// In words.
        detail: String,
    },
    /// What the policy wanted was not done.
    ActionRefused {
        /// What.
        action: Action,
        /// About which finding, by its `id`.
        finding: String,
        /// Why not.
        reason: String,
    },
    /// Events did not reach a sink.
    Lost {
        /// The sink.
        sink: String,
        /// How many.
        events: u64,
        /// Why.
        reason: String,
    },
}

/// What a target did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetChange {
    /// A kernel was found where there was none.
    Started,
    /// Another boot took the place of the one before.
    Rebooted,
    /// Its clock stands still.
    Stopped,
    /// Its clock goes on.
    Resumed,
    /// It can't be seen any more.
    Gone,
    /// Memory contradicts what was believed about its kernel.
    Conflict,
}

/// What a watch did until now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Milliseconds that it ran.
    pub ran_ms: u64,
    /// Milliseconds of processor time that it used.
    pub cpu_ms: u64,
    /// Looks of detectors.
    pub looks: u64,
    /// Findings that appeared, without information.
    pub alarms: u64,
    /// Of these, those that are not gone.
    pub open_alarms: u64,
    /// Findings that were seen too seldom to be told.
    pub unconfirmed: u64,
    /// Tasks that the kernel says were made.
    pub tasks_created: u64,
    /// Of these, those that were seen.
    pub tasks_seen: u64,
}

impl Incident {
    /// Its name: what `event` says in JSON.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "started",
            Self::Stopped { .. } => "stopped",
            Self::Target { .. } => "target",
            Self::Monitor { .. } => "monitor",
            Self::Appeared { .. } => "appeared",
            Self::Changed { .. } => "changed",
            Self::Gone { .. } => "gone",
            Self::Blind { .. } => "blind",
            Self::Sighted { .. } => "sighted",
            Self::Behind { .. } => "behind",
            Self::Coverage { .. } => "coverage",
            Self::Excepted { .. } => "excepted",
            Self::ExceptionExpired { .. } => "exception_expired",
            Self::ActionDone { .. } => "action_done",
            Self::ActionRefused { .. } => "action_refused",
            Self::Lost { .. } => "lost",
        }
    }

    /// The finding that it is about.
    #[must_use]
    pub fn finding(&self) -> Option<&FindingRecord> {
        match self {
            Self::Appeared { finding }
            | Self::Changed { finding, .. }
            | Self::Gone { finding, .. }
            | Self::Excepted { finding, .. } => Some(finding),
            _ => None,
        }
    }

    /// Whether a person should look at it: an alarm that appeared, or an alert.
    #[must_use]
    pub fn is_alarm(&self) -> bool {
        match self {
            Self::Appeared { finding } | Self::Changed { finding, .. } => finding.class.is_alarm(),
            Self::ActionDone { action, .. } => *action == Action::Alert,
            _ => false,
        }
    }
}

impl fmt::Display for Incident {
    /// In one line, for people. Text of the guest is not escaped here.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started {
                detectors,
                budget_percent,
                ..
            } => write!(
                f,
                "{} detectors watch, with {budget_percent}% of a core",
                detectors.len()
            ),
            Self::Stopped { reason, tally } => {
                write!(f, "the watch ended: {reason}; {tally}")
            }
            Self::Target { detail, .. } => f.write_str(detail),
            Self::Monitor { kind, detail } => write!(f, "{kind}: {detail}"),
            Self::Appeared { finding } => f.write_str(&finding.summary),
            Self::Changed { finding, was } => {
                write!(f, "{} (was {was})", finding.summary)
            }
            Self::Gone {
                finding, reason, ..
            } => write!(f, "{} ({reason})", finding.summary),
            Self::Blind { detector, reason } => write!(f, "{detector} can't look: {reason}"),
            Self::Sighted { detector } => write!(f, "{detector} can look again"),
            Self::Behind { detector, reason } => write!(f, "{detector} is behind: {reason}"),
            Self::Coverage {
                what,
                created,
                seen,
                interval_ms,
                note,
            } => {
                let seconds = interval_ms / 1000;
                write!(f, "{seen} of {created} new {what} seen in {seconds} s")?;
                if note.is_empty() {
                    Ok(())
                } else {
                    write!(f, " ({note})")
                }
            }
            Self::Excepted {
                exception,
                reason,
                finding,
            } => write!(
                f,
                "exception {exception} ({reason}) hides: {}",
                finding.summary
            ),
            Self::ExceptionExpired {
                exception,
                reason,
                expired,
            } => write!(f, "exception {exception} ({reason}) expired on {expired}"),
            Self::ActionDone { action, detail, .. } => write!(f, "{action}: {detail}"),
            Self::ActionRefused { action, reason, .. } => {
                write!(f, "{action} was not done: {reason}")
            }
            Self::Lost {
                sink,
                events,
                reason,
            } => write!(f, "{events} events did not reach {sink}: {reason}"),
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = match self.ran_ms {
            0 => 0.0,
            ran => self.cpu_ms as f64 / ran as f64 * 100.0,
        };
        write!(
            f,
            "{} looks in {} s, {share:.1}% of a core; {} alarms, {} of them open; \
             {} of {} new tasks seen",
            self.looks,
            self.ran_ms / 1000,
            self.alarms,
            self.open_alarms,
            self.tasks_seen,
            self.tasks_created
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_flat_object() {
        let event = Event {
            sequence: 3,
            time_ms: 1_790_000_000_000,
            target: "qemu:web1".into(),
            trust_level: TrustLevel::L0,
            incident: Incident::Blind {
                detector: "tracing".into(),
                reason: "the kernel has no ftrace_ops_list".into(),
            },
        };
        let json = serde_json::to_value(&event).expect("JSON");
        let expected = serde_json::json!({
            "sequence": 3,
            "time_ms": 1_790_000_000_000_u64,
            "target": "qemu:web1",
            "trust_level": "L0",
            "event": "blind",
            "detector": "tracing",
            "reason": "the kernel has no ftrace_ops_list",
        });
        assert_eq!(json, expected);
        assert_eq!(json["event"], event.incident.name());
        let read: Event = serde_json::from_value(json).expect("an event");
        assert_eq!(read, event);
    }
}

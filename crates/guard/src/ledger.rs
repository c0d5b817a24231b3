//! Which findings there are, since when, and what changed.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::Finding;

/// More findings than this of one source are not kept: the first say enough.
const MOST: usize = 256;

/// What became of a finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Change {
    /// It is there now.
    Appeared {
        /// When it was first seen, in milliseconds since 1970.
        since: u64,
        /// What.
        #[serde(flatten)]
        finding: Finding,
    },
    /// It is not there any more.
    Gone {
        /// When it was first seen, in milliseconds since 1970.
        since: u64,
        /// What.
        #[serde(flatten)]
        finding: Finding,
    },
}

/// The findings that are there, by the source that looks for them: a source
/// that did not look says nothing of its findings.
#[derive(Debug, Default)]
pub struct Ledger {
    open: Vec<(&'static str, u64, Finding)>,
}

impl Ledger {
    /// Whether a finding is there already.
    #[must_use]
    pub fn has(&self, finding: &Finding) -> bool {
        self.open.iter().any(|(_, _, open)| open.is_same(finding))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Takes all that a source found when it last looked; gives what is new
    /// and what is gone.
    pub fn update(&mut self, source: &'static str, found: Vec<Finding>) -> Vec<Change> {
        let mut changes = Vec::new();
        self.open.retain(|(of, since, finding)| {
            let stays = *of != source || found.iter().any(|found| found.is_same(finding));
            if !stays {
                changes.push(Change::Gone {
                    since: *since,
                    finding: finding.clone(),
                });
            }
            stays
        });
        let now = now();
        for finding in found {
            let known = self.open.iter().filter(|(of, ..)| *of == source).count();
            if !self.has(&finding) && known < MOST {
                self.open.push((source, now, finding.clone()));
                changes.push(Change::Appeared {
                    since: now,
                    finding,
                });
            }
        }
        changes
    }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    fn finding(place: &str, seen: &str) -> Finding {
        Finding::new(Kind::Silent, place, "an answer", seen)
    }

    #[test]
    fn a_finding_appears_once_and_goes_once() {
        let mut ledger = Ledger::default();
        let first = ledger.update("memory", vec![finding("a", "1"), finding("b", "1")]);
        assert_eq!(first.len(), 2);
        assert!(
            ledger
                .update("memory", vec![finding("a", "2"), finding("b", "1")])
                .is_empty()
        );
        // Another source says nothing of them.
        assert!(ledger.update("channel", Vec::new()).is_empty());
        let gone = ledger.update("memory", vec![finding("b", "1")]);
        assert!(matches!(gone.as_slice(), [Change::Gone { finding, .. }] if finding.place == "a"));
        assert_eq!(ledger.len(), 1);
    }

    #[test]
    fn findings_are_bounded() {
        let mut ledger = Ledger::default();
        let many = (0..1000).map(|number| finding(&number.to_string(), ""));
        assert_eq!(ledger.update("memory", many.collect()).len(), MOST);
    }
}

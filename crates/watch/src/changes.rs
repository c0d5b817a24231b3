//! What is new: a finding is told when it appears, when it becomes another
//! class or severity, and when it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use secmon_detect::Finding;

use crate::policy::{Day, Policy};
use crate::{FindingRecord, Incident};

/// The most findings that are followed; a hostile guest can cause any number.
const MOST: usize = 20_000;
/// In how many rounds of looks a finding must be missing to be gone.
const MISSING: u32 = 2;

/// The findings that are there.
#[derive(Debug, Default)]
pub struct Changes {
    open: BTreeMap<String, Open>,
    /// Those that an exception hides, and the exception's number.
    hidden: BTreeMap<String, usize>,
    /// Exceptions whose end was told.
    expired: BTreeSet<usize>,
    /// Alarms that appeared.
    alarms: u64,
}

#[derive(Debug)]
struct Open {
    record: FindingRecord,
    told: Instant,
    seen: Instant,
    missing: u32,
}

impl Changes {
    /// Whether a finding was told or hidden before, and is not gone.
    pub fn knows(&self, finding: &Finding) -> bool {
        let id = FindingRecord::id_of(finding);
        self.open.contains_key(&id) || self.hidden.contains_key(&id)
    }

    /// Whether one of a detector's findings was missing at its last looks.
    pub fn misses(&self, detector: &str) -> bool {
        self.of(detector).any(|open| open.missing > 0)
    }

    fn of(&self, detector: &str) -> impl Iterator<Item = &Open> {
        let detector = detector.to_owned();
        self.open
            .values()
            .filter(move |open| open.record.detector == detector)
    }

    /// Alarms that appeared, and how many of them are there.
    pub fn alarms(&self) -> (u64, u64) {
        let open = self.open.values();
        let open = open.filter(|open| open.record.class.is_alarm()).count();
        (self.alarms, open as u64)
    }

    /// Takes what a detector's looks confirmed; `whole`: it looked to the end,
    /// so that what lacks is missing.
    pub fn settle(
        &mut self,
        detector: &str,
        findings: &[Finding],
        whole: bool,
        policy: &Policy,
        now: Instant,
        today: Day,
    ) -> Vec<Incident> {
        let mut incidents = Vec::new();
        let mut lost = 0_u64;
        let mut seen = BTreeSet::new();
        for finding in findings.iter().filter(|finding| policy.reports(finding)) {
            let record = FindingRecord::from(finding);
            seen.insert(record.id.clone());
            if let Some(exception) = policy.excepted(&record, today) {
                if self.hidden.len() < MOST
                    && self.hidden.insert(record.id.clone(), exception) != Some(exception)
                    && let Some(rule) = policy.exceptions.get(exception)
                {
                    incidents.push(Incident::Excepted {
                        exception: exception.saturating_add(1),
                        reason: rule.reason.clone(),
                        finding: Box::new(record.clone()),
                    });
                }
                if let Some(open) = self.open.remove(&record.id) {
                    incidents.push(gone(open, "an exception of the policy hides it"));
                }
                continue;
            }
            self.hidden.remove(&record.id);
            let full = self.open.len() >= MOST;
            match self.open.get_mut(&record.id) {
                Some(open) => {
                    (open.seen, open.missing) = (now, 0);
                    let was = (open.record.class, open.record.severity);
                    if was != (record.class, record.severity) {
                        if record.class.is_alarm() && !was.0.is_alarm() {
                            self.alarms = self.alarms.saturating_add(1);
                        }
                        incidents.push(Incident::Changed {
                            finding: Box::new(record.clone()),
                            was: was.0,
                        });
                    }
                    open.record = record;
                }
                None if full => lost = lost.saturating_add(1),
                None => {
                    if record.class.is_alarm() {
                        self.alarms = self.alarms.saturating_add(1);
                    }
                    incidents.push(Incident::Appeared {
                        finding: Box::new(record.clone()),
                    });
                    let open = Open {
                        record: record.clone(),
                        told: now,
                        seen: now,
                        missing: 0,
                    };
                    self.open.insert(record.id, open);
                }
            }
        }
        if whole {
            self.take_missing(detector, &seen, &mut incidents);
        }
        if lost > 0 {
            incidents.push(Incident::Lost {
                sink: "the watch".to_owned(),
                events: lost,
                reason: format!("{MOST} findings are followed already"),
            });
        }
        incidents
    }

    fn take_missing(
        &mut self,
        detector: &str,
        seen: &BTreeSet<String>,
        incidents: &mut Vec<Incident>,
    ) {
        let mut ended = Vec::new();
        for (id, open) in &mut self.open {
            if open.record.detector == detector && !seen.contains(id) {
                open.missing = open.missing.saturating_add(1);
                if open.missing >= MISSING {
                    ended.push(id.clone());
                }
            }
        }
        for id in ended {
            if let Some(open) = self.open.remove(&id) {
                incidents.push(gone(open, "not seen any more"));
            }
        }
        let of_detector = format!("{detector}/");
        self.hidden
            .retain(|id, _| !id.starts_with(&of_detector) || seen.contains(id));
    }

    /// Another boot took the place of the one whose findings these are.
    pub fn another_boot(&mut self) -> Vec<Incident> {
        self.hidden.clear();
        std::mem::take(&mut self.open)
            .into_values()
            .map(|open| gone(open, "the target was started anew"))
            .collect()
    }

    /// Exceptions that have expired and were not told yet.
    pub fn expired(&mut self, policy: &Policy, today: Day) -> Vec<Incident> {
        let mut incidents = Vec::new();
        for (number, exception) in policy.exceptions.iter().enumerate() {
            if exception.has_expired(today) && self.expired.insert(number) {
                incidents.push(Incident::ExceptionExpired {
                    exception: number.saturating_add(1),
                    reason: exception.reason.clone(),
                    expired: exception.expires.to_string(),
                });
            }
        }
        incidents
    }
}

fn gone(open: Open, reason: &str) -> Incident {
    let lasted = open.seen.saturating_duration_since(open.told);
    Incident::Gone {
        finding: Box::new(open.record),
        lasted_ms: u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use secmon_detect::{Class, Severity, Subject};
    use secmon_memory::VirtualAddress;

    use super::*;

    fn finding(address: u64, class: Class) -> Finding {
        let subject = Subject::Module {
            address: VirtualAddress::new(address),
            name: "m".into(),
        };
        Finding::new(
            "modules",
            "hidden_module",
            class,
            Severity::High,
            subject,
            "a module",
        )
    }

    fn names(incidents: &[Incident]) -> Vec<&'static str> {
        incidents.iter().map(Incident::name).collect()
    }

    fn settle(
        changes: &mut Changes,
        policy: &Policy,
        found: &[Finding],
        whole: bool,
    ) -> Vec<&'static str> {
        let today = Day::of_unix_days(20_000);
        names(&changes.settle("modules", found, whole, policy, Instant::now(), today))
    }

    #[test]
    fn only_changes_are_told() {
        let mut changes = Changes::default();
        let policy = Policy::default();
        let attack = [finding(1, Class::Attack)];
        assert_eq!(settle(&mut changes, &policy, &attack, true), ["appeared"]);
        assert!(changes.knows(&attack[0]) && !changes.knows(&finding(2, Class::Attack)));
        assert!(settle(&mut changes, &policy, &attack, true).is_empty());
        let milder = [finding(1, Class::Suspicion)];
        assert_eq!(settle(&mut changes, &policy, &milder, true), ["changed"]);
        // Whoever did not look to the end misses nothing.
        assert!(settle(&mut changes, &policy, &[], false).is_empty());
        assert!(settle(&mut changes, &policy, &[], true).is_empty());
        assert!(changes.misses("modules") && !changes.misses("tracing"));
        assert_eq!(changes.alarms(), (1, 1));
        assert_eq!(settle(&mut changes, &policy, &[], true), ["gone"]);
        assert_eq!(changes.alarms(), (1, 0));
        assert_eq!(settle(&mut changes, &policy, &attack, true), ["appeared"]);
        assert_eq!(names(&changes.another_boot()), ["gone"]);
    }

    #[test]
    fn what_an_exception_hides_is_told_once_and_appears_when_it_expires() {
        let policy = Policy::parse(
            "version = 1\n[[exception]]\nname = \"hidden_module\"\nreason = \"r\"\n\
             expires = 2024-10-04\n",
            "p",
        )
        .expect("a policy");
        let mut changes = Changes::default();
        let found = [finding(1, Class::Attack)];
        let mut on = |day| {
            let today = Day::of_unix_days(day);
            let mut told = changes.expired(&policy, today);
            told.extend(changes.settle("modules", &found, true, &policy, Instant::now(), today));
            names(&told)
        };
        assert_eq!(on(20_000), ["excepted"]);
        assert!(on(20_000).is_empty());
        assert_eq!(on(20_001), ["exception_expired", "appeared"]);
        assert!(on(20_001).is_empty());
    }

    #[test]
    fn what_is_below_the_threshold_is_not_told() {
        let policy = Policy::parse("version = 1\nreport = \"attack\"\n", "p").expect("a policy");
        let mut changes = Changes::default();
        let found = [finding(1, Class::Suspicion), finding(2, Class::Attack)];
        assert_eq!(settle(&mut changes, &policy, &found, true), ["appeared"]);
    }

    #[test]
    fn any_number_of_findings_is_bounded() {
        let mut changes = Changes::default();
        let found: Vec<Finding> = (0..MOST as u64 + 5)
            .map(|address| finding(address, Class::Attack))
            .collect();
        let told = changes.settle(
            "modules",
            &found,
            true,
            &Policy::default(),
            Instant::now(),
            Day::of_unix_days(0),
        );
        assert_eq!(told.len(), MOST + 1);
        assert!(matches!(
            told.last(),
            Some(Incident::Lost { events: 5, .. })
        ));
    }
}

//! Runs detectors and decides what is reported.
//!
//! An image is looked at once. A running guest is caught in the middle of
//! things: a finding is reported only if the same one (same detector, name and
//! subject) is seen in several looks, with pauses between them that grow. What
//! was not is kept apart and counted, never dropped silently: it is a moment
//! of the guest's life, or something that hides only now and then.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::{Duration, Instant};

use secmon_guest::Guest;
use secmon_memory::Volatility;

use crate::{DetectError, Detector, Finding};

/// More findings of one detector are not kept; a hostile guest can cause any
/// number.
const MOST_FINDINGS: usize = 10_000;
/// How often a detector that could not look to the end is run on a running
/// guest.
const MOST_TRIES: u32 = 6;

/// How often a running guest is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confirmation {
    /// In how many looks a finding must be seen.
    pub needed: u32,
    /// How many looks there are at most: more than are needed find what hides
    /// and shows itself by turns.
    pub looks: u32,
    /// The pause before the second look; each further one is twice as long.
    pub pause: Duration,
}

impl Default for Confirmation {
    /// Three of up to six looks, the last 155 ms after the first.
    fn default() -> Self {
        Self {
            needed: 3,
            looks: 6,
            pause: Duration::from_millis(5),
        }
    }
}

impl Confirmation {
    /// One look, as at an image.
    pub const ONCE: Self = Self {
        needed: 1,
        looks: 1,
        pause: Duration::ZERO,
    };
}

/// What came out of a check.
#[derive(Debug, Default)]
pub struct Report {
    /// What was found and confirmed, in the order of the detectors.
    pub findings: Vec<Finding>,
    /// One for each detector, in their order.
    pub detectors: Vec<DetectorReport>,
}

impl Report {
    /// Whether something was found that is more than information.
    #[must_use]
    pub fn has_alarm(&self) -> bool {
        self.findings.iter().any(|finding| finding.class.is_alarm())
    }

    /// Whether every detector looked to the end.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.detectors
            .iter()
            .all(|detector| detector.outcome == Outcome::Checked)
    }
}

/// What one detector did.
#[derive(Debug)]
pub struct DetectorReport {
    /// Its name.
    pub detector: &'static str,
    /// Whether it looked to the end.
    pub outcome: Outcome,
    /// What it can't look at in this guest.
    pub limits: Option<&'static str>,
    /// How many of its findings are reported.
    pub findings: usize,
    /// What it saw, but not often enough to be reported.
    pub unconfirmed: Vec<Finding>,
    /// How many findings were more than are kept.
    pub dropped: u64,
    /// How often it looked.
    pub looks: u32,
    /// How long its looks took together.
    pub time: Duration,
}

/// Whether a detector looked to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did.
    Checked,
    /// It did not: why. What it found before is reported.
    NotChecked(String),
}

/// Runs the detectors.
pub fn check(
    guest: &Guest,
    detectors: &[&'static dyn Detector],
    confirmation: Confirmation,
) -> Report {
    let confirmation = match guest.space().memory().volatility() {
        Volatility::Static => Confirmation::ONCE,
        Volatility::Live => confirmation,
    };
    let mut report = confirm(detectors, confirmation, &mut |detector, findings| {
        detector.run(guest, findings)
    });
    for (report, detector) in report.detectors.iter_mut().zip(detectors) {
        report.limits = detector.limits(guest);
    }
    report
}

/// One look of a detector.
type Look<'a> = dyn FnMut(&dyn Detector, &mut dyn FnMut(Finding)) -> Result<(), DetectError> + 'a;

/// Looks until what was found is confirmed or can't be any more.
fn confirm(
    detectors: &[&'static dyn Detector],
    confirmation: Confirmation,
    look_with: &mut Look<'_>,
) -> Report {
    let mut rounds: Vec<Round> = detectors
        .iter()
        .map(|detector| Round::new(*detector, confirmation))
        .collect();
    let mut open: Vec<&mut Round> = rounds.iter_mut().collect();
    let mut pause = None;
    while !open.is_empty() {
        if let Some(pause) = pause {
            std::thread::sleep(pause);
        }
        pause = None;
        open.retain_mut(|round| {
            round.look_with(look_with);
            let more = round.wants_more(&|_| false);
            pause = pause.max(more);
            more.is_some()
        });
    }
    let mut report = Report::default();
    for round in rounds {
        let (findings, detector) = round.finish(&|_| false);
        report.findings.extend(findings);
        report.detectors.push(detector);
    }
    report
}

/// One detector's looks at a guest, until what they found is confirmed or
/// can't be any more.
pub struct Round {
    detector: &'static dyn Detector,
    confirmation: Confirmation,
    /// The pause before the next look.
    pause: Duration,
    /// Whether a look came to its end.
    complete: bool,
    error: Option<DetectError>,
    limits: Option<&'static str>,
    /// By name and subject: the latest, and in how many looks it was seen.
    seen: BTreeMap<(&'static str, String), Seen>,
    dropped: u64,
    looks: u32,
    time: Duration,
}

struct Seen {
    finding: Finding,
    /// Where it stands among the findings of the look that had it first.
    order: usize,
    times: u32,
    /// The last look that had it.
    look: u32,
}

impl Round {
    /// Nothing has been looked at yet.
    #[must_use]
    pub fn new(detector: &'static dyn Detector, confirmation: Confirmation) -> Self {
        Self {
            detector,
            confirmation,
            pause: confirmation.pause,
            complete: false,
            error: None,
            limits: None,
            seen: BTreeMap::new(),
            dropped: 0,
            looks: 0,
            time: Duration::ZERO,
        }
    }

    /// Looks once.
    pub fn look(&mut self, guest: &Guest) {
        self.limits = self.detector.limits(guest);
        self.look_with(&mut |detector, findings| detector.run(guest, findings));
    }

    fn look_with(&mut self, look_with: &mut Look<'_>) {
        let started = Instant::now();
        let look = self.looks + 1;
        let (seen, dropped) = (&mut self.seen, &mut self.dropped);
        let result = look_with(self.detector, &mut |finding| {
            let order = seen.len();
            match seen.entry((finding.name, finding.subject.key())) {
                Entry::Occupied(mut known) => {
                    let known = known.get_mut();
                    // Twice in one look is once.
                    known.times += u32::from(known.look != look);
                    known.look = look;
                    known.finding = finding;
                }
                Entry::Vacant(_) if order >= MOST_FINDINGS => *dropped += 1,
                Entry::Vacant(place) => {
                    place.insert(Seen {
                        finding,
                        order,
                        times: 1,
                        look,
                    });
                }
            }
        });
        self.looks = look;
        self.time += started.elapsed();
        match result {
            Ok(()) => self.complete = true,
            Err(error) => self.error = Some(error),
        }
    }

    /// The pause before the next look, if another one can change what is
    /// reported. What `known` knows was confirmed before, and needs no more.
    pub fn wants_more(&mut self, known: &dyn Fn(&Finding) -> bool) -> Option<Duration> {
        let needed = self.confirmation.needed;
        let left = self.confirmation.looks.saturating_sub(self.looks);
        if left == 0 {
            return None;
        }
        let undecided = |seen: &Seen| {
            seen.times < needed && seen.times + left >= needed && !known(&seen.finding)
        };
        let again = !self.complete
            && self.looks < MOST_TRIES
            && self.error.as_ref().is_some_and(DetectError::may_pass);
        if !again && !self.seen.values().any(undecided) {
            return None;
        }
        let pause = self.pause;
        self.pause = pause.saturating_mul(2);
        Some(pause)
    }

    /// What is reported, and what the detector did. What `known` knows was
    /// confirmed before: it is reported if it was seen at all.
    #[must_use]
    pub fn finish(self, known: &dyn Fn(&Finding) -> bool) -> (Vec<Finding>, DetectorReport) {
        let needed = self.confirmation.needed;
        let mut seen: Vec<Seen> = self.seen.into_values().collect();
        seen.sort_by_key(|seen| seen.order);
        let (confirmed, unconfirmed): (Vec<Seen>, Vec<Seen>) = seen
            .into_iter()
            .partition(|seen| seen.times >= needed || known(&seen.finding));
        let outcome = match self.error {
            Some(error) if !self.complete => Outcome::NotChecked(error.to_string()),
            _ => Outcome::Checked,
        };
        let report = DetectorReport {
            detector: self.detector.name(),
            outcome,
            limits: self.limits,
            findings: confirmed.len(),
            unconfirmed: unconfirmed.into_iter().map(|seen| seen.finding).collect(),
            dropped: self.dropped,
            looks: self.looks,
            time: self.time,
        };
        let findings = confirmed.into_iter().map(|seen| seen.finding).collect();
        (findings, report)
    }
}

#[cfg(test)]
mod tests {
    use secmon_guest::Guest;
    use secmon_memory::VirtualAddress;

    use super::*;
    use crate::{Class, Severity, Subject, Technique};

    struct Named(&'static str);

    impl Detector for Named {
        fn name(&self) -> &'static str {
            self.0
        }
        fn meaning(&self) -> &'static str {
            ""
        }
        fn compares(&self) -> &'static str {
            ""
        }
        fn evaded_by(&self) -> &'static str {
            ""
        }
        fn techniques(&self) -> &'static [Technique] {
            &[]
        }
        fn cost(&self) -> &'static str {
            ""
        }
        fn run(&self, _: &Guest, _: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
            Err(DetectError::Missing { what: "guest" })
        }
    }

    static FIRST: Named = Named("first");
    static SECOND: Named = Named("second");

    fn finding(class: Class, address: u64, summary: &str) -> Finding {
        let subject = Subject::KernelCode {
            address: VirtualAddress::new(address),
            symbol: None,
        };
        Finding::new("first", "changed", class, Severity::High, subject, summary)
    }

    fn attack(address: u64) -> Finding {
        finding(Class::Attack, address, "")
    }

    const QUICK: Confirmation = Confirmation {
        needed: 3,
        looks: 6,
        pause: Duration::ZERO,
    };

    fn incomplete() -> DetectError {
        DetectError::Incomplete {
            view: "list",
            reason: "it changed".into(),
        }
    }

    /// What is reported when look number n finds what `found(n)` says.
    fn reported(
        confirmation: Confirmation,
        mut found: impl FnMut(u32) -> (Vec<u64>, Result<(), DetectError>),
    ) -> (Vec<u64>, DetectorReport) {
        let mut look = 0;
        let mut report = confirm(&[&FIRST], confirmation, &mut |_, findings| {
            look += 1;
            let (addresses, result) = found(look);
            addresses.into_iter().map(attack).for_each(findings);
            result
        });
        let address = |finding: &Finding| finding.subject.address().map(VirtualAddress::as_u64);
        let reported = report.findings.iter().filter_map(address).collect();
        (reported, report.detectors.remove(0))
    }

    #[test]
    fn a_clean_guest_is_looked_at_once() {
        let (findings, detector) = reported(QUICK, |_| (vec![], Ok(())));
        assert!(findings.is_empty());
        assert_eq!((detector.looks, detector.outcome), (1, Outcome::Checked));
    }

    #[test]
    fn what_stays_is_reported_after_three_looks_in_the_order_of_the_first() {
        let (findings, detector) = reported(QUICK, |_| (vec![9, 5, 9], Ok(())));
        assert_eq!((findings, detector.looks), (vec![9, 5], 3));
        let (findings, detector) = reported(Confirmation::ONCE, |_| (vec![9], Ok(())));
        assert_eq!((findings, detector.looks), (vec![9], 1));
    }

    #[test]
    fn a_moment_is_not_reported_but_told() {
        let (findings, detector) = reported(QUICK, |look| {
            (if look == 1 { vec![5] } else { vec![] }, Ok(()))
        });
        assert!(findings.is_empty());
        assert_eq!(detector.unconfirmed, [attack(5)]);
        assert_eq!(detector.looks, 5, "then it can't be confirmed any more");
        // Another thing at each look is nothing that stays.
        let (findings, detector) = reported(QUICK, |look| (vec![look.into()], Ok(())));
        assert!(findings.is_empty());
        assert_eq!(detector.unconfirmed.len(), 5);
    }

    #[test]
    fn what_hides_by_turns_is_reported() {
        let (findings, detector) = reported(QUICK, |look| {
            (if look % 2 == 1 { vec![5] } else { vec![] }, Ok(()))
        });
        assert_eq!((findings, detector.looks), (vec![5], 5));
    }

    #[test]
    fn a_detector_that_can_not_look_says_so() {
        let missing = || DetectError::Missing { what: "idt_table" };
        let (_, detector) = reported(QUICK, |_| (vec![], Err(missing())));
        assert_eq!(detector.looks, 1, "it won't ever");
        let reason = "the kernel has no idt_table".to_owned();
        assert_eq!(detector.outcome, Outcome::NotChecked(reason));

        let (_, detector) = reported(QUICK, |look| {
            (vec![], if look < 3 { Err(incomplete()) } else { Ok(()) })
        });
        assert_eq!((detector.looks, detector.outcome), (3, Outcome::Checked));

        let (findings, detector) = reported(QUICK, |_| (vec![7], Err(incomplete())));
        assert_eq!(detector.looks, MOST_TRIES);
        assert_eq!(findings, [7], "what it found before counts");
        assert!(matches!(detector.outcome, Outcome::NotChecked(_)));
    }

    #[test]
    fn each_detector_is_reported_and_only_alarms_are_alarms() {
        let detectors: [&'static dyn Detector; 2] = [&FIRST, &SECOND];
        let report = confirm(&detectors, QUICK, &mut |detector, findings| {
            if detector.name() == "first" {
                findings(finding(Class::Information, 1, "in use"));
            }
            Ok(())
        });
        assert!(!report.has_alarm() && report.is_complete());
        let counts: Vec<_> = report
            .detectors
            .iter()
            .map(|detector| (detector.detector, detector.findings, detector.looks))
            .collect();
        assert_eq!(counts, [("first", 1, 3), ("second", 0, 1)]);
    }

    #[test]
    fn the_latest_words_are_reported() {
        let mut look = 0;
        let report = confirm(&[&FIRST], QUICK, &mut |_, findings| {
            look += 1;
            findings(finding(Class::Attack, 1, &format!("look {look}")));
            Ok(())
        });
        assert_eq!(report.findings[0].summary, "look 3");
    }

    #[test]
    fn any_number_of_findings_is_bounded() {
        let (findings, detector) = reported(Confirmation::ONCE, |_| {
            ((0..MOST_FINDINGS as u64 + 7).collect(), Ok(()))
        });
        assert_eq!((findings.len(), detector.dropped), (MOST_FINDINGS, 7));
    }
}

//! Checks of a guest that has nothing to hide: how many were made, and what
//! came of them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use secmon_detect::{Outcome, Report, detectors};
use secmon_guest::Guest as Watched;
use secmon_lab::TruthChannel;
use serde::{Deserialize, Serialize};

use super::check;
use super::loads::Load;
use crate::open::Opened;

/// So many different reasons are kept for what was not complete.
const MOST_REASONS: usize = 12;
/// A guest whose diagnostics are more than this is taken anew: they are kept.
const DIAGNOSTICS: u64 = 2000;

/// The clean guest under one load.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Clean {
    /// The load.
    pub load: String,
    /// How many processors the guest has.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// How often it was checked.
    pub checks: u32,
    /// How many findings there were that are more than information.
    pub alarms: u64,
    /// In how many checks a detector could not look to the end.
    #[serde(default)]
    pub incomplete: u64,
    /// Why not, without numbers, and how often.
    #[serde(default)]
    pub reasons: BTreeMap<String, u64>,
    /// What was seen in one look and in too few others to be reported.
    #[serde(default)]
    pub unconfirmed: BTreeMap<String, u64>,
    /// How long the checks took together, in seconds.
    #[serde(default)]
    pub seconds: f64,
}

fn one() -> u32 {
    1
}

impl Clean {
    /// Nothing was checked yet.
    #[must_use]
    pub fn new(load: &str, vcpus: u32) -> Self {
        Self {
            load: load.to_owned(),
            vcpus,
            ..Self::default()
        }
    }

    /// Takes note of one check; gives what it found and should not have.
    fn note(&mut self, report: &Report, time: Duration) -> Vec<String> {
        self.checks += 1;
        self.seconds += time.as_secs_f64();
        self.incomplete += u64::from(!report.is_complete());
        for detector in &report.detectors {
            if let Outcome::NotChecked(why) = &detector.outcome {
                let reason = format!("{}: {}", detector.detector, without_numbers(why));
                count(&mut self.reasons, reason);
            }
            for finding in &detector.unconfirmed {
                if finding.class.is_alarm() {
                    let name = format!("{}/{}", finding.detector, finding.name);
                    count(&mut self.unconfirmed, name);
                }
            }
        }
        let found = report.findings.iter().filter(|one| one.class.is_alarm());
        let found: Vec<String> = found.map(|finding| format!("{finding:?}")).collect();
        self.alarms += found.len() as u64;
        found
    }
}

fn count(counts: &mut BTreeMap<String, u64>, name: String) {
    if counts.len() < MOST_REASONS || counts.contains_key(&name) {
        *counts.entry(name).or_default() += 1;
    }
}

/// The same words for the same reason, wherever in memory it was.
fn without_numbers(text: &str) -> String {
    let mut result = String::new();
    for word in text.split_inclusive(|letter: char| !letter.is_ascii_alphanumeric()) {
        let end = word.trim_end_matches(|letter: char| !letter.is_ascii_alphanumeric());
        let number = end.starts_with(|letter: char| letter.is_ascii_digit());
        if number {
            result.push('N');
            result.push_str(&word[end.len()..]);
        } else {
            result.push_str(word);
        }
    }
    result
}

/// Puts a guest under a load and checks it until `clean` has so many checks, or
/// `after` ends it, which is called after each check with what that found and
/// should not have.
///
/// # Errors
/// If the guest can't bear the load.
pub fn check_under(
    load: &Load,
    truth: &TruthChannel,
    opened: &Opened,
    goal: u32,
    clean: &mut Clean,
    after: &mut dyn FnMut(&Clean, Vec<String>) -> ControlFlow<()>,
) -> Result<()> {
    if clean.checks >= goal {
        return Ok(());
    }
    load.begin(truth)
        .with_context(|| format!("starting the load: {}", load.name))?;
    let mut guest: Option<Watched> = None;
    while clean.checks < goal {
        let used = guest.take().filter(|guest| {
            // What is known of it is known for good, as in a watch.
            guest.diagnostics().recorded() < DIAGNOSTICS
        });
        let used = guest.insert(used.unwrap_or_else(|| opened.guest()));
        let started = Instant::now();
        let report = check(used, detectors());
        let found = clean.note(&report, started.elapsed());
        if after(clean, found).is_break() {
            break;
        }
    }
    load.end(truth)
        .with_context(|| format!("ending the load: {}", load.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_told_apart_by_their_words() {
        let first = "net at 0xffff888003a1c000: 17 things of net_namespace_list, 5.10";
        assert_eq!(
            without_numbers(first),
            "net at N: N things of net_namespace_list, N.N"
        );
    }
}

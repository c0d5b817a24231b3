//! What is said of a check: what the detectors found, and what each of them
//! did.

use secmon_detect::{Class, Evidence, Finding, Outcome, Report, Severity};
use secmon_guest::Value;
use serde::{Deserialize, Serialize};

use super::{Cell, Pause};

/// The most findings that were seen too seldom whose words are sent.
const MOST_UNCONFIRMED: usize = 16;

/// Which detectors are to look at which target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The target's name.
    pub target: String,
    /// The names of the detectors; `None`: all.
    pub detectors: Option<Vec<String>>,
    /// Findings that may be sent at once.
    pub credit: u32,
    /// Whether the target stands still meanwhile.
    pub pause: Pause,
}

/// Something that a detector found: a [`Finding`] on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckFinding {
    /// The detector.
    pub detector: String,
    /// What was found, in `snake_case`.
    pub name: String,
    /// Whether it can have an innocent reason.
    pub class: Class,
    /// How much harm it can do.
    pub severity: Severity,
    /// The technique of ATT&CK.
    pub technique: Option<String>,
    /// What it is about, in a few words.
    pub subject: String,
    /// What kind of thing that is, in `snake_case`.
    pub subject_kind: String,
    /// That thing's parts.
    pub subject_columns: Vec<(String, Cell)>,
    /// One sentence for people.
    pub summary: String,
    /// Which view said what.
    pub evidence: Vec<CheckEvidence>,
}

/// What one view said: an [`Evidence`] on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckEvidence {
    /// The view.
    pub view: String,
    /// What it said.
    pub what: String,
    /// The row that says it.
    pub row: Vec<(String, Cell)>,
}

/// What one detector did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetectorResult {
    /// Its name.
    pub detector: String,
    /// Why it did not look to the end.
    pub not_checked: Option<String>,
    /// What it can't look at in this guest.
    #[serde(default)]
    pub limits: Option<String>,
    /// How many of its findings are reported.
    pub findings: u64,
    /// How many were seen, but not often enough.
    pub unconfirmed: u64,
    /// The first of these, in words.
    pub unconfirmed_summaries: Vec<String>,
    /// How many were more than are kept.
    pub dropped: u64,
    /// How often it looked.
    pub looks: u32,
    /// Microseconds that its looks took together.
    pub microseconds: u64,
}

fn columns(columns: &[(&'static str, Value)]) -> Vec<(String, Cell)> {
    let cells = columns.iter();
    cells
        .map(|(name, value)| ((*name).to_owned(), value.into()))
        .collect()
}

impl From<&Finding> for CheckFinding {
    fn from(finding: &Finding) -> Self {
        Self {
            detector: finding.detector.to_owned(),
            name: finding.name.to_owned(),
            class: finding.class,
            severity: finding.severity,
            technique: finding.technique.map(|technique| technique.id().to_owned()),
            subject: finding.subject.to_string(),
            subject_kind: finding.subject.kind().to_owned(),
            subject_columns: columns(&finding.subject.columns()),
            summary: finding.summary.clone(),
            evidence: finding.evidence.iter().map(Into::into).collect(),
        }
    }
}

impl From<&Evidence> for CheckEvidence {
    fn from(evidence: &Evidence) -> Self {
        Self {
            view: evidence.view.to_owned(),
            what: evidence.what.clone(),
            row: columns(&evidence.row),
        }
    }
}

/// What each detector of a check did.
#[must_use]
pub fn results(report: &Report) -> Vec<DetectorResult> {
    let result = |detector: &secmon_detect::DetectorReport| DetectorResult {
        detector: detector.detector.to_owned(),
        not_checked: match &detector.outcome {
            Outcome::Checked => None,
            Outcome::NotChecked(reason) => Some(reason.clone()),
        },
        limits: detector.limits.map(str::to_owned),
        findings: detector.findings as u64,
        unconfirmed: detector.unconfirmed.len() as u64,
        unconfirmed_summaries: detector
            .unconfirmed
            .iter()
            .take(MOST_UNCONFIRMED)
            .map(|finding| finding.summary.clone())
            .collect(),
        dropped: detector.dropped,
        looks: detector.looks,
        microseconds: u64::try_from(detector.time.as_micros()).unwrap_or(u64::MAX),
    };
    report.detectors.iter().map(result).collect()
}

//! The policy: what looks how often, what is reported, what is excepted, and
//! what is done about it.
//!
//! ```toml
//! version = 1
//! budget = "5%"                     # of one core
//!
//! [detector.process_integrity]
//! longest_interval = "30s"
//!
//! [[exception]]
//! name = "writable_code"
//! subject = { name = "java" }
//! reason = "the application server compiles as it runs"
//! expires = 2027-06-30
//!
//! [[response]]
//! severity = "critical"
//! actions = ["alert", "pause"]
//! ```
//!
//! A word that is not known is an error with its line and column, never
//! ignored: a policy that is misspelt must not come to mean less than its
//! author thinks.

mod exception;
pub mod schema;
mod value;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use secmon_detect::{Class, Confirmation, Detector, Finding, Severity};
use serde::Deserialize;

pub use exception::{Exception, Pattern, Selector};
pub use value::{Budget, Day, DetectorName, Interval};

use crate::{Action, FindingRecord};

/// The version that this program reads.
pub const VERSION: u32 = 1;
/// The longest policy.
pub const MAX_BYTES: usize = 256 << 10;
/// The most exceptions and the most responses.
const MAX_ENTRIES: usize = 1024;

/// A policy that was read and found right.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// The share of one core that watching may use.
    pub budget: Budget,
    /// The least class that is reported, where a detector has none of its own.
    pub report: Class,
    /// How often it is told what the poller saw of what there was.
    pub coverage_interval: Duration,
    /// What is said of single detectors.
    detectors: BTreeMap<&'static str, DetectorPolicy>,
    /// What is not reported.
    pub exceptions: Vec<Exception>,
    /// What is done.
    pub responses: Vec<Response>,
}

/// What a policy says of one detector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DetectorPolicy {
    /// Whether it looks at all.
    pub enabled: bool,
    /// It looks no more often than this.
    pub shortest_interval: Duration,
    /// It should look at least as often as this; if the budget does not
    /// allow it, that is told.
    pub longest_interval: Option<Duration>,
    /// The least class that is reported of it.
    pub report: Class,
    /// In how many looks a finding must be seen.
    pub confirmation: Confirmation,
}

/// What is done about which findings.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// Which findings.
    pub selector: Selector,
    /// The least class.
    pub class: Class,
    /// The least severity.
    pub severity: Severity,
    /// What is done, in this order.
    pub actions: Vec<Action>,
    /// How often within an hour at most; what is more is refused.
    pub at_most_per_hour: u32,
}

impl Response {
    /// Whether it is meant for this finding.
    #[must_use]
    pub fn is_for(&self, finding: &FindingRecord) -> bool {
        finding.class >= self.class
            && finding.severity >= self.severity
            && self.selector.matches(finding)
    }
}

/// Why a text is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: {message}")]
pub struct PolicyError {
    /// The file's name, as it was given.
    pub file: String,
    /// The line, from 1 on.
    pub line: usize,
    /// The column, in characters, from 1 on.
    pub column: usize,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl Default for Policy {
    /// All detectors, 5 % of a core, all findings, no exceptions, no actions.
    fn default() -> Self {
        Self {
            budget: Budget::default(),
            report: Class::Information,
            coverage_interval: Duration::from_secs(60),
            detectors: BTreeMap::new(),
            exceptions: Vec::new(),
            responses: Vec::new(),
        }
    }
}

impl Policy {
    /// Reads a policy. `file` is what its errors call it.
    ///
    /// # Errors
    /// [`PolicyError`] with the place of the first thing that is wrong.
    pub fn parse(text: &str, file: &str) -> Result<Self, PolicyError> {
        let fail = |span: Range<usize>, message: String| {
            let (line, column) = position(text, span.start);
            PolicyError {
                file: file.to_owned(),
                line,
                column,
                message,
            }
        };
        if text.len() > MAX_BYTES {
            let message = format!(
                "the policy has {} bytes, at most {MAX_BYTES} are read",
                text.len()
            );
            return Err(fail(0..0, message));
        }
        let form: FileForm = toml::from_str(text).map_err(|error| {
            // Some errors of a whole document have no place but its start.
            fail(error.span().unwrap_or(0..0), said(error.message()))
        })?;
        if *form.version.get_ref() != VERSION {
            let found = form.version.get_ref();
            let message =
                format!("this is version {found}; this program reads version = {VERSION}");
            return Err(fail(form.version.span(), message));
        }
        for (what, count, span) in [
            (
                "exceptions",
                form.exception.len(),
                form.exception.last().map(toml::Spanned::span),
            ),
            (
                "responses",
                form.response.len(),
                form.response.last().map(toml::Spanned::span),
            ),
        ] {
            if count > MAX_ENTRIES {
                let message = format!("{count} {what}; at most {MAX_ENTRIES} are read");
                return Err(fail(span.unwrap_or(0..0), message));
            }
        }
        let report = form.report.unwrap_or(Class::Information);
        let mut detectors = BTreeMap::new();
        for (name, of_detector) in form.detector {
            let span = of_detector.span();
            let policy = of_detector
                .into_inner()
                .check(report)
                .map_err(|message| fail(span, message))?;
            detectors.insert(name.name(), policy);
        }
        let mut exceptions = Vec::new();
        for form in form.exception {
            let span = form.span();
            let exception = form.into_inner().check();
            exceptions.push(exception.map_err(|message| fail(span, message))?);
        }
        let mut responses = Vec::new();
        for form in form.response {
            let span = form.span();
            let response = form.into_inner().check();
            responses.push(response.map_err(|message| fail(span, message))?);
        }
        Ok(Self {
            budget: form.budget.unwrap_or_default(),
            report,
            coverage_interval: form
                .coverage_interval
                .map_or(Duration::from_secs(60), Interval::duration),
            detectors,
            exceptions,
            responses,
        })
    }

    /// What is said of a detector, or what holds where nothing is said.
    #[must_use]
    pub fn detector(&self, name: &str) -> DetectorPolicy {
        let said = self.detectors.get(name).copied();
        said.unwrap_or(DetectorPolicy {
            report: self.report,
            ..DetectorPolicy::default()
        })
    }

    /// The detectors that look.
    #[must_use]
    pub fn enabled(&self) -> Vec<&'static dyn Detector> {
        let all = secmon_detect::detectors().iter().copied();
        all.filter(|detector| self.detector(detector.name()).enabled)
            .collect()
    }

    /// Whether a finding is of a class that is reported.
    #[must_use]
    pub fn reports(&self, finding: &Finding) -> bool {
        finding.class >= self.detector(finding.detector).report
    }

    /// The number of the exception that hides a finding today, from 0 on.
    #[must_use]
    pub fn excepted(&self, finding: &FindingRecord, today: Day) -> Option<usize> {
        self.exceptions
            .iter()
            .position(|exception| exception.hides(finding, today))
    }

    /// What is to be done about a finding: the response's number, from 0 on,
    /// and the action. Each action is wanted once.
    #[must_use]
    pub fn responses_to(&self, finding: &FindingRecord) -> Vec<(usize, Action)> {
        let mut wanted: Vec<(usize, Action)> = Vec::new();
        for (number, response) in self.responses.iter().enumerate() {
            if !response.is_for(finding) {
                continue;
            }
            for action in &response.actions {
                if wanted.iter().all(|(_, other)| other != action) {
                    wanted.push((number, *action));
                }
            }
        }
        wanted
    }
}

impl Default for DetectorPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            shortest_interval: Duration::from_secs(1),
            longest_interval: None,
            report: Class::Information,
            confirmation: Confirmation::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    version: toml::Spanned<u32>,
    budget: Option<Budget>,
    report: Option<Class>,
    coverage_interval: Option<Interval>,
    #[serde(default)]
    detector: BTreeMap<DetectorName, toml::Spanned<DetectorForm>>,
    #[serde(default)]
    exception: Vec<toml::Spanned<ExceptionForm>>,
    #[serde(default)]
    response: Vec<toml::Spanned<ResponseForm>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DetectorForm {
    enabled: Option<bool>,
    shortest_interval: Option<Interval>,
    longest_interval: Option<Interval>,
    report: Option<Class>,
    needed: Option<u32>,
    looks: Option<u32>,
}

impl DetectorForm {
    fn check(self, report: Class) -> Result<DetectorPolicy, String> {
        let standard = DetectorPolicy::default();
        let needed = self.needed.unwrap_or(standard.confirmation.needed);
        let looks = self
            .looks
            .unwrap_or(standard.confirmation.looks.max(needed));
        if !(1..=32).contains(&needed) || !(1..=32).contains(&looks) || needed > looks {
            return Err(format!(
                "needed = {needed} of looks = {looks}; write 1 to 32 each, and no more needed \
                 than looks"
            ));
        }
        let shortest = self
            .shortest_interval
            .map_or(standard.shortest_interval, Interval::duration);
        let longest = self.longest_interval.map(Interval::duration);
        let shortest = match (self.shortest_interval, longest) {
            // Only the other was given: it says enough.
            (None, Some(longest)) => shortest.min(longest),
            _ => shortest,
        };
        if longest.is_some_and(|longest| longest < shortest) {
            return Err(
                "longest_interval is shorter than shortest_interval: exchange them".to_owned(),
            );
        }
        Ok(DetectorPolicy {
            enabled: self.enabled.unwrap_or(true),
            shortest_interval: shortest,
            longest_interval: longest,
            report: self.report.unwrap_or(report),
            confirmation: Confirmation {
                needed,
                looks,
                pause: standard.confirmation.pause,
            },
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExceptionForm {
    detector: Option<DetectorName>,
    name: Option<Pattern>,
    class: Option<Class>,
    technique: Option<Pattern>,
    #[serde(default)]
    subject: BTreeMap<String, Pattern>,
    #[serde(default)]
    evidence: BTreeMap<String, Pattern>,
    reason: String,
    expires: Day,
}

impl ExceptionForm {
    fn check(self) -> Result<Exception, String> {
        if self.reason.trim().is_empty() {
            return Err("an exception needs a reason that says why: reason = \"…\"".to_owned());
        }
        let selector = Selector {
            detector: self.detector,
            name: self.name,
            technique: self.technique,
            subject: self.subject,
            evidence: self.evidence,
        };
        if selector.is_empty() {
            return Err(
                "this exception would hide everything: say what it is for with detector, name, \
                 technique, subject or evidence"
                    .to_owned(),
            );
        }
        Ok(Exception {
            selector,
            class: self.class,
            reason: self.reason,
            expires: self.expires,
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResponseForm {
    detector: Option<DetectorName>,
    name: Option<Pattern>,
    class: Option<Class>,
    severity: Option<Severity>,
    technique: Option<Pattern>,
    #[serde(default)]
    subject: BTreeMap<String, Pattern>,
    #[serde(default)]
    evidence: BTreeMap<String, Pattern>,
    actions: Vec<Action>,
    at_most_per_hour: Option<u32>,
}

impl ResponseForm {
    fn check(self) -> Result<Response, String> {
        if self.actions.is_empty() {
            let names: Vec<&str> = Action::ALL.iter().map(|action| action.name()).collect();
            return Err(format!(
                "this response does nothing: actions needs some of {}",
                names.join(", ")
            ));
        }
        Ok(Response {
            selector: Selector {
                detector: self.detector,
                name: self.name,
                technique: self.technique,
                subject: self.subject,
                evidence: self.evidence,
            },
            class: self.class.unwrap_or(Class::Suspicion),
            severity: self.severity.unwrap_or(Severity::Low),
            actions: self.actions,
            at_most_per_hour: self.at_most_per_hour.unwrap_or(6),
        })
    }
}

/// The message in one line.
fn said(message: &str) -> String {
    message.trim().replace('\n', "; ")
}

/// Line and column, from 1 on, of the byte at `offset`.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count().saturating_add(1);
    let start = before.rfind('\n').map_or(0, |at| at.saturating_add(1));
    let column = before
        .get(start..)
        .map_or(0, |rest| rest.chars().count())
        .saturating_add(1);
    (line, column)
}

#[cfg(test)]
mod tests;

//! How much an event matters.

use secmon_detect::{Class, Severity};
use secmon_watch::{Action, Event, FindingRecord, Incident};

/// How much an event matters, in the steps that syslog and OpenTelemetry
/// share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// For the record.
    Information,
    /// Normal, and of note.
    Notice,
    /// Something is amiss, or not seen.
    Warning,
    /// An alarm.
    Error,
    /// The kernel is not in its own hands.
    Critical,
    /// A policy wants a person to look.
    Alert,
}

impl Level {
    pub(crate) fn of(event: &Event) -> Self {
        match &event.incident {
            Incident::Appeared { finding } | Incident::Changed { finding, .. } => {
                Self::of_finding(finding)
            }
            Incident::ActionDone {
                action: Action::Alert,
                ..
            } => Self::Alert,
            Incident::ActionRefused { .. } => Self::Error,
            Incident::Blind { .. }
            | Incident::Behind { .. }
            | Incident::ExceptionExpired { .. }
            | Incident::Lost { .. } => Self::Warning,
            Incident::ActionDone { .. }
            | Incident::Gone { .. }
            | Incident::Target { .. }
            | Incident::Monitor { .. }
            | Incident::Started { .. }
            | Incident::Stopped { .. } => Self::Notice,
            Incident::Sighted { .. } | Incident::Coverage { .. } | Incident::Excepted { .. } => {
                Self::Information
            }
        }
    }

    fn of_finding(finding: &FindingRecord) -> Self {
        match (finding.class, finding.severity) {
            (Class::Information, _) => Self::Information,
            (_, Severity::Low) => Self::Notice,
            (_, Severity::Medium) => Self::Warning,
            (_, Severity::High) => Self::Error,
            (_, Severity::Critical) => Self::Critical,
        }
    }

    /// RFC 5424, 6.2.1.
    pub(crate) fn syslog(self) -> u8 {
        match self {
            Self::Alert => 1,
            Self::Critical => 2,
            Self::Error => 3,
            Self::Warning => 4,
            Self::Notice => 5,
            Self::Information => 6,
        }
    }

    /// `SeverityNumber` and `SeverityText` of OpenTelemetry's log data model,
    /// as its appendix maps syslog's levels.
    pub(crate) fn opentelemetry(self) -> (u8, &'static str) {
        match self {
            Self::Alert => (19, "ALERT"),
            Self::Critical => (18, "CRITICAL"),
            Self::Error => (17, "ERROR"),
            Self::Warning => (13, "WARNING"),
            Self::Notice => (10, "NOTICE"),
            Self::Information => (9, "INFORMATIONAL"),
        }
    }
}

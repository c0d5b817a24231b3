//! What a detector claims, with the evidence for it.

use std::fmt;

use secmon_guest::Value;
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use crate::Subject;

/// Something that a detector found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// The name of the detector.
    pub detector: &'static str,
    /// What was found, in `snake_case`, stable: `hidden_process`.
    pub name: &'static str,
    /// Whether it can have an innocent reason.
    pub class: Class,
    /// How much harm it can do.
    pub severity: Severity,
    /// The technique of ATT&CK that leaves this trace, where there is one.
    pub technique: Option<Technique>,
    /// What it was found about.
    pub subject: Subject,
    /// One sentence for people.
    pub summary: String,
    /// Which view said what.
    pub evidence: Vec<Evidence>,
}

impl Finding {
    /// A finding without technique and evidence.
    pub fn new(
        detector: &'static str,
        name: &'static str,
        class: Class,
        severity: Severity,
        subject: Subject,
        summary: impl Into<String>,
    ) -> Self {
        Self {
            detector,
            name,
            class,
            severity,
            technique: None,
            subject,
            summary: summary.into(),
            evidence: Vec::new(),
        }
    }

    /// Names the technique.
    #[must_use]
    pub fn technique(mut self, technique: Technique) -> Self {
        self.technique = Some(technique);
        self
    }

    /// Adds a piece of evidence.
    #[must_use]
    pub fn evidence(mut self, evidence: Evidence) -> Self {
        self.evidence.push(evidence);
        self
    }
}

/// Whether a finding can have an innocent reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Legitimate use that one may want to know of: a kprobe, an eBPF program.
    Information,
    /// Seldom innocent.
    Suspicion,
    /// No sound guest looks like this.
    Attack,
}

impl Class {
    /// Its name, as it stands in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Information => "information",
            Self::Suspicion => "suspicion",
            Self::Attack => "attack",
        }
    }

    /// Whether a check that found such a thing is not clean.
    #[must_use]
    pub const fn is_alarm(self) -> bool {
        matches!(self, Self::Suspicion | Self::Attack)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How much harm a finding can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Little by itself.
    Low,
    /// A part of something.
    Medium,
    /// Somebody hides, or has more rights than were given.
    High,
    /// The kernel itself is not in its own hands.
    Critical,
}

impl Severity {
    /// Its name, as it stands in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The id of a technique in MITRE ATT&CK: `T1014`, `T1547.006`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Technique(&'static str);

impl Technique {
    /// Rootkit.
    pub const ROOTKIT: Self = Self::new("T1014");

    /// The technique with this id.
    ///
    /// # Panics
    /// If it has not the form of one: `T` and four digits, perhaps a dot and
    /// three more. In a constant that is an error of the compiler.
    #[must_use]
    pub const fn new(id: &'static str) -> Self {
        let bytes = id.as_bytes();
        assert!(
            matches!(bytes.len(), 5 | 9) && bytes[0] == b'T',
            "not the id of an ATT&CK technique"
        );
        let mut index = 1;
        while index < bytes.len() {
            assert!(
                (index == 5 && bytes[index] == b'.')
                    || (index != 5 && bytes[index].is_ascii_digit()),
                "not the id of an ATT&CK technique"
            );
            index += 1;
        }
        Self(id)
    }

    /// The id.
    #[must_use]
    pub const fn id(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for Technique {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What one view said.
#[derive(Clone, Debug, PartialEq)]
pub struct Evidence {
    /// The view: `task_list`, `slab`.
    pub view: &'static str,
    /// What it said, in a few words.
    pub what: String,
    /// The row that says it, if there is one: columns and their values.
    pub row: Vec<(&'static str, Value)>,
}

impl Evidence {
    /// Evidence without a row.
    pub fn new(view: &'static str, what: impl Into<String>) -> Self {
        Self {
            view,
            what: what.into(),
            row: Vec::new(),
        }
    }

    /// Adds a column.
    #[must_use]
    pub fn with(mut self, column: &'static str, value: impl Into<Value>) -> Self {
        self.row.push((column, value.into()));
        self
    }

    /// Adds all columns of a row.
    #[must_use]
    pub fn with_row(mut self, row: impl IntoIterator<Item = (&'static str, Value)>) -> Self {
        self.row.extend(row);
        self
    }
}

impl Serialize for Evidence {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("view", self.view)?;
        map.serialize_entry("what", &self.what)?;
        map.serialize_entry("row", &Columns(&self.row))?;
        map.end()
    }
}

/// Columns and values as an object; what could not be read is `null` and has
/// its reason under `unreadable`, as in the rows of a table.
pub(crate) struct Columns<'a>(pub(crate) &'a [(&'static str, Value)]);

impl Serialize for Columns<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (column, value) in self.0 {
            map.serialize_entry(column, value)?;
        }
        let unreadable: Vec<_> = self.0.iter().filter_map(reason).collect();
        if !unreadable.is_empty() {
            map.serialize_entry("unreadable", &Reasons(&unreadable))?;
        }
        map.end()
    }
}

fn reason<'a>((column, value): &'a (&'static str, Value)) -> Option<(&'static str, &'a str)> {
    match value {
        Value::Unreadable(reason) => Some((*column, reason)),
        _ => None,
    }
}

struct Reasons<'a>(&'a [(&'static str, &'a str)]);

impl Serialize for Reasons<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use secmon_guest::Text;
    use secmon_memory::VirtualAddress;

    use super::*;

    #[test]
    fn json_of_a_finding() {
        let finding = Finding::new(
            "processes",
            "hidden_process",
            Class::Attack,
            Severity::High,
            Subject::Process {
                task: VirtualAddress::new(0xffff_8880_0000_1000),
                pid: 812,
                started: 5,
                name: Text::new(*b"sh\xff"),
            },
            "process 812 is hidden",
        )
        .technique(Technique::ROOTKIT)
        .evidence(
            Evidence::new("slab", "a live task_struct")
                .with("pid", 812_u32)
                .with("exe", Value::unreadable("swapped out")),
        );
        let json = serde_json::to_value(&finding).expect("JSON");
        let expected = serde_json::json!({
            "detector": "processes",
            "name": "hidden_process",
            "class": "attack",
            "severity": "high",
            "technique": "T1014",
            "subject": {
                "kind": "process",
                "task": "0xffff888000001000",
                "pid": 812,
                "started": 5,
                "name": "sh\\xff",
            },
            "summary": "process 812 is hidden",
            "evidence": [{
                "view": "slab",
                "what": "a live task_struct",
                "row": {"pid": 812, "exe": null, "unreadable": {"exe": "swapped out"}},
            }],
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn alarms_are_more_than_information() {
        assert!(Class::Attack.is_alarm() && Class::Suspicion.is_alarm());
        assert!(!Class::Information.is_alarm());
        assert!(Class::Attack > Class::Suspicion && Severity::Critical > Severity::High);
    }

    #[test]
    fn techniques_have_the_form_of_one() {
        assert_eq!(Technique::new("T1547.006").id(), "T1547.006");
        for wrong in ["", "T101", "t1014", "T1014.", "T1014-006", "T1547.00a"] {
            assert!(
                std::panic::catch_unwind(|| Technique::new(wrong)).is_err(),
                "{wrong}"
            );
        }
    }
}

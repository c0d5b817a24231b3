//! A finding as it is told, kept and sent: what [`secmon_detect::Finding`]
//! becomes when it leaves the detectors, with the same JSON.

use secmon_detect::{Class, Finding, Severity};
use secmon_memory::VirtualAddress;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The most bytes of JSON that a finding's subject and evidence may have: a
/// hostile guest chooses much of it.
const MOST_BYTES: usize = 32 << 10;
/// The most characters of a text of the guest.
const MOST_TEXT: usize = 4096;

/// A finding.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FindingRecord {
    /// What makes it the same finding at the next look, in one boot of the
    /// target: detector, name, and where its subject lies.
    pub id: String,
    /// The detector.
    pub detector: String,
    /// What was found, in `snake_case`.
    pub name: String,
    /// Whether it can have an innocent reason.
    pub class: Class,
    /// How much harm it can do.
    pub severity: Severity,
    /// The technique of ATT&CK, where there is one.
    pub technique: Option<String>,
    /// What it is about: `kind`, and that thing's parts by name.
    pub subject: Map<String, Value>,
    /// The same in a few words.
    pub about: String,
    /// One sentence for people.
    pub summary: String,
    /// Which view said what.
    pub evidence: Vec<EvidenceRecord>,
}

/// What one view said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvidenceRecord {
    /// The view.
    pub view: String,
    /// What it said.
    pub what: String,
    /// The row that says it.
    #[serde(default)]
    pub row: Map<String, Value>,
}

/// A process that a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessSubject {
    /// Its (first thread's, or the thread's own) `task_struct`.
    pub task: VirtualAddress,
    /// Its id in the initial pid namespace.
    pub pid: u32,
    /// When it was started: nanoseconds since the guest's boot.
    pub started: u64,
}

impl FindingRecord {
    /// What makes a finding the same one at the next look.
    #[must_use]
    pub fn id_of(finding: &Finding) -> String {
        format!(
            "{}/{} {}",
            finding.detector,
            finding.name,
            finding.subject.key()
        )
    }

    /// The process that it is about: one, or a thread of one.
    #[must_use]
    pub fn process(&self) -> Option<ProcessSubject> {
        let kind = self.subject.get("kind")?.as_str()?;
        if !matches!(kind, "process" | "thread") {
            return None;
        }
        let task = self.subject.get("task")?.as_str()?.strip_prefix("0x")?;
        Some(ProcessSubject {
            task: VirtualAddress::new(u64::from_str_radix(task, 16).ok()?),
            pid: u32::try_from(self.subject.get("pid")?.as_u64()?).ok()?,
            started: self.subject.get("started")?.as_u64()?,
        })
    }
}

impl From<&Finding> for FindingRecord {
    fn from(finding: &Finding) -> Self {
        let object = |value: serde_json::Result<Value>| match value {
            Ok(Value::Object(map)) => map,
            _ => Map::new(),
        };
        let mut subject = object(serde_json::to_value(&finding.subject));
        let mut bytes = 0_usize;
        if size(&subject) > MOST_BYTES {
            subject.retain(|name, _| name == "kind");
        }
        bytes = bytes.saturating_add(size(&subject));
        let mut evidence = Vec::new();
        for piece in &finding.evidence {
            let mut row = object(serde_json::to_value(piece));
            let row = match row.remove("row") {
                Some(Value::Object(row)) => row,
                _ => Map::new(),
            };
            bytes = bytes.saturating_add(size(&row));
            let (what, row) = if bytes > MOST_BYTES {
                ("more evidence than is kept".to_owned(), Map::new())
            } else {
                (bounded(&piece.what), row)
            };
            evidence.push(EvidenceRecord {
                view: piece.view.to_owned(),
                what,
                row,
            });
            if bytes > MOST_BYTES {
                break;
            }
        }
        Self {
            id: Self::id_of(finding),
            detector: finding.detector.to_owned(),
            name: finding.name.to_owned(),
            class: finding.class,
            severity: finding.severity,
            technique: finding.technique.map(|technique| technique.id().to_owned()),
            subject,
            about: bounded(&finding.subject.to_string()),
            summary: bounded(&finding.summary),
            evidence,
        }
    }
}

fn size(map: &Map<String, Value>) -> usize {
    serde_json::to_string(map).map_or(0, |text| text.len())
}

fn bounded(text: &str) -> String {
    text.chars().take(MOST_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use secmon_detect::{Evidence, Subject};

    use super::*;

    fn finding() -> Finding {
        Finding::new(
            "processes",
            "hidden_process",
            Class::Attack,
            Severity::High,
            Subject::Process {
                task: VirtualAddress::new(0xffff_8880_0000_1000),
                pid: 812,
                started: 5,
                name: "sh".into(),
            },
            "process 812 is hidden",
        )
        .evidence(Evidence::new("slab", "a live task_struct").with("pid", 812_u32))
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_names_its_process() {
        let record = FindingRecord::from(&finding());
        let text = serde_json::to_string(&record).expect("JSON");
        let read: FindingRecord = serde_json::from_str(&text).expect("a record");
        assert_eq!(read, record);
        assert_eq!(
            read.process(),
            Some(ProcessSubject {
                task: VirtualAddress::new(0xffff_8880_0000_1000),
                pid: 812,
                started: 5
            })
        );
        assert_eq!(read.evidence[0].row["pid"], 812);
    }

    #[test]
    fn evidence_is_bounded_and_what_lacks_is_said() {
        let large = "x".repeat(20 << 10);
        let finding = (0..5).fold(finding(), |finding, _| {
            finding.evidence(Evidence::new("text", "large").with("text", large.clone()))
        });
        let record = FindingRecord::from(&finding);
        assert_eq!(record.evidence.len(), 3);
        assert_eq!(record.evidence[2].what, "more evidence than is kept");
        assert!(serde_json::to_string(&record).expect("JSON").len() < 2 * MOST_BYTES);
    }
}

//! Findings that no client has taken yet: bounded, numbered, and kept in a
//! file so that they outlive the worker. The same file tells the next worker
//! which boot of each target this one followed.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::TRUST_LEVEL;
use super::watcher::Boot;
use crate::protocol::{Finding, FindingKind, Severity};

/// The largest file that is read back.
const MAX_BYTES: u64 = 64 << 20;
/// The longest text of a finding: guests choose parts of it.
const MAX_TEXT: usize = 1024;

/// The findings that wait.
#[derive(Debug)]
pub(super) struct Outbox {
    findings: VecDeque<Finding>,
    next: u64,
    lost: u64,
    /// How many of those lost have been told by a finding.
    told: u64,
    limit: usize,
    /// Which boot of each target is followed.
    boots: BTreeMap<String, Boot>,
    /// Findings up to here may be forgotten once all clients were sent them.
    acknowledged: u64,
    /// Up to where each client was sent them.
    sent: BTreeMap<u64, u64>,
    next_client: u64,
    file: Option<File>,
}

/// What stands in the file.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    next: u64,
    lost: u64,
    told: u64,
    findings: Vec<Finding>,
    boots: BTreeMap<String, Boot>,
}

impl Outbox {
    /// An outbox of at most `limit` findings, kept in `file`, with those that
    /// are in it. What can't be read back counts as one lost finding.
    pub(super) fn open(limit: usize, file: Option<File>) -> Self {
        let mut outbox = Self {
            findings: VecDeque::new(),
            next: 1,
            lost: 0,
            told: 0,
            limit: limit.max(2),
            boots: BTreeMap::new(),
            acknowledged: 0,
            sent: BTreeMap::new(),
            next_client: 0,
            file,
        };
        match outbox.file.as_mut().map(load) {
            Some(Ok(Some(stored))) => {
                outbox.next = stored.next.max(1);
                outbox.lost = stored.lost;
                outbox.told = stored.told;
                outbox.findings = stored.findings.into();
                outbox.boots = stored.boots;
                outbox.bound();
            }
            Some(Err(())) => outbox.lost = 1,
            Some(Ok(None)) | None => {}
        }
        outbox
    }

    /// Adds a finding; if there are too many, the oldest is lost.
    pub(super) fn push(
        &mut self,
        target: Option<&str>,
        severity: Severity,
        kind: FindingKind,
        text: &str,
    ) {
        self.append(target, severity, kind, text, None);
        self.bound();
        self.store();
    }

    /// Adds what the detectors that watch a target told: in words, and as
    /// JSON.
    pub(super) fn push_incident(
        &mut self,
        target: &str,
        severity: Severity,
        text: &str,
        incident: String,
    ) {
        let kind = FindingKind::Watch;
        self.append(Some(target), severity, kind, text, Some(incident));
        self.bound();
        self.store();
    }

    /// Which boot of a target was followed last.
    pub(super) fn boot(&self, target: &str) -> Option<Boot> {
        self.boots.get(target).copied()
    }

    /// Keeps which boot of a target is followed.
    pub(super) fn set_boot(&mut self, target: &str, boot: Boot) {
        if self.boots.insert(target.to_owned(), boot) != Some(boot) {
            self.store();
        }
    }

    /// A client that is to be sent what is there and what comes; gives its
    /// number.
    pub(super) fn join(&mut self) -> u64 {
        self.next_client = self.next_client.saturating_add(1);
        self.sent.insert(self.next_client, 0);
        self.next_client
    }

    /// A client that went.
    pub(super) fn leave(&mut self, client: u64) {
        self.sent.remove(&client);
        self.forget();
    }

    /// Notes up to where a client was sent findings.
    pub(super) fn sent(&mut self, client: u64, through: u64) {
        if let Some(sent) = self.sent.get_mut(&client) {
            *sent = through;
        }
        self.forget();
    }

    /// Notes that a client has kept findings up to this number elsewhere.
    pub(super) fn acknowledge(&mut self, through: u64) {
        // Not what is still to come.
        let through = through.min(self.next.saturating_sub(1));
        self.acknowledged = self.acknowledged.max(through);
        self.forget();
    }

    /// Forgets what a client has kept and all have seen: whoever is connected
    /// at that moment sees it, too.
    fn forget(&mut self) {
        let seen = self.sent.values().copied().min().unwrap_or(u64::MAX);
        let through = self.acknowledged.min(seen);
        let before = self.findings.len();
        while self
            .findings
            .front()
            .is_some_and(|finding| finding.sequence <= through)
        {
            self.findings.pop_front();
        }
        if self.findings.len() != before {
            self.store();
        }
    }

    /// Copies of the findings after number `after`, at most `count`. Says
    /// first what was lost since that was last said.
    pub(super) fn after(&mut self, after: u64, count: usize) -> Vec<Finding> {
        if self.lost > self.told {
            let text = format!(
                "{} findings were lost, as nobody took them",
                self.lost - self.told
            );
            // Its own place may cost one more, told the next time.
            self.told = self.lost;
            let kind = FindingKind::FindingsLost;
            self.append(None, Severity::Warning, kind, &text, None);
            self.bound();
            self.store();
        }
        self.findings
            .iter()
            .filter(|finding| finding.sequence > after)
            .take(count)
            .cloned()
            .collect()
    }

    /// How many wait.
    pub(super) fn kept(&self) -> u64 {
        self.findings.len() as u64
    }

    /// How many were lost.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    fn append(
        &mut self,
        target: Option<&str>,
        severity: Severity,
        kind: FindingKind,
        text: &str,
        incident: Option<String>,
    ) {
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.findings.push_back(Finding {
            sequence: self.next,
            time_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
            target: target.map(str::to_owned),
            severity,
            kind,
            text: text.chars().take(MAX_TEXT).collect(),
            incident,
            trust_level: TRUST_LEVEL,
        });
        self.next = self.next.saturating_add(1);
    }

    fn bound(&mut self) {
        while self.findings.len() > self.limit
            && let Some(finding) = self.findings.pop_front()
        {
            if finding.sequence > self.acknowledged {
                self.lost = self.lost.saturating_add(1);
            }
        }
    }

    /// Writes the file anew. If that fails the findings live as long as the
    /// worker.
    fn store(&mut self) {
        let Some(file) = self.file.as_mut() else {
            return;
        };
        let stored = Stored {
            next: self.next,
            lost: self.lost,
            told: self.told,
            findings: self.findings.iter().cloned().collect(),
            boots: self.boots.clone(),
        };
        let written = secmon_channel::encode(&stored, usize::MAX)
            .map_err(io::Error::other)
            .and_then(|bytes| {
                file.seek(SeekFrom::Start(0))?;
                file.write_all(&bytes)?;
                file.set_len(bytes.len() as u64)
            });
        if let Err(error) = written {
            super::log(format_args!("findings can't be kept: {error}"));
            self.file = None;
        }
    }
}

/// The file's content; nothing if it is empty.
fn load(file: &mut File) -> Result<Option<Stored>, ()> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).map_err(drop)?;
    let mut bounded = (&mut *file).take(MAX_BYTES);
    bounded.read_to_end(&mut bytes).map_err(drop)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    secmon_channel::decode(&bytes).map(Some).map_err(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(outbox: &mut Outbox, text: &str) {
        outbox.push(
            Some("web1"),
            Severity::Information,
            FindingKind::TargetStarted,
            text,
        );
    }

    #[test]
    fn findings_wait_until_they_are_taken() {
        let mut outbox = Outbox::open(16, None);
        for text in ["a", "b", "c"] {
            push(&mut outbox, text);
        }
        let texts = |findings: Vec<Finding>| -> Vec<(u64, String)> {
            findings.into_iter().map(|f| (f.sequence, f.text)).collect()
        };
        assert_eq!(texts(outbox.after(1, 1)), [(2, "b".to_owned())]);
        outbox.acknowledge(2);
        assert_eq!(texts(outbox.after(0, 9)), [(3, "c".to_owned())]);
        outbox.acknowledge(99);
        assert_eq!((outbox.kept(), outbox.lost()), (0, 0));
        push(&mut outbox, "d");
        assert_eq!(texts(outbox.after(0, 9)), [(4, "d".to_owned())]);
    }

    #[test]
    fn a_finding_stays_until_all_clients_were_sent_it() {
        let mut outbox = Outbox::open(16, None);
        let (first, second) = (outbox.join(), outbox.join());
        push(&mut outbox, "a");
        push(&mut outbox, "b");
        outbox.sent(first, 2);
        outbox.acknowledge(2);
        assert_eq!(outbox.kept(), 2);
        outbox.sent(second, 1);
        assert_eq!(outbox.kept(), 1);
        outbox.leave(second);
        assert_eq!(outbox.kept(), 0);
        // Sent to none that would keep it.
        push(&mut outbox, "c");
        outbox.sent(first, 3);
        outbox.leave(first);
        assert_eq!(outbox.kept(), 1);
    }

    #[test]
    fn what_is_lost_is_counted_and_told() {
        let mut outbox = Outbox::open(16, None);
        for _ in 0..20 {
            push(&mut outbox, &"x".repeat(5000));
        }
        assert_eq!((outbox.kept(), outbox.lost()), (16, 4));
        let findings = outbox.after(0, 99);
        assert_eq!(findings[0].text.len(), MAX_TEXT);
        let last = findings.last().expect("findings");
        assert_eq!(last.kind, FindingKind::FindingsLost);
        assert!(last.text.starts_with("4 "), "{}", last.text);
        assert_eq!((findings[0].sequence, last.sequence), (6, 21));
        outbox.acknowledge(21);
        // The one that made room for that.
        let findings = outbox.after(21, 99);
        assert!(findings.len() == 1 && findings[0].text.starts_with("1 "));
    }

    #[test]
    fn findings_outlive_the_worker() {
        let file = tempfile::tempfile().expect("a file");
        let again = || file.try_clone().ok();
        let mut outbox = Outbox::open(16, again());
        push(&mut outbox, "first");
        push(&mut outbox, "second");
        outbox.acknowledge(1);
        let boot = Boot {
            instance: Some(9),
            count: 2,
        };
        outbox.set_boot("web1", boot);
        drop(outbox);
        let mut outbox = Outbox::open(16, again());
        assert_eq!(
            (outbox.boot("web1"), outbox.boot("db1")),
            (Some(boot), None)
        );
        let findings = outbox.after(0, 9);
        assert_eq!((findings.len(), findings[0].sequence), (1, 2));
        drop(outbox);
        file.set_len(7).expect("cut");
        let mut outbox = Outbox::open(16, again());
        assert_eq!(outbox.lost(), 1);
        assert_eq!(outbox.after(0, 9)[0].kind, FindingKind::FindingsLost);
    }
}

//! The detector `lies`: what programs in the guest are told, against what is
//! there.
//!
//! A reader in the guest runs ordinary tools and sends what they print;
//! whatever carries that here is a [`Reader`]. What the guest says proves
//! nothing by itself. What it does not say, of something that was there before
//! it was asked and is there afterwards, was kept from its own programs.

mod answer;
mod there;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use secmon_guest::{Guest, Text};
use secmon_memory::VirtualAddress;

use crate::rows::Parts;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

pub use answer::{Answer, AnswerError, Endpoint, FOLDERS, LONGEST, Question, Silence, Told};
use there::{There, Thing};

const NAME: &str = "lies";

/// Hide artifacts.
const HIDING: Technique = Technique::new("T1564");
/// What carries questions into the guest and answers out of it.
pub trait Reader: Send + Sync {
    /// Asks, and gives at most [`LONGEST`] bytes of the answer.
    ///
    /// # Errors
    /// Why there is none, for people.
    fn ask(&self, question: &Question) -> Result<Vec<u8>, String>;
}

/// Compares what a reader in the guest is told with what is there.
pub struct Lies {
    reader: Option<Box<dyn Reader>>,
    folders: Vec<String>,
    asked: AtomicU64,
}

/// For its description alone.
pub(crate) static UNASKED: Lies = Lies {
    reader: None,
    folders: Vec::new(),
    asked: AtomicU64::new(0),
};

impl Lies {
    /// With this reader, about these folders; those that are no absolute paths
    /// of ordinary characters ([`Question::can_ask`]) are left out.
    #[must_use]
    pub fn new(reader: Box<dyn Reader>, folders: impl IntoIterator<Item = String>) -> Self {
        let folders = folders.into_iter();
        Self {
            reader: Some(reader),
            folders: folders.filter(|folder| Question::can_ask(folder)).collect(),
            asked: AtomicU64::new(0),
        }
    }

    /// A question that no other one is like, so that an old answer is none.
    fn question(&self) -> Question {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_nanos() as u64);
        Question {
            nonce: now.wrapping_add(self.asked.fetch_add(1, Ordering::Relaxed)),
            folders: self.folders.clone(),
        }
    }
}

impl Detector for Lies {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Processes, modules, listening sockets and files that are there and that the guest's own \
         programs are not told of, and processes that they are told of and that are in no list. It \
         needs the reader in the guest (check --reader)."
    }

    fn compares(&self) -> &'static str {
        "What ps, /proc, lsmod, /proc/modules, ss, /proc/net and ls print in the guest with the \
         lists of processes, modules and sockets and the cache of names in its memory, read before \
         and after the answer: only what was there at both moments has to be told."
    }

    fn evaded_by(&self) -> &'static str {
        "Who hides from other programs than the reader's, or answers in the reader's place with \
         what is there. A file that the kernel's cache of names does not hold. What is hidden \
         from the kernel's lists as well is left to processes and modules."
    }

    fn techniques(&self) -> &'static [Technique] {
        &[Technique::ROOTKIT, HIDING]
    }

    fn cost(&self) -> &'static str {
        "The tools' own time in the guest, a second or less; two walks of the lists outside."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let Some(reader) = &self.reader else {
            return Err(DetectError::Missing { what: "reader" });
        };
        let question = self.question();
        let incomplete = |reason| DetectError::Incomplete {
            view: "the reader's answer",
            reason,
        };
        let mut parts = Parts::default();
        let before = There::read(guest, &question, &mut parts);
        let bytes = reader.ask(&question).map_err(incomplete)?;
        let after = There::read(guest, &question, &mut parts);
        let answer = question.read(&bytes);
        let answer = answer.map_err(|error| incomplete(error.to_string()))?;
        // What was read only in part lacks what need not be a lie; the other
        // direction would then claim too much.
        let whole = parts.finish();
        if whole.is_ok() {
            not_there(&answer, &before, &after, findings);
        }
        not_told(&answer, &before.and(&after), findings);
        let spoke = answer.processes.values().any(Result::is_ok);
        if !spoke {
            return Err(incomplete("the guest has neither ps nor /proc".to_owned()));
        }
        whole
    }
}

/// What was there all the time, and some tool did not name.
fn not_told(answer: &Answer, there: &There, findings: &mut dyn FnMut(Finding)) {
    for ((pid, _), thing) in &there.processes {
        let tools = answer.processes.iter();
        let lacking = lacking(tools, pid);
        lie("process_not_told", thing, &lacking, HIDING, findings);
    }
    for ((name, _), thing) in &there.modules {
        let lacking = lacking(answer.modules.iter(), name);
        lie("module_not_told", thing, &lacking, HIDING, findings);
    }
    for ((endpoint, _), thing) in &there.sockets {
        let tools = answer.sockets.iter();
        let covering = tools.filter(|(tool, _)| endpoint.is_told_by(tool));
        let lacking = lacking(covering, endpoint);
        lie("port_not_told", thing, &lacking, HIDING, findings);
    }
    for (((folder, name), _), thing) in &there.files {
        let told = answer.folders.get_key_value(folder);
        let told = told.map(|(folder, told)| (folder.as_str(), told));
        let lacking = lacking(told.iter().map(|(folder, told)| (folder, *told)), name);
        lie("file_not_told", thing, &lacking, HIDING, findings);
    }
}

/// The tools that spoke and did not name it.
fn lacking<'t, T: Ord + 't, N: fmt::Display + 't>(
    tools: impl Iterator<Item = (&'t N, &'t Told<T>)>,
    thing: &T,
) -> Vec<String> {
    let silent = tools.filter(|(_, told)| told.as_ref().is_ok_and(|told| !told.contains(thing)));
    silent.map(|(tool, _)| tool.to_string()).collect()
}

fn lie(
    name: &'static str,
    thing: &Thing,
    lacking: &[String],
    technique: Technique,
    findings: &mut dyn FnMut(Finding),
) {
    if lacking.is_empty() {
        return;
    }
    // File systems elsewhere may have lost what the cache still holds.
    let (class, tool) = match thing.subject {
        Subject::File { .. } => (Class::Suspicion, "ls of "),
        _ => (Class::Attack, ""),
    };
    let tools = lacking.join(" and ");
    let summary = format!(
        "{} is there, and {tool}{tools} did not show it",
        thing.subject
    );
    let told = Evidence::new(
        "reader",
        format!("{tool}{tools}: it is not among what was printed"),
    );
    findings(
        Finding::new(
            NAME,
            name,
            class,
            Severity::High,
            thing.subject.clone(),
            summary,
        )
        .technique(technique)
        .evidence(thing.evidence.clone())
        .evidence(told),
    );
}

/// Processes that all tools named which spoke, and that were there neither
/// before nor after. Of other things that come and go there is nothing that
/// tells one from the next.
fn not_there(answer: &Answer, before: &There, after: &There, findings: &mut dyn FnMut(Finding)) {
    let mut known = before.pids();
    known.extend(after.pids());
    for pid in told_by_all(answer.processes.values()).difference(&known) {
        let subject = Subject::Process {
            task: VirtualAddress::new(0),
            pid: *pid,
            started: 0,
            name: Text::new(*b""),
        };
        let summary = format!("programs are told of process {pid}, which is in no list of tasks");
        findings(
            Finding::new(
                NAME,
                "process_not_there",
                Class::Attack,
                Severity::High,
                subject,
                summary,
            )
            .technique(Technique::ROOTKIT)
            .evidence(Evidence::new("reader", "what was printed").with("pid", *pid))
            .evidence(Evidence::new("task_list", "it is not in the list of tasks")),
        );
    }
}

/// What each tool that spoke has named: what came and went meanwhile is in one
/// of them only.
fn told_by_all<'t, T: Ord + Clone + 't>(tools: impl Iterator<Item = &'t Told<T>>) -> BTreeSet<T> {
    tools
        .filter_map(|told| told.as_ref().ok())
        .cloned()
        .reduce(|all, told| all.intersection(&told).cloned().collect())
        .unwrap_or_default()
}

impl Endpoint {
    /// Whether a tool has to name it.
    fn is_told_by(&self, tool: &str) -> bool {
        match tool {
            "ss" => true,
            "/proc/net/tcp" => self.tcp && self.address.is_ipv4(),
            "/proc/net/tcp6" => self.tcp && self.address.is_ipv6(),
            "/proc/net/udp" => !self.tcp && self.address.is_ipv4(),
            "/proc/net/udp6" => !self.tcp && self.address.is_ipv6(),
            _ => false,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.tcp { "tcp" } else { "udp" };
        match self.address {
            std::net::IpAddr::V4(address) => write!(f, "{protocol} {address}:{}", self.port),
            std::net::IpAddr::V6(address) => write!(f, "{protocol} [{address}]:{}", self.port),
        }
    }
}

//! The detector `tracing`: who is called by ftrace, kprobes and tracepoints, and
//! which BPF programs are loaded.
//!
//! All of it has legitimate uses, which are told as information. A function
//! that is called and lies in memory of nobody is an attack; one that a module
//! lets ftrace put in place of others is what live patching does, by a function
//! of the kernel, and what rootkits do by one of their own.

mod bpf;

use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::linux::tracing::{FtraceOps, Kprobe, Probe, ftrace_ops_in_use, kprobes, probes};
use secmon_guest::{Guest, Text};
use secmon_memory::VirtualAddress;

use crate::code::{self, Target};
use crate::detector::whole;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "tracing";
/// `KPROBE_FLAG_GONE`: what it stood at is no more, and it calls nobody.
const GONE: u64 = 1;

/// Finds tracing that calls foreign code, and tells of all other.
pub struct Tracing;

impl Detector for Tracing {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds ftrace, kprobes, tracepoints and BPF programs that run code which nobody owns, \
         and modules that put functions of their own in place of the kernel's by ftrace; tells \
         of all other tracing and of all BPF programs as information."
    }

    fn compares(&self) -> &'static str {
        "The functions of registered ftrace_ops, of kprobes and kretprobes in the hash table, \
         of tracepoints of the kernel and its modules, and the code of BPF programs, with the \
         owners of executable memory."
    }

    fn evaded_by(&self) -> &'static str {
        "A listed module that only observes: that is what tracing is for."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[
            Technique::ROOTKIT,
            Technique::new("T1056.004"),
            Technique::new("T1205.002"),
        ];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "The records of what is attached, two thousand tracepoints, and the map of code."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let before = guest.diagnostics().recorded();
        let map = code::map(guest, NAME)?;
        let replaces = Replaces::of(guest);
        for ops in ftrace_ops_in_use(guest, NAME)? {
            if let Some(finding) = ftrace(guest, &map, &ops, &replaces) {
                findings(finding);
            }
        }
        for kprobe in kprobes(guest, NAME)? {
            if kprobe.flags & GONE == 0 {
                findings(probe_of_code(guest, &map, &kprobe));
            }
        }
        for probe in probes(guest, NAME, &map.modules)? {
            findings(tracepoint(guest, &map, &probe));
        }
        bpf::look(guest, &map, findings)?;
        whole(guest, before, "kernel objects")
    }
}

/// The flag of `ftrace_ops` that change where a function goes on.
struct Replaces(Option<u64>);

impl Replaces {
    fn of(guest: &Guest) -> Self {
        let types = guest.types(NAME).ok();
        // An enumeration without a name: all types are looked at, so only
        // where something is attached at all.
        let flag = || types.and_then(|types| types.any_enumerator("FTRACE_OPS_FL_IPMODIFY"));
        let attached = ftrace_ops_in_use(guest, NAME).is_ok_and(|ops| !ops.is_empty());
        Self(
            attached
                .then(flag)
                .flatten()
                .and_then(|flag| u64::try_from(flag).ok()),
        )
    }

    fn applies(&self, flags: u64) -> bool {
        self.0.is_some_and(|flag| flags & flag != 0)
    }
}

/// The worst of several targets, and what is to be said of them.
fn worst<'m>(
    map: &'m CodeMap,
    functions: impl Iterator<Item = VirtualAddress>,
) -> Option<(VirtualAddress, Target<'m>)> {
    functions
        .map(|function| (function, code::target(map, function)))
        .max_by_key(|(_, target)| match target {
            Target::Unowned | Target::NoCode(_) => 3,
            Target::NotExecutable | Target::Beside => 2,
            Target::Owned(CodeOwner::Module { .. }) => 1,
            Target::Owned(_) => 0,
        })
}

fn ftrace(guest: &Guest, map: &CodeMap, ops: &FtraceOps, replaces: &Replaces) -> Option<Finding> {
    let functions = [Some(ops.function), ops.saved_function];
    let (function, target) = worst(map, functions.into_iter().flatten())?;
    let module = matches!(target, Target::Owned(CodeOwner::Module { .. }));
    let (name, class, severity) = match target {
        _ if target.is_foreign() => ("ftrace_to_foreign_code", Class::Attack, Severity::Critical),
        _ if module && replaces.applies(ops.flags) => {
            ("function_replaced", Class::Suspicion, Severity::High)
        }
        _ => ("ftrace_in_use", Class::Information, Severity::Low),
    };
    let summary = match name {
        "function_replaced" => format!(
            "{} replaces functions of the kernel through ftrace by its own at {function}",
            target.describe()
        ),
        _ => format!("ftrace calls {function}, {}", target.describe()),
    };
    let evidence = Evidence::new("ftrace_ops_list", "what is registered")
        .with("ops", ops.address)
        .with("function", ops.function)
        .with("flags", ops.flags);
    let subject = subject(
        "ftrace_ops",
        ops.address,
        code::symbol(guest, map, function),
    );
    Some(finding(
        guest,
        map,
        name,
        (class, severity),
        subject,
        summary,
        evidence,
        function,
    ))
}

fn probe_of_code(guest: &Guest, map: &CodeMap, kprobe: &Kprobe) -> Finding {
    let place =
        code::symbol(guest, map, kprobe.address).unwrap_or_else(|| kprobe.address.to_string());
    let evidence = Evidence::new("kprobe_table", "what is registered")
        .with("kprobe", kprobe.object)
        .with("address", kprobe.address)
        .with("symbol", place.as_str())
        .with("flags", kprobe.flags);
    let subject = subject("kprobe", kprobe.object, Some(place.clone()));
    let Some((function, target)) = worst(map, kprobe.functions()) else {
        let summary = format!("A kprobe stands at {place}");
        let rank = (Class::Information, Severity::Low);
        return plain("kprobe_in_use", rank, subject, summary, evidence);
    };
    let (name, rank) = match target.is_foreign() {
        true => (
            "kprobe_to_foreign_code",
            (Class::Attack, Severity::Critical),
        ),
        false => ("kprobe_in_use", (Class::Information, Severity::Low)),
    };
    let summary = format!(
        "A kprobe at {place} calls {function}, {}",
        target.describe()
    );
    finding(guest, map, name, rank, subject, summary, evidence, function)
}

fn tracepoint(guest: &Guest, map: &CodeMap, probe: &Probe) -> Finding {
    let target = code::target(map, probe.function);
    let (name, rank) = match target.is_foreign() {
        true => (
            "tracepoint_to_foreign_code",
            (Class::Attack, Severity::Critical),
        ),
        false => ("tracepoint_in_use", (Class::Information, Severity::Low)),
    };
    let place = probe.name.to_display().into_owned();
    let summary = format!(
        "Tracepoint {place} calls {}, {}",
        probe.function,
        target.describe()
    );
    let evidence = Evidence::new("tracepoints", "what is registered")
        .with("tracepoint", probe.tracepoint)
        .with("name", Text::clone(&probe.name))
        .with("function", probe.function)
        .with("data", probe.data);
    // One tracepoint calls several functions: each is a thing of its own.
    let subject = Subject::KernelPointer {
        location: probe.tracepoint,
        target: probe.function,
        symbol: Some(format!("tracepoint {place}")),
    };
    finding(
        guest,
        map,
        name,
        rank,
        subject,
        summary,
        evidence,
        probe.function,
    )
}

fn subject(kind: &'static str, address: VirtualAddress, name: Option<String>) -> Subject {
    Subject::KernelObject {
        kind,
        address,
        name: Text::from(name.unwrap_or_default().as_str()),
    }
}

fn plain(
    name: &'static str,
    (class, severity): (Class, Severity),
    subject: Subject,
    summary: String,
    evidence: Evidence,
) -> Finding {
    let finding = Finding::new(NAME, name, class, severity, subject, summary);
    let finding = match class {
        Class::Information => finding,
        Class::Suspicion | Class::Attack => finding.technique(Technique::ROOTKIT),
    };
    finding.evidence(evidence)
}

#[expect(clippy::too_many_arguments, reason = "the parts of a finding")]
fn finding(
    guest: &Guest,
    map: &CodeMap,
    name: &'static str,
    rank: (Class, Severity),
    subject: Subject,
    summary: String,
    evidence: Evidence,
    function: VirtualAddress,
) -> Finding {
    plain(name, rank, subject, summary, evidence)
        .evidence(code::target_evidence(guest, map, function))
}

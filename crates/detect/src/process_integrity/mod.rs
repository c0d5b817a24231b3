//! The detector `process_integrity`: processes that are not what they say, or
//! that run code which came from no file.

mod code;
mod environment;
mod identity;
mod threads;

use std::collections::BTreeMap;

use secmon_guest::Guest;

use crate::named_processes::NamedProcesses;
use crate::rows::Parts;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Technique};

const NAME: &str = "process_integrity";

/// How many rows are kept as evidence of one finding; it says how many there
/// were.
const MOST_EVIDENCE: usize = 8;

/// Looks at executables, names, memory areas, code pages and environments.
pub(crate) struct ProcessIntegrity;

impl Detector for ProcessIntegrity {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Processes that run deleted files or files that were only ever in memory, that call \
         themselves like threads of the kernel, whose code differs from its file or lies in no \
         file, whose threads make system calls in such code or were not started by a library, that \
         have another process's memory or none of their own program's code, that can write to their \
         code, that others trace, or that load libraries by LD_PRELOAD."
    }

    fn compares(&self) -> &'static str {
        "Names and command lines of programs with those of kernel threads; each page of executable \
         areas of files with the file's own page in the page cache, byte by byte, and of the vDSO \
         with the kernel's; permissions and files of memory areas; the instruction and the stack pointer with which each \
         thread came out of user mode with these areas; the thread-local data of threads and the \
         memory of processes with each other; environments."
    }

    fn evaded_by(&self) -> &'static str {
        "Code that is brought in as data for an interpreter, or through a library that is a file; \
         an executable that is put back in its place; an environment that the program writes \
         over or that is swapped out. A thread that was brought in and that a library started, while it \
         is in a library's system call. Programs that make code as they run (Java, browsers) are \
         found as anonymous_code or writable_code as well: they need an exception; so do packed \
         programs, which make system calls in such code."
    }

    fn techniques(&self) -> &'static [Technique] {
        &[
            code::INJECTION,
            code::HOLLOWING,
            code::TRACING,
            code::REFLECTIVE,
            identity::DELETION,
            identity::MASQUERADING,
            environment::LINKER,
        ]
    }

    fn cost(&self) -> &'static str {
        "A row of each process and memory area, a look-up for each page of code that is mapped, \
         and the pages of environments and command lines."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let processes = NamedProcesses::new(guest, NAME)?;
        let mut claims = Claims::default();
        let mut parts = Parts::default();
        let programs = identity::look(guest, &mut claims, &mut parts);
        let areas = code::look(guest, &programs, &mut claims, &mut parts);
        threads::look(guest, &areas, &mut claims, &mut parts);
        parts.note(environment::look(guest, &mut claims));
        for ((pid, name), claim) in claims.by_process {
            // What ended meanwhile is nobody's any more.
            let Some(subject) = processes.subject(pid) else {
                continue;
            };
            let summary = match claim.count {
                1 => claim.summary,
                count => format!("{} ({count} places)", claim.summary),
            };
            let mut finding =
                Finding::new(NAME, name, claim.class, claim.severity, subject, summary)
                    .technique(claim.technique);
            finding.evidence = claim.evidence;
            findings(finding);
        }
        parts.finish()
    }
}

/// What is said of processes, each thing once.
#[derive(Default)]
struct Claims {
    by_process: BTreeMap<(u32, &'static str), Claim>,
}

struct Claim {
    class: Class,
    severity: Severity,
    technique: Technique,
    summary: String,
    evidence: Vec<Evidence>,
    count: u64,
}

/// A kind of claim.
struct Sort {
    name: &'static str,
    class: Class,
    severity: Severity,
    technique: Technique,
}

impl Claims {
    fn add(&mut self, pid: u32, sort: &Sort, summary: &str, evidence: Evidence) {
        let claim = self
            .by_process
            .entry((pid, sort.name))
            .or_insert_with(|| Claim {
                class: sort.class,
                severity: sort.severity,
                technique: sort.technique,
                summary: summary.to_owned(),
                evidence: Vec::new(),
                count: 0,
            });
        claim.count += 1;
        if claim.evidence.len() < MOST_EVIDENCE {
            claim.evidence.push(evidence);
        }
    }
}

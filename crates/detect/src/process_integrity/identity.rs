//! What a process runs and how it calls itself.

use std::collections::{HashMap, HashSet};

use secmon_guest::{Guest, Value};

use super::{Claims, Sort};
use crate::rows::{Fields, Parts, Rows};
use crate::{Class, Evidence, Severity, Technique};

/// Indicator removal: file deletion.
pub(super) const DELETION: Technique = Technique::new("T1070.004");
/// Masquerading: a task or service.
pub(super) const MASQUERADING: Technique = Technique::new("T1036.004");

const MEMORY_EXECUTABLE: Sort = Sort {
    name: "memory_executable",
    class: Class::Suspicion,
    severity: Severity::High,
    technique: super::code::REFLECTIVE,
};
const DELETED_EXECUTABLE: Sort = Sort {
    name: "deleted_executable",
    class: Class::Suspicion,
    severity: Severity::Medium,
    technique: DELETION,
};
const KERNEL_NAME: Sort = Sort {
    name: "named_like_kernel_thread",
    class: Class::Attack,
    severity: Severity::High,
    technique: MASQUERADING,
};
const TRACED: Sort = Sort {
    name: "traced_process",
    class: Class::Suspicion,
    severity: Severity::Medium,
    technique: super::code::TRACING,
};

const COLUMNS: &[&str] = &[
    "pid",
    "ppid",
    "uid",
    "euid",
    "state",
    "comm",
    "task_comm",
    "exe",
    "exe_deleted",
    "cmdline",
    "cwd",
    "kernel_thread",
    "tracer",
    "start_time",
];

/// The names of kernel threads of this guest: whole ones, and the parts before
/// a slash (`kworker`).
#[derive(Default)]
struct KernelNames {
    whole: HashSet<Vec<u8>>,
    stems: HashSet<Vec<u8>>,
}

fn stem(name: &[u8]) -> Option<&[u8]> {
    let slash = name.iter().position(|byte| *byte == b'/')?;
    name.get(..slash)
}

impl KernelNames {
    fn add(&mut self, name: &[u8]) {
        self.whole.insert(name.to_vec());
        self.stems.extend(stem(name).map(<[u8]>::to_vec));
    }

    fn is_one(&self, name: &[u8]) -> bool {
        self.whole.contains(name) || stem(name).is_some_and(|stem| self.stems.contains(stem))
    }
}

/// A name in square brackets, as `ps` writes those of kernel threads.
fn in_brackets(word: &[u8]) -> bool {
    matches!(word, [b'[', .., b']'])
}

/// What a process was started as.
pub(super) struct Program {
    /// Its path.
    pub(super) path: Vec<u8>,
    /// Whether that was deleted since.
    pub(super) deleted: bool,
    /// The process's row.
    pub(super) evidence: Evidence,
}

/// Looks at all processes; gives what they were started as.
pub(super) fn look(guest: &Guest, claims: &mut Claims, parts: &mut Parts) -> HashMap<u32, Program> {
    let mut names = KernelNames::default();
    let threads = Rows::of("processes", &["kernel_thread", "task_comm"]).and_then(|rows| {
        rows.read(guest, |row| {
            if let (true, Some(name)) = (row.is_true("kernel_thread"), row.text("task_comm")) {
                names.add(name);
            }
        })
    });
    parts.note(threads);
    let mut found = HashMap::new();
    let programs = Rows::of("processes", COLUMNS).and_then(|rows| {
        rows.read(guest, |row| {
            if row.is_true("kernel_thread") {
                return;
            }
            judge(&row, &names, claims);
            if let (Some(pid), Some(exe)) = (row.id("pid"), row.text("exe")) {
                let program = Program {
                    path: exe.to_vec(),
                    deleted: row.is_true("exe_deleted"),
                    evidence: row.evidence("processes", "the process"),
                };
                found.insert(pid, program);
            }
        })
    });
    parts.note(programs);
    found
}

fn judge(row: &Fields<'_>, names: &KernelNames, claims: &mut Claims) {
    let Some(pid) = row.id("pid") else {
        return;
    };
    let evidence = || row.evidence("processes", "the process");
    if let Some(exe) = row.text("exe")
        && row.is_true("exe_deleted")
    {
        if exe.starts_with(b"/memfd:") {
            let summary = "it runs a program that was only ever in memory";
            claims.add(pid, &MEMORY_EXECUTABLE, summary, evidence());
        } else {
            let summary = "it runs a file that was deleted";
            claims.add(pid, &DELETED_EXECUTABLE, summary, evidence());
        }
    }
    let first_word = match row.list("cmdline").first() {
        Some(Value::Text(word)) => word.as_bytes(),
        _ => &[],
    };
    let named = row.text("task_comm").is_some_and(|name| names.is_one(name));
    if row.text("exe").is_some() && (named || in_brackets(first_word)) {
        let summary = "a program that calls itself like a thread of the kernel";
        claims.add(pid, &KERNEL_NAME, summary, evidence());
    }
    if let Some(tracer) = row.number("tracer") {
        let summary = format!("thread {tracer} traces it and can change its memory");
        claims.add(pid, &TRACED, &summary, evidence());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kernel_threads_are_known_by_their_stems() {
        let mut names = KernelNames::default();
        names.add(b"kworker/0:1");
        names.add(b"kthreadd");
        for name in [&b"kworker/3:7H"[..], b"kworker/u8:0", b"kthreadd"] {
            assert!(names.is_one(name), "{name:?}");
        }
        for name in [&b"kworker"[..], b"kthread", b"sh", b"", b"bin/sh"] {
            assert!(!names.is_one(name), "{name:?}");
        }
    }

    #[test]
    fn brackets_count_only_around_the_whole_word() {
        assert!(in_brackets(b"[kworker/0:1]"));
        assert!(!in_brackets(b"["));
        assert!(!in_brackets(b"[a] b"));
        assert!(!in_brackets(b"test"));
    }
}

//! What processes can execute.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use secmon_guest::Guest;

use super::identity::Program;
use super::{Claims, Sort};
use crate::rows::{Fields, Parts, Rows};
use crate::{Class, Severity, Technique};

/// Process injection.
pub(super) const INJECTION: Technique = Technique::new("T1055");
/// Process injection: ptrace system calls.
pub(super) const TRACING: Technique = Technique::new("T1055.008");
/// Process injection: process hollowing.
pub(super) const HOLLOWING: Technique = Technique::new("T1055.012");
/// Reflective code loading.
pub(super) const REFLECTIVE: Technique = Technique::new("T1620");

const WRITABLE: Sort = Sort {
    name: "writable_code",
    class: Class::Suspicion,
    severity: Severity::Medium,
    technique: INJECTION,
};
const ANONYMOUS: Sort = Sort {
    name: "anonymous_code",
    class: Class::Suspicion,
    severity: Severity::Medium,
    technique: INJECTION,
};
const DELETED: Sort = Sort {
    name: "code_of_deleted_file",
    class: Class::Suspicion,
    severity: Severity::Medium,
    technique: REFLECTIVE,
};
const CHANGED: Sort = Sort {
    name: "changed_code",
    class: Class::Attack,
    severity: Severity::High,
    technique: INJECTION,
};
const REPLACED: Sort = Sort {
    name: "replaced_code",
    class: Class::Suspicion,
    severity: Severity::High,
    technique: INJECTION,
};
const HOLLOWED: Sort = Sort {
    name: "hollowed_image",
    class: Class::Suspicion,
    severity: Severity::High,
    technique: HOLLOWING,
};
const BREAKPOINT: Sort = Sort {
    name: "breakpoint_in_code",
    class: Class::Information,
    severity: Severity::Low,
    technique: TRACING,
};

const AREAS: &[&str] = &[
    "pid",
    "start",
    "end",
    "permissions",
    "path",
    "deleted",
    "type",
    "address",
];

const CHANGES: &[&str] = &[
    "pid",
    "path",
    "page",
    "first_change",
    "changed_bytes",
    "original",
    "found",
    "offset",
    "address",
];

/// The executable memory of all processes.
#[derive(Default)]
pub(super) struct Areas {
    by_process: BTreeMap<u32, Vec<Area>>,
}

struct Area {
    range: Range<u64>,
    of_file: bool,
}

impl Areas {
    /// Adds an executable area.
    pub(super) fn add(&mut self, pid: u32, range: Range<u64>, of_file: bool) {
        let areas = self.by_process.entry(pid).or_default();
        areas.push(Area { range, of_file });
    }

    fn at(&self, pid: u32, address: u64) -> Option<&Area> {
        let mut areas = self.by_process.get(&pid)?.iter();
        areas.find(|area| area.range.contains(&address))
    }

    /// Whether the address lies in executable memory of the process that
    /// belongs to no file.
    pub(super) fn is_of_no_file(&self, pid: u32, address: u64) -> bool {
        self.at(pid, address).is_some_and(|area| !area.of_file)
    }

    /// Whether it lies in any executable memory of the process.
    pub(super) fn is_executable(&self, pid: u32, address: u64) -> bool {
        self.at(pid, address).is_some()
    }
}

/// Looks at all memory areas and pages of code. The areas of deleted executables
/// that are told already are left out.
pub(super) fn look(
    guest: &Guest,
    programs: &HashMap<u32, Program>,
    claims: &mut Claims,
    parts: &mut Parts,
) -> Areas {
    let mut areas = Areas::default();
    let mut own_code: HashSet<u32> = HashSet::new();
    let read = Rows::of("maps", AREAS).and_then(|rows| {
        rows.read(guest, |row| {
            area(&row, programs, claims, &mut areas, &mut own_code);
        })
    });
    // What could not be read may be the program's own code.
    if parts.note(read).is_some() {
        hollowed(programs, &areas, &own_code, claims);
    }
    let changes = Rows::of("changed_code", CHANGES)
        .and_then(|rows| rows.read(guest, |row| change(&row, claims)));
    parts.note(changes);
    areas
}

/// Programs that have no code of their own file, and some of no file.
fn hollowed(
    programs: &HashMap<u32, Program>,
    areas: &Areas,
    own_code: &HashSet<u32>,
    claims: &mut Claims,
) {
    for (pid, program) in programs {
        let of_process = areas.by_process.get(pid);
        let made = of_process.is_some_and(|areas| areas.iter().any(|area| !area.of_file));
        if made && !own_code.contains(pid) {
            let summary = "its code is not that of the program that it was started as";
            claims.add(*pid, &HOLLOWED, summary, program.evidence.clone());
        }
    }
}

fn area(
    row: &Fields<'_>,
    programs: &HashMap<u32, Program>,
    claims: &mut Claims,
    areas: &mut Areas,
    own_code: &mut HashSet<u32>,
) {
    let (Some(pid), Some(permissions)) = (row.id("pid"), row.text("permissions")) else {
        return;
    };
    if permissions.get(2) != Some(&b'x') {
        return;
    }
    let kind = row.text("type").unwrap_or_default();
    // The kernel's own: vdso, vsyscall, uprobes.
    if kind == b"special" {
        return;
    }
    if let (Some(start), Some(end)) = (row.number("start"), row.number("end")) {
        areas.add(pid, start..end, kind == b"file");
    }
    let evidence = || row.evidence("maps", "the memory area");
    if permissions.get(1) == Some(&b'w') {
        let summary = "it has memory that it can both write and execute";
        claims.add(pid, &WRITABLE, summary, evidence());
    } else if kind != b"file" {
        let summary = "it has code in memory that belongs to no file";
        claims.add(pid, &ANONYMOUS, summary, evidence());
    }
    let program = programs.get(&pid);
    let of_program = program.is_some_and(|program| row.text("path") == Some(&program.path));
    if kind == b"file" && of_program {
        own_code.insert(pid);
    }
    let is_told = of_program && program.is_some_and(|program| program.deleted);
    if kind == b"file" && row.is_true("deleted") && !is_told {
        let summary = "it has code of a file that was deleted or only ever in memory";
        claims.add(pid, &DELETED, summary, evidence());
    }
}

fn change(row: &Fields<'_>, claims: &mut Claims) {
    let Some(pid) = row.id("pid") else {
        return;
    };
    let evidence = row.evidence("changed_code", "the page");
    match row.number("changed_bytes") {
        None => {
            let summary = "it has a page of code of its own, whose file's page is not in memory";
            claims.add(pid, &REPLACED, summary, evidence);
        }
        // int3, as debuggers and uprobes set it.
        Some(1)
            if row
                .text("found")
                .is_some_and(|found| found.starts_with(b"cc")) =>
        {
            let summary = "a debugger or a uprobe has set a breakpoint in its code";
            claims.add(pid, &BREAKPOINT, summary, evidence);
        }
        Some(_) => {
            let summary = "its code differs from the file that it comes from";
            claims.add(pid, &CHANGED, summary, evidence);
        }
    }
}

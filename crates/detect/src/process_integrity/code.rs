//! What processes can execute.

use std::collections::HashMap;

use secmon_guest::Guest;

use super::{Claims, Sort};
use crate::rows::{Fields, Parts, Rows};
use crate::{Class, Severity, Technique};

/// Process injection.
pub(super) const INJECTION: Technique = Technique::new("T1055");
/// Process injection: ptrace system calls.
pub(super) const TRACING: Technique = Technique::new("T1055.008");
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

/// Looks at all memory areas and pages of code. The areas of deleted executables
/// that are told already are left out.
pub(super) fn look(
    guest: &Guest,
    told: &HashMap<u32, Vec<u8>>,
    claims: &mut Claims,
    parts: &mut Parts,
) {
    let areas =
        Rows::of("maps", AREAS).and_then(|rows| rows.read(guest, |row| area(&row, told, claims)));
    parts.note(areas);
    let changes = Rows::of("changed_code", CHANGES)
        .and_then(|rows| rows.read(guest, |row| change(&row, claims)));
    parts.note(changes);
}

fn area(row: &Fields<'_>, told: &HashMap<u32, Vec<u8>>, claims: &mut Claims) {
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
    let evidence = || row.evidence("maps", "the memory area");
    if permissions.get(1) == Some(&b'w') {
        let summary = "it has memory that it can both write and execute";
        claims.add(pid, &WRITABLE, summary, evidence());
    } else if kind != b"file" {
        let summary = "it has code in memory that belongs to no file";
        claims.add(pid, &ANONYMOUS, summary, evidence());
    }
    let is_executable = told.get(&pid).map(Vec::as_slice) == row.text("path");
    if kind == b"file" && row.is_true("deleted") && !is_executable {
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

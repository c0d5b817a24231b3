//! Libraries that the environment brings into a process.

use secmon_guest::Guest;

use super::{Claims, Sort};
use crate::rows::Rows;
use crate::{Class, DetectError, Severity, Technique};

/// Hijack execution flow: dynamic linker.
pub(super) const LINKER: Technique = Technique::new("T1574.006");

const PRELOADED: Sort = Sort {
    name: "preloaded_library",
    class: Class::Suspicion,
    severity: Severity::Medium,
    technique: LINKER,
};

/// Variables by which the dynamic linker loads libraries that the program does
/// not name (ld.so(8)).
const VARIABLES: &[&[u8]] = &[b"LD_PRELOAD", b"LD_AUDIT"];

/// Looks at all environments. Pages of them that are swapped out are what a
/// sound guest has as well: they are no reason to call the look incomplete.
pub(super) fn look(guest: &Guest, claims: &mut Claims) -> Result<(), DetectError> {
    let read = Rows::of("env", &["pid", "name", "value"])?.read(guest, |row| {
        let (Some(pid), Some(name)) = (row.id("pid"), row.text("name")) else {
            return;
        };
        let value = row.text("value").unwrap_or_default();
        if VARIABLES.contains(&name) && !value.is_empty() {
            let summary = format!(
                "{} brings libraries into it that it does not name",
                String::from_utf8_lossy(name)
            );
            claims.add(
                pid,
                &PRELOADED,
                &summary,
                row.evidence("env", "the variable"),
            );
        }
    });
    match read {
        Err(DetectError::Incomplete { .. }) => Ok(()),
        read => read,
    }
}

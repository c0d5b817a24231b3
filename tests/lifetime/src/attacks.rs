//! What is done to a monitor, and what notices it: rows of `SECURITY.md`.

use anyhow::Result;
use secmon_guard::Kind;

use crate::Victim;

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attacker {
    /// Root on the host, by writing to the VM's memory.
    HostWrites,
}

impl Attacker {
    fn words(self) -> &'static str {
        match self {
            Self::HostWrites => "the host writes to memory",
        }
    }
}

/// What comes of an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guard tells a finding of this kind.
    Detected(Kind),
    /// Nothing notices it at this level; what would.
    NotCovered(&'static str),
}

/// An attack.
#[derive(Clone, Copy)]
pub struct Attack {
    /// Its name.
    pub name: &'static str,
    /// What is done, in words.
    pub what: &'static str,
    /// By whom.
    pub attacker: Attacker,
    /// Does it.
    pub attempt: fn(&mut Victim) -> Result<()>,
    /// What has to come of it.
    pub outcome: Outcome,
}

/// `1 << 1` of a page-table entry: it may be written.
const WRITABLE: u64 = 1 << 1;
/// `1 << 63`: it may not be executed.
const NO_EXECUTE: u64 = 1 << 63;
/// The vector of the overflow exception, which nothing raises.
const OVERFLOW: u64 = 4;

const fn written(
    name: &'static str,
    what: &'static str,
    attempt: fn(&mut Victim) -> Result<()>,
    kind: Kind,
) -> Attack {
    Attack {
        name,
        what,
        attacker: Attacker::HostWrites,
        attempt,
        outcome: Outcome::Detected(kind),
    }
}

/// All of them.
pub const ATTACKS: &[Attack] = &[
    written(
        "kernel_text",
        "one bit of the kernel's text",
        |victim| victim.flip(victim.symbol("__x64_sys_reboot")?.wrapping_add(0x20), 1),
        Kind::ChangedKernel,
    ),
    written(
        "system_call_table",
        "one bit of an entry of the table of system calls",
        |victim| victim.flip(victim.symbol("sys_call_table")?.wrapping_add(169 * 8), 0x10),
        Kind::ChangedKernel,
    ),
    written(
        "interrupt_table",
        "one bit of a gate of the interrupt table",
        |victim| {
            victim.flip(
                victim.symbol("idt_table")?.wrapping_add(OVERFLOW * 16),
                0x10,
            )
        },
        Kind::ChangedInterrupts,
    ),
    written(
        "writable_text",
        "the kernel's text made writable in its page table",
        |victim| victim.flip_entry(victim.symbol("_stext")?, WRITABLE),
        Kind::WritableCode,
    ),
    written(
        "executable_constants",
        "the kernel's constants made executable in their page table",
        |victim| victim.flip_entry(victim.symbol("__start_rodata")?, NO_EXECUTE),
        Kind::UnknownCode,
    ),
    written(
        "modules",
        "the switch that modules can't be loaded any more",
        |victim| victim.flip(victim.symbol("modules_disabled")?, 1),
        Kind::ChangedSetting,
    ),
    written(
        "program_text",
        "one bit of secmon's text",
        Victim::flip_text,
        Kind::ChangedProgram,
    ),
    written(
        "program_constants",
        "one bit of secmon's constants",
        Victim::flip_constant,
        Kind::ChangedProgram,
    ),
    written(
        "program_relocated",
        "one bit of a pointer that secmon relocated as it started",
        Victim::flip_relocated,
        Kind::ChangedRelocated,
    ),
    written(
        "configuration",
        "one bit of the configuration and policy that process 1 gives to workers",
        Victim::change_configuration,
        Kind::ChangedConfiguration,
    ),
    Attack {
        name: "data",
        what: "one bit of the heap of process 1",
        attacker: Attacker::HostWrites,
        attempt: Victim::flip_data,
        outcome: Outcome::NotCovered("memory that the host can't write: a confidential VM"),
    },
];

/// The table of `SECURITY.md`.
#[must_use]
pub fn table() -> String {
    let mut table = "| attacker | what is attacked | outcome |\n|---|---|---|\n".to_owned();
    for attack in ATTACKS {
        let outcome = match attack.outcome {
            Outcome::Detected(kind) => format!("detected by the guard: `{kind}`"),
            Outcome::NotCovered(what) => format!("not covered; would be by {what}"),
        };
        let (who, what) = (attack.attacker.words(), attack.what);
        table.push_str(&format!("| {who} | {what} | {outcome} |\n"));
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_is_in_the_security_document() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../SECURITY.md");
        let text = std::fs::read_to_string(path).expect("SECURITY.md");
        let table = table();
        assert!(
            text.contains(&format!("\n\n{table}\n")),
            "`cargo xtask lifetime` writes this table into SECURITY.md:\n{table}"
        );
    }

    #[test]
    fn names_are_told_apart() {
        let names: BTreeSet<&str> = ATTACKS.iter().map(|attack| attack.name).collect();
        assert_eq!(names.len(), ATTACKS.len());
    }
}

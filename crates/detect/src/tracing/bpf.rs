//! Loaded BPF programs: information, unless what the kernel runs as one is not
//! what its compiler made.

use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::{Guest, Text, Value};
use secmon_memory::VirtualAddress;

use super::NAME;
use crate::code::{self, Target};
use crate::rows::{Fields, Rows};
use crate::{Class, DetectError, Finding, Severity, Subject, Technique};

/// The technique of filters that wait for a packet of their own.
const SOCKET_FILTERS: Technique = Technique::new("T1205.002");

/// Tells of all programs.
pub(super) fn look(
    guest: &Guest,
    map: &CodeMap,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    // A kernel without BPF has no programs.
    if guest.address("prog_idr").is_none() {
        return Ok(());
    }
    let rows = Rows::of(
        "bpf",
        &[
            "object",
            "id",
            "type",
            "name",
            "tag",
            "load_time",
            "uid",
            "pid",
            "attach_type",
            "attach_to",
            "entry",
            "jited_bytes",
            "address",
        ],
    )?;
    rows.read(guest, |row| {
        if row.text("object") == Some(b"program") {
            findings(program(guest, map, row));
        }
    })
}

fn program(guest: &Guest, map: &CodeMap, row: Fields<'_>) -> Finding {
    let text = |column| {
        let bytes = row.text(column).unwrap_or_default();
        Text::new(bytes).to_display().into_owned()
    };
    let address = VirtualAddress::new(row.number("address").unwrap_or_default());
    let kind = text("type");
    let name = text("name");
    let id = row.number("id").unwrap_or_default();
    let subject = Subject::KernelObject {
        kind: "bpf_prog",
        address,
        name: Text::from(name.as_str()),
    };
    let what = format!("BPF program {id} ({name}), of type {kind},");
    // One that is not compiled has no entry.
    let entry = match row.value("entry") {
        Value::Address(entry) => Some(VirtualAddress::new(*entry)),
        _ => None,
    };
    let foreign = entry.filter(|entry| is_foreign(map, *entry));
    let finding = match foreign {
        Some(entry) => Finding::new(
            NAME,
            "bpf_program_to_foreign_code",
            Class::Attack,
            Severity::Critical,
            subject,
            format!(
                "{what} is run at {entry}, {}",
                code::target(map, entry).describe()
            ),
        )
        .technique(Technique::ROOTKIT)
        .evidence(code::target_evidence(guest, map, entry)),
        None => {
            let summary = format!("{what} is loaded");
            let rank = (Class::Information, Severity::Low);
            let finding =
                Finding::new(NAME, "bpf_program_in_use", rank.0, rank.1, subject, summary);
            match kind.as_str() {
                "socket_filter" | "sched_cls" | "xdp" => finding.technique(SOCKET_FILTERS),
                _ => finding,
            }
        }
    };
    finding.evidence(row.evidence("bpf", "the program"))
}

/// Whether the address is none that the compiler gives a program.
fn is_foreign(map: &CodeMap, entry: VirtualAddress) -> bool {
    match code::target(map, entry) {
        Target::Owned(owner) => !matches!(
            owner,
            CodeOwner::Bpf { .. } | CodeOwner::BpfPack | CodeOwner::Kernel
        ),
        Target::Unowned | Target::NoCode(_) => true,
        // Compiled, and not yet or no more executable.
        Target::Beside | Target::NotExecutable => false,
    }
}

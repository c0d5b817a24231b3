//! The detector `kernel_text`: instructions that were put into the code of the
//! kernel and its modules.
//!
//! No reference is needed for what is looked at here. The kernel changes its own
//! text, but only at places and in ways of which it keeps records, and its text
//! never leads into a module. A detour must lead somewhere: to code of a module,
//! or of nobody.

mod detour;
mod sites;

pub(crate) use sites::may_trace;

use secmon_guest::Guest;
use secmon_guest::linux::code::CodeMap;
use secmon_memory::{MappedPage, VirtualAddress};

use crate::code;
use crate::detector::whole;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "kernel_text";
/// More page tables than this map no kernel image.
const MOST_TABLES: usize = 1 << 12;
/// Bytes of code that are shown.
const SHOWN: usize = 16;

/// Finds detours in kernel code.
pub struct KernelText;

impl Detector for KernelText {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds jumps and calls in the kernel's and its modules' code that lead to foreign code, \
         traced functions whose first instruction is neither a call for tracing nor empty, and \
         kernel text or constants that can be written."
    }

    fn compares(&self) -> &'static str {
        "All jumps and calls in the kernel's text, direct ones and through an address in the \
         code, with the owners of executable memory; each site of ftrace with the instructions \
         that ftrace puts there; and the page tables' rights over text and constants with those \
         that the kernel gives itself at its start."
    }

    fn evaded_by(&self) -> &'static str {
        "Changes that lead nowhere: a condition turned round, a return value changed; and \
         detours to other code of the kernel. The detector kernel_image finds them, where the \
         kernel's own file is at hand."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[
            Technique::ROOTKIT,
            Technique::new("T1056.004"),
            Technique::new("T1574.013"),
        ];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "One pass over the kernel's and its modules' text (10 to 30 MiB), and the records of \
         ftrace."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let before = guest.diagnostics().recorded();
        let map = code::map(guest, NAME)?;
        rights(guest, &map, findings)?;
        sites::look(guest, &map, findings)?;
        detour::look(guest, &map, findings)?;
        whole(guest, before, "kernel objects")
    }
}

/// Whether text or constants of the image can be written.
fn rights(
    guest: &Guest,
    map: &CodeMap,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    // A kernel that was started with `rodata=off` protects nothing.
    let unprotected = guest
        .address("rodata_enabled")
        .is_some_and(|address| guest.space().read_u8(address) == Ok(0));
    let class = match unprotected {
        true => Class::Information,
        false => Class::Attack,
    };
    for (what, section) in [("text", &map.image.text), ("constants", &map.image.rodata)] {
        let mut writable: Option<(VirtualAddress, VirtualAddress)> = None;
        let mut each = |page: MappedPage| {
            if page.rights.writable {
                let start = writable.map_or(page.address, |(start, _)| start);
                writable = Some((start.max(section.start), page.end().min(section.end)));
            }
        };
        guest
            .space()
            .mapped_pages(section.clone(), MOST_TABLES, &mut each)
            .map_err(|error| DetectError::Incomplete {
                view: "page tables",
                reason: error.to_string(),
            })?;
        let Some((start, end)) = writable else {
            continue;
        };
        let symbol = code::symbol(guest, map, start);
        let subject = Subject::KernelCode {
            address: start,
            symbol,
        };
        let summary = format!("The kernel's {what} can be written from {start} on");
        findings(
            Finding::new(
                NAME,
                "writable_kernel_text",
                class,
                Severity::High,
                subject,
                summary,
            )
            .technique(Technique::ROOTKIT)
            .evidence(
                Evidence::new("page tables", "writable")
                    .with("first", start)
                    .with("end", end),
            ),
        );
    }
    Ok(())
}

/// A finding about an instruction of the kernel that leads to `target`.
fn finding(
    guest: &Guest,
    map: &CodeMap,
    name: &'static str,
    address: VirtualAddress,
    target: Option<VirtualAddress>,
    what: &str,
) -> Finding {
    let symbol = code::symbol(guest, map, address);
    let shown = symbol.as_deref().unwrap_or("kernel code");
    let summary = match target {
        Some(target) => format!(
            "{shown} at {address} {what} {target}, {}",
            code::target(map, target).describe()
        ),
        None => format!("{shown} at {address} {what}"),
    };
    let mut bytes = [0; SHOWN];
    let shown = match guest.space().read(address, &mut bytes) {
        Ok(()) => code::hex(&bytes),
        Err(error) => error.to_string(),
    };
    let subject = Subject::KernelCode { address, symbol };
    let finding = Finding::new(
        NAME,
        name,
        Class::Attack,
        Severity::Critical,
        subject,
        summary,
    )
    .technique(Technique::ROOTKIT)
    .evidence(
        Evidence::new("kernel text", "the instruction")
            .with("address", address)
            .with("code", shown),
    );
    match target {
        Some(target) => finding.evidence(code::target_evidence(guest, map, target)),
        None => finding,
    }
}

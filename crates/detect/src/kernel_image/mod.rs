//! The detector `kernel_image`: the kernel's text and constants beside those in
//! the kernel's own file.
//!
//! What the bytes have to be is worked out by `secmon-reference`; here is what
//! the running kernel's records allow, and what is made of the rest.

mod changing;
mod disassembly;
mod patches;

use secmon_guest::Guest;
use secmon_memory::VirtualAddress;
use secmon_reference::{Comparison, Difference, DifferenceKind, Expected};

use self::patches::KernelPatches;
use crate::code;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "kernel_image";
/// Bytes that are shown of a change.
const SHOWN: usize = 32;

/// Compares the kernel with its own file.
pub struct KernelImage;

impl Detector for KernelImage {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds every byte of the kernel's text and constants that is not as the kernel's own \
         file has it, and that the kernel itself has no reason to change."
    }

    fn compares(&self) -> &'static str {
        "The text and the constants up to the kernel's data with the sections of its file, moved \
         as KASLR did, with what the kernel changes itself worked out place by place: alternative \
         instructions by the processor's features, paravirt calls, returns, calls through \
         registers, lock prefixes and constants of the start; jump labels by their keys, static \
         calls by what their keys hold, places for tracing and kprobes by their records."
    }

    fn evaded_by(&self) -> &'static str {
        "Whoever also changes what the kernel goes by: a key of a jump label, a static call's \
         function, the words of features. What is written only while the kernel starts, data, \
         and code of modules are not compared. Without the kernel's file nothing is, and that \
         is said."
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
        "The kernel's text and constants once (20 to 40 MiB); the first time also the patching of \
         a copy of the file's."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let expected = match guest.expected_image(NAME)? {
            Some(Ok(expected)) => expected,
            Some(Err(error)) => {
                return Err(DetectError::Reference {
                    reason: error.to_string(),
                });
            }
            None => {
                findings(without_reference(guest)?);
                return Ok(());
            }
        };
        let was_changing = changing::changes_its_text(guest);
        let patches = KernelPatches::of(guest, NAME)?;
        let mut comparison = expected.compare(&patches);
        let mut unsettled = 0;
        if comparison.differences.iter().any(changing::is_by_records) {
            // A record and what it is compared with were read one after the
            // other, and the kernel changes one after the other.
            let again = expected.compare(&KernelPatches::of(guest, NAME)?);
            let is_changing = was_changing || changing::changes_its_text(guest);
            unsettled = changing::settle(&mut comparison, &again, is_changing);
        }
        for difference in &comparison.differences {
            // The kernel may be changing its text just now.
            if is_still_there(guest, difference) {
                findings(finding(guest, &patches, expected, difference));
            }
        }
        whole(&comparison)?;
        match unsettled {
            0 => Ok(()),
            _ => Err(DetectError::Incomplete {
                view: "the kernel's image",
                reason: format!(
                    "the kernel is just changing its own code, {unsettled} places differ from its \
                     records"
                ),
            }),
        }
    }
}

/// Whether all was compared.
fn whole(comparison: &Comparison) -> Result<(), DetectError> {
    let reason = match (comparison.unread.first(), comparison.dropped) {
        (None, 0) => return Ok(()),
        (Some(unread), _) => format!(
            "{} pieces could not be read, the first at {:#x}",
            comparison.unread.len(),
            unread.start
        ),
        (None, dropped) => format!("{dropped} more changes than are told"),
    };
    Err(DetectError::Incomplete {
        view: "the kernel's image",
        reason,
    })
}

fn is_still_there(guest: &Guest, difference: &Difference) -> bool {
    let mut found = vec![0; difference.found.len()];
    let address = VirtualAddress::new(difference.address);
    guest.space().read(address, &mut found).is_ok() && found == difference.found
}

/// That nothing was compared, and why.
fn without_reference(guest: &Guest) -> Result<Finding, DetectError> {
    let address = guest.symbol(NAME, "_stext")?;
    let subject = Subject::KernelCode {
        address,
        symbol: Some("_stext".to_owned()),
    };
    Ok(Finding::new(
        NAME,
        "no_reference",
        Class::Information,
        Severity::Low,
        subject,
        "The kernel's text and constants were not compared with anything: the kernel's own file \
         is not at hand",
    ))
}

fn finding(
    guest: &Guest,
    patches: &KernelPatches<'_>,
    expected: &Expected,
    difference: &Difference,
) -> Finding {
    let address = VirtualAddress::new(difference.address);
    let symbol = code::symbol(guest, patches.map(), address);
    let named = symbol.as_deref().unwrap_or("the kernel's image");
    let count = difference.found.len();
    let bytes = if count == 1 { "byte" } else { "bytes" };
    let in_text = difference.section == ".text";
    let (name, class, severity, summary) = match difference.kind {
        DifferenceKind::JumpLabel => (
            "jump_label",
            Class::Suspicion,
            Severity::High,
            format!("{named} at {address}: a jump label is not as its key says"),
        ),
        DifferenceKind::StaticCall => (
            "static_call",
            Class::Attack,
            Severity::Critical,
            format!("{named} at {address}: a static call is not the one to its key's function"),
        ),
        DifferenceKind::Trace => (
            "traced_function",
            Class::Attack,
            Severity::Critical,
            format!("{named} at {address}: the place for tracing holds something else"),
        ),
        DifferenceKind::Unexplained if in_text => (
            "changed_code",
            Class::Attack,
            Severity::Critical,
            format!(
                "{named} at {address}: {count} {bytes} of code are not those of the kernel's file"
            ),
        ),
        DifferenceKind::Unexplained => (
            "changed_constant",
            Class::Attack,
            Severity::High,
            format!(
                "{named} at {address}: {count} {bytes} of {} are not those of the kernel's file",
                difference.section
            ),
        ),
    };
    let shown = |bytes: &[u8]| code::hex(bytes.get(..bytes.len().min(SHOWN)).unwrap_or_default());
    let mut file = Evidence::new("the kernel's file", "what should be there")
        .with("address", address)
        .with("section", difference.section.as_str())
        .with("bytes", shown(&difference.expected));
    let mut memory = Evidence::new("memory", "what is there")
        .with("address", address)
        .with("bytes", shown(&difference.found));
    if in_text {
        let (before, after) = disassembly::both(guest, expected, difference);
        file = file.with("instructions", before);
        memory = memory.with("instructions", after);
    }
    let subject = Subject::KernelCode { address, symbol };
    Finding::new(NAME, name, class, severity, subject, summary)
        .technique(Technique::ROOTKIT)
        .evidence(file)
        .evidence(memory)
}

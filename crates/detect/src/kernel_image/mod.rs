//! The detector `kernel_image`: the kernel's text and constants beside those in
//! the kernel's own file, or beside what they were at the first look.
//!
//! What the bytes have to be is worked out by `secmon-reference`; here is what
//! the running kernel's records allow, and what is made of the rest.

mod changing;
mod disassembly;
mod first;
mod patches;

pub use first::{expected as expected_of_first_state, first_state};

use secmon_guest::{Guest, Value};
use secmon_memory::VirtualAddress;
use secmon_reference::{Comparison, Difference, DifferenceKind, Expected, Origin};

use self::patches::KernelPatches;
use crate::code;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "kernel_image";
/// Bytes that are shown of a change.
const SHOWN: usize = 32;

/// Compares the kernel with its own file, or its first state.
pub struct KernelImage;

impl Detector for KernelImage {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds every byte of the kernel's text and constants that is not as the kernel's own \
         file has it, or as it was at the first look, and that the kernel itself has no reason to \
         change."
    }

    fn compares(&self) -> &'static str {
        "The text and the constants up to the kernel's data with the sections of its file, moved \
         as KASLR did, with what the kernel changes itself worked out place by place: alternative \
         instructions by the processor's features, paravirt calls, returns, calls through \
         registers, lock prefixes and constants of the start; jump labels by their keys, static \
         calls by what their keys hold, places for tracing and kprobes by their records. Without \
         the file, with the first verified state of this boot, where one is kept (check \
         --baseline, watch): text, constants with those written only at the start, and ORC tables, \
         as the first look saw them, where the kernel's own records do not contradict it."
    }

    fn evaded_by(&self) -> &'static str {
        "Whoever also changes what the kernel goes by: a key of a jump label, a static call's \
         function, the words of features. Data and code of modules are not compared, nor, with \
         the file, what is written only while the kernel starts. With a first state, what was \
         changed before it, and by whoever makes one boot look like another, as a new one is then \
         begun, which is told. Without file and state nothing is compared, and that is said."
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
         a copy of the file's. A first state is kept in memory, or as a file of 10 to 20 MiB."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        has_started(guest)?;
        let expected = match guest.expected_image(NAME)? {
            Some(Ok(expected)) => expected,
            Some(Err(error)) => {
                return Err(DetectError::Reference {
                    reason: error.to_string(),
                });
            }
            None => match first_look(guest)? {
                Some(expected) => expected,
                None => {
                    findings(without_reference(guest)?);
                    return Ok(());
                }
            },
        };
        if let Some(told) = Said::of(expected).told(guest, expected)? {
            findings(told);
        }
        let was_changing = changing::changes_its_text(guest);
        let patches = KernelPatches::of(guest, NAME)?;
        let mut comparison = expected.compare(patches.kernel());
        changing::name_trampolines(guest, &mut comparison);
        let mut unsettled = 0;
        if comparison.differences.iter().any(changing::is_by_records) {
            // A record and what it is compared with were read one after the
            // other, and the kernel changes one after the other.
            let mut again = expected.compare(KernelPatches::of(guest, NAME)?.kernel());
            changing::name_trampolines(guest, &mut again);
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

/// Whether the kernel has made its text and constants what they stay
/// (`kernel_init` in `init/main.c`): an error if not.
fn has_started(guest: &Guest) -> Result<(), DetectError> {
    let types = guest.types(NAME)?;
    let running = types.enumerator("system_states", "SYSTEM_RUNNING");
    let (Ok(running), Some(address)) = (running, guest.address("system_state")) else {
        return Ok(());
    };
    let state = guest.space().read_u32(address);
    let state = state.map_err(|source| DetectError::Read {
        what: "system_state",
        address,
        source,
    })?;
    if i64::from(state) >= running {
        return Ok(());
    }
    Err(DetectError::Incomplete {
        view: "the kernel's image",
        reason: "the kernel still starts, and changes its text at will".to_owned(),
    })
}

/// What was there at the first look, which this one may be.
fn first_look(guest: &Guest) -> Result<Option<&Expected>, DetectError> {
    let Some(known) = guest.first_state() else {
        return Ok(None);
    };
    if let Some(expected) = known.get() {
        return Ok(Some(expected));
    }
    let expected = expected_of_first_state(guest, first_state(guest)?)?;
    Ok(Some(known.get_or_init(|| expected)))
}

/// How one speaks of what memory is compared with.
struct Said {
    /// What the evidence is from.
    view: &'static str,
    /// What is wrong with bytes that differ.
    other: String,
    /// When the first look was, if it is that.
    taken: Option<Value>,
}

impl Said {
    fn of(expected: &Expected) -> Self {
        match expected.origin() {
            Origin::File => Self {
                view: "the kernel's file",
                other: "are not those of the kernel's file".to_owned(),
                taken: None,
            },
            Origin::FirstState { taken } => {
                let taken = Value::time(i128::from(taken) * 1_000_000_000);
                Self {
                    view: "first verified state",
                    other: format!("are not those of the first verified state, of {taken}"),
                    taken: Some(taken),
                }
            }
        }
    }

    /// That it is no file of whoever made the kernel.
    fn told(&self, guest: &Guest, expected: &Expected) -> Result<Option<Finding>, DetectError> {
        let Some(taken) = &self.taken else {
            return Ok(None);
        };
        let address = guest.symbol(NAME, "_stext")?;
        let subject = Subject::KernelCode {
            address,
            symbol: Some("_stext".to_owned()),
        };
        let text = taken.to_string();
        Ok(Some(
            Finding::new(
                NAME,
                "first_state",
                Class::Information,
                Severity::Low,
                subject,
                format!(
                    "The kernel's text and constants are compared with their first verified state, \
                     of {text}: the kernel's own file is not at hand, and what was changed before \
                     is not seen"
                ),
            )
            .evidence(
                Evidence::new(self.view, "what later looks are compared with")
                    .with("taken", taken.clone())
                    .with("unknown_bytes", expected.unknown()),
            ),
        ))
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
         is not at hand, and no earlier state of them",
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
    let said = Said::of(expected);
    let other = &said.other;
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
            format!("{named} at {address}: {count} {bytes} of code {other}"),
        ),
        DifferenceKind::Unexplained => (
            "changed_constant",
            Class::Attack,
            Severity::High,
            format!(
                "{named} at {address}: {count} {bytes} of {} {other}",
                difference.section
            ),
        ),
    };
    let shown = |bytes: &[u8]| code::hex(bytes.get(..bytes.len().min(SHOWN)).unwrap_or_default());
    let mut file = Evidence::new(said.view, "what should be there")
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

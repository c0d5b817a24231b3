//! The detector `interrupts`: the table of interrupt gates (`idt_table`,
//! `arch/x86/kernel/idt.c`).

use secmon_guest::Guest;
use secmon_guest::linux::code::CodeMap;
use secmon_memory::VirtualAddress;

use crate::code;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "interrupts";
/// Gates in the table.
const GATES: usize = 256;
/// Bytes of a gate in 64-bit mode.
const GATE_BYTES: usize = 16;
/// `__KERNEL_CS`.
const KERNEL_CODE_SEGMENT: u16 = 0x10;
/// Type of an interrupt gate.
const INTERRUPT_GATE: u8 = 0xe;
/// The first vector that is no exception (`FIRST_EXTERNAL_VECTOR`).
const FIRST_EXTERNAL: usize = 0x20;
/// `IA32_SYSCALL_VECTOR`.
const SYSTEM_CALL: usize = 0x80;
/// Exceptions that programs may raise by an instruction: breakpoint and
/// overflow.
const RAISED_BY_PROGRAMS: [usize; 2] = [3, 4];
/// Bytes from one stub of an external vector to the next.
const STUB_STRIDES: [u64; 2] = [8, 16];

/// Bytes of a stub of `early_idt_handler_array`, with and without `endbr64`.
const EARLY_STRIDES: [u64; 2] = [9, 13];

/// The symbols of the entry points of exceptions, by vector; older kernels
/// have other names.
const EXCEPTIONS: &[(usize, &str)] = &[
    (0, "asm_exc_divide_error"),
    (1, "asm_exc_debug"),
    (2, "asm_exc_nmi"),
    (3, "asm_exc_int3"),
    (4, "asm_exc_overflow"),
    (5, "asm_exc_bounds"),
    (6, "asm_exc_invalid_op"),
    (7, "asm_exc_device_not_available"),
    (8, "asm_exc_double_fault"),
    (9, "asm_exc_coproc_segment_overrun"),
    (10, "asm_exc_invalid_tss"),
    (11, "asm_exc_segment_not_present"),
    (12, "asm_exc_stack_segment"),
    (13, "asm_exc_general_protection"),
    (14, "asm_exc_page_fault"),
    (16, "asm_exc_coprocessor_error"),
    (17, "asm_exc_alignment_check"),
    (18, "asm_exc_machine_check"),
    (19, "asm_exc_simd_coprocessor_error"),
    (21, "asm_exc_control_protection"),
    (29, "asm_exc_vmm_communication"),
];

/// Finds gates that lead elsewhere than to the kernel's entry code.
pub struct Interrupts;

impl Detector for Interrupts {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds gates of the interrupt table that lead elsewhere than to their own entry points, \
         or that programs may use and should not."
    }

    fn compares(&self) -> &'static str {
        "Each of the 256 gates of idt_table with the kernel's entry text, with the symbol of its \
         exception or the stub of its vector, and with the type, privilege and segment that \
         Linux gives to gates; the table's address in idt_descr with where the table lies."
    }

    fn evaded_by(&self) -> &'static str {
        "A table elsewhere that is loaded into a CPU's register alone, and changes behind the \
         entry points (kernel_text looks there)."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[Technique::ROOTKIT, Technique::new("T1056.004")];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "One page, and the map of code."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let table = guest
            .address("idt_table")
            .ok_or(DetectError::Missing { what: "idt_table" })?;
        let mut bytes = [[0; GATE_BYTES]; GATES];
        guest
            .space()
            .read(table, bytes.as_flattened_mut())
            .map_err(|source| DetectError::Read {
                what: "idt_table",
                address: table,
                source,
            })?;
        let map = code::map(guest, NAME)?;
        let gates: Vec<Option<Gate>> = bytes.iter().map(|bytes| Gate::new(*bytes)).collect();
        let present: Vec<Gate> = gates.iter().copied().flatten().collect();
        let entries = Entries::of(guest, &map, &present);
        for (vector, gate) in gates.into_iter().enumerate() {
            let Some(gate) = gate else {
                continue;
            };
            let Some(fault) = entries.fault(vector, gate) else {
                continue;
            };
            let location = table.wrapping_add((vector * GATE_BYTES) as u64);
            let what = match fault {
                Fault::Handler(_) => "interrupt_gate",
                Fault::Attributes(_) => "interrupt_gate_attributes",
            };
            let summary = format!("The gate of interrupt {vector:#x} {}", fault.text());
            let subject = Subject::KernelPointer {
                location,
                target: gate.handler,
                symbol: Some(format!("idt_table[{vector}]")),
            };
            findings(
                Finding::new(
                    NAME,
                    what,
                    Class::Attack,
                    Severity::Critical,
                    subject,
                    summary,
                )
                .technique(Technique::ROOTKIT)
                .evidence(
                    Evidence::new("idt_table", "the gate")
                        .with("vector", vector as u64)
                        .with("handler", gate.handler)
                        .with("segment", u64::from(gate.segment))
                        .with("type", u64::from(gate.kind))
                        .with("privilege", u64::from(gate.privilege)),
                )
                .evidence(code::target_evidence(guest, &map, gate.handler)),
            );
        }
        descriptor(guest, table, findings)
    }
}

/// A gate that is present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gate {
    handler: VirtualAddress,
    segment: u16,
    kind: u8,
    privilege: u8,
}

impl Gate {
    fn new(bytes: [u8; GATE_BYTES]) -> Option<Self> {
        let raw = u128::from_le_bytes(bytes);
        let present = raw >> 47 & 1 == 1;
        let offset = (raw & 0xffff) | (raw >> 48 & 0xffff) << 16 | (raw >> 64 & 0xffff_ffff) << 32;
        present.then_some(Self {
            handler: VirtualAddress::new(offset as u64),
            segment: (raw >> 16) as u16,
            kind: (raw >> 40 & 0xf) as u8,
            privilege: (raw >> 45 & 3) as u8,
        })
    }
}

/// What is wrong with a gate.
#[derive(Debug, PartialEq, Eq)]
enum Fault {
    Handler(String),
    Attributes(String),
}

impl Fault {
    fn text(&self) -> &str {
        match self {
            Self::Handler(text) | Self::Attributes(text) => text,
        }
    }
}

/// Where gates may lead.
struct Entries {
    /// The entry text; all of the kernel's text where it has no own symbols.
    text: std::ops::Range<VirtualAddress>,
    /// The entry points of the exceptions that have a symbol.
    exceptions: Vec<(usize, VirtualAddress)>,
    /// The stubs of external and of spurious vectors.
    stubs: Vec<VirtualAddress>,
    /// `early_idt_handler_array`: what exceptions without a handler lead to
    /// since the start. It was freed and can't be executed any more.
    early: Option<VirtualAddress>,
    /// Whether all entry points have names of the form `asm_…`.
    named: bool,
    /// Entry points of kernels that name them: those of gates that are not
    /// exceptions' own and that are not stubs.
    points: Vec<VirtualAddress>,
}

impl Entries {
    fn of(guest: &Guest, map: &CodeMap, gates: &[Gate]) -> Self {
        let text = match (
            guest.address("__entry_text_start"),
            guest.address("__entry_text_end"),
        ) {
            (Some(start), Some(end)) if start < end => start..end,
            _ => map.image.text.clone(),
        };
        let exceptions: Vec<(usize, VirtualAddress)> = EXCEPTIONS
            .iter()
            .filter_map(|(vector, name)| Some((*vector, guest.address(name)?)))
            .collect();
        let stubs: Vec<VirtualAddress> = ["irq_entries_start", "spurious_entries_start"]
            .into_iter()
            .filter_map(|name| guest.address(name))
            .collect();
        let named = !exceptions.is_empty();
        let points = gates
            .iter()
            .map(|gate| gate.handler)
            .filter(|handler| is_entry_point(guest, *handler))
            .collect();
        Self {
            text,
            exceptions,
            stubs,
            early: guest.address("early_idt_handler_array"),
            named,
            points,
        }
    }

    fn fault(&self, vector: usize, gate: Gate) -> Option<Fault> {
        if !self.text.contains(&gate.handler) && !self.is_early(vector, gate.handler) {
            return Some(Fault::Handler(format!(
                "leads to {}, outside of the kernel's entry code",
                gate.handler
            )));
        }
        if self.named
            && !self.is_entry_of(vector, gate.handler)
            && !self.is_early(vector, gate.handler)
        {
            return Some(Fault::Handler(format!(
                "leads to {}, which is not the entry point of that interrupt",
                gate.handler
            )));
        }
        let for_programs = RAISED_BY_PROGRAMS.contains(&vector) || vector == SYSTEM_CALL;
        if gate.kind != INTERRUPT_GATE {
            return Some(Fault::Attributes(format!("is of type {:#x}", gate.kind)));
        }
        if gate.segment != KERNEL_CODE_SEGMENT {
            return Some(Fault::Attributes(format!(
                "enters segment {:#x}",
                gate.segment
            )));
        }
        if gate.privilege != 0 && !for_programs {
            return Some(Fault::Attributes("can be used by programs".to_owned()));
        }
        None
    }

    /// Whether the gate is still the one from the start, of an exception that
    /// this kernel has no handler for.
    fn is_early(&self, vector: usize, handler: VirtualAddress) -> bool {
        self.early.is_some_and(|early| {
            EARLY_STRIDES
                .iter()
                .any(|stride| early.wrapping_add(vector as u64 * stride) == handler)
        }) && vector < FIRST_EXTERNAL
    }

    fn is_entry_of(&self, vector: usize, handler: VirtualAddress) -> bool {
        if let Some((_, expected)) = self.exceptions.iter().find(|(of, _)| *of == vector) {
            return *expected == handler;
        }
        if self.points.contains(&handler) {
            // Not that of an exception with another number.
            return !self.exceptions.iter().any(|(_, entry)| *entry == handler);
        }
        let Some(number) = vector.checked_sub(FIRST_EXTERNAL) else {
            return false;
        };
        self.stubs.iter().any(|stubs| {
            STUB_STRIDES.iter().any(|stride| {
                // The spurious stubs start at a vector of the kernel's build.
                (0..=number as u64).any(|index| stubs.wrapping_add(index * stride) == handler)
            })
        })
    }
}

/// Whether a symbol of an entry point is at this address.
fn is_entry_point(guest: &Guest, address: VirtualAddress) -> bool {
    guest
        .symbols()
        .nearest(address)
        .is_some_and(|(symbol, distance)| {
            distance == 0
                && (symbol.name.starts_with("asm_") || symbol.name == "entry_INT80_compat")
        })
}

/// Whether the descriptor that CPUs load leads to the table.
fn descriptor(
    guest: &Guest,
    table: VirtualAddress,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    let Some(descriptor) = guest.address("idt_descr") else {
        return Ok(());
    };
    let space = guest.space();
    // The limit comes first, in two bytes.
    let location = descriptor.wrapping_add(2);
    let loaded = space
        .read_pointer(location)
        .map_err(|source| DetectError::Read {
            what: "idt_descr",
            address: location,
            source,
        })?;
    let place = |address| space.translate(address).ok().map(|found| found.physical);
    let (Some(own), found) = (place(table), place(loaded)) else {
        return Ok(());
    };
    if found == Some(own) {
        return Ok(());
    }
    let subject = Subject::KernelPointer {
        location,
        target: loaded,
        symbol: Some("idt_descr".to_owned()),
    };
    let summary = format!("The interrupt table that CPUs load lies at {loaded}, not at idt_table");
    findings(
        Finding::new(
            NAME,
            "interrupt_table_moved",
            Class::Attack,
            Severity::Critical,
            subject,
            summary,
        )
        .technique(Technique::ROOTKIT)
        .evidence(
            Evidence::new("idt_descr", "the table that is loaded")
                .with("address", loaded)
                .with("idt_table", table),
        ),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(handler: u64, kind: u8, privilege: u8, segment: u16) -> [u8; GATE_BYTES] {
        let handler = u128::from(handler);
        let raw = (handler & 0xffff)
            | u128::from(segment) << 16
            | u128::from(kind) << 40
            | u128::from(privilege) << 45
            | 1 << 47
            | (handler >> 16 & 0xffff) << 48
            | (handler >> 32) << 64;
        raw.to_le_bytes()
    }

    fn entries() -> Entries {
        let at = |offset: u64| VirtualAddress::new(0xffff_ffff_8100_0000 + offset);
        Entries {
            text: at(0)..at(0x2000),
            exceptions: vec![(3, at(0x100)), (14, at(0x200))],
            stubs: vec![at(0x800)],
            early: Some(at(0x10_0000)),
            named: true,
            points: vec![at(0x100), at(0x200), at(0x300)],
        }
    }

    #[test]
    fn gates_lead_to_their_own_entry_points() {
        let fault = |vector, offset: u64, kind, privilege, segment| {
            let bytes = gate(0xffff_ffff_8100_0000 + offset, kind, privilege, segment);
            entries().fault(vector, Gate::new(bytes).expect("present"))
        };
        assert_eq!(fault(14, 0x200, 0xe, 0, 0x10), None);
        assert_eq!(fault(3, 0x100, 0xe, 3, 0x10), None);
        assert_eq!(fault(0x22, 0x810, 0xe, 0, 0x10), None);
        assert_eq!(fault(0x80, 0x300, 0xe, 3, 0x10), None);
        assert_eq!(fault(22, 0x10_0000 + 22 * 13, 0xe, 0, 0x10), None);
        for wrong in [
            fault(14, 0x9_0000, 0xe, 0, 0x10),
            fault(14, 0x100, 0xe, 0, 0x10),
            fault(14, 0x201, 0xe, 0, 0x10),
            fault(0x22, 0x200, 0xe, 0, 0x10),
            fault(0x22, 0x811, 0xe, 0, 0x10),
            fault(22, 0x10_0000 + 21 * 13, 0xe, 0, 0x10),
        ] {
            assert!(matches!(wrong, Some(Fault::Handler(_))), "{wrong:?}");
        }
        for wrong in [
            fault(14, 0x200, 0xe, 3, 0x10),
            fault(14, 0x200, 0xf, 0, 0x10),
            fault(14, 0x200, 0xe, 0, 0x33),
        ] {
            assert!(matches!(wrong, Some(Fault::Attributes(_))), "{wrong:?}");
        }
    }

    #[test]
    fn absent_gates_are_none() {
        assert_eq!(Gate::new([0; GATE_BYTES]), None);
    }
}

//! The detector `registers`: what protects the kernel in the processors
//! themselves, and which tables they use.
//!
//! Registers are known where a hypervisor or a dump tells them. The kernel's own
//! tables and accounts are looked at in any case.

use std::collections::BTreeSet;

use secmon_guest::linux::per_cpu::PerCpu;
use secmon_guest::linux::protection::{
    Protections, SegmentTable, cr4_accounts, protections, segment_tables,
};
use secmon_guest::{Guest, Text};
use secmon_memory::{CpuRegisters, VirtualAddress};

use crate::rows::Parts;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "registers";
/// `T1562.001`, disabled or modified tools of defense.
const IMPAIRED_DEFENSES: Technique = Technique::new("T1562.001");

/// CR0: paging, and that the kernel, too, may not write to what is read-only.
const CR0_PAGING: u64 = 1 << 31;
const CR0_WRITE_PROTECT: u64 = 1 << 16;
/// EFER: pages can be marked as not executable.
const EFER_NO_EXECUTE: u64 = 1 << 11;

const CR4_NO_EXECUTION: u64 = 1 << 20;
const CR4_NO_ACCESS: u64 = 1 << 21;
/// Bits of CR4 with their names.
const CR4_BITS: [(u64, &str); 5] = [
    (1 << 11, "UMIP"),
    (1 << 16, "FSGSBASE"),
    (CR4_NO_EXECUTION, "SMEP"),
    (CR4_NO_ACCESS, "SMAP"),
    (1 << 23, "CET"),
];

/// Finds protections that were switched off, and tables of other owners.
pub struct Registers;

impl Detector for Registers {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds processors whose protections were switched off (CR0.WP, CR4.SMEP, SMAP, UMIP, \
         EFER.NXE), that use another table of interrupts or of segments than the kernel's, and \
         segments that the kernel does not have."
    }

    fn compares(&self) -> &'static str {
        "CR0, CR4 and EFER with what the kernel found at its start and pinned; the bases of IDT \
         and GDT with where idt_table and the CPUs' own tables of segments lie; each descriptor \
         of these tables with the kernel's constants; and the kernel's account of CR4 with the \
         bits that it pinned. Registers are there for dumps that QEMU wrote and for running \
         guests whose QEMU could be asked through QMP, as of the moment when the target was \
         opened; elsewhere the kernel's tables and accounts alone."
    }

    fn evaded_by(&self) -> &'static str {
        "Bits that are cleared only for the moment of a change. The MSRs that system calls enter \
         by (LSTAR, CSTAR, SYSENTER_EIP): no hypervisor here tells them; the code that they lead \
         to is looked at by kernel_text."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[Technique::ROOTKIT, IMPAIRED_DEFENSES];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "Some hundred bytes for each CPU."
    }

    fn limits(&self, guest: &Guest) -> Option<&'static str> {
        guest.registers().is_empty().then_some(
            "the CPUs' registers are not known here: a raw image has none, and a running QEMU \
             tells them through a QMP socket that is free. Looked at are the kernel's tables and \
             accounts",
        )
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let mut parts = Parts::default();
        let wanted = parts.note(protections(guest, NAME).map_err(Into::into));
        let tables = parts.note(segment_tables(guest, NAME).map_err(Into::into));
        if let Some(wanted) = wanted {
            let required = required_cr4(wanted);
            let accounts = parts.note(cr4_accounts(guest, NAME).map_err(Into::into));
            for account in accounts.into_iter().flatten() {
                let lacking = required & !account.value;
                if lacking != 0 {
                    findings(account_lacks(
                        account.cpu,
                        account.location,
                        account.value,
                        lacking,
                    ));
                }
            }
            for (cpu, registers) in (0..).zip(guest.registers()) {
                control_registers(cpu, registers, wanted, required, findings);
            }
        }
        for table in tables.iter().flatten() {
            for (number, reason) in faults(guest, table) {
                findings(descriptor(table, number, reason));
            }
        }
        parts.note(bases(guest, tables.as_deref(), findings));
        parts.finish()
    }
}

/// The bits of CR4 that must be set.
fn required_cr4(wanted: Protections) -> u64 {
    let known = CR4_BITS.iter().fold(0, |bits, (bit, _)| bits | bit);
    let mut required = wanted.pinned & known;
    if wanted.no_execution {
        required |= CR4_NO_EXECUTION;
    }
    if wanted.no_access {
        required |= CR4_NO_ACCESS;
    }
    required
}

/// The names of bits of CR4.
fn names(bits: u64) -> String {
    let names = CR4_BITS.iter().filter(|(bit, _)| bits & bit != 0);
    let names: Vec<&str> = names.map(|(_, name)| *name).collect();
    names.join(", ")
}

fn control_registers(
    cpu: u32,
    registers: &CpuRegisters,
    wanted: Protections,
    required: u64,
    findings: &mut dyn FnMut(Finding),
) {
    // One that was not started yet, or that is in the firmware's hands.
    if registers.cr0 & CR0_PAGING == 0 {
        return;
    }
    let mut off = |name: &'static str, value: u64, what: &str| {
        let subject = Subject::Register { cpu, name, value };
        let summary = format!("{what} is switched off on CPU {cpu}: {name} is {value:#x}");
        findings(
            finding("protection_off", subject, summary)
                .technique(IMPAIRED_DEFENSES)
                .evidence(evidence(cpu, registers)),
        );
    };
    if registers.cr0 & CR0_WRITE_PROTECT == 0 {
        off("cr0", registers.cr0, "the kernel's write protection (WP)");
    }
    let lacking = required & !registers.cr4;
    if lacking != 0 {
        off("cr4", registers.cr4, &names(lacking));
    }
    if let Some(efer) = registers.efer
        && wanted.no_execute_pages
        && efer & EFER_NO_EXECUTE == 0
    {
        off("efer", efer, "the execute protection of pages (NXE)");
    }
}

fn evidence(cpu: u32, registers: &CpuRegisters) -> Evidence {
    Evidence::new("registers", "what the hypervisor tells")
        .with("cpu", cpu)
        .with("cr0", format!("{:#x}", registers.cr0))
        .with("cr4", format!("{:#x}", registers.cr4))
        .with("efer", registers.efer.map(|efer| format!("{efer:#x}")))
        .with("gdt", registers.gdt_base)
        .with("idt", registers.idt_base)
}

fn finding(name: &'static str, subject: Subject, summary: String) -> Finding {
    let (class, severity) = (Class::Attack, Severity::Critical);
    Finding::new(NAME, name, class, severity, subject, summary)
}

fn account_lacks(cpu: u32, location: VirtualAddress, value: u64, lacking: u64) -> Finding {
    let subject = Subject::Register {
        cpu,
        name: "cpu_tlbstate.cr4",
        value,
    };
    let summary = format!(
        "By the kernel's own account {} is switched off on CPU {cpu}: CR4 is {value:#x}",
        names(lacking)
    );
    finding("protection_off", subject, summary)
        .technique(IMPAIRED_DEFENSES)
        .evidence(
            Evidence::new("cpu_tlbstate", "what the kernel takes CR4 for")
                .with("location", location)
                .with("cr4", format!("{value:#x}")),
        )
}

/// Whether the CPUs use the kernel's tables. Each has its own view of them: the
/// same memory counts, not the same address.
fn bases(
    guest: &Guest,
    tables: Option<&[SegmentTable]>,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    let place = |address| {
        let found = guest.space().translate(address).ok();
        found.map(|found| found.physical)
    };
    let interrupts = guest
        .address("idt_table")
        .ok_or(DetectError::Missing { what: "idt_table" })?;
    let segments: BTreeSet<_> = segment_places(guest, tables)?
        .into_iter()
        .filter_map(place)
        .collect();
    for (cpu, registers) in (0..).zip(guest.registers()) {
        if registers.cr0 & CR0_PAGING == 0 {
            continue;
        }
        let own_interrupts = place(interrupts);
        let moved = |base: &VirtualAddress| place(*base) != own_interrupts;
        if let Some(base) = registers.idt_base.filter(moved) {
            let subject = Subject::Register {
                cpu,
                name: "idt",
                value: base.as_u64(),
            };
            let summary =
                format!("CPU {cpu} uses a table of interrupts at {base}, not the kernel's");
            findings(
                finding("interrupt_table_register", subject, summary)
                    .technique(Technique::ROOTKIT)
                    .evidence(evidence(cpu, registers).with("idt_table", interrupts)),
            );
        }
        let moved = |base: &VirtualAddress| place(*base).is_none_or(|at| !segments.contains(&at));
        if let Some(base) = registers.gdt_base.filter(moved) {
            let subject = Subject::Register {
                cpu,
                name: "gdt",
                value: base.as_u64(),
            };
            let summary = format!("CPU {cpu} uses a table of segments at {base}, not the kernel's");
            findings(
                finding("segment_table_register", subject, summary)
                    .technique(Technique::ROOTKIT)
                    .evidence(evidence(cpu, registers)),
            );
        }
    }
    Ok(())
}

/// Where the tables of segments of all CPUs lie, of those that are not online
/// as well: they keep theirs.
fn segment_places(
    guest: &Guest,
    tables: Option<&[SegmentTable]>,
) -> Result<Vec<VirtualAddress>, DetectError> {
    let mut places: Vec<_> = tables
        .into_iter()
        .flatten()
        .map(|table| table.address)
        .collect();
    let cpus = PerCpu::read(guest, NAME)?;
    if let Some(page) = guest.address("gdt_page") {
        let possible = cpus.possible();
        places.extend(possible.filter_map(|cpu| cpus.checked_address(guest, page, cpu)));
    }
    Ok(places)
}

/// The descriptors that the kernel gives to each CPU and never changes, without
/// the bit that the processor sets when it loads one: 32-bit and 64-bit code of
/// the kernel, its data, 32-bit code of programs, their data, their 64-bit code.
const CONSTANTS: [(usize, u64); 6] = [
    (1, 0x00cf_9a00_0000_ffff),
    (2, 0x00af_9a00_0000_ffff),
    (3, 0x00cf_9200_0000_ffff),
    (4, 0x00cf_fa00_0000_ffff),
    (5, 0x00cf_f200_0000_ffff),
    (6, 0x00af_fa00_0000_ffff),
];
const ACCESSED: u64 = 1 << 40;
/// No entry of the kernel's.
const UNUSED: [usize; 2] = [0, 7];
/// The task state, in two entries; then the local table, in two.
const TASK_STATE: usize = 8;
const LOCAL_TABLE: usize = 10;
/// Segments that a program asked for, and the one that tells its CPU's number.
const OF_PROGRAMS: [usize; 4] = [12, 13, 14, 15];

/// The type with the bit for code and data, and the privilege.
const fn kind_of(descriptor: u64) -> (u64, u64) {
    (descriptor >> 40 & 0x1f, descriptor >> 45 & 3)
}

const fn is_present(descriptor: u64) -> bool {
    descriptor >> 47 & 1 == 1
}

/// The base of a descriptor of 16 bytes.
const fn long_base(low: u64, high: u64) -> u64 {
    (low >> 16 & 0xff_ffff) | (low >> 56) << 24 | high << 32
}

/// Descriptors that are not what the kernel puts there, and what is wrong.
fn faults(guest: &Guest, table: &SegmentTable) -> Vec<(usize, &'static str)> {
    let mut faults = shape_faults(&table.descriptors);
    let [low, high] = [TASK_STATE, TASK_STATE + 1].map(|number| table.descriptors[number]);
    let place = |address| {
        let found = guest.space().translate(address).ok();
        found.map(|found| found.physical)
    };
    if let Some(own) = table.task_state.and_then(place)
        && is_present(low)
        && place(VirtualAddress::new(long_base(low, high))) != Some(own)
    {
        faults.push((TASK_STATE, "leads to another task state than the CPU's own"));
    }
    faults
}

/// What can be said of descriptors by themselves.
fn shape_faults(descriptors: &[u64]) -> Vec<(usize, &'static str)> {
    let at = |number: usize| descriptors.get(number).copied().unwrap_or(0);
    let mut faults = Vec::new();
    for (number, constant) in CONSTANTS {
        if at(number) & !ACCESSED != constant {
            faults.push((number, "is not the kernel's constant"));
        }
    }
    for number in UNUSED {
        if at(number) != 0 {
            faults.push((number, "is in use, which the kernel does not use"));
        }
    }
    // Available and busy task states of 64-bit code.
    if !matches!(kind_of(at(TASK_STATE)), (0x9 | 0xb, 0)) {
        faults.push((TASK_STATE, "is no task state of the kernel's"));
    }
    if is_present(at(LOCAL_TABLE)) && kind_of(at(LOCAL_TABLE)).0 != 2 {
        faults.push((LOCAL_TABLE, "is no local table"));
    }
    for number in OF_PROGRAMS {
        let (kind, privilege) = kind_of(at(number));
        // Data segments (code has bit 3, gates lack bit 4) of programs.
        if is_present(at(number)) && (kind & 0x18 != 0x10 || privilege != 3) {
            faults.push((number, "is no data segment of a program"));
        }
    }
    faults
}

fn descriptor(table: &SegmentTable, number: usize, reason: &str) -> Finding {
    let value = table.descriptors.get(number).copied().unwrap_or(0);
    let address = table.address.wrapping_add(number as u64 * 8);
    let subject = Subject::KernelObject {
        kind: "segment descriptor",
        address,
        name: Text::from(format!("{number} of CPU {}", table.cpu)),
    };
    let summary = format!(
        "Entry {number} of CPU {}'s table of segments {reason}: {value:#018x}",
        table.cpu
    );
    finding("segment_descriptor", subject, summary)
        .technique(Technique::ROOTKIT)
        .evidence(
            Evidence::new("gdt_page", "the descriptor")
                .with("address", address)
                .with("descriptor", format!("{value:#018x}")),
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As in a running kernel.
    const TABLE: [u64; 16] = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
        0x7000_8b6a_2000_4087,
        0xffff_fe1b,
        0,
        0,
        0,
        0,
        0,
        0x0040_f500_0000_0000,
    ];

    #[test]
    fn the_kernels_own_descriptors_are_sound() {
        assert_eq!(shape_faults(&TABLE), []);
        assert_eq!(long_base(TABLE[8], TABLE[9]), 0xffff_fe1b_706a_2000);
    }

    #[test]
    fn gates_and_code_of_others_are_not() {
        for (number, value) in [
            (7, 0x00af_fb00_0000_ffff),
            (2, 0x00af_fb00_0000_ffff),
            // A call gate into the kernel, that programs may use.
            (12, 0xffff_ec00_0010_1234),
            (13, 0x00af_fb00_0000_ffff),
            (13, 0x00cf_9300_0000_ffff),
            (8, 0x7000_ec6a_2000_4087),
            (10, 0x0000_ec00_0010_1234),
        ] {
            let mut table = TABLE;
            table[number] = value;
            let faults = shape_faults(&table);
            assert!(
                faults.iter().any(|(found, _)| *found == number),
                "{value:#x}"
            );
        }
    }

    #[test]
    fn bits_that_must_be_set() {
        let registers = CpuRegisters {
            cr3: 0,
            cr0: CR0_PAGING | CR0_WRITE_PROTECT | 1,
            cr4: CR4_NO_EXECUTION | CR4_NO_ACCESS,
            gdt_base: None,
            idt_base: None,
            efer: Some(EFER_NO_EXECUTE),
        };
        let wanted = Protections {
            no_execution: true,
            no_access: true,
            no_execute_pages: true,
            pinned: 0,
        };
        let found = |registers: CpuRegisters| {
            let mut found = Vec::new();
            let required = required_cr4(wanted);
            control_registers(0, &registers, wanted, required, &mut |finding| {
                found.push(finding.summary);
            });
            found.len()
        };
        let off = |cr0: u64, cr4: u64, efer: u64| {
            found(CpuRegisters {
                cr0: registers.cr0 & !cr0,
                cr4: registers.cr4 & !cr4,
                efer: Some(EFER_NO_EXECUTE & !efer),
                ..registers
            })
        };
        assert_eq!(off(0, 0, 0), 0);
        assert_eq!(off(CR0_WRITE_PROTECT, 0, 0), 1);
        assert_eq!(off(0, CR4_NO_EXECUTION, 0), 1);
        assert_eq!(off(0, CR4_NO_ACCESS, EFER_NO_EXECUTE), 2);
        // Not started.
        assert_eq!(off(CR0_PAGING | CR0_WRITE_PROTECT, u64::MAX, 0), 0);
    }

    proptest! {
        #[test]
        fn any_descriptors_are_judged(descriptors in prop::collection::vec(any::<u64>(), 0..20)) {
            let _ = shape_faults(&descriptors);
        }
    }
}

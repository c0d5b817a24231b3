//! How programs and devices enter the kernel, and what the processor keeps for it.

use super::rows::{edit, found, loaded, module};
use crate::specimens::{Edit, Need, Shown, Specimen};
use crate::suite::Suite;

/// The specimens.
pub(super) const ALL: &[Specimen] = &[
    // System calls and interrupts.
    module(
        "system-call-entry",
        "T1014",
        "replaces an entry of the table of system calls",
        loaded("system_call_entry", &[Need::Symbol("sys_call_table")]),
        found("system_calls", "system_call_entry"),
        Shown::Stands,
    ),
    module(
        "system-call-dispatch",
        "T1014",
        "leads a branch of the code that dispatches system calls elsewhere",
        loaded(
            "system_call_dispatch",
            &[
                Need::Symbol("x64_sys_call"),
                Need::Symbol("__x64_sys_getpgid"),
            ],
        ),
        found("system_calls", "system_call_dispatch"),
        Shown::Stands,
    ),
    module(
        "system-call-dispatch-32",
        "T1014",
        "leads a branch of the code that dispatches 32-bit system calls elsewhere",
        loaded(
            "system_call_dispatch_32",
            &[
                Need::Symbol("ia32_sys_call"),
                Need::Symbol("__ia32_sys_getpgid"),
            ],
        ),
        found("system_calls", "system_call_dispatch"),
        Shown::Stands,
    ),
    module(
        "interrupt-gate",
        "T1014",
        "leads a gate of the interrupt descriptor table elsewhere",
        loaded("interrupt_gate", &[Need::Symbol("idt_table")]),
        found("interrupts", "interrupt_gate"),
        Shown::Stands,
    ),
    edit(
        "system-call-entry",
        "T1014",
        "replaces an entry of the table of system calls",
        Edit::SystemCallEntry,
        found("system_calls", "system_call_entry"),
    ),
    Specimen {
        suites: &[Suite::Bullseye],
        ..edit(
            "system-call-32",
            "T1014",
            "leads a system call of 32-bit programs elsewhere",
            Edit::SystemCall32,
            found("system_calls", "system_call_entry"),
        )
    },
    Specimen {
        suites: &[Suite::Sid],
        ..edit(
            "system-call-dispatch-32",
            "T1014",
            "leads a branch of the code that dispatches 32-bit system calls elsewhere",
            Edit::SystemCall32,
            found("system_calls", "system_call_dispatch"),
        )
    },
    edit(
        "interrupt-gate",
        "T1014",
        "leads a gate of the interrupt descriptor table elsewhere",
        Edit::InterruptGate,
        found("interrupts", "interrupt_gate"),
    ),
    // Registers of the processor, and its tables.
    module(
        "write-protection-off",
        "T1562.001",
        "lets the kernel write to what it may only read (CR0.WP)",
        loaded("write_protection", &[]),
        found("registers", "protection_off"),
        Shown::Stands,
    ),
    module(
        "execution-prevention-off",
        "T1562.001",
        "lets the kernel execute memory of programs (CR4.SMEP)",
        loaded("execution_prevention", &[]),
        found("registers", "protection_off"),
        Shown::Stands,
    ),
    module(
        "interrupt-table",
        "T1014",
        "has the processor use a copy of the table of interrupts",
        loaded("interrupt_table", &[]),
        found("registers", "interrupt_table_register"),
        Shown::Stands,
    ),
    module(
        "segment-descriptor",
        "T1014",
        "adds a segment to a processor's table of segments",
        loaded("segment_descriptor", &[]),
        found("registers", "segment_descriptor"),
        Shown::Stands,
    ),
    edit(
        "segment-descriptor",
        "T1014",
        "adds a segment to a processor's table of segments",
        Edit::SegmentDescriptor,
        found("registers", "segment_descriptor"),
    ),
];

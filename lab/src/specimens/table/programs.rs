//! What programs do to themselves and to each other.

use super::rows::{found, program};
use crate::specimens::Specimen;
use crate::suite::Suite;

/// The specimens.
pub(super) const ALL: &[Specimen] = &[
    program(
        "preloaded",
        "T1574.006",
        "runs with LD_PRELOAD",
        found("process_integrity", "preloaded_library"),
    ),
    program(
        "deleted-executable",
        "T1070.004",
        "runs a program whose file is deleted",
        found("process_integrity", "deleted_executable"),
    ),
    program(
        "memory-executable",
        "T1620",
        "runs a program that was only ever in memory",
        found("process_integrity", "memory_executable"),
    ),
    program(
        "kernel-thread-name",
        "T1036.004",
        "calls itself like a kernel's worker",
        found("process_integrity", "named_like_kernel_thread"),
    ),
    program(
        "writable-code",
        "T1055",
        "maps memory that can be written and executed",
        found("process_integrity", "writable_code"),
    ),
    program(
        "anonymous-code",
        "T1055",
        "has code in memory of no file",
        found("process_integrity", "anonymous_code"),
    ),
    program(
        "changed-code",
        "T1055",
        "has code that differs from its file",
        found("process_integrity", "changed_code"),
    ),
    program(
        "traced",
        "T1055.008",
        "traces another process",
        found("process_integrity", "traced_process"),
    ),
    program(
        "injected-code",
        "T1055",
        "waits in code of no file",
        found("process_integrity", "injected_code"),
    ),
    program(
        "injected-thread",
        "T1055.003",
        "has a thread that no library started, in code of no file",
        found("process_integrity", "injected_thread"),
    ),
    program(
        "shared-memory",
        "T1055",
        "has the memory of another process, and goes on beside it",
        found("process_integrity", "shared_memory"),
    ),
    program(
        "hollowed-image",
        "T1055.012",
        "has given up its program's code for code of no file",
        found("process_integrity", "hollowed_image"),
    ),
    // Newer kernels let nobody write there.
    Specimen {
        suites: &[Suite::Bullseye, Suite::Bookworm, Suite::Trixie],
        ..program(
            "changed-vdso",
            "T1055.014",
            "has changed the code that the kernel lends it",
            found("process_integrity", "changed_code"),
        )
    },
];

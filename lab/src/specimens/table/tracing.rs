//! Tracing and eBPF.

use super::rows::{found, found_information, hidden, loaded, module, program};
use crate::specimens::{Shown, Specimen};

/// The specimens.
pub(super) const ALL: &[Specimen] = &[
    module(
        "ftrace",
        "T1014",
        "has ftrace call a module at the start of a function",
        loaded("ftrace_hook", &[]),
        found_information("tracing", "ftrace_in_use"),
        Shown::Stands,
    ),
    module(
        "hidden-ftrace",
        "T1014",
        "has ftrace call a hidden module at the start of a function",
        hidden("ftrace_hook"),
        found("tracing", "ftrace_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "kprobe",
        "T1014",
        "sets a kprobe of a module",
        loaded("kprobe_hook", &[]),
        found_information("tracing", "kprobe_in_use"),
        Shown::Stands,
    ),
    module(
        "hidden-kprobe",
        "T1014",
        "sets a kprobe of a hidden module",
        hidden("kprobe_hook"),
        found("tracing", "kprobe_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "tracepoint",
        "T1014",
        "attaches a module to a tracepoint",
        loaded("tracepoint_hook", &[]),
        found_information("tracing", "tracepoint_in_use"),
        Shown::Stands,
    ),
    module(
        "hidden-tracepoint",
        "T1014",
        "attaches a hidden module to a tracepoint",
        hidden("tracepoint_hook"),
        found("tracing", "tracepoint_to_foreign_code"),
        Shown::NoModule,
    ),
    program(
        "filter-program",
        "T1205.002",
        "filters a socket's packets by an eBPF program",
        found_information("tracing", "bpf_program_in_use"),
    ),
    program(
        "kprobe-program",
        "T1014",
        "has an eBPF program run at a kprobe",
        found_information("tracing", "bpf_program_in_use"),
    ),
];

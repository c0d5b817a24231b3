//! The specimens, as data.

use super::{Edit, Expected, How, Module, Need, Shown, Specimen, Verdict};
use crate::suite::Suite;

/// The kernels that modules are built for.
const MODULES: &[Suite] = &[Suite::Bookworm, Suite::Trixie];
/// The kernels for which memory is edited instead.
const EDITED: &[Suite] = &[Suite::Bullseye, Suite::Sid];

/// Found as an attack or a suspicion.
const fn found(detector: &'static str, finding: &'static str) -> Expected {
    Expected {
        detector,
        finding: Some(finding),
        verdict: Verdict::Alarm,
    }
}

/// As [`found`], for what is legitimate.
const fn found_information(detector: &'static str, finding: &'static str) -> Expected {
    Expected {
        verdict: Verdict::Information,
        ..found(detector, finding)
    }
}

/// Not found by any detector yet; by which it is to be.
const fn open(detector: &'static str) -> Expected {
    Expected {
        detector,
        finding: None,
        verdict: Verdict::Alarm,
    }
}

/// As [`open`], for what is legitimate.
const fn open_information(detector: &'static str) -> Expected {
    Expected {
        verdict: Verdict::Information,
        ..open(detector)
    }
}

const fn module(
    name: &'static str,
    technique: &'static str,
    does: &'static str,
    how: How,
    expected: Expected,
    shown: Shown,
) -> Specimen {
    Specimen {
        name,
        technique,
        does,
        suites: MODULES,
        how,
        expected,
        shown,
    }
}

const fn loaded(file: &'static str, needs: &'static [Need]) -> How {
    How::Module(Module { file, needs })
}

/// A module without needs, hidden.
const fn hidden(file: &'static str) -> How {
    How::HiddenModule(Module { file, needs: &[] })
}

const fn program(
    role: &'static str,
    technique: &'static str,
    does: &'static str,
    expected: Expected,
) -> Specimen {
    Specimen {
        name: role,
        technique,
        does,
        suites: &Suite::ALL,
        how: How::Program(role),
        expected,
        shown: Shown::Stands,
    }
}

const fn edit(
    name: &'static str,
    technique: &'static str,
    does: &'static str,
    edit: Edit,
    expected: Expected,
) -> Specimen {
    Specimen {
        name,
        technique,
        does,
        suites: EDITED,
        how: How::MemoryEdit(edit),
        expected,
        shown: Shown::Stands,
    }
}

/// An edit of the kernel's text or constants, for all kernels: no module is
/// needed to tell it from what modules do.
const fn anywhere(
    name: &'static str,
    does: &'static str,
    edit: Edit,
    finding: &'static str,
) -> Specimen {
    Specimen {
        name,
        technique: "T1014",
        does,
        suites: &Suite::ALL,
        how: How::MemoryEdit(edit),
        expected: found("kernel_image", finding),
        shown: Shown::Stands,
    }
}

/// A process of an ordinary user, that others change.
const ORDINARY: &[Need] = &[Need::Process("ordinary")];

/// All of them.
pub const ALL: &[Specimen] = &[
    // Processes.
    module(
        "process-unlinked",
        "T1014",
        "takes a process out of the list of tasks",
        loaded("process_unlinked", ORDINARY),
        found("processes", "hidden_process"),
        Shown::NoTask,
    ),
    module(
        "process-without-pid",
        "T1014",
        "takes a process's number out of the map of numbers, and so the process out of /proc",
        loaded("process_without_pid", ORDINARY),
        found("processes", "hidden_process"),
        Shown::NoProcess,
    ),
    module(
        "process-in-no-list",
        "T1014",
        "takes a process out of the list of tasks, the map of numbers, its parent's children and \
         its cgroup's members",
        loaded("process_in_no_list", ORDINARY),
        found("processes", "hidden_process"),
        Shown::NeitherProcessNorTask,
    ),
    module(
        "thread-unlinked",
        "T1014",
        "takes a thread out of its process's list of threads",
        loaded("thread_unlinked", &[Need::Thread("threaded")]),
        found("processes", "hidden_thread"),
        Shown::NoThread,
    ),
    edit(
        "process-unlinked",
        "T1014",
        "takes a process out of the list of tasks",
        Edit::UnlinkTask,
        found("processes", "hidden_process"),
    ),
    // Modules and code.
    module(
        "module-unlinked",
        "T1014",
        "takes a module out of the list of modules",
        loaded("module_unlinked", &[Need::Resident]),
        found("modules", "hidden_module"),
        Shown::NoModule,
    ),
    module(
        "module-without-sysfs",
        "T1014",
        "takes a module out of /sys/module",
        loaded("module_without_sysfs", &[Need::Resident]),
        found("modules", "partly_hidden_module"),
        Shown::NoModuleFolder,
    ),
    module(
        "code-without-module",
        "T1014",
        "runs a kernel thread in executable memory that belongs to no module",
        loaded("code_without_module", &[]),
        found("modules", "unowned_code"),
        Shown::KernelThread("specimen-code"),
    ),
    module(
        "hidden-kernel-thread",
        "T1014",
        "runs a kernel thread in the code of a hidden module",
        hidden("kernel_thread"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    edit(
        "module-unlinked",
        "T1014",
        "takes a module out of the list of modules",
        Edit::UnlinkModule,
        found("modules", "hidden_module"),
    ),
    edit(
        "module-object-unlinked",
        "T1014",
        "takes a module's object out of the set that /sys/module shows",
        Edit::UnlinkModuleObject,
        found("modules", "partly_hidden_module"),
    ),
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
    edit(
        "interrupt-gate",
        "T1014",
        "leads a gate of the interrupt descriptor table elsewhere",
        Edit::InterruptGate,
        found("interrupts", "interrupt_gate"),
    ),
    // Kernel code.
    module(
        "function-detour",
        "T1014",
        "writes a jump over the empty instruction at the start of a kernel function",
        loaded("function_detour", &[Need::Symbol("__x64_sys_getpgid")]),
        found("kernel_text", "code_detour"),
        Shown::Stands,
    ),
    edit(
        "function-detour",
        "T1014",
        "writes a jump over the start of a kernel function",
        Edit::Jump("__x64_sys_getpgid"),
        found("kernel_text", "code_detour"),
    ),
    anywhere(
        "code-bit",
        "changes one bit in the middle of a kernel function",
        Edit::CodeBit("__x64_sys_getpgid"),
        "changed_code",
    ),
    anywhere(
        "code-condition",
        "turns the first condition round that a kernel function asks",
        Edit::Condition("cap_capable"),
        "changed_code",
    ),
    anywhere(
        "code-return-value",
        "has a function of the kernel give 0 and do nothing",
        Edit::ReturnZero("cap_capable"),
        "changed_code",
    ),
    anywhere(
        "constant-word",
        "changes a word of the kernel's constants",
        Edit::Constant("linux_proc_banner"),
        "changed_constant",
    ),
    // Pointers.
    module(
        "proc-listing",
        "T1014",
        "replaces the function that lists /proc",
        loaded("proc_listing", &[Need::Symbol("proc_root_operations")]),
        found("kernel_pointers", "constant_into_module"),
        Shown::Stands,
    ),
    module(
        "tcp-listing",
        "T1014",
        "replaces the function that shows a line of /proc/net/tcp",
        loaded("tcp_listing", &[Need::Symbol("tcp4_seq_ops")]),
        found("kernel_pointers", "constant_into_module"),
        Shown::Stands,
    ),
    module(
        "tcp-operation",
        "T1014",
        "replaces TCP's function for sending",
        loaded("tcp_operation", &[]),
        found("kernel_pointers", "operation_into_module"),
        Shown::Stands,
    ),
    module(
        "security-hook",
        "T1562.001",
        "adds a security hook that allows everything",
        loaded(
            "lsm_hook",
            &[
                Need::SymbolIfThere("security_hook_heads"),
                Need::SymbolIfThere("static_calls_table"),
            ],
        ),
        found("kernel_pointers", "security_hook"),
        Shown::Stands,
    ),
    module(
        "hidden-netfilter-hook",
        "T1205",
        "sees incoming packets by a netfilter hook of a hidden module",
        hidden("netfilter_hook"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-packet-handler",
        "T1040",
        "is handed every packet by a handler of a hidden module",
        hidden("packet_handler"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-keyboard-notifier",
        "T1056.001",
        "is told of keys by a notifier of a hidden module",
        hidden("keyboard_notifier"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-reboot-notifier",
        "T1547.006",
        "is told of the system's end by a notifier of a hidden module",
        hidden("reboot_notifier"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-binary-format",
        "T1546",
        "is asked about every program by a format of a hidden module",
        hidden("binary_format"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-timer",
        "T1014",
        "has a timer in a hidden module",
        hidden("timer"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    edit(
        "proc-listing",
        "T1014",
        "replaces the function that lists /proc",
        Edit::Pointer {
            symbol: "proc_root_operations",
            structure: "file_operations",
            member: "iterate_shared",
        },
        found("kernel_pointers", "constant_into_module"),
    ),
    edit(
        "tcp-listing",
        "T1014",
        "replaces the function that shows a line of /proc/net/tcp",
        Edit::Pointer {
            symbol: "tcp4_seq_ops",
            structure: "seq_operations",
            member: "show",
        },
        found("kernel_pointers", "constant_into_module"),
    ),
    edit(
        "tcp-operation",
        "T1014",
        "replaces TCP's function for sending",
        Edit::Pointer {
            symbol: "tcp_prot",
            structure: "proto",
            member: "sendmsg",
        },
        found("kernel_pointers", "operation_into_module"),
    ),
    // What else the kernel calls.
    module(
        "hidden-high-resolution-timer",
        "T1014",
        "has a high-resolution timer in a hidden module",
        hidden("high_resolution_timer"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-delayed-work",
        "T1014",
        "has delayed work in a hidden module",
        hidden("delayed_work"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-running-work",
        "T1014",
        "runs a hidden module's code on one of the kernel's workers",
        hidden("running_work"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-device-handler",
        "T1040",
        "is handed every packet of a device by a handler of a hidden module",
        hidden("device_handler"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-receive-handler",
        "T1205",
        "takes the packets of a device first, in a hidden module",
        hidden("receive_handler"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "hidden-overflow-handler",
        "T1014",
        "is called by a performance event, in a hidden module",
        hidden("overflow_handler"),
        found("kernel_pointers", "callback_to_foreign_code"),
        Shown::NoModule,
    ),
    module(
        "device-operations",
        "T1014",
        "replaces the operations of the loopback device",
        loaded("device_operations", &[]),
        found("kernel_pointers", "operations_table_moved"),
        Shown::Stands,
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
    edit(
        "security-hook",
        "T1562.001",
        "leads a security hook elsewhere",
        Edit::SecurityHook,
        found("kernel_pointers", "security_hook"),
    ),
    edit(
        "device-operations",
        "T1014",
        "replaces the operations of the loopback device",
        Edit::DeviceOperations,
        found("kernel_pointers", "operations_table_moved"),
    ),
    // Tracing.
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
        open_information("tracing"),
    ),
    // Credentials.
    module(
        "credentials-shared",
        "T1068",
        "lets a process use the credentials of process 1",
        loaded("credentials_shared", ORDINARY),
        found("credentials", "shared_credentials"),
        Shown::UserZero,
    ),
    module(
        "credentials-in-place",
        "T1068",
        "makes a process one of user 0, in its credentials as they are",
        loaded("credentials_in_place", ORDINARY),
        found("credentials", "forged_user"),
        Shown::UserZero,
    ),
    module(
        "capabilities-gained",
        "T1068",
        "gives a process all capabilities, in its credentials as they are",
        loaded("capabilities_gained", ORDINARY),
        found("credentials", "capabilities_of_nobody"),
        Shown::AllCapabilities,
    ),
    edit(
        "credentials-shared",
        "T1068",
        "lets a process use the credentials of process 1",
        Edit::ShareCredentials,
        found("credentials", "shared_credentials"),
    ),
    edit(
        "credentials-in-place",
        "T1068",
        "makes a process one of user 0, in its credentials as they are",
        Edit::UserZero,
        found("credentials", "forged_user"),
    ),
    edit(
        "capabilities-gained",
        "T1068",
        "gives a process all capabilities, in its credentials as they are",
        Edit::AllCapabilities,
        found("credentials", "capabilities_of_nobody"),
    ),
    program(
        "container-with-host-pids",
        "T1611",
        "runs in a container's root and namespaces, but among the host's processes",
        found("credentials", "container_with_host_processes"),
    ),
    // What processes are.
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
    // The network.
    program(
        "raw-socket",
        "T1095",
        "has a raw socket",
        found_information("network", "raw_socket"),
    ),
    program(
        "packet-socket",
        "T1040",
        "has a packet socket for all protocols",
        found("network", "packet_socket_for_all"),
    ),
    program(
        "promiscuous",
        "T1040",
        "makes an interface promiscuous",
        found("network", "promiscuous_interface"),
    ),
    // Settings.
    Specimen {
        name: "core-pattern",
        technique: "T1546",
        does: "has core dumps handed to a program",
        suites: &Suite::ALL,
        how: How::Setting {
            path: "/proc/sys/kernel/core_pattern",
            text: "|/tmp/specimen %p",
        },
        expected: found("usermode_helpers", "usermode_helper_changed"),
        shown: Shown::Stands,
    },
    Specimen {
        name: "modprobe-path",
        technique: "T1546",
        does: "names another program to load modules",
        suites: &Suite::ALL,
        how: How::Setting {
            path: "/proc/sys/kernel/modprobe",
            text: "/tmp/specimen",
        },
        expected: found("usermode_helpers", "usermode_helper_changed"),
        shown: Shown::Stands,
    },
    edit(
        "modprobe-path-written",
        "T1546",
        "writes the name of another program over that of the one which loads modules",
        Edit::Text {
            symbol: "modprobe_path",
            text: "/tmp/specimen",
        },
        found("usermode_helpers", "usermode_helper_changed"),
    ),
];

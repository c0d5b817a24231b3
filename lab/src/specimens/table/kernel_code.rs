//! Modules, and instructions of the kernel.

use super::rows::{anywhere, edit, found, hidden, loaded, module};
use crate::specimens::{Edit, Need, Shown, Specimen};

/// The specimens.
pub(super) const ALL: &[Specimen] = &[
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
];

//! Facts about what protects the kernel, and from whom.

use secmon_memory::VirtualAddress;

use super::{Fact, FactError, TABLE, decimal, enumerator, symbol, text_at, variable};
use crate::{Guest, layout};

/// More features than this are named by no kernel: 32 words of 32 bits.
const MOST_FEATURES: u64 = 1024;
/// The longest name of a feature.
const LONGEST_FEATURE: usize = 32;
/// More security modules than this are in no kernel.
const MOST_SECURITY_MODULES: u32 = 64;
/// `EFI_BOOT`: bit 0 of `efi.flags` (`include/linux/efi.h`).
const EFI_BOOT: u64 = 1;

layout! {
    /// `arch/x86/include/asm/processor.h`
    struct ProcessorLayout: "cpuinfo_x86" {
        features: "x86_capability",
    }
}

layout! {
    /// `security/selinux/include/security.h`
    struct SelinuxLayout: "selinux_state" {
    } optional {
        enforcing: "enforcing",
        initialized: "initialized",
    }
}

layout! {
    /// `include/linux/lsm_hooks.h`
    struct SecurityModuleLayout: "lsm_id" {
        name: "name",
    }
}

layout! {
    /// `include/linux/moduleparam.h`
    struct ParameterLayout: "kernel_param" {
        argument: "arg",
    }
}

layout! {
    /// `arch/x86/include/uapi/asm/bootparam.h`
    struct BootLayout: "boot_params" {
        secure_boot: "secure_boot",
    }
}

layout! {
    /// `include/linux/efi.h`
    struct EfiLayout: "efi" {
        flags: "flags",
    }
}

/// A fact that is a 4-byte variable of the kernel.
macro_rules! setting {
    ($name:literal, $symbol:literal, $meaning:literal) => {
        Fact {
            name: $name,
            meaning: $meaning,
            value: |guest| decimal(guest, $symbol),
        }
    };
}

/// A fact that is a feature of the processor which the kernel uses.
macro_rules! feature {
    ($name:literal, $feature:literal, $meaning:literal) => {
        Fact {
            name: $name,
            meaning: $meaning,
            value: |guest| has_feature(guest, $feature),
        }
    };
}

/// A fact that is a variable of an enumeration's type, and means something
/// only on a processor with that bug.
macro_rules! mitigation {
    ($name:literal, $symbol:literal, $enumeration:literal, $bug:literal, $meaning:literal) => {
        Fact {
            name: $name,
            meaning: $meaning,
            value: |guest| mitigation_state(guest, $symbol, $enumeration, $bug),
        }
    };
}

pub(super) const FACTS: &[Fact] = &[
    feature!(
        "kpti",
        "pti",
        "Whether user space has page tables without the kernel (KPTI)."
    ),
    feature!("nx", "nx", "Whether pages can be made not executable."),
    feature!(
        "smep",
        "smep",
        "Whether the kernel can't execute user pages."
    ),
    feature!(
        "smap",
        "smap",
        "Whether the kernel can't read user pages by accident."
    ),
    feature!(
        "umip",
        "umip",
        "Whether user space can't read descriptor tables' addresses."
    ),
    feature!(
        "ibt",
        "ibt",
        "Whether indirect branches must end at marked places."
    ),
    feature!(
        "user_shadow_stack",
        "user_shstk",
        "Whether user space can have shadow stacks."
    ),
    Fact {
        name: "cr4_pinned",
        meaning: "Bits of CR4 that the kernel restores when somebody clears them: bit 20 SMEP, \
                  21 SMAP, 11 UMIP, 16 FSGSBASE, 23 CET.",
        value: |guest| match symbol(guest, "cr4_pinned_bits") {
            Some(address) => Ok(Some(format!("{:#x}", guest.space().read_u64(address)?))),
            None => Ok(None),
        },
    },
    Fact {
        name: "lockdown",
        meaning: "How far root is kept from changing the kernel: none, integrity or \
                  confidentiality.",
        value: lockdown,
    },
    Fact {
        name: "security_modules",
        meaning: "The Linux security modules in use, in their order.",
        value: security_modules,
    },
    Fact {
        name: "selinux",
        meaning: "off, permissive or enforcing.",
        value: selinux,
    },
    Fact {
        name: "apparmor",
        meaning: "Whether AppArmor is on.",
        value: |guest| {
            let Some(enabled) = variable(guest, "apparmor_enabled")? else {
                return Ok(None);
            };
            let initialized = variable(guest, "apparmor_initialized")?.unwrap_or_default();
            Ok(Some((enabled & 1 != 0 && initialized != 0).to_string()))
        },
    },
    Fact {
        name: "module_signatures",
        meaning: "Whether modules without a good signature are refused.",
        value: module_signatures,
    },
    setting!(
        "modules_disabled",
        "modules_disabled",
        "1: no module can be loaded any more."
    ),
    setting!(
        "kexec_load_disabled",
        "kexec_load_disabled",
        "1: no other kernel can be started."
    ),
    Fact {
        name: "secure_boot",
        meaning: "What the firmware said of Secure Boot: enabled, disabled, unknown or unset.",
        value: secure_boot,
    },
    Fact {
        name: "efi",
        meaning: "Whether the machine was booted by EFI firmware.",
        value: |guest| {
            let Some(address) = symbol(guest, "efi") else {
                return Ok(None);
            };
            let layout = guest.layout::<EfiLayout>(TABLE)?;
            let flags = guest.number(address, &layout.flags)?;
            Ok(Some((flags & EFI_BOOT != 0).to_string()))
        },
    },
    setting!(
        "randomize_va_space",
        "randomize_va_space",
        "Randomized addresses of processes: 0 none, 1 all but the heap, 2 all."
    ),
    setting!(
        "kptr_restrict",
        "kptr_restrict",
        "Kernel addresses are shown 0 hashed, 1 to root only, 2 to nobody."
    ),
    setting!(
        "dmesg_restrict",
        "dmesg_restrict",
        "1: only root reads the kernel's log."
    ),
    setting!(
        "perf_event_paranoid",
        "sysctl_perf_event_paranoid",
        "Performance counters without privilege: -1 all; 2 and more, little or nothing."
    ),
    setting!(
        "ptrace_scope",
        "ptrace_scope",
        "Who may trace a process: 0 its user, 1 its parents, 2 root, 3 nobody."
    ),
    setting!(
        "unprivileged_bpf_disabled",
        "sysctl_unprivileged_bpf_disabled",
        "BPF without privilege: 0 allowed, 1 never again, 2 not now."
    ),
    setting!(
        "unprivileged_userns_clone",
        "unprivileged_userns_clone",
        "1: users may make user namespaces (Debian's switch)."
    ),
    setting!(
        "protected_symlinks",
        "sysctl_protected_symlinks",
        "1: links in sticky folders are followed only if their owner made them."
    ),
    setting!(
        "protected_hardlinks",
        "sysctl_protected_hardlinks",
        "1: only files one could write can be linked."
    ),
    setting!(
        "suid_dumpable",
        "suid_dumpable",
        "1 or 2: processes with other rights dump core."
    ),
    setting!(
        "audit_enabled",
        "audit_enabled",
        "1 or 2: the kernel records audit events."
    ),
    setting!(
        "panic_on_oops",
        "panic_on_oops",
        "1: the kernel stops at its first error."
    ),
    Fact {
        name: "mitigations",
        meaning: "What the command line wants of mitigations as a whole.",
        value: |guest| match variable(guest, "cpu_mitigations")? {
            Some(value) => enumerator(guest, &["cpu_mitigations"], value.into()).map(Some),
            None => Ok(None),
        },
    },
    mitigation!(
        "spectre_v1",
        "spectre_v1_mitigation",
        "spectre_v1_mitigation",
        "spectre_v1",
        "Mitigation of bounds check bypass."
    ),
    mitigation!(
        "spectre_v2",
        "spectre_v2_enabled",
        "spectre_v2_mitigation",
        "spectre_v2",
        "Mitigation of branch target injection."
    ),
    mitigation!(
        "spectre_v2_user",
        "spectre_v2_user_stibp",
        "spectre_v2_user_mitigation",
        "spectre_v2",
        "Mitigation of branch target injection between processes."
    ),
    mitigation!(
        "spec_store_bypass",
        "ssb_mode",
        "ssb_mitigation",
        "spec_store_bypass",
        "Mitigation of speculative store bypass."
    ),
    mitigation!(
        "l1tf",
        "l1tf_mitigation",
        "l1tf_mitigations",
        "l1tf",
        "Mitigation of L1 terminal faults."
    ),
    mitigation!(
        "mds",
        "mds_mitigation",
        "mds_mitigations",
        "mds",
        "Mitigation of microarchitectural data sampling."
    ),
    mitigation!(
        "tsx_async_abort",
        "taa_mitigation",
        "taa_mitigations",
        "taa",
        "Mitigation of TSX asynchronous aborts."
    ),
    mitigation!(
        "mmio_stale_data",
        "mmio_mitigation",
        "mmio_mitigations",
        "mmio_stale_data",
        "Mitigation of stale data from memory-mapped devices."
    ),
    mitigation!(
        "srbds",
        "srbds_mitigation",
        "srbds_mitigations",
        "srbds",
        "Mitigation of special register buffer data sampling."
    ),
    mitigation!(
        "reg_file_data_sampling",
        "rfds_mitigation",
        "rfds_mitigations",
        "rfds",
        "Mitigation of register file data sampling."
    ),
    mitigation!(
        "gather_data_sampling",
        "gds_mitigation",
        "gds_mitigations",
        "gds",
        "Mitigation of gather data sampling."
    ),
    mitigation!(
        "retbleed",
        "retbleed_mitigation",
        "retbleed_mitigation",
        "retbleed",
        "Mitigation of speculation behind returns."
    ),
    mitigation!(
        "spec_rstack_overflow",
        "srso_mitigation",
        "srso_mitigation",
        "srso",
        "Mitigation of speculative return stack overflow."
    ),
    mitigation!(
        "branch_history_injection",
        "bhi_mitigation",
        "bhi_mitigations",
        "bhi",
        "Mitigation of branch history injection."
    ),
    mitigation!(
        "indirect_target_selection",
        "its_mitigation",
        "its_mitigation",
        "its",
        "Mitigation of indirect target selection."
    ),
    mitigation!(
        "tsa",
        "tsa_mitigation",
        "tsa_mitigations",
        "tsa",
        "Mitigation of transient scheduler attacks."
    ),
    mitigation!(
        "vmscape",
        "vmscape_mitigation",
        "vmscape_mitigations",
        "vmscape",
        "Mitigation of guests that attack their host's user space."
    ),
];

/// Whether the kernel uses the feature of that name.
fn has_feature(guest: &Guest, feature: &str) -> Result<Option<String>, FactError> {
    Ok(processor_bit(guest, "x86_cap_flags", 0, feature)?.map(|set| set.to_string()))
}

/// Whether the bit of that name is set in `boot_cpu_data`: its number, counted
/// from `first`, is the name's place in the kernel's own list of names. None
/// if the kernel does not know the name.
fn processor_bit(
    guest: &Guest,
    names: &'static str,
    first: u64,
    wanted: &str,
) -> Result<Option<bool>, FactError> {
    let layout = guest.layout::<ProcessorLayout>(TABLE)?;
    let list = guest.symbol(TABLE, names)?;
    let processor = guest.symbol(TABLE, "boot_cpu_data")?;
    let bits = layout.features.size.saturating_mul(8).min(MOST_FEATURES);
    for bit in first..bits {
        let place = list.wrapping_add((bit - first) * 8);
        if !belongs_to(guest, place, names) {
            break;
        }
        let name = guest.space().read_pointer(place)?;
        if name.is_null() {
            continue;
        }
        if guest.space().read_c_string(name, LONGEST_FEATURE)? == wanted.as_bytes() {
            let word = processor
                .wrapping_add(layout.features.offset)
                .wrapping_add(bit / 32 * 4);
            let word = guest.space().read_u32(word)?;
            return Ok(Some(word >> (bit % 32) & 1 == 1));
        }
    }
    Ok(None)
}

/// Whether no other symbol starts between this one and `address`.
fn belongs_to(guest: &Guest, address: VirtualAddress, name: &str) -> bool {
    let nearest = guest.symbols().nearest(address);
    nearest.is_some_and(|(symbol, _)| symbol.name == name)
}

/// The number of the bit at which bugs follow the features in
/// `cpuinfo_x86.x86_capability`: as many as there are names of features, in
/// words of 32.
fn first_bug(guest: &Guest) -> Result<Option<u64>, FactError> {
    let layout = guest.layout::<ProcessorLayout>(TABLE)?;
    let list = guest.symbol(TABLE, "x86_cap_flags")?;
    let words = (layout.features.size / 4).min(MOST_FEATURES / 32);
    Ok((0..words)
        .find(|word| !belongs_to(guest, list.wrapping_add(word * 32 * 8), "x86_cap_flags"))
        .map(|word| word * 32))
}

fn mitigation_state(
    guest: &Guest,
    symbol: &'static str,
    enumeration: &str,
    bug: &str,
) -> Result<Option<String>, FactError> {
    let Some(value) = variable(guest, symbol)? else {
        return Ok(None);
    };
    let state = enumerator(guest, &[enumeration], value.into())?;
    let affected = match first_bug(guest)? {
        Some(first) => processor_bit(guest, "x86_bug_flags", first, bug)?,
        None => None,
    };
    Ok(Some(match affected {
        Some(false) => "not affected".to_owned(),
        _ => state,
    }))
}

fn lockdown(guest: &Guest) -> Result<Option<String>, FactError> {
    let Some(level) = variable(guest, "kernel_locked_down")? else {
        return Ok(None);
    };
    let name = enumerator(guest, &["lockdown_reason"], level.into())?;
    Ok(Some(
        match name.as_str() {
            "integrity_max" => "integrity",
            "confidentiality_max" => "confidentiality",
            other => other,
        }
        .to_owned(),
    ))
}

fn security_modules(guest: &Guest) -> Result<Option<String>, FactError> {
    if let Some(pointer) = symbol(guest, "lsm_names") {
        let address = guest.space().read_pointer(pointer)?;
        if address.is_null() {
            return Ok(None);
        }
        return text_at(guest, address).map(Some);
    }
    let (Some(count), Some(list)) = (symbol(guest, "lsm_active_cnt"), symbol(guest, "lsm_idlist"))
    else {
        return Ok(None);
    };
    let layout = guest.layout::<SecurityModuleLayout>(TABLE)?;
    let count = guest.space().read_u32(count)?.min(MOST_SECURITY_MODULES);
    let names: Result<Vec<String>, FactError> = (0..u64::from(count))
        .map(|index| {
            let module = guest.space().read_pointer(list.wrapping_add(index * 8))?;
            text_at(guest, guest.pointer(module, &layout.name)?)
        })
        .collect();
    Ok(Some(names?.join(",")))
}

fn selinux(guest: &Guest) -> Result<Option<String>, FactError> {
    let Some(state) = symbol(guest, "selinux_state") else {
        return Ok(None);
    };
    let layout = guest.layout::<SelinuxLayout>(TABLE)?;
    let flag = |member: &Option<secmon_profile::Member>| -> Result<Option<bool>, FactError> {
        match member {
            Some(member) => Ok(Some(guest.number(state, member)? & 1 == 1)),
            None => Ok(None),
        }
    };
    let enabled = variable(guest, "selinux_enabled_boot")?.unwrap_or(1) != 0;
    if !enabled || flag(&layout.initialized)? == Some(false) {
        return Ok(Some("off".to_owned()));
    }
    // A kernel that can't be permissive has no such member.
    let enforcing = flag(&layout.enforcing)?.unwrap_or(true);
    let state = if enforcing { "enforcing" } else { "permissive" };
    Ok(Some(state.to_owned()))
}

fn module_signatures(guest: &Guest) -> Result<Option<String>, FactError> {
    // Two variables have the name `sig_enforce`: the parameter says which.
    let Some(parameter) = symbol(guest, "__param_sig_enforce") else {
        return Ok(None);
    };
    let layout = guest.layout::<ParameterLayout>(TABLE)?;
    let argument: VirtualAddress = guest.pointer(parameter, &layout.argument)?;
    Ok(Some(
        (guest.space().read_u8(argument)? & 1 == 1).to_string(),
    ))
}

fn secure_boot(guest: &Guest) -> Result<Option<String>, FactError> {
    let Some(address) = symbol(guest, "boot_params") else {
        return Ok(None);
    };
    let layout = guest.layout::<BootLayout>(TABLE)?;
    // `enum efi_secureboot_mode`
    Ok(Some(match guest.number(address, &layout.secure_boot)? {
        0 => "unset".to_owned(),
        1 => "unknown".to_owned(),
        2 => "disabled".to_owned(),
        3 => "enabled".to_owned(),
        other => other.to_string(),
    }))
}

//! What the table `info` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Info;

use super::Check;
use crate::rows::{Comparison, Expected, ExpectedRow, TableRow};

/// The check of `info`.
pub const INFO: Check = Check {
    comparison: Comparison {
        table: "info",
        key: &["name"],
    },
    selection: Selection::default,
    expected: |truth| {
        let facts = FACTS.iter().map(|(name, _)| *name);
        let row = |name| {
            ExpectedRow::from([
                ("name", Expected::exactly(name)),
                ("value", fact(name, &truth.info)),
            ])
        };
        facts.map(row).collect()
    },
    beyond_truth: |row| !is_told(row),
};

/// What of the truth says it.
#[derive(Clone, Copy)]
enum Told {
    /// In a way of its own.
    Own,
    /// A flag of the processor.
    Flag(&'static str),
    /// A file below `/proc/sys`.
    Sysctl(&'static str),
    /// A file below `/sys/devices/system/cpu/vulnerabilities`.
    Vulnerability(&'static str),
}

/// The facts that a guest tells of itself.
const FACTS: &[(&str, Told)] = &[
    ("banner", Told::Own),
    ("release", Told::Own),
    ("version", Told::Own),
    ("machine", Told::Own),
    ("hostname", Told::Own),
    ("domainname", Told::Sysctl("kernel/domainname")),
    ("build_id", Told::Own),
    ("command_line", Told::Own),
    ("state", Told::Own),
    ("boot_time", Told::Own),
    ("time", Told::Own),
    ("uptime", Told::Own),
    ("cpus_online", Told::Own),
    ("processor", Told::Own),
    ("taint", Told::Own),
    ("memory_total", Told::Own),
    ("memory_free", Told::Own),
    ("page_levels", Told::Own),
    ("kernel_base", Told::Own),
    ("kernel_physical_base", Told::Own),
    ("kaslr_text_slide", Told::Own),
    ("kpti", Told::Flag("pti")),
    ("nx", Told::Flag("nx")),
    ("smep", Told::Flag("smep")),
    ("smap", Told::Flag("smap")),
    ("umip", Told::Flag("umip")),
    ("ibt", Told::Flag("ibt")),
    ("user_shadow_stack", Told::Flag("user_shstk")),
    ("lockdown", Told::Own),
    ("security_modules", Told::Own),
    ("apparmor", Told::Own),
    ("modules_disabled", Told::Sysctl("kernel/modules_disabled")),
    (
        "kexec_load_disabled",
        Told::Sysctl("kernel/kexec_load_disabled"),
    ),
    (
        "randomize_va_space",
        Told::Sysctl("kernel/randomize_va_space"),
    ),
    ("kptr_restrict", Told::Sysctl("kernel/kptr_restrict")),
    ("dmesg_restrict", Told::Sysctl("kernel/dmesg_restrict")),
    (
        "perf_event_paranoid",
        Told::Sysctl("kernel/perf_event_paranoid"),
    ),
    ("ptrace_scope", Told::Sysctl("kernel/yama/ptrace_scope")),
    (
        "unprivileged_bpf_disabled",
        Told::Sysctl("kernel/unprivileged_bpf_disabled"),
    ),
    (
        "unprivileged_userns_clone",
        Told::Sysctl("kernel/unprivileged_userns_clone"),
    ),
    ("protected_symlinks", Told::Sysctl("fs/protected_symlinks")),
    (
        "protected_hardlinks",
        Told::Sysctl("fs/protected_hardlinks"),
    ),
    ("suid_dumpable", Told::Sysctl("fs/suid_dumpable")),
    ("panic_on_oops", Told::Sysctl("kernel/panic_on_oops")),
    ("spectre_v1", Told::Vulnerability("spectre_v1")),
    ("spectre_v2", Told::Vulnerability("spectre_v2")),
    (
        "spec_store_bypass",
        Told::Vulnerability("spec_store_bypass"),
    ),
    ("l1tf", Told::Vulnerability("l1tf")),
    ("mds", Told::Vulnerability("mds")),
    ("tsx_async_abort", Told::Vulnerability("tsx_async_abort")),
    ("mmio_stale_data", Told::Vulnerability("mmio_stale_data")),
    ("srbds", Told::Vulnerability("srbds")),
    (
        "reg_file_data_sampling",
        Told::Vulnerability("reg_file_data_sampling"),
    ),
    (
        "gather_data_sampling",
        Told::Vulnerability("gather_data_sampling"),
    ),
    ("retbleed", Told::Vulnerability("retbleed")),
    (
        "spec_rstack_overflow",
        Told::Vulnerability("spec_rstack_overflow"),
    ),
    (
        "indirect_target_selection",
        Told::Vulnerability("indirect_target_selection"),
    ),
    ("tsa", Told::Vulnerability("tsa")),
    ("vmscape", Told::Vulnerability("vmscape")),
];

/// Whether the row is a fact that is compared, or one that a clean guest must
/// not have.
fn is_told(row: &TableRow) -> bool {
    let name = row.get("name");
    let mut names = FACTS.iter().map(|(name, _)| *name).chain(["conflict"]);
    names.any(|told| name == Some(&Value::from(told)))
}

/// Where the image lies without KASLR: `__START_KERNEL_map` and
/// `CONFIG_PHYSICAL_START`.
const IMAGE_BASE: u64 = 0xffff_ffff_8100_0000;
/// The letters of `/proc/sys/kernel/tainted`, by bit, as
/// `Documentation/admin-guide/tainted-kernels.rst` lists them.
const TAINTS: &str = "PFSRMBUDAWCIOELKXTNJ";
const SECOND: i128 = 1_000_000_000;
/// The kernel sums its clock up once a tick, and a guest that stands still for
/// a moment hears of it late.
const CLOCK_LAG: i128 = 60 * SECOND;
/// How far the sum of free memory may be behind, and how much may be taken or
/// given back between two readings.
const FREE_LAG: i128 = 256 << 20;

fn fact(name: &str, info: &Info) -> Expected {
    let told = FACTS.iter().find(|(known, _)| *known == name);
    match told.map_or(Told::Own, |(_, told)| *told) {
        Told::Own => own(name, info),
        Told::Flag(flag) => flag_of(flag, info),
        Told::Sysctl(path) => match info.sysctls.get(path) {
            Some(text) => Expected::exactly(text.as_str()),
            None => Expected::Exactly(Value::Null),
        },
        Told::Vulnerability(file) => vulnerability(info.vulnerabilities.get(file)),
    }
}

fn own(name: &str, info: &Info) -> Expected {
    let [_, host, release, version, machine] = &info.uname;
    let time = |nanoseconds: i128| Value::time(nanoseconds).to_string();
    match name {
        // Ubuntu's kernels have their package's version behind it, which
        // /proc/version leaves out.
        "banner" if version.to_string().contains("Ubuntu") => {
            let start = info.version.to_string();
            Expected::TextBetween(format!("{start} (Ubuntu "), format!("{start} (Ubuntu ~"))
        }
        "banner" => Expected::text(info.version.as_bytes()),
        "release" => Expected::text(release.as_bytes()),
        "version" => Expected::text(version.as_bytes()),
        "machine" => Expected::text(machine.as_bytes()),
        "hostname" => Expected::text(host.as_bytes()),
        "build_id" => Expected::Exactly(info.build_id.as_deref().into()),
        "command_line" => Expected::text(info.cmdline.as_bytes()),
        "state" => Expected::exactly("running"),
        "boot_time" => {
            let second = i128::from(info.boot_time) * SECOND;
            Expected::TextBetween(time(second), time(second + SECOND))
        }
        "time" => {
            let now = i128::from(info.wall_time);
            Expected::TextBetween(time(now - CLOCK_LAG), time(now + CLOCK_LAG))
        }
        "uptime" => {
            let seconds = i128::from(info.uptime) / SECOND;
            let lag = CLOCK_LAG / SECOND;
            Expected::DecimalBetween(seconds - lag, seconds + lag)
        }
        "cpus_online" => Expected::exactly(match info.processors {
            1 => "0".to_owned(),
            count => format!("0-{}", count - 1),
        }),
        "processor" => Expected::Exactly(info.processor.as_deref().into()),
        "taint" => {
            let letters = TAINTS.chars().enumerate();
            let set = letters.filter(|(bit, _)| info.taint >> bit & 1 == 1);
            let letters: String = set.map(|(_, letter)| letter).collect();
            Expected::Exactly(Some(letters).filter(|letters| !letters.is_empty()).into())
        }
        "memory_total" => match info.memory_kib.get("MemTotal") {
            Some(total) => Expected::exactly((total * 1024).to_string()),
            None => Expected::Exactly(Value::Null),
        },
        "memory_free" => {
            let free = info.memory_kib.get("MemFree").copied().unwrap_or(0);
            let free = i128::from(free) * 1024;
            Expected::DecimalBetween(free - FREE_LAG, free + FREE_LAG)
        }
        "page_levels" => Expected::exactly(info.paging_levels.to_string()),
        "kernel_base" => {
            let base = info.text_base.map(|base| format!("{base:#x}"));
            Expected::Exactly(base.into())
        }
        "kernel_physical_base" => Expected::Exactly(code_in_memory(info).into()),
        "kaslr_text_slide" => {
            let slide = info.text_base.map(|base| base.wrapping_sub(IMAGE_BASE));
            Expected::Exactly(slide.map(|slide| format!("{slide:#x}")).into())
        }
        "lockdown" => {
            let level = info.lockdown.as_deref();
            let level = level.and_then(|text| text.split_once('[')?.1.split_once(']'));
            Expected::Exactly(level.map(|(level, _)| level).into())
        }
        "security_modules" => Expected::Exactly(info.security_modules.as_deref().into()),
        "apparmor" => {
            let modules = info.security_modules.as_deref().unwrap_or_default();
            Expected::exactly(
                modules
                    .split(',')
                    .any(|name| name == "apparmor")
                    .to_string(),
            )
        }
        _ => Expected::Anything,
    }
}

/// What `/proc/cpuinfo` says of a flag. What it does not name is off, or is
/// nothing that the kernel knows.
fn flag_of(flag: &str, info: &Info) -> Expected {
    if info.processor_flags.iter().any(|set| set == flag) {
        Expected::exactly("true")
    } else {
        Expected::OneOf(vec!["false".into(), Value::Null])
    }
}

/// The kernel's words for a mitigation, and those of the table: the
/// enumerators of `arch/x86/kernel/cpu/bugs.c`.
fn vulnerability(text: Option<&String>) -> Expected {
    let Some(text) = text else {
        // The kernel does not know of it.
        return Expected::Exactly(Value::Null);
    };
    if text == "Not affected" {
        // A kernel for virtual machines can lack what does nothing there.
        Expected::OneOf(vec!["not affected".into(), Value::Null])
    } else if text.starts_with("Vulnerable") {
        Expected::OneOf(vec!["none".into(), "off".into()])
    } else if text.starts_with("Mitigation: Retpolines") {
        Expected::exactly("retpoline")
    } else if text.starts_with("Mitigation: usercopy/swapgs barriers") {
        Expected::exactly("auto")
    } else {
        // Others are not met with under an emulated processor.
        Expected::Anything
    }
}

/// Where `/proc/iomem` says that the kernel's code starts.
fn code_in_memory(info: &Info) -> Option<String> {
    let line = info
        .iomem
        .iter()
        .find(|line| line.trim_end().ends_with(": Kernel code"))?;
    let start = line.trim().split_once('-')?.0;
    Some(format!("{:#x}", u64::from_str_radix(start, 16).ok()?))
}

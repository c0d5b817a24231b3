//! The system as a whole, and the kernel's symbols.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;

use secmon_truth::{ByteString, Info, Symbol};

use super::text_of;

/// Sysctls that say how the kernel is set, as `/proc/sys` paths.
const SYSCTLS: &[&str] = &[
    "kernel/randomize_va_space",
    "kernel/kptr_restrict",
    "kernel/dmesg_restrict",
    "kernel/perf_event_paranoid",
    "kernel/unprivileged_bpf_disabled",
    "kernel/unprivileged_userns_clone",
    "kernel/panic_on_oops",
    "kernel/modules_disabled",
    "kernel/kexec_load_disabled",
    "kernel/yama/ptrace_scope",
    "kernel/hostname",
    "kernel/domainname",
    "kernel/core_pattern",
    "kernel/modprobe",
    "kernel/pid_max",
    "kernel/threads-max",
    "kernel/tainted",
    "kernel/random/boot_id",
    "vm/mmap_min_addr",
    "vm/unprivileged_userfaultfd",
    "net/core/bpf_jit_enable",
    "net/core/bpf_jit_harden",
    "user/max_user_namespaces",
    "fs/protected_symlinks",
    "fs/protected_hardlinks",
    "fs/suid_dumpable",
];

/// Everything about the system that isn't a list.
pub fn info(failures: &[String], roles: &BTreeMap<String, i32>) -> io::Result<Info> {
    let stat = fs::read_to_string("/proc/stat")?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let processor_flags = first_flags(&cpuinfo);
    let vendor = first_line(&cpuinfo, "vendor_id");
    let model = first_line(&cpuinfo, "model name");
    Ok(Info {
        uname: uname()?,
        version: read("/proc/version")?,
        cmdline: read("/proc/cmdline")?,
        boot_time: stat
            .lines()
            .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
            .unwrap_or(0),
        wall_time: clock(libc::CLOCK_REALTIME)?,
        uptime: clock(libc::CLOCK_BOOTTIME)?,
        clock_ticks: 100,
        taint: text_of("/proc/sys/kernel/tainted")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
        build_id: build_id(&fs::read("/sys/kernel/notes").unwrap_or_default()),
        vmcoreinfo: text_of("/sys/kernel/vmcoreinfo"),
        text_base: text_base()?,
        memory_kib: meminfo()?,
        processors: stat
            .lines()
            .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
            .count() as u32,
        paging_levels: if processor_flags.iter().any(|flag| flag == "la57") {
            5
        } else {
            4
        },
        processor: vendor
            .zip(model)
            .map(|(vendor, model)| format!("{vendor} {model}")),
        processor_flags,
        vulnerabilities: vulnerabilities(),
        sysctls: SYSCTLS
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), text_of(format!("/proc/sys/{name}"))?)))
            .collect(),
        lockdown: text_of("/sys/kernel/security/lockdown"),
        security_modules: text_of("/sys/kernel/security/lsm"),
        iomem: fs::read_to_string("/proc/iomem")?
            .lines()
            .map(str::to_owned)
            .collect(),
        agent_pid: std::process::id() as i32,
        workload_failures: failures.to_vec(),
        roles: roles.clone(),
    })
}

/// Every line of `/proc/kallsyms`.
pub fn symbols() -> io::Result<Vec<Symbol>> {
    let text = fs::read_to_string("/proc/kallsyms")?;
    Ok(text.lines().filter_map(symbol).collect())
}

fn symbol(line: &str) -> Option<Symbol> {
    let (address, rest) = line.split_once(' ')?;
    let (kind, rest) = rest.split_once(' ')?;
    let (name, module) = match rest.split_once('\t') {
        Some((name, module)) => (
            name,
            Some(module.trim_matches(['[', ']', ' ', '\t']).to_owned()),
        ),
        None => (rest, None),
    };
    Some(Symbol {
        address: u64::from_str_radix(address, 16).ok()?,
        kind: kind.chars().next()?,
        name: name.to_owned(),
        module,
    })
}

/// The build id in ELF notes: the note named `GNU` of type 3, in hex.
pub fn build_id(notes: &[u8]) -> Option<String> {
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(notes.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    let mut at = 0;
    loop {
        let (name_size, size, kind) = (word(at)?, word(at + 4)?, word(at + 8)?);
        let name = notes.get(at + 12..at + 12 + name_size)?;
        let start = at + 12 + name_size.next_multiple_of(4);
        let description = notes.get(start..start + size)?;
        if kind == 3 && name == b"GNU\0" {
            return Some(
                description
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect(),
            );
        }
        at = start + size.next_multiple_of(4);
    }
}

fn text_base() -> io::Result<Option<u64>> {
    let text = fs::read_to_string("/proc/kallsyms")?;
    Ok(text
        .lines()
        .filter_map(symbol)
        .find(|symbol| symbol.name == "_text")
        .map(|symbol| symbol.address))
}

fn read(path: &str) -> io::Result<ByteString> {
    let mut bytes = fs::read(path)?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Ok(ByteString(bytes))
}

fn uname() -> io::Result<[ByteString; 5]> {
    let mut names = MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: a pointer to a structure of the right type; all-zero bytes are
    // a valid value of it, so it is initialised whatever the call does.
    let names = unsafe {
        super::super::sys::check(libc::uname(names.as_mut_ptr()))?;
        names.assume_init()
    };
    Ok([
        names.sysname,
        names.nodename,
        names.release,
        names.version,
        names.machine,
    ]
    .map(|field| {
        ByteString(
            field
                .iter()
                .take_while(|byte| **byte != 0)
                .map(|byte| *byte as u8)
                .collect(),
        )
    }))
}

fn clock(clock: libc::clockid_t) -> io::Result<u64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a pointer to a structure of the right type.
    super::super::sys::check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

fn meminfo() -> io::Result<BTreeMap<String, u64>> {
    Ok(fs::read_to_string("/proc/meminfo")?
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let value = value.split_whitespace().next()?.parse().ok()?;
            Some((name.to_owned(), value))
        })
        .collect())
}

/// What the first line of that name says.
fn first_line<'t>(cpuinfo: &'t str, name: &str) -> Option<&'t str> {
    let (_, value) = cpuinfo
        .lines()
        .find(|line| line.starts_with(name))?
        .split_once(':')?;
    Some(value.trim())
}

fn first_flags(cpuinfo: &str) -> Vec<String> {
    let flags = first_line(cpuinfo, "flags").unwrap_or_default();
    flags.split_whitespace().map(str::to_owned).collect()
}

fn vulnerabilities() -> BTreeMap<String, String> {
    let Ok(entries) = fs::read_dir("/sys/devices/system/cpu/vulnerabilities") else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            Some((
                entry.file_name().into_string().ok()?,
                text_of(entry.path())?,
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_id_is_found_among_other_notes() {
        let mut notes = Vec::new();
        for (name, kind, description) in [
            (&b"Xen\0"[..], 5u32, &b"abcde"[..]),
            (&b"GNU\0"[..], 3, &[0xab, 0x01, 0xff, 0x00][..]),
        ] {
            notes.extend((name.len() as u32).to_le_bytes());
            notes.extend((description.len() as u32).to_le_bytes());
            notes.extend(kind.to_le_bytes());
            notes.extend(name);
            notes.extend(description);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        assert_eq!(build_id(&notes).as_deref(), Some("ab01ff00"));
        assert_eq!(build_id(&notes[..20]), None);
    }

    #[test]
    fn symbols_with_and_without_a_module() {
        let symbol = symbol("ffffffffc0001000 t probe\t[dummy]").unwrap();
        assert_eq!(
            (symbol.name.as_str(), symbol.module.as_deref()),
            ("probe", Some("dummy"))
        );
        assert!(
            super::symbol("ffffffff81000000 T _text")
                .unwrap()
                .module
                .is_none()
        );
    }
}

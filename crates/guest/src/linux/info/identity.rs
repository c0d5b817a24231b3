//! Facts about which kernel it is, on what machine, and since when it runs.

use super::{Fact, FactError, TABLE, enumerator, symbol, text_at, variable};
use crate::linux::clock::Clock;
use crate::linux::per_cpu::PerCpu;
use crate::linux::taint::{taint_letters, taint_meanings};
use crate::{Guest, Time, layout, value};

/// Bytes of each name in `new_utsname` (`__NEW_UTS_LEN` and its zero byte).
const NAME_BYTES: usize = 65;

layout! {
    /// `include/linux/utsname.h`
    struct NamesLayout: "uts_namespace" {
        release: "name.release",
        version: "name.version",
        machine: "name.machine",
        host: "name.nodename",
        domain: "name.domainname",
    }
}

layout! {
    /// `arch/x86/include/asm/processor.h`
    struct ProcessorLayout: "cpuinfo_x86" {
        vendor: "x86_vendor_id",
        model: "x86_model_id",
    }
}

pub(super) const FACTS: &[Fact] = &[
    Fact {
        name: "banner",
        meaning: "The kernel's own description: version, compiler, build.",
        value: |guest| Ok(Some(guest.kernel().profile.banner().to_owned())),
    },
    Fact {
        name: "release",
        meaning: "The kernel's release, as `uname -r` shows it.",
        value: |guest| name(guest, |layout| &layout.release),
    },
    Fact {
        name: "version",
        meaning: "The kernel's build, as `uname -v` shows it.",
        value: |guest| name(guest, |layout| &layout.version),
    },
    Fact {
        name: "machine",
        meaning: "The kind of processor, as `uname -m` shows it.",
        value: |guest| name(guest, |layout| &layout.machine),
    },
    Fact {
        name: "hostname",
        meaning: "The name of the host in the initial namespace.",
        value: |guest| name(guest, |layout| &layout.host),
    },
    Fact {
        name: "domainname",
        meaning: "The NIS domain in the initial namespace.",
        value: |guest| name(guest, |layout| &layout.domain),
    },
    Fact {
        name: "build_id",
        meaning: "The kernel's build id: the same for no two builds.",
        value: |guest| {
            let build_id = guest.kernel().profile.build_id();
            Ok(build_id.map(ToString::to_string))
        },
    },
    Fact {
        name: "command_line",
        meaning: "What the boot loader gave the kernel, as /proc/cmdline shows it.",
        value: |guest| {
            let Some(pointer) = symbol(guest, "saved_command_line") else {
                return Ok(None);
            };
            let address = guest.space().read_pointer(pointer)?;
            text_at(guest, address).map(Some)
        },
    },
    Fact {
        name: "state",
        meaning: "What the system does: running after it has booted.",
        value: |guest| match variable(guest, "system_state")? {
            Some(state) => enumerator(guest, &["system_states"], state.into()).map(Some),
            None => Ok(None),
        },
    },
    Fact {
        name: "boot_time",
        meaning: "When the kernel was started, by its own clock (UTC).",
        value: |guest| {
            Ok(Some(value::format_time(Time::from_nanoseconds(
                clock(guest)?.booted(),
            ))))
        },
    },
    Fact {
        name: "time",
        meaning: "The kernel's time at its last update (UTC).",
        value: |guest| {
            Ok(Some(value::format_time(Time::from_nanoseconds(
                clock(guest)?.now,
            ))))
        },
    },
    Fact {
        name: "uptime",
        meaning: "Seconds from boot to the kernel's last update of its time.",
        value: |guest| {
            let uptime = clock(guest)?.uptime();
            let (seconds, rest) = (
                uptime.div_euclid(1_000_000_000),
                uptime.rem_euclid(1_000_000_000),
            );
            Ok(Some(format!("{seconds}.{:02}", rest / 10_000_000)))
        },
    },
    Fact {
        name: "cpus_online",
        meaning: "The numbers of the CPUs in use.",
        value: |guest| Ok(Some(ranges(cpus(guest)?.online()))),
    },
    Fact {
        name: "cpus_possible",
        meaning: "The numbers of the CPUs that could be plugged in.",
        value: |guest| {
            let possible: Vec<u32> = cpus(guest)?.possible().collect();
            Ok(Some(ranges(&possible)))
        },
    },
    Fact {
        name: "processor",
        meaning: "The processor's vendor and model, as the guest sees them.",
        value: processor,
    },
    Fact {
        name: "hypervisor",
        meaning: "The hypervisor that the kernel knows it runs on; native: none it knows.",
        value: |guest| match variable(guest, "x86_hyper_type")? {
            Some(kind) => enumerator(guest, &["x86_hypervisor_type"], kind.into()).map(Some),
            None => Ok(None),
        },
    },
    Fact {
        name: "taint",
        meaning: "Letters for what may have harmed the kernel since boot; null for nothing.",
        value: |guest| Ok(taint_letters(taint(guest)?)),
    },
    Fact {
        name: "taint_meaning",
        meaning: "What those letters say.",
        value: |guest| {
            let meanings = taint_meanings(taint(guest)?);
            Ok((!meanings.is_empty()).then(|| meanings.join("; ")))
        },
    },
    Fact {
        name: "found_by",
        meaning: "What led to the kernel's page tables, and to its symbols and types.",
        value: |guest| {
            let evidence = &guest.kernel().evidence;
            Ok(Some(format!(
                "page tables: {:?}, profile: {:?}",
                evidence.tables, evidence.profile
            )))
        },
    },
];

fn name(
    guest: &Guest,
    member: fn(&NamesLayout) -> &secmon_profile::Member,
) -> Result<Option<String>, FactError> {
    let layout = guest.layout::<NamesLayout>(TABLE)?;
    let names = guest.symbol(TABLE, "init_uts_ns")?;
    let address = names.wrapping_add(member(&layout).offset);
    let bytes = guest.space().read_c_string(address, NAME_BYTES)?;
    Ok(Some(crate::Text::new(bytes).to_display().into_owned()))
}

fn clock(guest: &Guest) -> Result<Clock, FactError> {
    Clock::read(guest, TABLE).map_err(|error| FactError::Other(error.to_string()))
}

fn cpus(guest: &Guest) -> Result<PerCpu, FactError> {
    Ok(PerCpu::read(guest, TABLE)?)
}

fn taint(guest: &Guest) -> Result<u64, FactError> {
    let address = guest.symbol(TABLE, "tainted_mask")?;
    Ok(guest.space().read_u64(address)?)
}

fn processor(guest: &Guest) -> Result<Option<String>, FactError> {
    let layout = guest.layout::<ProcessorLayout>(TABLE)?;
    let processor = guest.symbol(TABLE, "boot_cpu_data")?;
    let text = |member: &secmon_profile::Member| {
        let address = processor.wrapping_add(member.offset);
        guest
            .space()
            .read_c_string(address, member.size.min(256) as usize)
            .map(|bytes| crate::Text::new(bytes).to_display().trim().to_owned())
    };
    Ok(Some(format!(
        "{} {}",
        text(&layout.vendor)?,
        text(&layout.model)?
    )))
}

/// Numbers in ascending order as `0-3,8`.
fn ranges(numbers: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*number) => *last = *number,
            _ => parts.push((*number, *number)),
        }
    }
    let parts: Vec<String> = parts
        .into_iter()
        .map(|(first, last)| {
            if first == last {
                first.to_string()
            } else {
                format!("{first}-{last}")
            }
        })
        .collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn ranges_of_numbers() {
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[0]), "0");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
    }
}

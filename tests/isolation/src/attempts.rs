//! What is tried, and what denies it: the rows of `SECURITY.md`.

/// Where an attempt is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// By a monitoring VM whose program was replaced.
    Monitor,
    /// By a target, on the monitor that reads it.
    Target,
}

/// An attempt.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Its name in the tests.
    pub name: &'static str,
    /// Where it is made.
    pub setting: Setting,
    /// What is tried.
    pub tried: &'static str,
    /// What happens, and what denies it.
    pub happened: &'static str,
}

const fn monitor(name: &'static str, tried: &'static str, happened: &'static str) -> Attempt {
    Attempt {
        name,
        setting: Setting::Monitor,
        tried,
        happened,
    }
}

const fn target(name: &'static str, tried: &'static str, happened: &'static str) -> Attempt {
    Attempt {
        name,
        setting: Setting::Target,
        tried,
        happened,
    }
}

/// All of them, in the order of the table.
pub const ATTEMPTS: &[Attempt] = &[
    monitor(
        "bar_widths",
        "storing 1, 2, 4, 8, 16 and 32 bytes at 308 offsets of the BAR, aligned and not, past the caches",
        "denied: QEMU has the file mapped read-only and drops the store",
    ),
    monitor(
        "bar_strings",
        "`rep movsb` and `rep stosb` of 1 byte to 256 KiB",
        "denied: as above",
    ),
    monitor(
        "bar_atomics",
        "`lock cmpxchg`, `xchg`, `lock xadd`, `lock not`, `lock btc`, also split over two lines",
        "denied: as above",
    ),
    monitor(
        "bar_kernel",
        "letting the VM's kernel write: `read` into the BAR, `/dev/mem`, `/proc/self/mem`, a second mapping",
        "denied: as above",
    ),
    monitor(
        "bar_configuration",
        "ones and zeros into every register of the device and all of its configuration space",
        "denied: the device has no register that changes its memory",
    ),
    monitor(
        "bar_moved",
        "moving the BAR to other addresses and storing there",
        "denied: the same memory is seen there, as read-only as before",
    ),
    monitor(
        "bar_enlarged",
        "enlarging it: a longer mapping, a larger size mask, a resizable BAR, addresses behind its end",
        "denied: the device has no such capability, and nothing is behind it",
    ),
    monitor(
        "dma_virtio",
        "DMA: buffers and used rings of the virtio-serial device put into the BAR",
        "denied: QEMU lets its devices write no read-only memory either",
    ),
    monitor(
        "dma_msi",
        "DMA: interrupts (MSI-X) addressed to the BAR",
        "denied: as above",
    ),
    monitor(
        "dma_fw_cfg",
        "DMA: fw_cfg told to copy files into the BAR",
        "denied: as above",
    ),
    monitor(
        "other_memory",
        "finding a third VM's memory: its words in all BARs, anything in a terabyte of addresses",
        "denied: nothing answers that was not granted",
    ),
    monitor(
        "hot_plug",
        "plugging in a device: slot registers, ACPI hot plug, all 65,536 functions on the buses",
        "denied: only the host plugs in, by its QMP",
    ),
    monitor(
        "fw_cfg_items",
        "reading all 65,536 items of fw_cfg",
        "denied: they are the VM's own kernel, initial file system, configuration and tables",
    ),
    monitor(
        "fw_cfg_writes",
        "writing them, by register and by DMA",
        "denied: QEMU takes no write",
    ),
    monitor(
        "host_devices",
        "devices that could reach a file: disks, 9p, virtiofs, USB, TPM, with their drivers loaded",
        "denied: there is none; the PCI devices are those of the launcher's command line",
    ),
    monitor(
        "host_ports",
        "VMware's back door, debug consoles and exits, parallel port, further serial ports, floppy",
        "denied: nothing answers",
    ),
    monitor(
        "network_interfaces",
        "network cards, with the drivers for them loaded",
        "denied: there is the loopback alone",
    ),
    monitor(
        "network_sockets",
        "TCP, UDP, vsock to where a host usually is",
        "denied: no route, no device",
    ),
    monitor(
        "gate_requests",
        "each of the gate's requests that `observe` does not include, as a client of the gate",
        "denied by the grant, each with its right; logged",
    ),
    monitor(
        "gate_commands",
        "every QMP command that QEMU lists and 25 gdb packets as QEMU takes them, before a handshake and within a session",
        "denied: before it nothing is heard, within it they are no requests and end the session",
    ),
    monitor(
        "gate_keys",
        "a handshake with another key, to another gate, of another version, of another role",
        "denied: refused",
    ),
    monitor(
        "gate_replay",
        "a recorded session sent again, three times",
        "denied: its first frame no longer decrypts",
    ),
    monitor(
        "gate_frames",
        "frames of length 0, of 4 GiB, cut short, of 64 KiB of garbage",
        "denied: that session ends",
    ),
    monitor(
        "gate_flood",
        "garbage, hellos and requests for seconds at full rate, answers not read",
        "denied: limited, and the session ends",
    ),
    monitor(
        "gate_half_open",
        "conversations that stop in each part of the handshake, a silent session",
        "denied: they end by themselves",
    ),
    monitor(
        "channel_garbage",
        "to the host's client: bytes without end",
        "denied: no conversation, said at its deadline",
    ),
    monitor(
        "channel_answers",
        "to the host's client: forged answers and hellos",
        "denied: no conversation",
    ),
    monitor(
        "channel_malformed",
        "with the monitor's own key: messages that are none",
        "denied: the client ends with status 2",
    ),
    monitor(
        "channel_oversized",
        "with the monitor's own key: a message of 4 MiB",
        "denied: the client ends at its bound of 1 MiB",
    ),
    monitor(
        "channel_endless",
        "with the monitor's own key: bytes without end for 16 that were asked for",
        "denied: the client ends, as there is more than was asked for",
    ),
    monitor(
        "channel_escapes",
        "with the monitor's own key: escape sequences in rows, errors and names",
        "denied: they are escaped",
    ),
    monitor(
        "console_flood",
        "1.8 MB of text and escape sequences to the console, at and beyond a serial line's speed",
        "denied: QEMU keeps to the line's speed, the log to its 2 MiB, what writes it to 64 MiB of memory",
    ),
    target(
        "cyclic_lists",
        "lists of processes, threads, children, modules and mounts that come back to themselves",
        "denied: walks are bounded; what is cut off is said",
    ),
    target(
        "cyclic_trees",
        "maple trees of memory areas and the radix tree of process numbers whose nodes lead to themselves",
        "denied: walks are bounded and check each node; said",
    ),
    target(
        "huge_counts",
        "2^32 open files, 2^31 log records, arguments of 128 TiB, module names without an end",
        "denied: counts are checked against what is there; said",
    ),
    target(
        "page_tables",
        "page tables of processes and of the kernel that lead to themselves",
        "denied: translation has four levels, whatever they hold; said",
    ),
    target(
        "pointers_everywhere",
        "all memory but the kernel's image and page tables filled with pointers to one process",
        "denied: as above; said",
    ),
    target(
        "random_words",
        "thousands of words changed at random, half of them to kernel addresses",
        "denied: as above; said",
    ),
    target(
        "random_memory",
        "all memory random",
        "denied: the search is bounded; there is no kernel, it says",
    ),
    target(
        "no_memory",
        "all memory zero",
        "denied: it has not started, it says",
    ),
    target(
        "rewritten_ram",
        "RAM rewritten by another writer without rest during reads",
        "denied: bytes are copied once and then checked; what was torn is counted",
    ),
    target(
        "twin",
        "a target that is a copy of the monitor: same image, same size; each watches the other",
        "denied: each shows the other, not itself",
    ),
];

/// What the list has for a setting.
pub fn of(setting: Setting) -> impl Iterator<Item = &'static Attempt> {
    ATTEMPTS
        .iter()
        .filter(move |attempt| attempt.setting == setting)
}

/// The table of a setting, as it stands in `SECURITY.md`.
#[must_use]
pub fn table(setting: Setting) -> String {
    let mut table = "| attempt | what happened |\n|---|---|\n".to_owned();
    for Attempt {
        tried, happened, ..
    } in of(setting)
    {
        table.push_str(&format!("| {tried} | {happened} |\n"));
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_tables_are_in_the_security_document() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../SECURITY.md");
        let text = std::fs::read_to_string(path).expect("SECURITY.md");
        for setting in [Setting::Monitor, Setting::Target] {
            let table = table(setting);
            assert!(
                text.contains(&format!("\n\n{table}\n")),
                "SECURITY.md lacks this table as it is here:\n{table}"
            );
        }
    }

    #[test]
    fn names_are_told_apart_and_everything_is_denied() {
        let names: BTreeSet<&str> = ATTEMPTS.iter().map(|attempt| attempt.name).collect();
        assert_eq!(names.len(), ATTEMPTS.len());
        for attempt in ATTEMPTS {
            assert!(attempt.happened.starts_with("denied"), "{}", attempt.name);
        }
    }
}

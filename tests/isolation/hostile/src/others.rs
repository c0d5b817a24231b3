//! Memory that was not granted: another VM's, anything else in the machine's
//! address space, devices that are not plugged in.

use std::collections::BTreeMap;
use std::fs::{self, File};

use anyhow::{Context, Result, ensure};
use secmon_hostile::Report;
use serde_json::Value;

use crate::bar::MEMORY_BAR;
use crate::memory::{PAGE, Window};
use crate::pci;
use crate::ports::Ports;

/// The words to look for come with all bits flipped, so that what looks for
/// them does not find itself.
fn word(argument: &Value, name: &str) -> Result<Vec<u8>> {
    let text = argument[name].as_str().with_context(|| name.to_owned())?;
    (0..text.len() / 2)
        .map(|at| Ok(!u8::from_str_radix(&text[at * 2..at * 2 + 2], 16)?))
        .collect()
}

/// Where `word` is in a window.
fn find(window: &Window, word: &[u8]) -> Option<usize> {
    const STEP: usize = 1 << 20;
    let mut at = 0;
    while at < window.length() {
        let count = (STEP + word.len()).min(window.length() - at);
        let bytes = window.bytes(at, count);
        let first = *word.first()?;
        let mut from = 0;
        while let Some(next) = bytes[from..].iter().position(|byte| *byte == first) {
            if bytes[from + next..].starts_with(word) {
                return Some(at + from + next);
            }
            from += next + 1;
        }
        at += STEP;
    }
    None
}

/// Looks for a word of the target's, which must be found, and for one that
/// only the other VM has, in all BARs; and for anything at all in the rest of
/// the address space.
pub fn memory(argument: &Value) -> Result<Report> {
    let (own, other) = (word(argument, "target")?, word(argument, "other")?);
    let mut report = Report::new();
    let shared = pci::shared_memory()?;
    let window = shared.map(MEMORY_BAR)?;
    ensure!(
        find(&window, &own).is_some(),
        "the target's own word is not found"
    );
    report.tried(find(&window, &other).is_none(), || "in the BAR".to_owned());
    for device in pci::list()? {
        for index in 0..6 {
            let Some((_, length)) = device.bar(index)? else {
                continue;
            };
            if device.address == shared.address && index == MEMORY_BAR || length > 1 << 28 {
                continue;
            }
            // A BAR of ports can't be mapped.
            let Ok(window) = device.map(index) else {
                continue;
            };
            // Registers may act when they are read; what they hold is no RAM.
            if length >= 1 << 16 {
                let found = find(&window, &other).is_some();
                report.tried(!found, || format!("in BAR {index} of {}", device.address));
            }
        }
    }

    // What the kernel knows of: RAM, devices, tables.
    let known: Vec<(u64, u64)> = fs::read_to_string("/proc/iomem")?
        .lines()
        .filter(|line| !line.contains("PCI Bus"))
        .filter_map(|line| {
            let (start, end) = line.split_once(':')?.0.trim().split_once('-')?;
            let number = |text: &str| u64::from_str_radix(text.trim(), 16).ok();
            Some((number(start)?, number(end)?))
        })
        .collect();
    let physical = File::options().read(true).open("/dev/mem")?;
    let physical_window = |address| map_for_reading(&physical, address);
    let below = (0..1_u64 << 32).step_by(8 << 20);
    let above = (1_u64 << 32..1 << 40).step_by(256 << 20);
    let mut answered: BTreeMap<u64, u64> = BTreeMap::new();
    for address in below.chain(above) {
        if known
            .iter()
            .any(|(start, end)| (*start..=*end).contains(&address))
        {
            continue;
        }
        report.tries += 1;
        if let Some(value) = physical_window(address)
            && value != u64::MAX
            && value != 0
        {
            answered.insert(address, value);
        }
    }
    ensure!(report.tries > 3000, "only {} addresses", report.tries);
    for (address, value) in answered {
        report
            .successes
            .push(format!("{value:#x} at {address:#x}, which is nobody's"));
    }
    Ok(report)
}

/// The first eight bytes there, if the kernel lets them be seen.
fn map_for_reading(physical: &File, address: u64) -> Option<u64> {
    let window = Window::map_read_only(physical, address, PAGE).ok()?;
    let bytes = window.bytes(0, 8);
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// Asks for devices: by the slots' own registers and by the ports that QEMU has
/// for ACPI; then looks for what came.
pub fn hot_plug() -> Result<Report> {
    let addresses = || -> Result<Vec<String>> {
        let devices = pci::list()?.into_iter();
        Ok(devices.map(|device| device.address).collect())
    };
    let before = addresses()?;
    let ports = Ports::open()?;
    let mut report = Report::new();
    for device in pci::list()? {
        // Bridges: PCI Express capability, slot control at 0x18.
        if device.class >> 8 != 0x0604 {
            continue;
        }
        let configuration = device.configuration()?;
        let Some(capability) = configuration.capabilities(0x10)?.first().copied() else {
            continue;
        };
        let saved = configuration.u16(capability + 0x18)?;
        // Only of slots that hold nothing: power off and on ends a device.
        let present = configuration.u16(capability + 0x1a)? & 0x40 != 0;
        if !present {
            for control in [0x0000, 0x0100, 0x0400, 0x07ff, 0x01c0] {
                configuration.set_u16(capability + 0x18, control)?;
                report.tries += 1;
            }
            configuration.set_u16(capability + 0x18, saved)?;
        }
    }
    // QEMU's ACPI hot plug: bus select, then what is up and down to read; a
    // write to the last one only ejects, so it is left alone.
    for bus in 0..32 {
        ports.write_u32(0x0cc0 + 0x10, bus);
        // What was plugged in before the start may still be told of here.
        let _ = ports.read_u32(0x0cc0);
        report.tries += 1;
    }
    fs::write("/sys/bus/pci/rescan", "1").context("looking again")?;
    let after = addresses()?;
    report.tried(before == after, || format!("{after:?} after {before:?}"));
    // Every function of every bus, past the kernel's own list.
    let mut functions = Vec::new();
    for bus in 0..=255_u32 {
        for function in 0..256_u32 {
            if bus > 20 && function % 8 != 0 {
                continue;
            }
            report.tries += 1;
            ports.write_u32(0xcf8, 0x8000_0000 | bus << 16 | function << 8);
            let id = ports.read_u32(0xcfc);
            if id != u32::MAX {
                functions.push(format!(
                    "0000:{bus:02x}:{:02x}.{}",
                    function >> 3,
                    function & 7
                ));
            }
        }
    }
    functions.sort();
    report.tried(functions == before, || {
        format!("{functions:?} answer, the kernel knows {before:?}")
    });
    Ok(report)
}

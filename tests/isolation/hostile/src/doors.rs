//! Ways to the host's files: what QEMU hands out by fw_cfg, and the ports by
//! which a guest can speak to its hypervisor.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use secmon_hostile::Report;
use serde_json::Value;

use crate::memory::Window;
use crate::ports::Ports;
use crate::virtio::wait;

/// fw_cfg's ports, and items (QEMU `include/standard-headers/linux/qemu_fw_cfg.h`).
const SELECTOR: u16 = 0x510;
const DATA: u16 = 0x511;
const FIRST_FILE: u16 = 0x20;
const WRITE_CHANNEL: u16 = 0x4000;
/// Where Linux shows the files.
const FILES: &str = "/sys/firmware/qemu_fw_cfg/by_key";

/// What has no name: numbers of the machine, and the kernel, its initial file
/// system and its command line, which this VM was started with.
fn is_legacy(key: u16) -> bool {
    const LAST_LEGACY: u16 = 0x1f;
    const ARCHITECTURE: u16 = 0x8000;
    key <= LAST_LEGACY || (ARCHITECTURE..=ARCHITECTURE + 4).contains(&key)
}

/// The numbers and names of the files.
fn files() -> Result<Vec<(u16, String)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(FILES).context(FILES)? {
        let path = entry?.path();
        let key = path.file_name().and_then(|name| name.to_str());
        let key = key.and_then(|key| key.parse().ok()).context("a key")?;
        let name = fs::read_to_string(path.join("name"))?;
        files.push((key, name.trim_end().to_owned()));
    }
    Ok(files)
}

/// Reads each of the 65,536 items and looks for a word that stands in a file
/// of the host; no file is there that the launcher or QEMU did not put there.
pub fn items(argument: &Value) -> Result<Report> {
    let allowed: BTreeSet<String> = serde_json::from_value(argument["names"].clone())?;
    let ports = Ports::open()?;
    let files = files()?;
    let mut report = Report::new();
    let missing: Vec<&String> = allowed
        .iter()
        .filter(|name| files.iter().all(|(_, file)| file != *name))
        .collect();
    ensure!(missing.is_empty(), "no such items: {missing:?}");
    for (_, name) in &files {
        // The firmware's own tables of the machine.
        let firmware = name.starts_with("etc/")
            || name.starts_with("genroms/")
            || ["bootorder", "bios-geometry"].contains(&name.as_str());
        report.tried(firmware || allowed.contains(name), || {
            format!("file {name}")
        });
    }
    for key in 0..=u16::MAX {
        ports.write_u16(SELECTOR, key);
        let content: Vec<u8> = (0..8).map(|_| ports.read_u8(DATA)).collect();
        // One bit says that the item is to be written.
        let item = key & !WRITE_CHANNEL;
        let known = is_legacy(item) || files.iter().any(|(file, _)| *file == item);
        report.tried(known || content == [0; 8], || {
            format!("item {key:#x}: {content:?}")
        });
    }
    ports.write_u16(SELECTOR, FIRST_FILE);
    Ok(report)
}

/// Writes each item, by the register and by DMA, and looks whether it changed.
pub fn item_writes() -> Result<Report> {
    const ERROR: u32 = 1;
    const SELECT: u32 = 8;
    const WRITE: u32 = 16;
    let ports = Ports::open()?;
    let (page, physical) = Window::page()?;
    let mut report = Report::new();
    let mut errors = 0;
    for (key, name) in files()? {
        let content = || fs::read(Path::new(FILES).join(key.to_string()).join("raw"));
        let before = content()?;
        ports.write_u16(SELECTOR, key);
        for byte in before.iter().take(64) {
            ports.write_u8(DATA, !byte);
        }
        page.store_string(0x400, 64, 0x5a);
        page.set_u32(0, (u32::from(key) << 16 | SELECT | WRITE).swap_bytes());
        page.set_u32(4, 64_u32.swap_bytes());
        page.copy_string(8, &(physical + 0x400).to_be_bytes());
        ports.write_u32(0x514, u32::try_from(physical >> 32)?.swap_bytes());
        ports.write_u32(0x518, u32::try_from(physical & 0xffff_ffff)?.swap_bytes());
        wait("the answer", || page.u32(0).swap_bytes() & !ERROR == 0)?;
        errors += page.u32(0).swap_bytes() & ERROR;
        let denied = content()? == before;
        // The firmware tells QEMU by these where it put its tables; they are
        // numbers of this machine.
        let own = ["etc/vmgenid_addr", "etc/hardware-errors-addr", "etc/smi"];
        let own = own.iter().any(|prefix| name.starts_with(prefix));
        report.tried(denied || own, || format!("{name} was changed"));
    }
    ensure!(report.tries > 3, "only {} items", report.tries);
    report.note(format!("{errors} of {} ended with an error", report.tries));
    Ok(report)
}

/// Ports at which some machines have a door to their host.
pub fn ports() -> Result<Report> {
    let ports = Ports::open()?;
    let mut report = Report::new();
    // VMware's: version, clipboard, host's time, files by drag and drop.
    for command in 0..128 {
        let (eax, ebx) = ports.vmware(command);
        report.tried(
            ebx != 0x564d_5868 && (eax == u32::MAX || eax == 0x564d_5868),
            || format!("VMware's command {command}: {eax:#x} {ebx:#x}"),
        );
    }
    // Debug consoles that write host files, exits, panics, a parallel port, the
    // other serial ports (their line status), VMware mouse, floppies.
    for port in [
        0x402, 0xe9, 0xf4, 0x501, 0x505, 0x378, 0x278, 0x2fd, 0x3ed, 0x2ed, 0x3f4, 0x1f7, 0x177,
    ] {
        let value = ports.read_u8(port);
        report.tried(value == 0xff, || format!("port {port:#x}: {value:#x}"));
    }
    Ok(report)
}

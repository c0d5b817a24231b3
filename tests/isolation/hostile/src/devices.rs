//! What devices there are, compared with what the launcher gives.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use secmon_hostile::Report;
use serde_json::Value;

use crate::pci;

/// Counts devices by vendor and device number; nothing may be there that is
/// not expected, and nothing that a module of the kernel makes a disk, a
/// shared folder, a network or a USB of.
pub fn expected(argument: &Value) -> Result<Report> {
    let expected: BTreeMap<String, usize> = serde_json::from_value(argument["devices"].clone())?;
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    for device in pci::list()? {
        let id = format!("{:04x}:{:04x}", device.vendor, device.device);
        *found.entry(id).or_default() += 1;
    }
    let mut report = Report::new();
    for (id, count) in &found {
        let allowed = expected.get(id).copied().unwrap_or(0);
        report.tried(*count <= allowed, || format!("{count} devices {id}"));
    }
    for (folder, allowed) in [
        // 9p and virtiofs tag their folders there.
        (
            "/sys/bus/virtio/drivers/9pnet_virtio",
            &["bind", "uevent", "unbind", "module"][..],
        ),
        (
            "/sys/bus/virtio/drivers/virtiofs",
            &["bind", "uevent", "unbind", "module"],
        ),
        (
            "/sys/bus/virtio/drivers/virtio_blk",
            &["bind", "uevent", "unbind", "module"],
        ),
        (
            "/sys/bus/virtio/drivers/virtio_net",
            &["bind", "uevent", "unbind", "module"],
        ),
        ("/sys/bus/scsi/devices", &[]),
        ("/sys/bus/usb/devices", &[]),
        ("/sys/class/tpm", &[]),
        ("/sys/class/nvme", &[]),
        ("/sys/class/iscsi_host", &[]),
        ("/sys/class/fc_host", &[]),
        ("/sys/class/ptp", &[]),
    ] {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            report.tried(allowed.contains(&name.as_str()), || {
                format!("{folder}/{name}")
            });
        }
        report.tries += 1;
    }
    let blocks = fs::read_dir("/sys/block").context("/sys/block")?;
    for entry in blocks.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // In the VM's own memory.
        let own = ["loop", "ram", "zram"]
            .iter()
            .any(|own| name.starts_with(own));
        report.tried(own, || format!("block device {name}"));
    }
    Ok(report)
}

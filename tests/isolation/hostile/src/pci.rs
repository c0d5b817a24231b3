//! PCI devices by way of sysfs: lists, configuration space, BARs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::memory::Window;

const DEVICES: &str = "/sys/bus/pci/devices";
/// The vendor of QEMU's own devices.
pub const RED_HAT: u16 = 0x1af4;
/// `ivshmem`.
pub const SHARED_MEMORY: u16 = 0x1110;

/// A device.
#[derive(Clone, Debug)]
pub struct Device {
    path: PathBuf,
    /// `0000:01:00.0`
    pub address: String,
    pub vendor: u16,
    pub device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
}

fn number(path: &Path) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    parse(text.trim())
}

fn parse(text: &str) -> Result<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).with_context(|| text.to_owned())
}

/// All devices that the kernel knows.
pub fn list() -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for entry in fs::read_dir(DEVICES).context(DEVICES)? {
        let path = entry?.path();
        let part = |name: &str| number(&path.join(name));
        devices.push(Device {
            address: path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default()
                .to_owned(),
            vendor: u16::try_from(part("vendor")?)?,
            device: u16::try_from(part("device")?)?,
            class: u32::try_from(part("class")?)?,
            path,
        });
    }
    devices.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(devices)
}

/// The device with the target's memory, once the kernel has found it.
pub fn shared_memory() -> Result<Device> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = list()?
            .into_iter()
            .find(|device| device.vendor == RED_HAT && device.device == SHARED_MEMORY);
        match found {
            Some(device) => {
                device.enable()?;
                return Ok(device);
            }
            None if Instant::now() > deadline => anyhow::bail!("there is no ivshmem device"),
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

impl Device {
    fn enable(&self) -> Result<()> {
        fs::write(self.path.join("enable"), "1").context("enabling the device")
    }

    /// The first address and the length of a BAR; `None` if there is none.
    pub fn bar(&self, index: usize) -> Result<Option<(u64, u64)>> {
        let text = fs::read_to_string(self.path.join("resource"))?;
        let Some(line) = text.lines().nth(index) else {
            return Ok(None);
        };
        let mut parts = line.split_whitespace();
        let (Some(start), Some(end)) = (parts.next(), parts.next()) else {
            return Ok(None);
        };
        let (start, end) = (parse(start)?, parse(end)?);
        Ok((end > start).then(|| (start, end - start + 1)))
    }

    /// A BAR's file.
    pub fn resource(&self, index: usize) -> Result<File> {
        let path = self.path.join(format!("resource{index}"));
        File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| path.display().to_string())
    }

    /// A whole BAR.
    pub fn map(&self, index: usize) -> Result<Window> {
        let (_, length) = self.bar(index)?.context("no such BAR")?;
        let file = self.resource(index)?;
        Window::map(&file, 0, usize::try_from(length)?).context("mapping a BAR")
    }

    /// The configuration space.
    pub fn configuration(&self) -> Result<Configuration> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.path.join("config"))?;
        Ok(Configuration(file))
    }

    /// Takes the device away from its driver.
    pub fn unbind(&self) -> Result<()> {
        fs::write(self.path.join("driver/unbind"), &self.address).context("unbinding")
    }

    /// Gives it to a driver.
    pub fn bind(&self, driver: &str) -> Result<()> {
        let path = format!("/sys/bus/pci/drivers/{driver}/bind");
        fs::write(&path, &self.address).context(path)
    }
}

/// A device's configuration space.
#[derive(Debug)]
pub struct Configuration(File);

impl Configuration {
    pub fn u8(&self, offset: u64) -> io::Result<u8> {
        let mut bytes = [0; 1];
        self.0.read_exact_at(&mut bytes, offset)?;
        Ok(bytes[0])
    }

    pub fn u16(&self, offset: u64) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.0.read_exact_at(&mut bytes, offset)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub fn u32(&self, offset: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.0.read_exact_at(&mut bytes, offset)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub fn set_u16(&self, offset: u64, value: u16) -> io::Result<()> {
        self.0.write_all_at(&value.to_le_bytes(), offset)
    }

    pub fn set_u32(&self, offset: u64, value: u32) -> io::Result<()> {
        self.0.write_all_at(&value.to_le_bytes(), offset)
    }

    /// The offsets of the capabilities with this number.
    pub fn capabilities(&self, wanted: u8) -> io::Result<Vec<u64>> {
        let mut found = Vec::new();
        let mut at = u64::from(self.u8(0x34)?);
        // As many as fit into 256 bytes.
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            if self.u8(at)? == wanted {
                found.push(at);
            }
            at = u64::from(self.u8(at + 1)?);
        }
        Ok(found)
    }

    /// The numbers of the extended capabilities; none on a plain PCI device.
    pub fn extended_capabilities(&self) -> Vec<u16> {
        let mut found = Vec::new();
        let mut at = 0x100;
        for _ in 0..256 {
            let Ok(header) = self.u32(at) else { break };
            if header == 0 || header == u32::MAX {
                break;
            }
            found.push((header & 0xffff) as u16);
            at = u64::from(header >> 20);
            if at < 0x100 {
                break;
            }
        }
        found
    }
}

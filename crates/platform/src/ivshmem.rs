//! The memory BAR of an `ivshmem-plain` device: inside of the monitoring VM,
//! the target's RAM as the host shares it.
//!
//! QEMU of the monitoring VM has the target's RAM file as the backend of the
//! device; BAR 2 then is that RAM, live. Linux gives it as the file
//! `resource2` of the device, which can be mapped by root. A BAR's size is a
//! power of two, so that it can be larger than the target's RAM.
//!
//! Sources: QEMU `docs/specs/ivshmem-spec.rst`, Linux
//! `Documentation/PCI/sysfs-pci.rst`.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustix::io::Errno;
use secmon_memory::{MapError, MappedMemory, PhysicalMemory, Volatility};

use crate::image::{Judge, candidate_layouts};
use crate::layout::RamLayout;

/// Where Linux shows PCI devices.
pub const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// Red Hat's PCI vendor id.
const VENDOR: u32 = 0x1af4;
/// The device id of ivshmem.
const DEVICE: u32 = 0x1110;
/// The line of BAR 2 in `resource`, and the number in its file's name.
const MEMORY_BAR: usize = 2;

/// The address of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The PCI domain, 0 on most machines.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on the bus, at most 31.
    pub device: u8,
    /// The function of the device, at most 7.
    pub function: u8,
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a PCI address such as 0000:00:04.0 or 00:04.0")]
pub struct PciAddressError(pub String);

impl FromStr for PciAddress {
    type Err = PciAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            let number = |text: &str, limit: u32| {
                let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
                let value = u32::from_str_radix(text, 16).ok()?;
                (digits && value <= limit).then_some(value)
            };
            Some(Self {
                domain: number(domain, u32::MAX)?,
                bus: u8::try_from(number(bus, 0xff)?).ok()?,
                device: u8::try_from(number(device, 0x1f)?).ok()?,
                function: u8::try_from(number(function, 7)?).ok()?,
            })
        };
        parse().ok_or_else(|| PciAddressError(text.to_owned()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

/// An ivshmem device of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IvshmemDevice {
    /// Where it is.
    pub address: PciAddress,
    /// The bytes of its memory BAR.
    pub size: u64,
    /// Why it can't be opened, and what to do about it; `None` if it can.
    pub problem: Option<String>,
}

/// How an ivshmem device is opened.
#[derive(Clone, Copy, Default)]
pub struct IvshmemOptions<'a> {
    /// Where RAM lies, if it is known.
    pub layout: Option<&'a RamLayout>,
    /// The size of the target's RAM, if it is known; otherwise it is taken to
    /// fill the BAR.
    pub ram_size: Option<u64>,
    /// Asked which of several possible layouts fits the guest.
    pub validate: Option<Judge<'a>>,
}

/// An opened ivshmem device.
pub struct Ivshmem {
    /// The target's memory.
    pub memory: Arc<dyn PhysicalMemory>,
    /// The bytes of the BAR.
    pub size: u64,
    /// What its user should know.
    pub notes: Vec<String>,
}

/// Why an ivshmem device can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum IvshmemError {
    /// No PCI device is there.
    #[error("there is no PCI device {address}; {present}")]
    NotFound {
        /// Where it should be.
        address: PciAddress,
        /// The ivshmem devices there are.
        present: String,
    },
    /// Another device is there.
    #[error("PCI device {address} is {vendor:04x}:{device:04x}, not ivshmem (1af4:1110)")]
    OtherDevice {
        /// Where it is.
        address: PciAddress,
        /// Its vendor id.
        vendor: u32,
        /// Its device id.
        device: u32,
    },
    /// The device has no shared memory.
    #[error("ivshmem device {address} has no memory BAR")]
    NoMemory {
        /// Where it is.
        address: PciAddress,
    },
    /// The host refused.
    #[error("ivshmem device {address}: {what}: {source}{advice}")]
    Host {
        /// Where it is.
        address: PciAddress,
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
    /// The BAR can't be mapped so.
    #[error("ivshmem device {address}: {source}")]
    Map {
        /// Where it is.
        address: PciAddress,
        /// Why.
        source: MapError,
    },
}

/// The ivshmem devices among the PCI devices in `folder`
/// ([`PCI_DEVICES`], but for tests), by address.
///
/// # Errors
/// The host's, if the folder can't be read; a machine without PCI has none and
/// gives an empty list.
pub fn list(folder: &Path) -> io::Result<Vec<IvshmemDevice>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut devices = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let Some(Ok(address)) = name.to_str().map(PciAddress::from_str) else {
            continue;
        };
        let path = folder.join(&name);
        if identity(&path).ok() != Some((VENDOR, DEVICE)) {
            continue;
        }
        let size = bar_size(&path).unwrap_or(0);
        let problem = match File::open(bar(&path)) {
            Ok(_) if size == 0 => Some("it has no memory BAR".to_owned()),
            Ok(_) => None,
            Err(error) => Some(format!("{error}{}", advice(&error))),
        };
        devices.push(IvshmemDevice {
            address,
            size,
            problem,
        });
    }
    devices.sort_by_key(|device| device.address);
    Ok(devices)
}

/// Maps the memory BAR of the ivshmem device at `address`, read-only.
///
/// # Errors
/// [`IvshmemError`], which says what to do where the host forbids it.
pub fn open(
    folder: &Path,
    address: PciAddress,
    options: &IvshmemOptions<'_>,
) -> Result<Ivshmem, IvshmemError> {
    let path = folder.join(address.to_string());
    let (vendor, device) = match identity(&path) {
        Ok(identity) => identity,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(not_found(folder, address));
        }
        Err(source) => {
            return Err(IvshmemError::Host {
                address,
                what: "reading its ids",
                advice: advice(&source),
                source,
            });
        }
    };
    if (vendor, device) != (VENDOR, DEVICE) {
        return Err(IvshmemError::OtherDevice {
            address,
            vendor,
            device,
        });
    }
    let size = bar_size(&path).filter(|size| *size > 0);
    let size = size.ok_or(IvshmemError::NoMemory { address })?;
    let file = File::open(bar(&path)).map_err(|source| IvshmemError::Host {
        address,
        what: "opening its memory",
        advice: advice(&source),
        source,
    })?;
    let map = |layout: &RamLayout| {
        MappedMemory::map_file(&file, layout.entries(), Volatility::Live).map_err(|source| {
            match source {
                MapError::Host(source) => IvshmemError::Host {
                    address,
                    what: "mapping its memory",
                    advice: advice(&source),
                    source,
                },
                source => IvshmemError::Map { address, source },
            }
        })
    };
    if let Some(layout) = options.layout {
        return Ok(Ivshmem {
            memory: Arc::new(map(layout)?),
            size,
            notes: Vec::new(),
        });
    }
    let mut notes = Vec::new();
    let ram_size = options.ram_size.unwrap_or_else(|| {
        notes.push(format!(
            "the target's RAM is taken to be as large as the device's memory, {size:#x} bytes"
        ));
        size
    });
    let layouts = candidate_layouts(ram_size);
    let choice = layouts.len() > 1;
    let mut best: Option<(u64, RamLayout, Arc<dyn PhysicalMemory>)> = None;
    for layout in layouts {
        let memory: Arc<dyn PhysicalMemory> = Arc::new(map(&layout)?);
        let score = match options.validate {
            Some(validate) if choice => validate(&memory),
            _ => 0,
        };
        // The earlier candidate is the likelier one, and wins a tie.
        if best.as_ref().is_none_or(|(other, ..)| score > *other) {
            best = Some((score, layout, memory));
        }
    }
    let (score, layout, memory) = best.ok_or(IvshmemError::NoMemory { address })?;
    if choice {
        let why = match score {
            0 => "nothing decides between several: state it if it is wrong",
            _ => "the guest's own structures fit it",
        };
        notes.push(format!("layout {layout} assumed: {why}"));
    }
    Ok(Ivshmem {
        memory,
        size,
        notes,
    })
}

fn not_found(folder: &Path, address: PciAddress) -> IvshmemError {
    let devices = list(folder).unwrap_or_default();
    let devices: Vec<String> = devices.iter().map(|d| d.address.to_string()).collect();
    IvshmemError::NotFound {
        address,
        present: if devices.is_empty() {
            "there is no ivshmem device here".to_owned()
        } else {
            format!("ivshmem devices: {}", devices.join(", "))
        },
    }
}

fn bar(device: &Path) -> PathBuf {
    device.join(format!("resource{MEMORY_BAR}"))
}

/// Vendor and device id, each a file with a number such as `0x1af4`.
fn identity(device: &Path) -> io::Result<(u32, u32)> {
    let number = |name: &str| {
        let text = std::fs::read_to_string(device.join(name))?;
        let digits = text.trim().trim_start_matches("0x");
        u32::from_str_radix(digits, 16)
            .map_err(|_| io::Error::other(format!("{name} holds no number")))
    };
    Ok((number("vendor")?, number("device")?))
}

/// The size of the memory BAR, by the third line of `resource`:
/// `START LAST FLAGS`.
fn bar_size(device: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(device.join("resource")).ok()?;
    parse_bar_size(&text)
}

fn parse_bar_size(text: &str) -> Option<u64> {
    let mut fields = text.lines().nth(MEMORY_BAR)?.split_ascii_whitespace();
    let mut number = || u64::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok();
    let (start, last) = (number()?, number()?);
    match (start, last) {
        // A BAR that is not there.
        (0, 0) => None,
        _ => last.checked_sub(start)?.checked_add(1),
    }
}

/// What to do when Linux does not let the BAR be opened or mapped.
fn advice(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::ACCESS) => "; run secmon as root in the monitoring VM",
        Some(Errno::PERM) => {
            "; the kernel is locked down (Secure Boot): the device's memory must be mapped through VFIO there"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secmon_memory::PhysicalAddress;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A device as Linux shows it; `ids` are vendor and device.
    fn device(folder: &Path, name: &str, ids: (&str, &str), size: u64) -> PathBuf {
        let path = folder.join(name);
        std::fs::create_dir(&path).expect("a folder");
        std::fs::write(path.join("vendor"), ids.0).expect("a file");
        std::fs::write(path.join("device"), ids.1).expect("a file");
        let last = 0xfe_0000_0000_u64 + size - u64::from(size > 0);
        let resource = if size == 0 {
            "0x0 0x0 0x0\n".repeat(6)
        } else {
            format!(
                "0x00000000febd1000 0x00000000febd10ff 0x0000000000040200\n0x0 0x0 0x0\n0x000000fe00000000 {last:#018x} 0x000000000014220c\n"
            )
        };
        std::fs::write(path.join("resource"), resource).expect("a file");
        let bar = File::create(path.join("resource2")).expect("a file");
        bar.set_len(size).expect("a sparse file");
        path
    }

    const IVSHMEM: (&str, &str) = ("0x1af4\n", "0x1110\n");

    #[test]
    fn devices_are_listed_and_others_are_not() {
        let folder = tempfile::tempdir().expect("a folder");
        device(folder.path(), "0000:00:05.0", IVSHMEM, 2 * MIB);
        device(folder.path(), "0000:00:04.0", IVSHMEM, 0);
        device(folder.path(), "0000:00:03.0", ("0x1af4\n", "0x1000\n"), MIB);
        device(folder.path(), "nonsense", IVSHMEM, MIB);
        let devices = list(folder.path()).expect("a list");
        let addresses: Vec<String> = devices.iter().map(|d| d.address.to_string()).collect();
        assert_eq!(addresses, ["0000:00:04.0", "0000:00:05.0"]);
        assert!(devices[0].problem.is_some());
        assert_eq!((devices[1].size, &devices[1].problem), (2 * MIB, &None));
        assert_eq!(list(&folder.path().join("none")).expect("no PCI"), []);
    }

    #[test]
    fn memory_is_mapped_and_live() {
        use std::os::unix::fs::FileExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = device(folder.path(), "0000:00:05.0", IVSHMEM, 4 << 30);
        let ram = File::options()
            .write(true)
            .open(path.join("resource2"))
            .expect("the target's RAM");
        let address = "00:05.0".parse().expect("an address");
        let open = |options: &IvshmemOptions<'_>| open(folder.path(), address, options);
        let target = open(&IvshmemOptions::default()).expect("a target");
        assert_eq!(target.size, 4 << 30);
        assert_eq!(target.memory.volatility(), Volatility::Live);
        assert_eq!(target.notes.len(), 2, "both guesses are said");
        for value in [1_u8, 2] {
            // q35: what lies above 4 GiB is the upper half of the RAM.
            ram.write_all_at(&[value; 16], (2 << 30) + 5)
                .expect("a write");
            let mut bytes = [0; 16];
            target
                .memory
                .read(PhysicalAddress::new((4 << 30) + 5), &mut bytes)
                .expect("memory");
            assert_eq!(bytes, [value; 16]);
        }
        let judged = open(&IvshmemOptions {
            ram_size: Some(4 << 30),
            validate: Some(&|memory| memory.regions().first().map_or(0, |region| region.length)),
            ..IvshmemOptions::default()
        });
        let judged = judged.expect("a target");
        let first = judged.memory.regions()[0];
        assert_eq!(first.length, 4 << 30, "the largest was preferred");
        let layout: RamLayout = "0x1000-0x2000@0x3000".parse().expect("a layout");
        let stated = open(&IvshmemOptions {
            layout: Some(&layout),
            ..IvshmemOptions::default()
        });
        assert_eq!(stated.expect("a target").memory.size(), 0x1000);
        let layout: RamLayout = "0-0x200000000".parse().expect("a layout");
        let too_large = open(&IvshmemOptions {
            layout: Some(&layout),
            ..IvshmemOptions::default()
        });
        assert!(matches!(too_large, Err(IvshmemError::Map { .. })));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        device(folder.path(), "0000:00:03.0", ("0x8086\n", "0x29c0\n"), MIB);
        device(folder.path(), "0000:00:04.0", IVSHMEM, 0);
        let open = |address: &str| {
            let address = address.parse().expect("an address");
            open(folder.path(), address, &IvshmemOptions::default()).map(drop)
        };
        let error = open("00:03.0").expect_err("another device");
        assert!(error.to_string().contains("8086:29c0"), "{error}");
        let error = open("00:04.0").expect_err("no BAR");
        assert!(matches!(error, IvshmemError::NoMemory { .. }));
        let error = open("00:09.0").expect_err("nothing there");
        assert!(error.to_string().contains("0000:00:04.0"), "{error}");
    }

    #[test]
    fn addresses() {
        let parse = |text: &str| text.parse::<PciAddress>().map(|a| a.to_string());
        assert_eq!(parse("0000:00:04.0").as_deref(), Ok("0000:00:04.0"));
        assert_eq!(parse("1:ff:1f.7").as_deref(), Ok("0001:ff:1f.7"));
        assert_eq!(parse("00:04.0").as_deref(), Ok("0000:00:04.0"));
        for bad in [
            "",
            "4",
            "00:20.0",
            "00:04.8",
            "00:04",
            "g:00:04.0",
            "00:+4.0",
            "100:04.0",
        ] {
            assert_eq!(parse(bad), Err(PciAddressError(bad.to_owned())));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "\\PC{0,80}|[0-9a-f:. x\n]{0,80}") {
            let _ = parse_bar_size(&text);
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}

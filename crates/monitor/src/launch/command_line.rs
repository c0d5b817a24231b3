//! The command line of the QEMU that runs a monitoring VM.
//!
//! Everything that QEMU opens at its start comes as a descriptor that is open
//! already, so that it needs no right to any folder: the kernel and the
//! initramfs as `/proc/self/fd/N`, the sockets as `fd=N`. The targets' RAM is
//! not on the command line: it is plugged in through QMP, the same way for a
//! target that runs at the start and for one that comes later (see
//! [`hotplug`](super::hotplug)).
//!
//! The machine has no disk, no network, no display, no USB and no option ROM;
//! `-sandbox` denies QEMU to start programs, to gain privileges and to change
//! its limits.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::MonitorName;
use crate::protocol::channel_port;

/// The most targets of one monitor: root ports of its machine.
pub const MAX_TARGETS: u32 = 16;

/// The device number on bus 0 of the first root port.
const FIRST_PORT: u32 = 0x10;

/// Room for the memory BARs behind a root port. It is address space, not
/// memory.
const PORT_WINDOW_GIB: u64 = 64;

/// The largest RAM of a target: a power of two of which two fit into a root
/// port's window, however the firmware aligns it.
pub const MAX_TARGET_RAM: u64 = (PORT_WINDOW_GIB / 2) << 30;

/// How much of targets' RAM a VM of the usual size can map.
pub const USUAL_TARGET_RAM: u64 = 4 << 30;

/// The RAM of a VM, in MiB, that maps so much memory of targets: its kernel maps
/// a device's memory by pages of 4 KiB, whose tables take a 512th of it.
#[must_use]
pub fn memory_for(usual_mib: u32, target_ram: u64) -> u32 {
    let tables = target_ram.saturating_sub(USUAL_TARGET_RAM).div_ceil(512);
    let mib = u32::try_from(tables.div_ceil(1 << 20)).unwrap_or(u32::MAX);
    usual_mib.saturating_add(mib)
}

/// What runs the VM's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's emulation.
    Tcg,
}

/// The descriptors that QEMU starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptors {
    /// The kernel.
    pub kernel: i32,
    /// The initramfs.
    pub initramfs: i32,
    /// The monitor's configuration.
    pub configuration: i32,
    /// A connected socket that takes the console's text.
    pub console: i32,
    /// A listening socket for QMP.
    pub qmp: i32,
    /// Listening sockets that lead to the monitor, one a client.
    pub channels: Vec<i32>,
}

/// A port that leads to a gate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatePort {
    /// Its number in the port's name, `org.secmon.gate.NUMBER`.
    pub number: u32,
    /// The gate's socket.
    pub socket: PathBuf,
}

/// A monitoring VM, as far as QEMU needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The monitor's name.
    pub name: String,
    /// What runs it.
    pub accelerator: Accelerator,
    /// Its RAM, in MiB.
    pub memory_mib: u32,
    /// What the kernel is told.
    pub kernel_arguments: String,
    /// How many targets can be plugged in.
    pub target_slots: u32,
    /// The ports to gates.
    pub gates: Vec<GatePort>,
    /// How QEMU is told to connect again to a gate that went away.
    pub reconnect: Reconnect,
}

/// The option by which a socket is connected again after a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reconnect {
    /// `reconnect=1`, up to QEMU 9.1.
    Seconds,
    /// `reconnect-ms=1000`, from QEMU 9.2 on.
    Milliseconds,
}

/// The id of the root port that takes a target.
#[must_use]
pub fn port_id(slot: u32) -> String {
    format!("port{slot}")
}

/// The PCI address that a target's device has in the monitoring VM. Root ports
/// are the only bridges, so the firmware numbers their buses in order.
#[must_use]
pub fn pci_address(slot: u32) -> String {
    format!("0000:{:02x}:00.0", slot + 1)
}

/// The number on the bus of a channel's port: the first is number 1, the gates
/// of all targets follow it, then the further ones.
fn channel_nr(number: u32) -> u32 {
    match number {
        0 => 1,
        number => MAX_TARGETS + 1 + number,
    }
}

/// The process name QEMU gives itself in `-name`.
#[must_use]
pub fn guest_name(name: &MonitorName) -> String {
    format!("secmon-monitor-{name}")
}

impl Machine {
    /// QEMU's arguments, the program's own name not among them.
    #[must_use]
    pub fn arguments(&self, open: &Descriptors) -> Vec<String> {
        let mut line = Line::default();
        line.option("-name", &format!("guest={}", escaped(&self.name)));
        line.flag("-nodefaults");
        line.flag("-no-user-config");
        line.flag("-no-reboot");
        // Plugged in and set up before the first instruction runs.
        line.flag("-S");
        line.option("-display", "none");
        line.option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
        line.option(
            "-machine",
            "q35,usb=off,vmport=off,dump-guest-core=off,memory-backend=ram",
        );
        // A file without a name, which a guard of the host maps for reading.
        line.option(
            "-object",
            &format!(
                "memory-backend-memfd,id=ram,size={}M,share=on",
                self.memory_mib
            ),
        );
        let (accelerator, processor) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            // QEMU 7.2 loses the flags of CMPXCHG16B when an interrupt comes at
            // the wrong moment; kernels do without the instruction.
            Accelerator::Tcg => ("tcg", "max,cx16=off"),
        };
        line.option("-accel", accelerator);
        line.option("-cpu", processor);
        line.option("-smp", "1");
        line.option("-m", &format!("{}M", self.memory_mib));
        line.option("-nic", "none");
        line.option("-kernel", &descriptor_path(open.kernel));
        line.option("-initrd", &descriptor_path(open.initramfs));
        line.option("-append", &self.kernel_arguments);
        line.option(
            "-fw_cfg",
            &format!(
                "name=opt/secmon/configuration,file={}",
                descriptor_path(open.configuration)
            ),
        );
        line.option(
            "-chardev",
            &format!("socket,id=console,fd={}", open.console),
        );
        line.option("-serial", "chardev:console");
        line.option(
            "-chardev",
            &format!("socket,id=qmp,fd={},server=on,wait=off", open.qmp),
        );
        line.option("-mon", "chardev=qmp,mode=control");
        line.option("-device", "virtio-serial-pci,id=serial,max_ports=31");
        for (number, descriptor) in (0..).zip(&open.channels) {
            line.option(
                "-chardev",
                &format!("socket,id=channel{number},fd={descriptor},server=on,wait=off"),
            );
            line.option(
                "-device",
                &format!(
                    "virtserialport,bus=serial.0,nr={},chardev=channel{number},name={}",
                    channel_nr(number),
                    channel_port(number)
                ),
            );
        }
        for gate in &self.gates {
            let GatePort { number, socket } = gate;
            let reconnect = match self.reconnect {
                Reconnect::Seconds => "reconnect=1",
                Reconnect::Milliseconds => "reconnect-ms=1000",
            };
            line.option(
                "-chardev",
                &format!(
                    "socket,id=gate{number},path={},{reconnect}",
                    escaped(&socket.display().to_string())
                ),
            );
            line.option(
                "-device",
                &format!(
                    "virtserialport,bus=serial.0,nr={},chardev=gate{number},name=org.secmon.gate.{number}",
                    number + 2
                ),
            );
        }
        for slot in 0..self.target_slots.min(MAX_TARGETS) {
            line.option(
                "-device",
                &format!(
                    "pcie-root-port,id={},bus=pcie.0,addr={:#x},chassis={},slot={},\
                     io-reserve=0,mem-reserve=2M,pref64-reserve={PORT_WINDOW_GIB}G",
                    port_id(slot),
                    FIRST_PORT + slot,
                    slot + 1,
                    slot + 1,
                ),
            );
        }
        line.0
    }
}

/// Where a process finds its own descriptor as a file.
#[must_use]
pub fn descriptor_path(number: i32) -> String {
    format!("/proc/self/fd/{number}")
}

/// A value in QEMU's option syntax, where a comma ends it unless doubled.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

/// Whether a path can stand in QEMU's options at all.
#[must_use]
pub fn can_be_named(path: &Path) -> bool {
    path.to_str()
        .is_some_and(|text| !text.chars().any(char::is_control))
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: &str) {
        self.0.push(name.to_owned());
        self.0.push(value.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Descriptors = Descriptors {
        kernel: 10,
        initramfs: 11,
        configuration: 12,
        console: 0,
        qmp: 13,
        channels: Vec::new(),
    };

    fn machine() -> Machine {
        Machine {
            name: "secmon-monitor-web1".into(),
            accelerator: Accelerator::Tcg,
            memory_mib: 128,
            kernel_arguments: "console=ttyS0".into(),
            target_slots: 2,
            gates: vec![GatePort {
                number: 0,
                socket: PathBuf::from("/run/a,b/gate.sock"),
            }],
            reconnect: Reconnect::Seconds,
        }
    }

    fn value<'a>(line: &'a [String], option: &str, part: &str) -> Option<&'a str> {
        line.windows(2).find_map(|pair| match pair {
            [name, value] if name == option && value.contains(part) => Some(value.as_str()),
            _ => None,
        })
    }

    #[test]
    fn nothing_is_there_that_was_not_asked_for() {
        let line = machine().arguments(&OPEN);
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            assert!(line.iter().any(|word| word == flag), "{flag}");
        }
        assert_eq!(value(&line, "-nic", ""), Some("none"));
        assert_eq!(value(&line, "-netdev", ""), None);
        assert!(value(&line, "-sandbox", "spawn=deny").is_some());
        let memory = line
            .iter()
            .filter(|word| word.starts_with("memory-backend"));
        assert_eq!(memory.count(), 1, "no memory but its own");
        assert!(value(&line, "-object", "id=ram,size=128M,share=on").is_some());
        assert!(
            !line.iter().any(|word| word.contains("path=/proc")),
            "no path but the gate's"
        );
    }

    #[test]
    fn each_target_has_a_port_and_an_address_of_its_own() {
        let line = machine().arguments(&OPEN);
        assert!(value(&line, "-device", "id=port0,bus=pcie.0,addr=0x10").is_some());
        assert!(value(&line, "-device", "id=port1,bus=pcie.0,addr=0x11").is_some());
        assert_eq!(value(&line, "-device", "id=port2"), None);
        assert_eq!(
            (pci_address(0), port_id(0)),
            ("0000:01:00.0".into(), "port0".into())
        );
        assert_eq!(pci_address(15), "0000:10:00.0");
        let many = Machine {
            target_slots: 1000,
            ..machine()
        };
        let ports = many.arguments(&OPEN);
        let ports = ports.iter().filter(|word| word.contains("pcie-root-port"));
        assert_eq!(ports.count(), MAX_TARGETS as usize);
    }

    #[test]
    fn ports_have_numbers_of_their_own() {
        let full = Machine {
            gates: (0..MAX_TARGETS)
                .map(|number| GatePort {
                    number,
                    socket: PathBuf::from("/run/gate.sock"),
                })
                .collect(),
            ..machine()
        };
        let open = Descriptors {
            channels: vec![14, 15, 16, 17],
            ..OPEN
        };
        let line = full.arguments(&open);
        assert!(value(&line, "-chardev", "id=channel0,fd=14,").is_some());
        assert!(value(&line, "-device", "chardev=channel0,name=org.secmon.channel").is_some());
        assert!(value(&line, "-device", "name=org.secmon.channel.3").is_some());
        let numbers = line.iter().filter_map(|word| {
            let (_, rest) = word.split_once(",nr=")?;
            rest.split(',').next()?.parse::<u32>().ok()
        });
        let mut numbers: Vec<u32> = numbers.collect();
        numbers.sort_unstable();
        let count = numbers.len();
        numbers.dedup();
        assert_eq!((numbers.len(), count), (20, 20), "each once");
        assert!(numbers.iter().all(|number| (1..31).contains(number)));
    }

    #[test]
    fn a_vm_has_room_for_the_tables_of_what_it_maps() {
        for (gib, mib) in [(0, 128), (4, 128), (8, 136), (512, 128 + 1016)] {
            assert_eq!(memory_for(128, gib << 30), mib);
        }
        assert_eq!(memory_for(128, USUAL_TARGET_RAM + 1), 129);
    }

    #[test]
    fn a_comma_in_a_path_adds_no_option() {
        let line = machine().arguments(&OPEN);
        let gate = value(&line, "-chardev", "id=gate0").expect("a gate");
        assert_eq!(gate, "socket,id=gate0,path=/run/a,,b/gate.sock,reconnect=1");
        let newer = Machine {
            reconnect: Reconnect::Milliseconds,
            ..machine()
        };
        let line = newer.arguments(&OPEN);
        assert!(value(&line, "-chardev", "reconnect-ms=1000").is_some());
        assert!(value(&line, "-device", "name=org.secmon.gate.0").is_some());
        assert!(!can_be_named(Path::new("/a\nb")));
    }
}

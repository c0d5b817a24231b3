//! A libvirt domain definition of a monitoring VM.
//!
//! libvirt's own `<shmem>` device has no read-only form, so the targets' RAM
//! is given to QEMU directly (`qemu:commandline`): opened `O_RDONLY` and
//! mapped so. The file's owner must let libvirt's QEMU user read it, and the
//! gates' sockets be given to that user.

use std::fmt::Write;
use std::path::PathBuf;

use crate::launch::command_line::GatePort;
use crate::launch::gates::port_name;
use crate::protocol::channel_port;

/// A target's RAM, as it is given to a monitoring VM under libvirt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetRam {
    /// The file.
    pub file: PathBuf,
    /// The bytes of the device's memory, a power of two.
    pub size: u64,
}

/// What a monitoring VM's definition is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorDomain {
    /// The monitor's name.
    pub name: String,
    /// `kvm` or `qemu`.
    pub domain_type: &'static str,
    /// Its RAM, in MiB.
    pub memory_mib: u32,
    /// The appliance's kernel.
    pub kernel: PathBuf,
    /// The appliance's initramfs.
    pub initramfs: PathBuf,
    /// What the kernel is told.
    pub kernel_arguments: String,
    /// The monitor's configuration.
    pub configuration: PathBuf,
    /// Where the channels are to listen.
    pub channels: Vec<PathBuf>,
    /// The targets' RAM, by slot.
    pub targets: Vec<TargetRam>,
    /// The ports to the targets' gates.
    pub gates: Vec<GatePort>,
}

impl MonitorDomain {
    /// The definition.
    #[must_use]
    pub fn to_xml(&self) -> String {
        let path = |path: &PathBuf| escaped(&path.display().to_string());
        let mut arguments = String::new();
        for (slot, TargetRam { file, size }) in self.targets.iter().enumerate() {
            let file = file.display().to_string().replace(',', ",,");
            let slots = [
                "-object".to_owned(),
                format!(
                    "memory-backend-file,id=secmon-ram{slot},size={size},mem-path={file},share=on,readonly=on"
                ),
                "-device".to_owned(),
                // Slots of the root bus that libvirt leaves free.
                format!(
                    "ivshmem-plain,id=secmon-target{slot},memdev=secmon-ram{slot},bus=pcie.0,addr={:#x}",
                    0x10 + slot
                ),
            ];
            for value in slots {
                // Writing to a string does not fail.
                let _ = writeln!(arguments, "    <qemu:arg value='{}'/>", escaped(&value));
            }
        }
        let mut channels = String::new();
        for (number, socket) in (0..).zip(&self.channels) {
            let _ = write!(
                channels,
                "    <channel type='unix'>
      <source mode='bind' path='{}'/>
      <target type='virtio' name='{}'/>
    </channel>
",
                path(socket),
                channel_port(number),
            );
        }
        let mut gates = String::new();
        for GatePort { number, socket } in &self.gates {
            let _ = write!(
                gates,
                "    <channel type='unix'>
      <source mode='connect' path='{}'>
        <reconnect enabled='yes' timeout='1'/>
      </source>
      <target type='virtio' name='{}'/>
    </channel>
",
                path(socket),
                port_name(*number),
            );
        }
        format!(
            "<domain type='{domain_type}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
  <vcpu>1</vcpu>
  <sysinfo type='fwcfg'>
    <entry name='opt/secmon/configuration' file='{configuration}'/>
  </sysinfo>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu mode='{cpu}'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <controller type='usb' model='none'/>
    <controller type='virtio-serial' index='0'/>
{channels}{gates}    <serial type='pty'/>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
{arguments}  </qemu:commandline>
</domain>
",
            domain_type = self.domain_type,
            name = escaped(&self.name),
            memory = self.memory_mib,
            configuration = path(&self.configuration),
            kernel = path(&self.kernel),
            initramfs = path(&self.initramfs),
            cmdline = escaped(&self.kernel_arguments),
            cpu = if self.domain_type == "kvm" {
                "host-passthrough"
            } else {
                "maximum"
            },
        )
    }
}

/// Text as it can stand in an attribute or between tags.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            // Characters that XML has no form for.
            character if character.is_control() => {}
            character => out.push(character),
        }
    }
    out
}

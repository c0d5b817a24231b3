//! Definitions that libvirt's own validator accepts.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use secmon_monitor::launch::command_line::GatePort;
use secmon_monitor::launch::libvirt::{MonitorDomain, TargetRam, convert};

/// A domain as `virsh dumpxml` writes it.
const TARGET: &str = "<domain type='kvm'>
  <name>web1</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <memory unit='KiB'>1572864</memory>
  <currentMemory unit='KiB'>1572864</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <boot dev='hd'/>
  </os>
  <features><acpi/><apic/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <source file='/var/lib/libvirt/images/web1.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
";

fn assert_valid(xml: &str) {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(xml.as_bytes()).expect("written");
    let output = Command::new("virt-xml-validate")
        .arg(file.path())
        .arg("domain")
        .output()
        .expect("virt-xml-validate: apt-get install libvirt-clients libxml2-utils");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{xml}");
}

#[test]
fn a_converted_domain_is_valid() {
    assert_valid(TARGET);
    for memory in ["1572864", "1048576"] {
        let target = TARGET.replace("1572864", memory);
        let converted = convert(&target).expect("converted");
        assert_ne!(converted.xml, target);
        assert_valid(&converted.xml);
    }
    let backed = TARGET.replace(
        "  <vcpu",
        "  <memoryBacking>\n    <hugepages/>\n    <access mode='private'/>\n  </memoryBacking>\n  <vcpu",
    );
    assert_valid(&backed);
    assert_valid(&convert(&backed).expect("converted").xml);
}

#[test]
fn a_monitors_domain_is_valid() {
    let monitor = |name: &str, domain_type| MonitorDomain {
        name: name.to_owned(),
        domain_type,
        memory_mib: 128,
        kernel: PathBuf::from("/var/lib/secmon/kernel"),
        initramfs: PathBuf::from("/var/lib/secmon/initramfs"),
        kernel_arguments: "console=ttyS0 quiet".into(),
        configuration: PathBuf::from("/run/secmon/web1/configuration.json"),
        channels: vec![
            PathBuf::from("/run/secmon/web1/channel.sock"),
            PathBuf::from("/run/secmon/web1/channel-1.sock"),
        ],
        targets: vec![
            TargetRam {
                file: PathBuf::from("/dev/shm/a,b & <c>"),
                size: 1 << 29,
            };
            2
        ],
        gates: (0..2)
            .map(|number| GatePort {
                number,
                socket: PathBuf::from(format!("/run/a & b/gate-{number}.sock")),
            })
            .collect(),
    };
    assert_valid(&monitor("web1", "kvm").to_xml());
    let qemu = monitor("a'b", "qemu").to_xml();
    assert_valid(&qemu);
    assert!(qemu.contains("<target type='virtio' name='org.secmon.gate.1'/>"));
    assert!(qemu.contains("<target type='virtio' name='org.secmon.channel.1'/>"));
    assert!(qemu.contains("readonly=on") && qemu.contains("a,,b &amp; &lt;c&gt;"));
}

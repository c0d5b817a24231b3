//! The detector `network`: who listens to the network as a whole.

use secmon_guest::{Guest, Value};
use secmon_memory::VirtualAddress;

use crate::rows::{Fields, Parts, Rows};
use crate::{Class, DetectError, Detector, Finding, Severity, Subject, Technique};

const NAME: &str = "network";

/// Network sniffing.
const SNIFFING: Technique = Technique::new("T1040");
/// Non-application layer protocol.
const RAW: Technique = Technique::new("T1095");

/// `ETH_P_ALL`, as the table of sockets shows it.
const ALL_PROTOCOLS: &[u8] = b"0x0003";

const SOCKETS: &[&str] = &[
    "protocol",
    "state",
    "local_address",
    "ip_protocol",
    "ethertype",
    "interface",
    "namespace",
    "inode",
    "pid",
    "comm",
    "has_file",
    "address",
];

const INTERFACES: &[&str] = &[
    "name",
    "kind",
    "type",
    "mac",
    "flags",
    "promiscuity",
    "namespace",
    "address",
];

/// Finds raw and packet sockets, and interfaces that take all packets.
pub(crate) struct Network;

impl Detector for Network {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Sockets that see packets of all programs, and interfaces that take packets for other \
         machines. A raw socket is what ping and routing daemons have as well: information."
    }

    fn compares(&self) -> &'static str {
        "Nothing: it reads the kernel's sockets and interfaces in all network namespaces, also \
         those that belong to no open file, which no program in the guest can do."
    }

    fn evaded_by(&self) -> &'static str {
        "A packet handler or netfilter hook in the kernel, which needs no socket: the detector \
         kernel_pointers looks for those. An eBPF program on an interface: see tracing."
    }

    fn techniques(&self) -> &'static [Technique] {
        &[SNIFFING, RAW]
    }

    fn cost(&self) -> &'static str {
        "One walk of the tables of sockets and of open files, and of the interfaces."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let mut parts = Parts::default();
        parts.note(Rows::of("sockets", SOCKETS)?.read(guest, |row| {
            if let Some(finding) = socket(&row) {
                findings(finding);
            }
        }));
        parts.note(Rows::of("interfaces", INTERFACES)?.read(guest, |row| {
            if let Some(finding) = interface(&row) {
                findings(finding);
            }
        }));
        parts.finish()
    }
}

fn socket(row: &Fields<'_>) -> Option<Finding> {
    let protocol = row.text("protocol")?;
    let (name, class, severity, technique, what) = match protocol {
        b"packet" if row.text("ethertype") == Some(ALL_PROTOCOLS) => (
            "packet_socket_for_all",
            Class::Suspicion,
            Severity::Medium,
            SNIFFING,
            "a packet socket that sees packets of all protocols",
        ),
        b"packet" => (
            "packet_socket",
            Class::Information,
            Severity::Low,
            SNIFFING,
            "a packet socket for one protocol",
        ),
        b"raw" | b"raw6" => (
            "raw_socket",
            Class::Information,
            Severity::Low,
            RAW,
            "a raw socket",
        ),
        _ => return None,
    };
    // The kernel has some of its own, for ICMP and address resolution.
    if !row.is_true("has_file") {
        return None;
    }
    let address = VirtualAddress::new(row.number("address")?);
    let owner = match (row.id("pid"), row.text("comm")) {
        (Some(pid), Some(comm)) => {
            format!("process {pid} ({})", String::from_utf8_lossy(comm))
        }
        _ => "no process that is shown".to_owned(),
    };
    let subject = Subject::Socket {
        address,
        name: format!("{} of {owner}", String::from_utf8_lossy(protocol)),
    };
    Some(
        Finding::new(
            NAME,
            name,
            class,
            severity,
            subject,
            format!("{owner} has {what}"),
        )
        .technique(technique)
        .evidence(row.evidence("sockets", "the socket")),
    )
}

fn interface(row: &Fields<'_>) -> Option<Finding> {
    let users = row.number("promiscuity")?;
    if users == 0 {
        return None;
    }
    let address = VirtualAddress::new(row.number("address")?);
    let Value::Text(name) = row.value("name") else {
        return None;
    };
    let subject = Subject::Interface {
        address,
        name: name.clone(),
    };
    let summary = format!(
        "interface {} takes packets for other machines, for {users} users",
        name.to_display()
    );
    Some(
        Finding::new(
            NAME,
            "promiscuous_interface",
            Class::Suspicion,
            Severity::Medium,
            subject,
            summary,
        )
        .technique(SNIFFING)
        .evidence(row.evidence("interfaces", "the interface")),
    )
}

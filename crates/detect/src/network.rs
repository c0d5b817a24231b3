//! The detector `network`: who listens to the network as a whole.

use std::collections::BTreeSet;

use secmon_guest::{Guest, Text, Value};
use secmon_memory::VirtualAddress;

use crate::rows::{Fields, Parts, Rows};
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

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
    "local_port",
    "ip_protocol",
    "ethertype",
    "interface",
    "namespace",
    "inode",
    "pid",
    "comm",
    "has_file",
    "shown_in_guest",
    "address",
];

const INTERFACES: &[&str] = &[
    "name",
    "kind",
    "type",
    "mac",
    "flags",
    "promiscuity",
    "master",
    "uppers",
    "namespace",
    "address",
];

/// Kinds of interfaces that take all packets of those below them, which is what
/// they are for.
const TAKE_ALL: &[&[u8]] = &[b"bridge", b"openvswitch", b"macvlan", b"macvtap", b"batadv"];

/// Finds raw and packet sockets, and interfaces that take all packets.
pub(crate) struct Network;

impl Detector for Network {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Ports that are open and that the kernel's tables of sockets lack, sockets that see packets \
         of all programs, and interfaces that take packets for other machines. A raw socket is what ping and routing daemons have as well, and a bridge takes \
         all packets of its ports: information."
    }

    fn compares(&self) -> &'static str {
        "The tables of TCP's and UDP's sockets with the sockets that open files lead to, in all \
         network namespaces. The others are compared with nothing: it reads the kernel's sockets \
         and interfaces, also those that belong to no open file, which no program in the guest can \
         do."
    }

    fn evaded_by(&self) -> &'static str {
        "A packet handler or netfilter hook in the kernel, which needs no socket: the detector \
         kernel_pointers looks for those. An eBPF program on an interface: see tracing."
    }

    fn techniques(&self) -> &'static [Technique] {
        &[SNIFFING, RAW, Technique::ROOTKIT]
    }

    fn cost(&self) -> &'static str {
        "One walk of the tables of sockets and of open files, and of the interfaces."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let mut parts = Parts::default();
        let mut unlisted = Vec::new();
        let read = Rows::of("sockets", SOCKETS)?.read(guest, |row| {
            if let Some(finding) = socket(&row) {
                findings(finding);
            }
            unlisted.extend(outside(&row));
        });
        // A table that could not be read to its end may have them.
        if parts.note(read).is_some() {
            unlisted.into_iter().for_each(&mut *findings);
        }
        let mut uppers = Uppers::default();
        let mut promiscuous = Vec::new();
        parts.note(Rows::of("interfaces", INTERFACES)?.read(guest, |row| {
            uppers.note(&row);
            promiscuous.extend(Promiscuous::of(&row));
        }));
        for interface in promiscuous {
            findings(interface.finding(&uppers));
        }
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
    let owner = owner(row);
    let subject = subject(row, &owner)?;
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

fn owner(row: &Fields<'_>) -> String {
    match (row.id("pid"), row.text("comm")) {
        (Some(pid), Some(comm)) => {
            format!("process {pid} ({})", String::from_utf8_lossy(comm))
        }
        _ => "no process that is shown".to_owned(),
    }
}

fn subject(row: &Fields<'_>, owner: &str) -> Option<Subject> {
    let protocol = String::from_utf8_lossy(row.text("protocol")?);
    Some(Subject::Socket {
        address: VirtualAddress::new(row.number("address")?),
        name: format!("{protocol} of {owner}"),
    })
}

/// A socket that takes connections or packets at a port, and that is missing
/// from the table which programs are told of: an open file alone leads to it.
fn outside(row: &Fields<'_>) -> Option<Finding> {
    let receives = match row.text("protocol")? {
        b"tcp" | b"tcp6" => row.text("state") == Some(b"LISTEN"),
        b"udp" | b"udp6" => true,
        _ => false,
    };
    let port = row.number("local_port").filter(|port| *port != 0)?;
    let listed = row.value("shown_in_guest") != &Value::Boolean(false);
    if !receives || listed || !row.is_true("has_file") {
        return None;
    }
    let owner = owner(row);
    let summary = format!("{owner} has port {port} open, and the kernel's table lacks the socket");
    let finding = Finding::new(
        NAME,
        "port_in_no_table",
        Class::Attack,
        Severity::High,
        subject(row, &owner)?,
        summary,
    );
    let what = "the socket, of which the process's open file tells";
    Some(
        finding
            .technique(Technique::ROOTKIT)
            .evidence(row.evidence("sockets", what)),
    )
}

/// The interfaces that take all packets of those below them, by address.
#[derive(Default)]
struct Uppers(BTreeSet<u64>);

impl Uppers {
    fn note(&mut self, row: &Fields<'_>) {
        let by_kind = row
            .text("kind")
            .is_some_and(|kind| TAKE_ALL.contains(&kind));
        // Whoever wants all packets of a VLAN or a bond gets those of what is
        // below, and is told of by that.
        let by_users = row.number("promiscuity").is_some_and(|users| users > 0);
        if by_kind || by_users {
            self.0.extend(row.number("address"));
        }
    }
}

/// An interface that takes all packets.
struct Promiscuous {
    address: VirtualAddress,
    name: Text,
    users: u64,
    uppers: Vec<u64>,
    evidence: Evidence,
}

impl Promiscuous {
    fn of(row: &Fields<'_>) -> Option<Self> {
        let users = row.number("promiscuity").filter(|users| *users > 0)?;
        let Value::Text(name) = row.value("name") else {
            return None;
        };
        let uppers = row.list("uppers").iter().filter_map(|upper| match upper {
            Value::Address(address) => Some(*address),
            _ => None,
        });
        Some(Self {
            address: VirtualAddress::new(row.number("address")?),
            name: name.clone(),
            users,
            uppers: uppers.collect(),
            evidence: row.evidence("interfaces", "the interface"),
        })
    }

    fn finding(self, known: &Uppers) -> Finding {
        let explained = self.uppers.iter().filter(|upper| known.0.contains(upper));
        let explained = explained.count() as u64;
        let (what, class, severity, of) = match self.users <= explained {
            true => (
                "promiscuous_port",
                Class::Information,
                Severity::Low,
                "for the interfaces above it",
            ),
            false => (
                "promiscuous_interface",
                Class::Suspicion,
                Severity::Medium,
                "for programs or the kernel",
            ),
        };
        let summary = format!(
            "interface {} takes packets for other machines, {of}: {} users",
            self.name.to_display(),
            self.users
        );
        let subject = Subject::Interface {
            address: self.address,
            name: self.name,
        };
        Finding::new(NAME, what, class, severity, subject, summary)
            .technique(SNIFFING)
            .evidence(self.evidence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name of what is found of a socket outside of the tables.
    fn socket_outside(changes: &[(&str, Value)]) -> Option<&'static str> {
        let sound = |column: &str| match column {
            "protocol" => "tcp".into(),
            "state" => "LISTEN".into(),
            "local_port" => 22_u64.into(),
            "shown_in_guest" => false.into(),
            "has_file" => true.into(),
            "address" => Value::Address(0xffff_8880_0000_1000),
            _ => Value::Null,
        };
        let value = |column: &&str| {
            let changed = changes.iter().find(|(name, _)| name == column);
            changed.map_or_else(|| sound(column), |(_, value)| value.clone())
        };
        let values: Vec<Value> = SOCKETS.iter().map(value).collect();
        outside(&Fields::new(SOCKETS, &values)).map(|finding| finding.name)
    }

    #[test]
    fn an_open_port_has_to_be_in_a_table() {
        assert_eq!(socket_outside(&[]), Some("port_in_no_table"));
        let udp = [("protocol", "udp6".into()), ("state", "CLOSE".into())];
        assert_eq!(socket_outside(&udp), Some("port_in_no_table"));
        for sound in [
            ("shown_in_guest", Value::Boolean(true)),
            ("shown_in_guest", Value::unreadable("it is gone")),
            ("has_file", false.into()),
            ("local_port", 0_u64.into()),
            ("state", "CLOSE".into()),
            ("protocol", "unix".into()),
        ] {
            assert_eq!(
                socket_outside(std::slice::from_ref(&sound)),
                None,
                "{sound:?}"
            );
        }
    }

    const COLUMNS: &[&str] = &["name", "kind", "promiscuity", "uppers", "address"];

    fn rows(kind: &str, users_of_upper: u64, users: u64) -> Finding {
        let upper = [
            Value::from("upper"),
            kind.into(),
            users_of_upper.into(),
            Value::List(Box::default()),
            Value::Address(0x1000),
        ];
        let lower = [
            Value::from("eth0"),
            Value::Null,
            users.into(),
            Value::List([Value::Address(0x1000)].into()),
            Value::Address(0x2000),
        ];
        let mut uppers = Uppers::default();
        uppers.note(&Fields::new(COLUMNS, &upper));
        let lower = Promiscuous::of(&Fields::new(COLUMNS, &lower)).expect("promiscuous");
        lower.finding(&uppers)
    }

    #[test]
    fn a_bridge_takes_all_packets_of_its_port_and_nobody_else() {
        assert_eq!(rows("bridge", 0, 1).class, Class::Information);
        assert_eq!(rows("bridge", 0, 2).class, Class::Suspicion);
        assert_eq!(rows("vlan", 0, 1).class, Class::Suspicion);
        assert_eq!(rows("vlan", 1, 1).class, Class::Information);
    }
}

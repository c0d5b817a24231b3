//! The table `interfaces`.

use std::net::IpAddr;
use std::sync::Arc;

use secmon_memory::ReadError;

use super::address::hardware_address;
use super::device::{Counters, Device, devices};
use super::namespace::namespaces;
use crate::linux::per_cpu::PerCpu;
use crate::table::Items;
use crate::{Column, Cost, Guest, Kind, Selection, Shown, TableError, TableOf, Value};

const TABLE: &str = "interfaces";

/// A network interface and the CPUs over which its counters are spread.
pub struct Interface {
    device: Device,
    cpus: Arc<Result<PerCpu, String>>,
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Interface) -> Value,
) -> Column<Interface> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `interfaces`.
pub static INTERFACES: TableOf<Interface> = TableOf {
    name: TABLE,
    aliases: &["ifconfig", "links"],
    meaning: "Network interfaces of all network namespaces with their addresses.",
    columns: &[
        column(
            "name",
            Kind::Text,
            Shown::Always,
            "The interface's name.",
            |_, interface| Value::text(interface.device.name.as_slice()),
        ),
        column(
            "index",
            Kind::Unsigned,
            Shown::Always,
            "Its number in its namespace.",
            |_, interface| interface.device.index().into(),
        ),
        column(
            "kind",
            Kind::Text,
            Shown::Always,
            "The kind of virtual interface, as `ip link` names it: veth, bridge, dummy; null \
             for hardware and loopback.",
            |guest, interface| match interface.device.kind(guest, TABLE) {
                Ok(Some(kind)) => Value::text(kind),
                Ok(None) => Value::Null,
                Err(error) => Value::unreadable(error),
            },
        ),
        column(
            "master",
            Kind::Text,
            Shown::OnRequest,
            "The bridge, bond or the like that it is a port of; null if it is none.",
            |guest, interface| {
                Value::from_read(interface.device.master(guest, TABLE), |name| {
                    name.map_or(Value::Null, Value::text)
                })
            },
        ),
        column(
            "uppers",
            Kind::List,
            Shown::OnRequest,
            "The addresses of the struct net_device of all interfaces above it: of its bridge, \
             of VLANs.",
            |guest, interface| {
                let uppers = interface.device.uppers(guest, TABLE).into_iter();
                Value::List(uppers.map(|upper| upper.address.into()).collect())
            },
        ),
        column(
            "type",
            Kind::Text,
            Shown::OnRequest,
            "What it links to: ether, loopback, none (point-to-point without headers), or the \
             number of another ARPHRD_ type.",
            |_, interface| link_type(interface.device.link_type()),
        ),
        column(
            "mac",
            Kind::Text,
            Shown::Always,
            "Its hardware address now; null if it has none.",
            |guest, interface| {
                Value::from_read(interface.device.hardware_address(guest), |bytes| {
                    hardware_address(&bytes)
                })
            },
        ),
        column(
            "operstate",
            Kind::Text,
            Shown::Always,
            "unknown, notpresent, down, lowerlayerdown, testing, dormant or up.",
            |_, interface| operational_state(interface.device.operational_state()),
        ),
        column(
            "mtu",
            Kind::Unsigned,
            Shown::Always,
            "The largest packet it takes, in bytes.",
            |_, interface| interface.device.mtu().into(),
        ),
        column(
            "flags",
            Kind::List,
            Shown::Always,
            "Its flags, as `ip link` names them. PROMISC says what the kernel does, whoever \
             asked for it.",
            |_, interface| flags(&interface.device),
        ),
        column(
            "promiscuity",
            Kind::Unsigned,
            Shown::OnRequest,
            "How many users want all packets; above 0 somebody listens to the network.",
            |_, interface| interface.device.promiscuity().into(),
        ),
        column(
            "ipv4",
            Kind::List,
            Shown::Always,
            "Its IPv4 addresses with prefix lengths.",
            |guest, interface| addresses(interface.device.ipv4_addresses(guest, TABLE)),
        ),
        column(
            "ipv6",
            Kind::List,
            Shown::Always,
            "Its IPv6 addresses with prefix lengths.",
            |guest, interface| addresses(interface.device.ipv6_addresses(guest, TABLE)),
        ),
        column(
            "namespace",
            Kind::Unsigned,
            Shown::Always,
            "Its network namespace, as the inode number in /proc/PID/ns/net.",
            |_, interface| interface.device.namespace.inode.into(),
        ),
        column(
            "rx_packets",
            Kind::Unsigned,
            Shown::OnRequest,
            "Packets received; null where only the driver counts.",
            |guest, interface| counters(guest, interface, |counters| counters.received_packets),
        ),
        column(
            "rx_bytes",
            Kind::Unsigned,
            Shown::OnRequest,
            "Bytes received; null where only the driver counts.",
            |guest, interface| counters(guest, interface, |counters| counters.received_bytes),
        ),
        column(
            "tx_packets",
            Kind::Unsigned,
            Shown::OnRequest,
            "Packets sent; null where only the driver counts.",
            |guest, interface| counters(guest, interface, |counters| counters.sent_packets),
        ),
        column(
            "tx_bytes",
            Kind::Unsigned,
            Shown::OnRequest,
            "Bytes sent; null where only the driver counts.",
            |guest, interface| counters(guest, interface, |counters| counters.sent_bytes),
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its struct net_device lies.",
            |_, interface| interface.device.address.into(),
        ),
    ],
    items,
};

fn link_type(number: u64) -> Value {
    match number {
        1 => "ether".into(),
        24 => "ieee1394".into(),
        32 => "infiniband".into(),
        512 => "ppp".into(),
        768 => "ipip".into(),
        769 => "tunnel6".into(),
        772 => "loopback".into(),
        776 => "sit".into(),
        778 => "gre".into(),
        823 => "gre6".into(),
        65534 => "none".into(),
        other => other.to_string().into(),
    }
}

fn operational_state(state: Option<u64>) -> Value {
    const NAMES: [&str; 7] = [
        "unknown",
        "notpresent",
        "down",
        "lowerlayerdown",
        "testing",
        "dormant",
        "up",
    ];
    match state {
        None => Value::Null,
        Some(state) => match usize::try_from(state).ok().and_then(|at| NAMES.get(at)) {
            Some(name) => (*name).into(),
            None => state.to_string().into(),
        },
    }
}

/// The flags that the kernel keeps, and the two that it computes on request.
fn flags(device: &Device) -> Value {
    const NAMES: [(u32, &str); 16] = [
        (0, "UP"),
        (1, "BROADCAST"),
        (2, "DEBUG"),
        (3, "LOOPBACK"),
        (4, "POINTOPOINT"),
        (5, "NOTRAILERS"),
        (7, "NOARP"),
        (8, "PROMISC"),
        (9, "ALLMULTI"),
        (10, "MASTER"),
        (11, "SLAVE"),
        (12, "MULTICAST"),
        (13, "PORTSEL"),
        (14, "AUTOMEDIA"),
        (15, "DYNAMIC"),
        (18, "ECHO"),
    ];
    let flags = device.flags();
    let mut names: Vec<&str> = NAMES
        .iter()
        .filter(|(bit, _)| flags >> bit & 1 == 1)
        .map(|(_, name)| *name)
        .collect();
    if device.is_running() {
        names.push("RUNNING");
    }
    if device.has_carrier() {
        names.push("LOWER_UP");
    }
    names.into()
}

fn addresses(read: Result<Vec<(IpAddr, u64)>, ReadError>) -> Value {
    Value::from_read(read, |list| {
        list.into_iter()
            .map(|(address, prefix)| format!("{address}/{prefix}"))
            .collect::<Vec<_>>()
            .into()
    })
}

fn counters(guest: &Guest, interface: &Interface, of: fn(Counters) -> u64) -> Value {
    match interface.cpus.as_ref() {
        Err(reason) => Value::unreadable(reason),
        Ok(cpus) => Value::from_read(interface.device.counters(guest, TABLE, cpus), |counters| {
            counters.map(of).into()
        }),
    }
}

fn items(
    guest: &Guest,
    _selection: &Selection,
    sink: &mut Items<'_, Interface>,
) -> Result<(), TableError> {
    let cpus = Arc::new(PerCpu::read(guest, TABLE).map_err(|error| error.to_string()));
    for namespace in namespaces(guest, TABLE)? {
        for device in devices(guest, TABLE, namespace)? {
            let cpus = cpus.clone();
            if sink(Interface { device, cpus }).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

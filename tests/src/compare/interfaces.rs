//! What the table `interfaces` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Interface;

use super::Check;
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The check of `interfaces`.
pub const INTERFACES: Check = Check {
    comparison: Comparison {
        table: "interfaces",
        key: &["namespace", "index"],
    },
    selection: Selection::default,
    expected: |truth| {
        let all = &truth.interfaces;
        all.iter()
            .map(|interface| expected(interface, all))
            .collect()
    },
    beyond_truth: |_| false,
};

/// `IFF_…` bits (`include/uapi/linux/if.h`) in the order of the table.
const FLAGS: [(u32, &str); 18] = [
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
    (6, "RUNNING"),
    (16, "LOWER_UP"),
];

fn expected(interface: &Interface, all: &[Interface]) -> ExpectedRow {
    const STATES: [&str; 7] = [
        "unknown",
        "notpresent",
        "down",
        "lowerlayerdown",
        "testing",
        "dormant",
        "up",
    ];
    let names = |flags: u32| {
        let set = FLAGS.iter().filter(|(bit, _)| flags >> bit & 1 == 1);
        Value::List(set.map(|(_, name)| Value::from(*name)).collect())
    };
    // The kernel shows user space only what user space asked for of these.
    let (promiscuous, all_multicast) = (1 << 8, 1 << 9);
    let flags = [0, promiscuous, all_multicast, promiscuous | all_multicast]
        .map(|hidden| names(interface.flags | hidden));
    let addresses = |version6: bool| {
        let of_version = interface
            .addresses
            .iter()
            .filter(|address| address.address.contains(':') == version6);
        Expected::Same(
            of_version
                .map(|address| format!("{}/{}", address.address, address.prefix_length).into())
                .collect(),
        )
    };
    let state = STATES.get(interface.operational_state as usize);
    let counter = |value: u64| match interface.name.as_bytes() {
        // It grows until the table is read.
        b"lo" => Expected::Between(value.into(), i128::from(value) + (1 << 30)),
        // Most drivers keep theirs to themselves.
        _ => Expected::Anything,
    };
    let master = all.iter().find(|other| {
        other.namespace == interface.namespace && Some(other.index) == interface.master
    });
    let [received_bytes, received_packets, sent_bytes, sent_packets] = interface.counters;
    ExpectedRow::from([
        ("namespace", Expected::Exactly(interface.namespace.into())),
        ("index", Expected::Exactly(interface.index.into())),
        (
            "name",
            Expected::Exactly(Value::text(interface.name.as_bytes())),
        ),
        (
            "kind",
            Expected::Exactly(interface.kind.as_deref().map_or(Value::Null, Value::from)),
        ),
        (
            "mac",
            Expected::Exactly(match interface.hardware_address.as_str() {
                "" => Value::Null,
                address => address.into(),
            }),
        ),
        (
            "master",
            Expected::Exactly(match master {
                Some(master) => Value::text(master.name.as_bytes()),
                None => Value::Null,
            }),
        ),
        (
            "operstate",
            state.map_or(Expected::Anything, |state| {
                Expected::Exactly((*state).into())
            }),
        ),
        ("mtu", Expected::Exactly(interface.mtu.into())),
        ("flags", Expected::OneOf(flags.to_vec())),
        ("ipv4", addresses(false)),
        ("ipv6", addresses(true)),
        ("rx_bytes", counter(received_bytes)),
        ("rx_packets", counter(received_packets)),
        ("tx_bytes", counter(sent_bytes)),
        ("tx_packets", counter(sent_packets)),
    ])
}

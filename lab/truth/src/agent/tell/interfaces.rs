//! Interfaces and their addresses, by rtnetlink, in each network namespace.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use secmon_truth::{ByteString, Interface, InterfaceAddress};

use super::namespaces::network_namespaces;
use crate::agent::netlink::{Netlink, attributes, number};
use crate::agent::sys;

/// Every interface of every network namespace.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let own = File::open("/proc/self/ns/net")?;
    let mut interfaces = Vec::new();
    for (inode, path) in network_namespaces()? {
        // A namespace may be gone by now; then it has no interfaces either.
        let Ok(file) = File::open(&path) else {
            continue;
        };
        sys::set_namespace(&file, libc::CLONE_NEWNET)?;
        let found = in_this_namespace(inode);
        sys::set_namespace(&own, libc::CLONE_NEWNET)?;
        interfaces.extend(found?);
    }
    Ok(interfaces)
}

fn in_this_namespace(namespace: u64) -> io::Result<Vec<Interface>> {
    let netlink = Netlink::open(libc::NETLINK_ROUTE)?;
    let mut addresses: BTreeMap<u32, Vec<InterfaceAddress>> = BTreeMap::new();
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    for message in netlink.dump(libc::RTM_GETADDR, &[0; 8])? {
        if let Some((index, address)) = address(&message.payload) {
            addresses.entry(index).or_default().push(address);
        }
    }
    // struct ifinfomsg: family, pad, type (2), index (4), flags (4), change.
    Ok(netlink
        .dump(libc::RTM_GETLINK, &[0; 16])?
        .iter()
        .filter_map(|message| interface(namespace, &message.payload, &mut addresses))
        .collect())
}

fn interface(
    namespace: u64,
    payload: &[u8],
    addresses: &mut BTreeMap<u32, Vec<InterfaceAddress>>,
) -> Option<Interface> {
    let index = u32::from_ne_bytes(number(payload, 4)?);
    let mut interface = Interface {
        namespace,
        index,
        name: ByteString::default(),
        flags: u32::from_ne_bytes(number(payload, 8)?),
        mtu: 0,
        link_type: u32::from(u16::from_ne_bytes(number(payload, 2)?)),
        hardware_address: String::new(),
        operational_state: 0,
        kind: None,
        addresses: addresses.remove(&index).unwrap_or_default(),
        link: None,
        master: None,
        alias: None,
        counters: [0; 4],
    };
    interface.addresses.sort();
    for (kind, value) in attributes(payload.get(16..)?) {
        let word = number(value, 0).map(u32::from_ne_bytes);
        match kind {
            libc::IFLA_IFNAME => interface.name = text(value),
            libc::IFLA_MTU => interface.mtu = word?,
            libc::IFLA_LINK => interface.link = word,
            libc::IFLA_MASTER => interface.master = word,
            libc::IFLA_OPERSTATE => interface.operational_state = u32::from(*value.first()?),
            libc::IFLA_IFALIAS => interface.alias = Some(text(value)),
            libc::IFLA_ADDRESS => {
                let pairs: Vec<_> = value.iter().map(|byte| format!("{byte:02x}")).collect();
                interface.hardware_address = pairs.join(":");
            }
            libc::IFLA_LINKINFO => {
                interface.kind = attributes(value)
                    .into_iter()
                    .find(|(kind, _)| *kind == libc::IFLA_INFO_KIND)
                    .map(|(_, name)| text(name).to_string());
            }
            libc::IFLA_STATS64 => {
                // struct rtnl_link_stats64: packets in, out, bytes in, out.
                let counter = |at| number(value, at).map(u64::from_ne_bytes);
                interface.counters = [counter(16)?, counter(0)?, counter(24)?, counter(8)?];
            }
            _ => {}
        }
    }
    Some(interface)
}

fn address(payload: &[u8]) -> Option<(u32, InterfaceAddress)> {
    let family = i32::from(*payload.first()?);
    let index = u32::from_ne_bytes(number(payload, 4)?);
    let (mut local, mut address, mut label) = (None, None, None);
    for (kind, value) in attributes(payload.get(8..)?) {
        match kind {
            libc::IFA_LOCAL => local = ip(family, value),
            libc::IFA_ADDRESS => address = ip(family, value),
            libc::IFA_LABEL => label = Some(text(value)),
            _ => {}
        }
    }
    // On a point-to-point link the local address is ours and the other one
    // the peer's; elsewhere both are the same, or only one is told.
    let own = local.clone().or_else(|| address.clone())?;
    let peer = address.filter(|address| local.is_some() && *address != own);
    Some((
        index,
        InterfaceAddress {
            address: own,
            prefix_length: *payload.get(1)?,
            peer,
            scope: *payload.get(3)?,
            label,
        },
    ))
}

fn ip(family: libc::c_int, value: &[u8]) -> Option<String> {
    match family {
        libc::AF_INET => Some(Ipv4Addr::from(number::<4>(value, 0)?).to_string()),
        libc::AF_INET6 => Some(Ipv6Addr::from(number::<16>(value, 0)?).to_string()),
        _ => None,
    }
}

fn text(value: &[u8]) -> ByteString {
    ByteString::from(value.strip_suffix(b"\0").unwrap_or(value))
}

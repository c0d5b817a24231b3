//! Network addresses and the kernel's words around them.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::Value;

/// An IPv4 address from the 4 bytes in network order that the kernel holds.
pub fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = bytes.get(..4)?.try_into().ok()?;
    Some(octets.into())
}

/// An IPv6 address from the 16 bytes in network order that the kernel holds.
pub fn ipv6(bytes: &[u8]) -> Option<Ipv6Addr> {
    let octets: [u8; 16] = bytes.get(..16)?.try_into().ok()?;
    Some(octets.into())
}

/// A hardware address as `aa:bb:…`; null if it has no bytes.
pub fn hardware_address(bytes: &[u8]) -> Value {
    if bytes.is_empty() {
        return Value::Null;
    }
    let parts: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":").into()
}

/// The name of an address family (`include/linux/socket.h`) in lower case, as
/// far as sockets of it are named by their family alone.
pub fn family_name(family: u16) -> Option<&'static str> {
    Some(match family {
        1 => "unix",
        2 => "inet",
        3 => "ax25",
        4 => "ipx",
        5 => "appletalk",
        6 => "netrom",
        8 => "atmpvc",
        9 => "x25",
        10 => "inet6",
        11 => "rose",
        15 => "key",
        16 => "netlink",
        17 => "packet",
        20 => "atmsvc",
        21 => "rds",
        23 => "irda",
        24 => "pppox",
        26 => "llc",
        27 => "ib",
        28 => "mpls",
        29 => "can",
        30 => "tipc",
        31 => "bluetooth",
        32 => "iucv",
        33 => "rxrpc",
        34 => "isdn",
        35 => "phonet",
        36 => "ieee802154",
        37 => "caif",
        38 => "alg",
        39 => "nfc",
        40 => "vsock",
        41 => "kcm",
        42 => "qipcrtr",
        43 => "smc",
        44 => "xdp",
        45 => "mctp",
        _ => return None,
    })
}

/// The name of a netlink protocol (`include/uapi/linux/netlink.h`), as `ss`
/// writes it.
pub fn netlink_name(protocol: u16) -> Option<&'static str> {
    Some(match protocol {
        0 => "route",
        2 => "usersock",
        3 => "firewall",
        4 => "sock_diag",
        5 => "nflog",
        6 => "xfrm",
        7 => "selinux",
        8 => "iscsi",
        9 => "audit",
        10 => "fib_lookup",
        11 => "connector",
        12 => "netfilter",
        13 => "ip6_fw",
        14 => "dnrtmsg",
        15 => "kobject_uevent",
        16 => "generic",
        18 => "scsitransport",
        19 => "ecryptfs",
        20 => "rdma",
        21 => "crypto",
        22 => "smc",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(
            ipv4(&[127, 0, 0, 1]).map(|a| a.to_string()).as_deref(),
            Some("127.0.0.1")
        );
        assert_eq!(ipv4(&[1, 2, 3]), None);
        let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 1, 2, 3, 4];
        assert_eq!(
            ipv6(&mapped).map(|a| a.to_string()).as_deref(),
            Some("::ffff:1.2.3.4")
        );
        assert_eq!(hardware_address(&[2, 0xab]), Value::from("02:ab"));
        assert_eq!(hardware_address(&[]), Value::Null);
    }
}

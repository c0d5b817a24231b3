//! Interfaces with addresses, by rtnetlink, and network namespaces.

use std::fs::{self, File};
use std::io;
use std::mem::forget;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};

use super::report::{Reports, attempt};
use crate::agent::netlink::{Netlink, put_attribute};
use crate::agent::sys;

const CREATE: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
/// `VETH_INFO_PEER` of `include/uapi/linux/veth.h`.
const VETH_PEER: u16 = 1;
/// `IFLA_VLAN_ID` of `include/uapi/linux/if_link.h`.
const VLAN_ID: u16 = 1;
/// `IFA_FLAGS`, `IFA_F_NODAD` of `include/uapi/linux/if_addr.h`.
const ADDRESS_FLAGS: u16 = 8;
const NO_DUPLICATE_DETECTION: u32 = 2;

/// Interfaces of the initial namespace.
pub fn interfaces(failures: &mut Vec<String>) {
    attempt(failures, "lo", || up("lo"));
    attempt(failures, "dummy0", || {
        address("dummy0", "192.0.2.1", 24, None)?;
        address("dummy0", "192.0.2.17", 32, None)?;
        address("dummy0", "2001:db8::1", 64, None)?;
        up("dummy0")
    });
    attempt(failures, "dummy1", || {
        rename("dummy1", "odd.näme-1")?;
        alias("odd.näme-1", "an alias, with blanks")?;
        address("odd.näme-1", "198.51.100.1", 32, Some("198.51.100.2"))?;
        up("odd.näme-1")
    });
    attempt(failures, "veth", || {
        veth("veth0", "veth1", None)?;
        address("veth0", "10.9.0.1", 30, None)?;
        up("veth0")?;
        up("veth1")
    });
    attempt(failures, "virtio", || {
        let name = ["eth0", "ens1", "enp0s3"]
            .into_iter()
            .find(|name| index(name).is_ok())
            .ok_or_else(|| io::Error::other("no virtio interface"))?;
        address(name, "203.0.113.5", 24, None)?;
        address(name, "fd00:5ec:0::5", 64, None)?;
        up(name)
    });
    attempt(failures, "bridge", || {
        link("br0", "bridge", None, &[])?;
        address("br0", "172.30.0.1", 16, None)?;
        port("veth1", "br0")
    });
    attempt(failures, "vlan", || {
        let mut data = Vec::new();
        put_attribute(&mut data, VLAN_ID, &42u16.to_ne_bytes());
        link("dummy0.42", "vlan", Some(index("dummy0")?), &data)
    });
}

/// Namespaces: one that only a bind mount keeps, one that only a descriptor
/// keeps, one with a process of its own and a socket held from outside.
pub fn namespaces(reports: &mut Reports) -> io::Result<()> {
    reports.simple("netns-mounted", |_| {
        fs::create_dir_all("/run/netns")?;
        fs::write("/run/netns/lonely", "")?;
        let own = File::open("/proc/self/ns/net")?;
        sys::unshare(libc::CLONE_NEWNET)?;
        up("lo")?;
        address("lo", "10.99.0.1", 32, None)?;
        sys::mount(
            "/proc/self/ns/net",
            "/run/netns/lonely",
            "",
            libc::MS_BIND,
            "",
        )?;
        sys::set_namespace(&own, libc::CLONE_NEWNET)
    })?;
    reports.simple("netns-descriptor", |_| {
        let own = File::open("/proc/self/ns/net")?;
        sys::unshare(libc::CLONE_NEWNET)?;
        up("lo")?;
        forget(File::open("/proc/self/ns/net")?);
        // A socket of that namespace in a process of this one.
        forget(TcpListener::bind("127.0.0.1:7001")?);
        sys::set_namespace(&own, libc::CLONE_NEWNET)
    })?;
    // Of other kinds too.
    reports.simple("uts-mounted", |_| {
        fs::create_dir_all("/run/netns")?;
        fs::write("/run/netns/uts", "")?;
        let own = File::open("/proc/self/ns/uts")?;
        sys::unshare(libc::CLONE_NEWUTS)?;
        let link = "/proc/self/ns/uts";
        sys::mount(link, "/run/netns/uts", "", libc::MS_BIND, "")?;
        sys::set_namespace(&own, libc::CLONE_NEWUTS)
    })?;
    reports.simple("ipc-descriptor", |_| {
        let own = File::open("/proc/self/ns/ipc")?;
        sys::unshare(libc::CLONE_NEWIPC)?;
        forget(File::open("/proc/self/ns/ipc")?);
        sys::set_namespace(&own, libc::CLONE_NEWIPC)
    })?;
    reports.simple("netns-own", |_| {
        sys::unshare(libc::CLONE_NEWNET)?;
        up("lo")?;
        forget(TcpListener::bind("0.0.0.0:7002")?);
        forget(UdpSocket::bind("[::1]:7003")?);
        forget(std::os::unix::net::UnixListener::bind(
            "/tmp/netns-own.sock",
        )?);
        Ok(())
    })?;
    Ok(())
}

/// Makes a pair of connected interfaces, the second in the namespace of
/// `pid` if given.
pub fn veth(name: &str, peer: &str, pid: Option<i32>) -> io::Result<()> {
    let mut peer_message = header(0, 0);
    put_attribute(&mut peer_message, libc::IFLA_IFNAME, &text(peer));
    if let Some(pid) = pid {
        put_attribute(&mut peer_message, libc::IFLA_NET_NS_PID, &pid.to_ne_bytes());
    }
    let mut data = Vec::new();
    put_attribute(&mut data, VETH_PEER, &peer_message);
    link(name, "veth", None, &data)
}

/// Adds an address, without the wait for duplicates of an IPv6 one.
pub fn address(name: &str, address: &str, prefix: u8, peer: Option<&str>) -> io::Result<()> {
    let parse = |text: &str| -> io::Result<(libc::c_int, Vec<u8>)> {
        match text.parse().map_err(io::Error::other)? {
            IpAddr::V4(address) => Ok((libc::AF_INET, address.octets().to_vec())),
            IpAddr::V6(address) => Ok((libc::AF_INET6, address.octets().to_vec())),
        }
    };
    let (family, own) = parse(address)?;
    let other = match peer {
        Some(peer) => parse(peer)?.1,
        None => own.clone(),
    };
    let mut message = vec![family as u8, prefix, 0, 0];
    message.extend(index(name)?.to_ne_bytes());
    put_attribute(&mut message, libc::IFA_LOCAL, &own);
    put_attribute(&mut message, libc::IFA_ADDRESS, &other);
    if family == libc::AF_INET6 {
        put_attribute(
            &mut message,
            ADDRESS_FLAGS,
            &NO_DUPLICATE_DETECTION.to_ne_bytes(),
        );
    }
    Netlink::open(libc::NETLINK_ROUTE)?.request(libc::RTM_NEWADDR, CREATE, &message)
}

/// Switches an interface on.
pub fn up(name: &str) -> io::Result<()> {
    set(&header(index(name)?, libc::IFF_UP as u32))
}

/// Makes an interface a port of a bridge.
fn port(name: &str, bridge: &str) -> io::Result<()> {
    let mut message = header(index(name)?, 0);
    put_attribute(
        &mut message,
        libc::IFLA_MASTER,
        &index(bridge)?.to_ne_bytes(),
    );
    set(&message)
}

fn rename(name: &str, new: &str) -> io::Result<()> {
    let mut message = header(index(name)?, 0);
    put_attribute(&mut message, libc::IFLA_IFNAME, &text(new));
    set(&message)
}

fn alias(name: &str, alias: &str) -> io::Result<()> {
    let mut message = header(index(name)?, 0);
    put_attribute(&mut message, libc::IFLA_IFALIAS, &text(alias));
    set(&message)
}

fn set(message: &[u8]) -> io::Result<()> {
    Netlink::open(libc::NETLINK_ROUTE)?.request(libc::RTM_NEWLINK, 0, message)
}

fn link(name: &str, kind: &str, lower: Option<u32>, data: &[u8]) -> io::Result<()> {
    let mut message = header(0, 0);
    put_attribute(&mut message, libc::IFLA_IFNAME, &text(name));
    if let Some(lower) = lower {
        put_attribute(&mut message, libc::IFLA_LINK, &lower.to_ne_bytes());
    }
    let mut information = Vec::new();
    put_attribute(&mut information, libc::IFLA_INFO_KIND, kind.as_bytes());
    put_attribute(&mut information, libc::IFLA_INFO_DATA, data);
    put_attribute(&mut message, libc::IFLA_LINKINFO, &information);
    Netlink::open(libc::NETLINK_ROUTE)?.request(libc::RTM_NEWLINK, CREATE, &message)
}

/// struct ifinfomsg: family, pad, type (2), index, flags, change mask.
fn header(index: u32, flags: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    for word in [index, flags, flags] {
        header.extend(word.to_ne_bytes());
    }
    header
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

/// An interface's index in this network namespace.
pub fn index(name: &str) -> io::Result<u32> {
    sys::interface_index(name)
}

/// An address that nothing answers at: on the dummy interface's network.
pub const SILENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);

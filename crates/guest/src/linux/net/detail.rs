//! What sockets of one family have beyond the common part: names of UNIX
//! sockets, ports and groups of netlink, what a packet socket listens to,
//! queues of TCP.

use secmon_memory::{ReadError, VirtualAddress};

use super::sock::{LISTEN, Sock};
use crate::{Guest, Text, layout};

/// `sockaddr_un.sun_path` has this many bytes; the kernel may append one.
const LONGEST_PATH: u64 = 109;
/// `sockaddr_un.sun_family` precedes the path.
const FAMILY_BYTES: u64 = 2;
/// More groups than this has no netlink protocol.
const MOST_GROUPS: u64 = 4096;

layout! {
    /// `include/net/af_unix.h`
    struct UnixLayout: "unix_sock" {
        address: "addr",
        peer: "peer",
    }
}

layout! {
    /// `include/net/af_unix.h`
    struct UnixAddressLayout: "unix_address" {
        length: "len",
        name: "name",
    }
}

layout! {
    /// `net/netlink/af_netlink.h`
    struct NetlinkLayout: "netlink_sock" {
        port: "portid",
        remote_port: "dst_portid",
        group_count: "ngroups",
        groups: "groups",
    }
}

layout! {
    /// `net/packet/internal.h`
    struct PacketLayout: "packet_sock" {
        interface: "ifindex",
        ethertype: "num",
    }
}

layout! {
    /// `include/linux/tcp.h`
    struct TcpLayout: "tcp_sock" {
        written: "write_seq",
        acknowledged: "snd_una",
        received: "rcv_nxt",
        copied: "copied_seq",
    }
}

/// The name of a UNIX socket: a path, an abstract name with a leading `@`, or
/// none.
///
/// # Errors
/// [`ReadError`] of the memory.
pub fn unix_name(
    guest: &Guest,
    table: &'static str,
    sock: VirtualAddress,
) -> Result<Option<Text>, ReadError> {
    let (Ok(layout), Ok(address)) = (
        guest.layout::<UnixLayout>(table),
        guest.layout::<UnixAddressLayout>(table),
    ) else {
        return Ok(None);
    };
    let name = guest.pointer(sock, &layout.address)?;
    if name.is_null() {
        return Ok(None);
    }
    let length = guest.number(name, &address.length)?;
    let length = length.saturating_sub(FAMILY_BYTES).min(LONGEST_PATH);
    let start = name.wrapping_add(address.name.offset + FAMILY_BYTES);
    let mut bytes = vec![0; length as usize];
    guest.space().read(start, &mut bytes)?;
    Ok(unix_text(&bytes))
}

/// The name out of `sun_path`.
fn unix_text(path: &[u8]) -> Option<Text> {
    match path {
        [] => None,
        [0, name @ ..] => Some(Text::new([b"@", name].concat())),
        _ => {
            let end = path.iter().position(|byte| *byte == 0);
            Some(Text::new(path.get(..end.unwrap_or(path.len()))?))
        }
    }
}

/// The other end of a connected UNIX socket.
///
/// # Errors
/// [`ReadError`] of the memory.
pub fn unix_peer(
    guest: &Guest,
    table: &'static str,
    sock: VirtualAddress,
) -> Result<Option<VirtualAddress>, ReadError> {
    let Ok(layout) = guest.layout::<UnixLayout>(table) else {
        return Ok(None);
    };
    let peer = guest.pointer(sock, &layout.peer)?;
    Ok((!peer.is_null()).then_some(peer))
}

/// A netlink socket's ports and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Netlink {
    /// Its port: by custom the process's id; 0 for the kernel's.
    pub port: u32,
    /// The port it is connected to; 0 for the kernel's.
    pub remote_port: u32,
    /// The numbers of the groups it listens to, from 1 on.
    pub groups: Vec<u64>,
}

/// Reads what a netlink socket has.
///
/// # Errors
/// [`ReadError`] of the memory.
pub fn netlink(
    guest: &Guest,
    table: &'static str,
    sock: VirtualAddress,
) -> Result<Option<Netlink>, ReadError> {
    let Ok(layout) = guest.layout::<NetlinkLayout>(table) else {
        return Ok(None);
    };
    let groups = guest.pointer(sock, &layout.groups)?;
    let count = guest.number(sock, &layout.group_count)?.min(MOST_GROUPS);
    let mut bits = Vec::new();
    if !groups.is_null() {
        let mut bytes = vec![0; (count.div_ceil(64) * 8) as usize];
        guest.space().read(groups, &mut bytes)?;
        bits = bytes;
    }
    Ok(Some(Netlink {
        port: guest.number(sock, &layout.port)? as u32,
        remote_port: guest.number(sock, &layout.remote_port)? as u32,
        groups: (0..count)
            .filter(|group| {
                bits.get((group / 8) as usize)
                    .is_some_and(|byte| byte >> (group % 8) & 1 == 1)
            })
            .map(|group| group + 1)
            .collect(),
    }))
}

/// What a packet socket listens to: the number of an interface (0 for all, -1
/// for one that is gone) and an ethertype (0 for nothing, 3 for all).
///
/// # Errors
/// [`ReadError`] of the memory.
pub fn packet(
    guest: &Guest,
    table: &'static str,
    sock: VirtualAddress,
) -> Result<Option<(i32, u16)>, ReadError> {
    let Ok(layout) = guest.layout::<PacketLayout>(table) else {
        return Ok(None);
    };
    let interface = guest.number(sock, &layout.interface)? as i32;
    let ethertype = (guest.number(sock, &layout.ethertype)? as u16).swap_bytes();
    Ok(Some((interface, ethertype)))
}

/// Bytes received and not read yet (of a listener: connections not accepted
/// yet), and bytes written and not acknowledged yet, of a TCP socket.
///
/// # Errors
/// [`ReadError`] of the memory.
pub fn tcp_queues(
    guest: &Guest,
    table: &'static str,
    sock: &Sock,
) -> Result<Option<(u64, u64)>, ReadError> {
    let Ok(layout) = guest.layout::<TcpLayout>(table) else {
        return Ok(None);
    };
    let number = |member| guest.number(sock.address, member).map(|value| value as u32);
    // Sequence numbers wrap; a difference of more than half their range is
    // one below zero.
    let distance = |from: u32, to: u32| u64::try_from(to.wrapping_sub(from) as i32).unwrap_or(0);
    let sent = distance(number(&layout.acknowledged)?, number(&layout.written)?);
    let received = match sock.state {
        LISTEN => sock.backlog().unwrap_or(0),
        _ => distance(number(&layout.copied)?, number(&layout.received)?),
    };
    Ok(Some((received, sent)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_unix_sockets() {
        assert_eq!(unix_text(b""), None);
        assert_eq!(unix_text(b"/run/x\0"), Some(Text::from("/run/x")));
        assert_eq!(unix_text(b"/run/x"), Some(Text::from("/run/x")));
        assert_eq!(unix_text(b"\0ab\0c"), Some(Text::from("@ab\0c")));
    }
}

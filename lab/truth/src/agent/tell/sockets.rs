//! Sockets of every network namespace: the `/proc/net` files, and
//! `sock_diag` for UNIX peers and vsock.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use secmon_truth::{ByteString, Socket};

use super::namespaces::network_namespaces;
use crate::agent::netlink::{Netlink, attributes, number};
use crate::agent::sys;

/// `SOCK_DIAG_BY_FAMILY` of `include/uapi/linux/sock_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// Internet protocols with a file of the common form in `/proc/net`.
const INTERNET: &[&str] = &[
    "tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "icmp", "icmp6", "raw", "raw6",
];

/// Every socket that the kernel lists, in every network namespace.
pub fn sockets() -> io::Result<Vec<Socket>> {
    let own = File::open("/proc/self/ns/net")?;
    let mut sockets = Vec::new();
    for (namespace, path) in network_namespaces()? {
        let Ok(file) = File::open(&path) else {
            continue;
        };
        sys::set_namespace(&file, libc::CLONE_NEWNET)?;
        let found = in_this_namespace(namespace);
        sys::set_namespace(&own, libc::CLONE_NEWNET)?;
        sockets.extend(found?);
    }
    Ok(sockets)
}

fn in_this_namespace(namespace: u64) -> io::Result<Vec<Socket>> {
    // `thread-self`, because `/proc/net` is the thread's own namespace's.
    let folder = "/proc/thread-self/net";
    let mut sockets = Vec::new();
    for protocol in INTERNET {
        for line in lines(&format!("{folder}/{protocol}")) {
            sockets.extend(internet(namespace, protocol, &line));
        }
    }
    let named = unix_dump()
        .unwrap_or_default()
        .into_iter()
        .map(|socket| (socket.inode, socket))
        .collect();
    for line in lines(&format!("{folder}/unix")) {
        sockets.extend(unix(namespace, &line, &named));
    }
    for line in lines(&format!("{folder}/packet")) {
        sockets.extend(packet(namespace, &line));
    }
    for line in lines(&format!("{folder}/netlink")) {
        sockets.extend(netlink(namespace, &line));
    }
    sockets.extend(vsock(namespace).unwrap_or_default());
    Ok(sockets)
}

/// The lines after the heading.
fn lines(path: &str) -> Vec<Vec<u8>> {
    // A family that isn't loaded has no file, and no sockets.
    fs::read(path)
        .unwrap_or_default()
        .split(|byte| *byte == b'\n')
        .skip(1)
        .filter(|line| !line.is_empty())
        .map(<[u8]>::to_vec)
        .collect()
}

fn empty(namespace: u64, protocol: &str) -> Socket {
    Socket {
        protocol: protocol.to_owned(),
        namespace,
        inode: 0,
        state: None,
        state_name: None,
        local_address: None,
        local_port: None,
        remote_address: None,
        remote_port: None,
        uid: None,
        path: None,
        socket_type: None,
        peer_inode: None,
        send_queue: None,
        receive_queue: None,
        sub_protocol: None,
        interface: None,
        groups: None,
    }
}

fn internet(namespace: u64, protocol: &str, line: &[u8]) -> Option<Socket> {
    let line = std::str::from_utf8(line).ok()?;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let state = u32::from_str_radix(fields.get(3)?, 16).ok()?;
    let (local_address, local_port) = end(fields.get(1)?)?;
    let (remote_address, remote_port) = end(fields.get(2)?)?;
    let (send_queue, receive_queue) = fields.get(4)?.split_once(':')?;
    Some(Socket {
        inode: fields.get(9)?.parse().ok()?,
        state: Some(state),
        state_name: Some(tcp_state(state).to_owned()),
        local_address: Some(local_address),
        local_port: Some(local_port),
        remote_address: Some(remote_address),
        remote_port: Some(remote_port),
        uid: fields.get(7)?.parse().ok(),
        send_queue: u64::from_str_radix(send_queue, 16).ok(),
        receive_queue: u64::from_str_radix(receive_queue, 16).ok(),
        ..empty(namespace, protocol)
    })
}

/// `0100007F:0016`: the address in the order the CPU keeps it, word by word.
fn end(text: &str) -> Option<(String, u32)> {
    let (address, port) = text.split_once(':')?;
    let words: Vec<[u8; 4]> = (0..address.len())
        .step_by(8)
        .map(|at| {
            let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
            Some(word.to_ne_bytes())
        })
        .collect::<Option<_>>()?;
    let bytes = words.concat();
    let address = match bytes.len() {
        4 => Ipv4Addr::from(number::<4>(&bytes, 0)?).to_string(),
        16 => Ipv6Addr::from(number::<16>(&bytes, 0)?).to_string(),
        _ => return None,
    };
    Some((address, u32::from_str_radix(port, 16).ok()?))
}

/// `include/net/tcp_states.h`, named as `ss` names them.
fn tcp_state(state: u32) -> &'static str {
    match state {
        1 => "ESTABLISHED",
        2 => "SYN_SENT",
        3 => "SYN_RECV",
        4 => "FIN_WAIT1",
        5 => "FIN_WAIT2",
        6 => "TIME_WAIT",
        7 => "CLOSE",
        8 => "CLOSE_WAIT",
        9 => "LAST_ACK",
        10 => "LISTEN",
        11 => "CLOSING",
        12 => "NEW_SYN_RECV",
        _ => "UNKNOWN",
    }
}

/// `Num: RefCount Protocol Flags Type St Inode Path`
fn unix(namespace: u64, line: &[u8], named: &BTreeMap<u64, UnixDiag>) -> Option<Socket> {
    // Seven fields, each followed by one blank except that numbers are
    // padded on the left; a path may itself hold blanks.
    let mut rest = line;
    let mut fields = Vec::new();
    for _ in 0..7 {
        let start = rest.iter().position(|byte| *byte != b' ')?;
        rest = &rest[start..];
        let end = rest
            .iter()
            .position(|byte| *byte == b' ')
            .unwrap_or(rest.len());
        fields.push(std::str::from_utf8(&rest[..end]).ok()?);
        rest = &rest[end..];
    }
    let inode = fields.get(6)?.parse().ok()?;
    let diag = named.get(&inode);
    // The file prints every NUL of an abstract name as '@', which can't be
    // told from a real '@', and ends a path at a newline: `sock_diag` has the
    // exact name. Without it, only the abstract mark is set right.
    let path = match diag.and_then(|diag| diag.name.clone()) {
        Some(ByteString(name)) if name.first() != Some(&0) => {
            Some(ByteString::from(name.strip_suffix(b"\0").unwrap_or(&name)))
        }
        Some(name) => Some(name),
        None => rest
            .strip_prefix(b" ")
            .map(|path| match path.split_first() {
                Some((b'@', name)) => ByteString([b"\0", name].concat()),
                _ => ByteString::from(path),
            }),
    };
    Some(Socket {
        inode,
        state: u32::from_str_radix(fields.get(5)?, 16).ok(),
        socket_type: u32::from_str_radix(fields.get(4)?, 16).ok(),
        path,
        peer_inode: diag.and_then(|diag| diag.peer),
        ..empty(namespace, "unix")
    })
}

/// `sk RefCnt Type Proto Iface R Rmem User Inode`
fn packet(namespace: u64, line: &[u8]) -> Option<Socket> {
    let line = std::str::from_utf8(line).ok()?;
    let fields: Vec<&str> = line.split_whitespace().collect();
    Some(Socket {
        inode: fields.get(8)?.parse().ok()?,
        socket_type: fields.get(2)?.parse().ok(),
        sub_protocol: u32::from_str_radix(fields.get(3)?, 16).ok(),
        interface: fields.get(4)?.parse().ok(),
        receive_queue: fields.get(6)?.parse().ok(),
        uid: fields.get(7)?.parse().ok(),
        ..empty(namespace, "packet")
    })
}

/// `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`
fn netlink(namespace: u64, line: &[u8]) -> Option<Socket> {
    let line = std::str::from_utf8(line).ok()?;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let family = fields.get(1)?.parse().ok()?;
    Some(Socket {
        inode: fields.get(9)?.parse().ok()?,
        local_port: fields.get(2)?.parse().ok(),
        groups: u32::from_str_radix(fields.get(3)?, 16).ok(),
        sub_protocol: Some(family),
        ..empty(namespace, "netlink")
    })
}

/// Exact names and peers' inodes of UNIX sockets, by inode.
fn unix_dump() -> io::Result<Vec<UnixDiag>> {
    // struct unix_diag_req: family, protocol, pad, states, inode, show, cookie.
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    // UDIAG_SHOW_NAME | UDIAG_SHOW_PEER
    request.extend(5u32.to_ne_bytes());
    request.extend(u64::MAX.to_ne_bytes());
    let messages = Netlink::open(libc::NETLINK_SOCK_DIAG)?.dump(SOCK_DIAG_BY_FAMILY, &request)?;
    Ok(messages
        .iter()
        .filter_map(|message| {
            // struct unix_diag_msg: family, type, state, pad, inode, cookie.
            let inode = u32::from_ne_bytes(number(&message.payload, 4)?);
            let mut found = UnixDiag {
                inode: u64::from(inode),
                name: None,
                peer: None,
            };
            for (kind, value) in attributes(message.payload.get(16..)?) {
                match kind {
                    0 => found.name = Some(ByteString::from(value)),
                    2 => {
                        found.peer =
                            number(value, 0).map(|inode| u64::from(u32::from_ne_bytes(inode)));
                    }
                    _ => {}
                }
            }
            Some(found)
        })
        .collect())
}

struct UnixDiag {
    inode: u64,
    name: Option<ByteString>,
    peer: Option<u64>,
}

/// vsock sockets; they have no file in `/proc/net`.
fn vsock(namespace: u64) -> io::Result<Vec<Socket>> {
    // struct vsock_diag_req: family, protocol, pad (2), states, inode,
    // show, cookie (2).
    let mut request = vec![libc::AF_VSOCK as u8, 0, 0, 0];
    request.extend(u32::MAX.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(u64::MAX.to_ne_bytes());
    let messages = Netlink::open(libc::NETLINK_SOCK_DIAG)?.dump(SOCK_DIAG_BY_FAMILY, &request)?;
    Ok(messages
        .iter()
        .filter_map(|message| {
            // struct vsock_diag_msg: family, type, state, shutdown, then
            // source CID and port, destination CID and port, inode.
            let bytes = &message.payload;
            let word = |at| number(bytes, at).map(u32::from_ne_bytes);
            let state = u32::from(*bytes.get(2)?);
            Some(Socket {
                inode: u64::from(word(20)?),
                state: Some(state),
                state_name: Some(tcp_state(state).to_owned()),
                socket_type: bytes.get(1).map(|kind| u32::from(*kind)),
                local_address: Some(word(4)?.to_string()),
                local_port: word(8),
                remote_address: Some(word(12)?.to_string()),
                remote_port: word(16),
                ..empty(namespace, "vsock")
            })
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internet_lines_of_both_families() {
        let line = b"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000002 00:00000000 00000000  1000        0 12345 1 0 100 0 0 10 0";
        let socket = internet(1, "tcp", line).unwrap();
        assert_eq!(socket.local_address.as_deref(), Some("127.0.0.1"));
        assert_eq!(socket.local_port, Some(8080));
        assert_eq!(socket.state_name.as_deref(), Some("LISTEN"));
        assert_eq!((socket.uid, socket.inode), (Some(1000), 12345));
        assert_eq!(socket.receive_queue, Some(2));
        assert_eq!(
            end("00000000000000000000000001000000:0050"),
            Some(("::1".to_owned(), 80))
        );
        assert_eq!(end("0100007F"), None);
    }

    #[test]
    fn a_unix_path_keeps_its_blanks() {
        let line = b"0000000000000000: 00000002 00000000 00010000 0001 01 21000 /tmp/a  b ";
        let names = BTreeMap::new();
        let socket = unix(1, line, &names).unwrap();
        assert_eq!(socket.path, Some(ByteString::from("/tmp/a  b ")));
        assert_eq!(socket.inode, 21000);
        let line = b"0000000000000000: 00000003 00000000 00000000 0003 03    42";
        let socket = unix(1, line, &names).unwrap();
        assert_eq!((socket.path, socket.state), (None, Some(3)));
    }
}

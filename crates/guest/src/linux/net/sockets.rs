//! The table `sockets`.

use std::borrow::Cow;

use secmon_memory::{ReadError, Volatility};

use super::address::{family_name, netlink_name};
use super::detail;
use super::sock::{
    AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, AF_VSOCK, ESTABLISHED, Form, LISTEN,
};
use super::socket::{Socket, sockets};
use super::tables::Source;
use super::vsock::VsockAddress;
use crate::table::Items;
use crate::{Column, Cost, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value};

const TABLE: &str = "sockets";

/// `SOCK_RAW`
const SOCK_RAW: u16 = 3;

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Socket) -> Value,
) -> Column<Socket> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `sockets`.
pub static SOCKETS: TableOf<Socket> = TableOf {
    name: TABLE,
    aliases: &["ss", "netstat"],
    meaning: "Sockets of all families and network namespaces: those in the kernel's tables, \
              then those that only an open file leads to.",
    columns: &[
        column(
            "protocol",
            Kind::Text,
            Shown::Always,
            "tcp, udp, udplite, raw, icmp, each with a 6 for IPv6; unix, packet, netlink, \
             vsock; of other families the family's name.",
            |_, socket| protocol(socket).into_owned().into(),
        ),
        column(
            "state",
            Kind::Text,
            Shown::Always,
            "LISTEN, ESTABLISHED, TIME_WAIT and so on; CLOSE also for what is not connected. \
             CONNECTING: a UNIX connection that nobody accepted yet. Null for packet sockets.",
            |_, socket| state(socket),
        ),
        column(
            "local_address",
            Kind::Text,
            Shown::Always,
            "IP address; path of a UNIX socket, an abstract name with a leading @; name of the \
             netlink protocol; interface of a packet socket, null for all; context id of a vsock \
             socket.",
            local_address,
        ),
        column(
            "local_port",
            Kind::Unsigned,
            Shown::Always,
            "Port; of a raw socket the IP protocol, of netlink its port number.",
            |guest, socket| port(guest, socket, End::Local),
        ),
        column(
            "remote_address",
            Kind::Text,
            Shown::Always,
            "IP address of the other end, 0.0.0.0 or :: if there is none; name of a UNIX \
             socket's other end.",
            remote_address,
        ),
        column(
            "remote_port",
            Kind::Unsigned,
            Shown::Always,
            "Port of the other end; 0 if there is none.",
            |guest, socket| port(guest, socket, End::Remote),
        ),
        column(
            "inode",
            Kind::Unsigned,
            Shown::Always,
            "The number that /proc/PID/fd shows; 0 for what no process holds (any more).",
            |_, socket| match &socket.inode {
                Ok(inode) => (*inode).into(),
                Err(reason) => Value::unreadable(reason),
            },
        ),
        column(
            "pid",
            Kind::Unsigned,
            Shown::Always,
            "The first process that has it open.",
            |_, socket| socket.owners().first().map(|owner| owner.pid).into(),
        ),
        column(
            "comm",
            Kind::Text,
            Shown::Always,
            "The name of that process.",
            |_, socket| {
                let owner = socket.owners().first();
                owner.map(|owner| Text::new(&*owner.comm)).into()
            },
        ),
        column(
            "fd",
            Kind::Unsigned,
            Shown::OnRequest,
            "The number of its file descriptor in that process.",
            |_, socket| socket.owners().first().map(|owner| owner.fd).into(),
        ),
        column(
            "pids",
            Kind::List,
            Shown::OnRequest,
            "All processes that have it open, once for each descriptor.",
            |_, socket| {
                let owners = socket.owners().iter();
                owners.map(|owner| owner.pid).collect::<Vec<_>>().into()
            },
        ),
        column(
            "type",
            Kind::Text,
            Shown::OnRequest,
            "stream, dgram, raw, rdm, seqpacket or another SOCK_ type's number.",
            |_, socket| socket.sock.socket_type().map(type_name).into(),
        ),
        column(
            "uid",
            Kind::Unsigned,
            Shown::OnRequest,
            "The user that made it; null for a connection that is not made yet or waits out \
             its end.",
            |_, socket| socket.sock.user().into(),
        ),
        column(
            "namespace",
            Kind::Unsigned,
            Shown::OnRequest,
            "Its network namespace, as the inode number in /proc/PID/ns/net.",
            |_, socket| match socket.namespace_inode {
                Some(inode) => inode.into(),
                None => Value::unreadable("its network namespace is in no list"),
            },
        ),
        column(
            "interface",
            Kind::Text,
            Shown::OnRequest,
            "The interface that it is bound to; null for any.",
            interface,
        ),
        column(
            "receive_queue",
            Kind::Unsigned,
            Shown::OnRequest,
            "TCP: bytes not read yet, of a listener connections not accepted yet. Others: \
             bytes of memory that received data takes.",
            |guest, socket| queue(guest, socket, |(receive, _)| receive),
        ),
        column(
            "send_queue",
            Kind::Unsigned,
            Shown::OnRequest,
            "TCP: bytes not acknowledged yet. Others: bytes of memory that unsent data takes.",
            |guest, socket| queue(guest, socket, |(_, send)| send),
        ),
        column(
            "ip_protocol",
            Kind::Unsigned,
            Shown::OnRequest,
            "The number of the protocol in its family.",
            |_, socket| socket.sock.protocol().map(u32::from).into(),
        ),
        column(
            "groups",
            Kind::List,
            Shown::OnRequest,
            "The numbers of the groups that a netlink socket listens to.",
            |guest, socket| netlink(guest, socket, |netlink| netlink.groups.into()),
        ),
        column(
            "ethertype",
            Kind::Text,
            Shown::OnRequest,
            "What a packet socket listens to, in hexadecimal: 0x0003 all, 0x0800 IPv4, 0x0000 \
             nothing.",
            |guest, socket| {
                packet(guest, socket, |(_, ethertype)| {
                    format!("{ethertype:#06x}").into()
                })
            },
        ),
        column(
            "peer_inode",
            Kind::Unsigned,
            Shown::OnRequest,
            "The inode number of a UNIX socket's other end.",
            peer_inode,
        ),
        column(
            "in_table",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether it was found in a table of its protocol; what is not was made and never \
             bound or connected, is of a family whose table is not read, or was taken out.",
            |_, socket| socket.source.is_some().into(),
        ),
        column(
            "shown_in_guest",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether it was found in a table that the guest's own programs are told of; false as \
             well for a TCP socket that is only in the table of what has a port.",
            |_, socket| {
                let told = socket
                    .source
                    .is_some_and(|source| source != Source::TcpPorts);
                told.into()
            },
        ),
        column(
            "has_file",
            Kind::Boolean,
            Shown::OnRequest,
            "Whether an open file is behind it: else it is the kernel's own, not accepted \
             yet, or closed by its process.",
            |guest, socket| match socket.has_file(guest) {
                Ok(has) => has.into(),
                Err(reason) => Value::unreadable(reason),
            },
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its struct sock lies.",
            |_, socket| socket.sock.address.into(),
        ),
    ],
    items,
};

fn items(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Socket>,
) -> Result<(), TableError> {
    sockets(guest, TABLE, &mut |socket| {
        let wanted = selection.pids.is_none()
            || socket
                .owners()
                .iter()
                .any(|owner| selection.wants_pid(owner.pid.into()));
        if wanted {
            sink(socket)
        } else {
            std::ops::ControlFlow::Continue(())
        }
    })
}

/// A value read from memory behind the socket: good only if the socket is
/// still the one that was copied.
fn behind(guest: &Guest, socket: &Socket, read: Result<Option<Value>, ReadError>) -> Value {
    let live = guest.space().memory().volatility() == Volatility::Live;
    if live && !socket.sock.is_unchanged(guest) {
        guest.diagnostics().count_torn_read();
        return Value::unreadable("the socket changed or was released during the read");
    }
    Value::from_read(read, |value| value.unwrap_or(Value::Null))
}

fn protocol(socket: &Socket) -> Cow<'static, str> {
    let sock = &socket.sock;
    if sock.family != AF_INET && sock.family != AF_INET6 {
        return match family_name(sock.family) {
            Some(name) => name.into(),
            None => format!("family{}", sock.family).into(),
        };
    }
    let is_version6 = sock.family == AF_INET6;
    let (name, name6) = match (sock.form, sock.socket_type(), sock.protocol()) {
        (Form::TimeWait | Form::Request, ..) => ("tcp", "tcp6"),
        (_, Some(SOCK_RAW), _) => ("raw", "raw6"),
        (_, _, Some(6)) => ("tcp", "tcp6"),
        (_, _, Some(17)) => ("udp", "udp6"),
        (_, _, Some(136)) => ("udplite", "udplite6"),
        (_, _, Some(1 | 58)) => ("icmp", "icmp6"),
        (_, _, Some(33)) => ("dccp", "dccp6"),
        (_, _, Some(132)) => ("sctp", "sctp6"),
        (_, _, Some(262)) => ("mptcp", "mptcp6"),
        _ => ("inet", "inet6"),
    };
    if is_version6 { name6 } else { name }.into()
}

/// The names of `TCP_…` states as `/proc/net/tcp`'s readers write them.
fn tcp_state(state: u8) -> Option<&'static str> {
    Some(match state {
        1 => "ESTABLISHED",
        2 => "SYN_SENT",
        // 12 is what the kernel calls a connection that is being made; it
        // shows it as 3.
        3 | 12 => "SYN_RECV",
        4 => "FIN_WAIT1",
        5 => "FIN_WAIT2",
        6 => "TIME_WAIT",
        0 | 7 => "CLOSE",
        8 => "CLOSE_WAIT",
        9 => "LAST_ACK",
        10 => "LISTEN",
        11 => "CLOSING",
        13 => "BOUND_INACTIVE",
        _ => return None,
    })
}

fn state(socket: &Socket) -> Value {
    let sock = &socket.sock;
    match sock.family {
        AF_PACKET => Value::Null,
        AF_UNIX if sock.socket().is_none() && sock.state == ESTABLISHED => "CONNECTING".into(),
        AF_UNIX if sock.socket().is_none() && sock.state != LISTEN => "DISCONNECTING".into(),
        _ => match tcp_state(sock.state) {
            Some(name) => name.into(),
            None => sock.state.to_string().into(),
        },
    }
}

fn type_name(number: u16) -> String {
    match number {
        1 => "stream".to_owned(),
        2 => "dgram".to_owned(),
        3 => "raw".to_owned(),
        4 => "rdm".to_owned(),
        5 => "seqpacket".to_owned(),
        6 => "dccp".to_owned(),
        10 => "packet".to_owned(),
        other => other.to_string(),
    }
}

fn netlink(guest: &Guest, socket: &Socket, value: fn(detail::Netlink) -> Value) -> Value {
    if socket.sock.family != AF_NETLINK {
        return Value::Null;
    }
    let read = detail::netlink(guest, TABLE, socket.sock.address);
    behind(guest, socket, read.map(|found| found.map(value)))
}

fn packet(guest: &Guest, socket: &Socket, value: fn((i32, u16)) -> Value) -> Value {
    if socket.sock.family != AF_PACKET {
        return Value::Null;
    }
    let read = detail::packet(guest, TABLE, socket.sock.address);
    behind(guest, socket, read.map(|found| found.map(value)))
}

fn interface_name(guest: &Guest, socket: &Socket, index: u64) -> Value {
    if index == 0 {
        return Value::Null;
    }
    let context = socket.context();
    match context.interface(guest, socket.sock.namespace, index) {
        Some(name) => name.into(),
        None => Value::unreadable(format!("there is no interface {index}")),
    }
}

fn interface(guest: &Guest, socket: &Socket) -> Value {
    if socket.sock.family == AF_PACKET {
        return match detail::packet(guest, TABLE, socket.sock.address) {
            Ok(Some((index, _))) => match u64::try_from(index) {
                Ok(index) => interface_name(guest, socket, index),
                Err(_) => Value::unreadable("its interface is gone"),
            },
            Ok(None) => Value::Null,
            Err(error) => Value::unreadable(error),
        };
    }
    interface_name(guest, socket, socket.sock.bound_device())
}

fn local_address(guest: &Guest, socket: &Socket) -> Value {
    let sock = &socket.sock;
    match sock.family {
        AF_INET | AF_INET6 => sock.local_ip().map(|address| address.to_string()).into(),
        AF_UNIX => {
            let name = detail::unix_name(guest, TABLE, sock.address);
            behind(guest, socket, name.map(|name| name.map(Value::from)))
        }
        AF_NETLINK => match sock.protocol() {
            Some(protocol) => match netlink_name(protocol) {
                Some(name) => name.into(),
                None => protocol.to_string().into(),
            },
            None => Value::Null,
        },
        AF_PACKET => interface(guest, socket),
        AF_VSOCK => vsock(guest, socket, End::Local, context_name),
        _ => Value::Null,
    }
}

fn remote_address(guest: &Guest, socket: &Socket) -> Value {
    let sock = &socket.sock;
    match sock.family {
        AF_INET | AF_INET6 => sock.remote_ip().map(|address| address.to_string()).into(),
        AF_UNIX => {
            let name = detail::unix_peer(guest, TABLE, sock.address).and_then(|peer| match peer {
                Some(peer) => detail::unix_name(guest, TABLE, peer),
                None => Ok(None),
            });
            behind(guest, socket, name.map(|name| name.map(Value::from)))
        }
        AF_VSOCK => vsock(guest, socket, End::Remote, context_name),
        _ => Value::Null,
    }
}

/// One end of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Local,
    Remote,
}

fn port(guest: &Guest, socket: &Socket, end: End) -> Value {
    let sock = &socket.sock;
    match (sock.family, end) {
        (AF_INET | AF_INET6, End::Local) => u32::from(sock.local_port()).into(),
        (AF_INET | AF_INET6, End::Remote) => u32::from(sock.remote_port()).into(),
        (AF_NETLINK, End::Local) => netlink(guest, socket, |netlink| netlink.port.into()),
        (AF_NETLINK, End::Remote) => netlink(guest, socket, |netlink| netlink.remote_port.into()),
        (AF_VSOCK, end) => vsock(guest, socket, end, |address| address.port.into()),
        _ => Value::Null,
    }
}

/// The context id as text.
fn context_name(address: VsockAddress) -> Value {
    match address.context {
        Some(number) => number.to_string().into(),
        None => "any".into(),
    }
}

fn vsock(guest: &Guest, socket: &Socket, end: End, value: fn(VsockAddress) -> Value) -> Value {
    let Some(vsock) = socket.context().vsock() else {
        return Value::Null;
    };
    let read = match end {
        End::Local => vsock.local(guest, socket.sock.address),
        End::Remote => vsock.remote(guest, socket.sock.address),
    };
    behind(guest, socket, read.map(|found| found.map(value)))
}

fn peer_inode(guest: &Guest, socket: &Socket) -> Value {
    let sock = &socket.sock;
    if sock.family != AF_UNIX {
        return Value::Null;
    }
    let read = detail::unix_peer(guest, TABLE, sock.address).and_then(|peer| match peer {
        Some(peer) => super::sock::inode_of_sock(guest, TABLE, peer),
        None => Ok(None),
    });
    behind(guest, socket, read.map(|inode| inode.map(Value::from)))
}

fn queue(guest: &Guest, socket: &Socket, of: fn((u64, u64)) -> u64) -> Value {
    let sock = &socket.sock;
    if sock.form != Form::Full {
        return Value::Unsigned(0);
    }
    if matches!(sock.family, AF_INET | AF_INET6) && sock.protocol() == Some(6) {
        let read = detail::tcp_queues(guest, TABLE, sock);
        return behind(
            guest,
            socket,
            read.map(|both| both.map(|both| of(both).into())),
        );
    }
    match (sock.receive_bytes(), sock.send_bytes()) {
        (Some(receive), Some(send)) => of((receive, send)).into(),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_words_of_proc() {
        assert_eq!(tcp_state(10), Some("LISTEN"));
        assert_eq!(tcp_state(12), Some("SYN_RECV"));
        assert_eq!(tcp_state(14), None);
        assert_eq!(type_name(5), "seqpacket");
    }
}

//! Sockets of every family and in every state that can be kept.

use std::io::{self, Read as _, Write as _};
use std::mem::forget;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::network::{self, SILENT};
use super::report::{Reports, attempt};
use crate::agent::memory::Shared;
use crate::agent::sys;

/// `ETH_P_ALL` and `ETH_P_ARP` of `include/uapi/linux/if_ether.h`.
const ETH_P_ALL: u16 = 3;
const ETH_P_ARP: u16 = 0x0806;

/// The processes.
pub fn processes(reports: &mut Reports, shared: &'static Shared) -> io::Result<()> {
    reports.simple("sockets-tcp", |failures| {
        tcp(failures);
        Ok(())
    })?;
    reports.simple("sockets-udp", |failures| {
        udp(failures);
        Ok(())
    })?;
    reports.simple("sockets-unix", |failures| {
        unix(failures);
        Ok(())
    })?;
    reports.simple("sockets-low", |failures| {
        raw_and_packet(failures);
        netlink(failures);
        Ok(())
    })?;
    reports.simple("sockets-vsock", |failures| {
        vsock(failures);
        Ok(())
    })?;
    // An owner other than root.
    reports.simple("sockets-user", |_| {
        sys::set_ids([1000; 3], [1000; 3], &[])?;
        forget(TcpListener::bind("127.0.0.1:8443")?);
        forget(UdpSocket::bind("127.0.0.1:5353")?);
        Ok(())
    })?;
    // One socket in two processes.
    reports.simple("sockets-shared", |_| {
        let listener = TcpListener::bind("127.0.0.1:8500")?;
        super::report::child_that_stands(|| {
            sys::set_name(b"sockets-heir");
            Ok(())
        })?;
        forget(listener);
        Ok(())
    })?;
    reports.piece("sockets-short-lived", |reporter| {
        let mut held = Vec::new();
        let mut failures = Vec::new();
        if let Err(error) = short_lived(&mut held) {
            failures.push(error.to_string());
        }
        reporter.done(&failures);
        loop {
            let asked = shared.sockets_asked.load(Ordering::SeqCst);
            if asked != shared.sockets_made.load(Ordering::SeqCst) {
                held.clear();
                let _ = short_lived(&mut held);
                shared.sockets_made.store(asked, Ordering::SeqCst);
            }
            thread::sleep(Duration::from_millis(20));
        }
    })?;
    Ok(())
}

fn tcp(failures: &mut Vec<String>) {
    for address in ["0.0.0.0:8080", "127.0.0.1:8081", "[::1]:8082", "[::]:8083"] {
        attempt(failures, address, || {
            let listener = TcpListener::bind(address)?;
            let mut to = listener.local_addr()?;
            if to.ip().is_unspecified() && to.is_ipv4() {
                to.set_ip(Ipv4Addr::LOCALHOST.into());
            } else if to.ip().is_unspecified() {
                to.set_ip(Ipv6Addr::LOCALHOST.into());
            }
            // Established on both sides.
            let client = TcpStream::connect(to)?;
            let (server, _) = listener.accept()?;
            forget((listener, client, server));
            Ok(())
        });
    }
    attempt(failures, "IPv4 over an IPv6 socket", || {
        let client = TcpStream::connect("127.0.0.1:8083")?;
        // The server's side waits in the listener's queue.
        forget(client);
        Ok(())
    });
    attempt(failures, "unread data", || {
        let (mut client, server) = pair("127.0.0.1:8084")?;
        client.write_all(&[b'd'; 3000])?;
        forget((client, server));
        Ok(())
    });
    attempt(failures, "CLOSE_WAIT and FIN_WAIT2", || {
        let (client, mut server) = pair("127.0.0.1:8085")?;
        // Shut down, not closed: the kernel doesn't forget it then.
        client.shutdown(Shutdown::Write)?;
        server.read_exact(&mut [0]).err();
        forget((client, server));
        Ok(())
    });
    attempt(failures, "two listeners at one port", || {
        for _ in 0..2 {
            let socket = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
            let on = 1i32.to_ne_bytes();
            sys::set_socket_option(&socket, libc::SOL_SOCKET, libc::SO_REUSEPORT, &on)?;
            sys::bind(&socket, &ipv4(Ipv4Addr::LOCALHOST, 8086))?;
            sys::listen(&socket, 3)?;
            forget(socket);
        }
        Ok(())
    });
    attempt(failures, "neither connected nor listening", || {
        forget(sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?);
        let bound = sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
        sys::bind(&bound, &ipv4(Ipv4Addr::LOCALHOST, 8087))?;
        forget(bound);
        Ok(())
    });
}

fn udp(failures: &mut Vec<String>) {
    for address in ["0.0.0.0:6000", "127.0.0.1:6001", "[::]:6002", "[::1]:6003"] {
        attempt(failures, address, || UdpSocket::bind(address).map(forget));
    }
    attempt(failures, "connected", || {
        let socket = UdpSocket::bind("127.0.0.1:6004")?;
        socket.connect("127.0.0.1:6001")?;
        forget(socket);
        let socket = UdpSocket::bind("[::1]:6005")?;
        socket.connect("[::1]:6003")?;
        forget(socket);
        Ok(())
    });
    attempt(failures, "unread datagram", || {
        let receiver = UdpSocket::bind("127.0.0.1:6006")?;
        receiver.send_to(b"unread", "127.0.0.1:6006")?;
        forget(receiver);
        Ok(())
    });
    attempt(failures, "UDP-Lite", || {
        let socket = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE)?;
        sys::bind(&socket, &ipv4(Ipv4Addr::LOCALHOST, 6007))?;
        forget(socket);
        Ok(())
    });
    attempt(failures, "ping", || {
        let socket = sys::socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?;
        sys::bind(&socket, &ipv4(Ipv4Addr::LOCALHOST, 777))?;
        forget(socket);
        Ok(())
    });
    attempt(failures, "never bound", || {
        sys::socket(libc::AF_INET, libc::SOCK_DGRAM, 0).map(forget)
    });
}

fn unix(failures: &mut Vec<String>) {
    attempt(failures, "stream", || {
        let listener = UnixListener::bind("/run/lab stream.sock")?;
        let client = UnixStream::connect("/run/lab stream.sock")?;
        let (server, _) = listener.accept()?;
        // A second client that nobody has accepted yet.
        let waiting = UnixStream::connect("/run/lab stream.sock")?;
        forget((listener, client, server, waiting));
        Ok(())
    });
    for name in [
        &b"lab-abstract"[..],
        b"\0with\0nul",
        b"at@sign",
        b"\xff\xfe",
        b"new\nline",
    ] {
        attempt(failures, "abstract", || {
            let address = SocketAddr::from_abstract_name(name)?;
            forget(UnixListener::bind_addr(&address)?);
            Ok(())
        });
    }
    attempt(failures, "abstract, named by the kernel", || {
        let socket = sys::socket(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
        sys::bind(&socket, &(libc::AF_UNIX as u16).to_ne_bytes())?;
        forget(socket);
        Ok(())
    });
    attempt(failures, "longest path", || {
        // 108 bytes without a NUL at the end.
        let path = format!("/run/{}", "s".repeat(103));
        let socket = sys::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        let address = [&(libc::AF_UNIX as u16).to_ne_bytes(), path.as_bytes()].concat();
        sys::bind(&socket, &address)?;
        sys::listen(&socket, 5)?;
        forget(socket);
        Ok(())
    });
    attempt(failures, "datagram", || {
        let receiver = UnixDatagram::bind("/run/datagram\nodd")?;
        let sender = UnixDatagram::unbound()?;
        sender.connect("/run/datagram\nodd")?;
        forget((receiver, sender, UnixDatagram::pair()?));
        Ok(())
    });
    attempt(failures, "deleted", || {
        forget(UnixListener::bind("/run/deleted.sock")?);
        std::fs::remove_file("/run/deleted.sock")
    });
    attempt(failures, "sequenced packets", || {
        forget(sys::socket_pair(libc::SOCK_SEQPACKET)?);
        let socket = sys::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0)?;
        let address = [
            &(libc::AF_UNIX as u16).to_ne_bytes()[..],
            b"/run/sequenced.sock",
        ]
        .concat();
        sys::bind(&socket, &address)?;
        sys::listen(&socket, 5)?;
        forget(socket);
        Ok(())
    });
    attempt(failures, "unnamed", || {
        forget(UnixStream::pair()?);
        forget(sys::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?);
        // One whose peer is gone.
        let (left, right) = UnixStream::pair()?;
        drop(right);
        forget(left);
        Ok(())
    });
    attempt(failures, "descriptors in flight", || {
        let (left, right) = UnixStream::pair()?;
        sys::send_descriptor(&left, &io::stdin())?;
        forget((left, right));
        Ok(())
    });
}

fn raw_and_packet(failures: &mut Vec<String>) {
    attempt(failures, "raw", || {
        forget(sys::socket(
            libc::AF_INET,
            libc::SOCK_RAW,
            libc::IPPROTO_ICMP,
        )?);
        forget(sys::socket(
            libc::AF_INET6,
            libc::SOCK_RAW,
            libc::IPPROTO_ICMPV6,
        )?);
        let bound = sys::socket(libc::AF_INET, libc::SOCK_RAW, 253)?;
        sys::bind(&bound, &ipv4(Ipv4Addr::LOCALHOST, 0))?;
        sys::connect(&bound, &ipv4(Ipv4Addr::LOCALHOST, 0))?;
        forget(bound);
        Ok(())
    });
    attempt(failures, "packet", || {
        for (kind, protocol, interface) in [
            (libc::SOCK_RAW, ETH_P_ALL, 0),
            (libc::SOCK_DGRAM, ETH_P_ARP, network::index("lo")?),
        ] {
            let socket = sys::socket(libc::AF_PACKET, kind, i32::from(protocol.to_be()))?;
            // struct sockaddr_ll: family, protocol, interface, then zeros.
            let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
            address.extend(protocol.to_be_bytes());
            address.extend(interface.to_ne_bytes());
            address.resize(20, 0);
            sys::bind(&socket, &address)?;
            forget(socket);
        }
        Ok(())
    });
}

fn netlink(failures: &mut Vec<String>) {
    for (family, groups) in [
        (libc::NETLINK_ROUTE, 0x11u32),
        (libc::NETLINK_KOBJECT_UEVENT, 1),
        (libc::NETLINK_GENERIC, 0),
        (libc::NETLINK_SOCK_DIAG, 0),
        (libc::NETLINK_AUDIT, 0),
    ] {
        attempt(failures, &format!("netlink family {family}"), || {
            let socket = sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, family)?;
            // struct sockaddr_nl: family, pad, port (0: any), groups.
            let mut address = (libc::AF_NETLINK as u32).to_ne_bytes().to_vec();
            address.extend(0u32.to_ne_bytes());
            address.extend(groups.to_ne_bytes());
            sys::bind(&socket, &address)?;
            forget(socket);
            Ok(())
        });
    }
}

fn vsock(failures: &mut Vec<String>) {
    attempt(failures, "vsock", || {
        let listener = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
        sys::bind(&listener, &vsock_address(u32::MAX, 9999))?;
        sys::listen(&listener, 4)?;
        // CID 1 is this machine itself.
        let client = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
        sys::connect(&client, &vsock_address(1, 9999))?;
        let server = sys::accept(&listener)?;
        forget((listener, client, server));
        Ok(())
    });
}

/// What the kernel forgets after a minute or two.
fn short_lived(held: &mut Vec<OwnedFd>) -> io::Result<()> {
    // TIME_WAIT: who closes first keeps it.
    let (client, server) = pair("127.0.0.1:0")?;
    drop(client);
    drop(server);
    // FIN_WAIT2 without a file: closed, while the other side isn't.
    let (client, server) = pair("127.0.0.1:0")?;
    drop(client);
    held.push(OwnedFd::from(server));
    // SYN_SENT: nobody answers.
    let socket = sys::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    match sys::connect(&socket, &ipv4(SILENT, 4444)) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
        Err(error) => return Err(error),
        Ok(()) => return Err(io::Error::other("somebody answered")),
    }
    held.push(socket);
    Ok(())
}

fn pair(address: &str) -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(address)?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    Ok((client, server))
}

/// struct sockaddr_in.
fn ipv4(address: Ipv4Addr, port: u16) -> Vec<u8> {
    let address = SocketAddrV4::new(address, port);
    let mut bytes = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    bytes.extend(address.port().to_be_bytes());
    bytes.extend(address.ip().octets());
    bytes.resize(16, 0);
    bytes
}

/// struct sockaddr_vm: family, reserved, port, CID, zeros.
fn vsock_address(cid: u32, port: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_VSOCK as u32).to_ne_bytes().to_vec();
    bytes.extend(port.to_ne_bytes());
    bytes.extend(cid.to_ne_bytes());
    bytes.resize(16, 0);
    bytes
}

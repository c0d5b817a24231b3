//! Reaching any network.

use std::fs;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use secmon_hostile::Report;

use crate::sys;

/// Interfaces, with the drivers of all cards that a cloud has loaded.
pub fn interfaces() -> Result<Report> {
    let mut report = Report::new();
    for entry in fs::read_dir("/sys/class/net").context("/sys/class/net")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        report.tried(name == "lo", || format!("interface {name}"));
    }
    let devices = crate::pci::list()?;
    for device in devices {
        report.tried(device.class >> 16 != 2, || {
            format!("{} is a network card", device.address)
        });
    }
    Ok(report)
}

/// Connections and datagrams to where a host usually is.
pub fn sockets() -> Result<Report> {
    let mut report = Report::new();
    let patience = Duration::from_secs(2);
    for address in [
        "10.0.2.2:22",
        "10.0.2.3:53",
        "192.0.2.1:80",
        "169.254.169.254:80",
        "[fec0::2]:22",
        "[2001:db8::1]:80",
    ] {
        let address: SocketAddr = address.parse()?;
        let reached = TcpStream::connect_timeout(&address, patience);
        report.tried(reached.is_err(), || format!("TCP to {address}"));
        let any = if address.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let sent = UdpSocket::bind(any).and_then(|socket| socket.send_to(b"x", address));
        report.tried(sent.is_err(), || format!("UDP to {address}"));
    }
    let vsock = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
    match vsock {
        Ok(_) => {
            // 0 the hypervisor, 1 this VM, 2 the host, 3 the next VM.
            for (cid, port) in [(0, 1), (2, 22), (2, 1024), (3, 1024)] {
                let socket = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
                let reached = sys::connect_vsock(&socket, cid, port);
                report.tried(reached.is_err(), || format!("vsock to {cid}:{port}"));
            }
        }
        Err(error) => {
            report.note(format!("vsock: {error}"));
            report.tries += 1;
        }
    }
    // Frames on every interface but the VM's own loopback.
    match sys::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) {
        Ok(_) => report.note("raw sockets are there, and no interface to use them on"),
        Err(error) => report.note(format!("raw sockets: {error}")),
    }
    Ok(report)
}

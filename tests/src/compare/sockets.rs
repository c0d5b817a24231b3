//! What the table `sockets` should hold.

use std::collections::BTreeMap;

use secmon_guest::{Selection, Value};
use secmon_lab::truth::{FileKind, Socket};

use super::{Check, Truth};
use crate::rows::{Comparison, Expected, ExpectedRow, TableRow};

/// The check of `sockets`.
pub const SOCKETS: Check = Check {
    comparison: Comparison {
        table: "sockets",
        key: &[
            "protocol",
            "namespace",
            "inode",
            "local_port",
            "remote_port",
        ],
    },
    selection: Selection::default,
    expected: |truth| {
        let listing = Listing::new(truth);
        let rows = truth.sockets.iter();
        rows.map(|socket| listing.expected(socket)).collect()
    },
    beyond_truth,
};

/// Sockets that no list of the guest has: those in no table, and TCP sockets
/// that are bound and neither listen nor are connected.
fn beyond_truth(row: &TableRow) -> bool {
    let is = |column, value: &str| row.get(column) == Some(&Value::from(value));
    row.get("in_table") == Some(&Value::Boolean(false))
        || (is("state", "CLOSE") && (is("protocol", "tcp") || is("protocol", "tcp6")))
}

struct Listing<'t> {
    /// Who has a socket's inode open, once for each descriptor.
    owners: BTreeMap<u64, Vec<i32>>,
    /// Interfaces' names by namespace and number.
    interfaces: BTreeMap<(u64, u32), &'t [u8]>,
}

impl<'t> Listing<'t> {
    fn new(truth: &'t Truth) -> Self {
        let mut owners: BTreeMap<u64, Vec<i32>> = BTreeMap::new();
        for file in &truth.files {
            if file.kind == FileKind::Socket {
                owners.entry(file.inode).or_default().push(file.pid);
            }
        }
        let interfaces = truth.interfaces.iter().map(|interface| {
            (
                (interface.namespace, interface.index),
                interface.name.as_bytes(),
            )
        });
        Self {
            owners,
            interfaces: interfaces.collect(),
        }
    }

    fn expected(&self, socket: &Socket) -> ExpectedRow {
        let owners: &[i32] = match socket.inode {
            0 => &[],
            inode => self.owners.get(&inode).map_or(&[], Vec::as_slice),
        };
        let pids = owners.iter().map(|pid| Value::Signed((*pid).into()));
        let exactly = |value: Option<u64>| Expected::Exactly(value.into());
        let optional =
            |value: Option<u64>| value.map_or(Expected::Anything, |value| exactly(Some(value)));
        let mut row = ExpectedRow::from([
            (
                "protocol",
                Expected::Exactly(socket.protocol.as_str().into()),
            ),
            ("namespace", Expected::Exactly(socket.namespace.into())),
            ("inode", Expected::Exactly(socket.inode.into())),
            ("local_port", exactly(port(socket.local_port))),
            ("remote_port", exactly(port(socket.remote_port))),
            ("pids", Expected::Same(pids.collect())),
            (
                "uid",
                // Of a socket that nobody holds the kernel shows root's.
                match socket.inode {
                    0 => Expected::Anything,
                    _ => optional(socket.uid.map(u64::from)),
                },
            ),
            (
                "receive_queue",
                match (socket.protocol.as_str(), socket.receive_queue) {
                    // It hears all that goes over the network, and nobody
                    // reads what it heard.
                    ("packet", Some(bytes)) => {
                        Expected::Between(bytes.into(), i128::from(bytes) + (1 << 24))
                    }
                    (_, bytes) => optional(bytes),
                },
            ),
            ("send_queue", optional(socket.send_queue)),
            (
                "type",
                socket
                    .socket_type
                    .map_or(Expected::Anything, |number| match number {
                        1 => Expected::Exactly("stream".into()),
                        2 => Expected::Exactly("dgram".into()),
                        3 => Expected::Exactly("raw".into()),
                        5 => Expected::Exactly("seqpacket".into()),
                        _ => Expected::Anything,
                    }),
            ),
            (
                "state",
                socket
                    .state_name
                    .as_deref()
                    .map_or(Expected::Anything, |name| Expected::Exactly(name.into())),
            ),
        ]);
        let text = |value: Option<&str>| Expected::Exactly(value.map_or(Value::Null, Value::from));
        match socket.protocol.as_str() {
            "unix" => self.unix(socket, &mut row),
            "packet" => {
                let key = (socket.namespace, socket.interface.unwrap_or(0));
                let name = self.interfaces.get(&key);
                let name = name.map_or(Value::Null, |name| Value::text(*name));
                row.insert("local_address", Expected::Exactly(name));
                let ethertype = format!("{:#06x}", socket.sub_protocol.unwrap_or(0));
                row.insert("ethertype", Expected::Exactly(ethertype.into()));
            }
            "netlink" => {
                row.insert("ip_protocol", exactly(socket.sub_protocol.map(u64::from)));
                // A netlink socket's other end is the kernel's unless it was
                // connected; no list shows it.
                row.insert("remote_port", Expected::Exactly(0_u64.into()));
                // The list shows the first 32 groups.
                let groups = socket.groups.unwrap_or(0);
                let first = (0..32_u32).filter(|bit| groups >> bit & 1 == 1);
                let first = first.map(|bit| Value::from(bit + 1));
                row.insert("groups", Expected::Includes(first.collect()));
            }
            "vsock" => {
                for (column, address) in [
                    ("local_address", &socket.local_address),
                    ("remote_address", &socket.remote_address),
                ] {
                    let address = match address.as_deref() {
                        Some("4294967295") => Some("any"),
                        other => other,
                    };
                    row.insert(column, text(address));
                }
            }
            _ => {
                row.insert("local_address", text(socket.local_address.as_deref()));
                row.insert("remote_address", text(socket.remote_address.as_deref()));
            }
        }
        row
    }

    fn unix(&self, socket: &Socket, row: &mut ExpectedRow) {
        // `SS_…` of include/uapi/linux/net.h. That a socket listens is told
        // by a flag that the truth leaves out.
        let states: &[&str] = match socket.state {
            Some(1) => &["CLOSE", "LISTEN"],
            Some(2) => &["CONNECTING"],
            Some(3) => &["ESTABLISHED"],
            Some(4) => &["DISCONNECTING"],
            _ => &[],
        };
        let states = states.iter().map(|state| Value::from(*state)).collect();
        row.insert("state", Expected::OneOf(states));
        let name = socket
            .path
            .as_ref()
            .map(secmon_lab::truth::ByteString::as_bytes);
        let name = match name {
            None => Value::Null,
            Some([0, name @ ..]) => Value::text([b"@", name].concat()),
            Some(path) => Value::text(path),
        };
        // A connection that nobody accepted yet has its listener's name and
        // no inode to ask `sock_diag` by: there `@` may stand for a NUL.
        row.insert(
            "local_address",
            match (socket.inode, &name) {
                (0, Value::Text(text))
                    if text.as_bytes().iter().skip(1).any(|byte| *byte == b'@') =>
                {
                    Expected::Anything
                }
                _ => Expected::Exactly(name),
            },
        );
        if let Some(peer) = socket.peer_inode.filter(|inode| *inode != 0) {
            row.insert("peer_inode", Expected::Exactly(peer.into()));
        }
    }
}

/// A port; none where there is none, or any would do.
fn port(port: Option<u32>) -> Option<u64> {
    port.filter(|port| *port != u32::MAX).map(u64::from)
}

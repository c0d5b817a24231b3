//! All sockets of a guest: those in the kernel's tables, and those that only
//! an open file leads to. Each is given once and says which of the two it was.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};

use secmon_memory::{VirtualAddress, Volatility};

use super::device::devices;
use super::namespace::{Known, NetworkNamespace, Standing, namespaces};
use super::sock::{
    AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_UNIX, AF_VSOCK, Form, Sock, SockError, SockModel,
    SocketLayout, inode_of,
};
use super::tables::{Source, Tables};
use super::vsock::Vsock;
use crate::linux::list::is_object_address;
use crate::linux::owner::{Behind, Owner, Owners};
use crate::{Diagnostic, Guest, TableError, Text};

/// What all sockets of one listing share.
pub struct Context {
    table: &'static str,
    owners: Owners,
    namespaces: Vec<NetworkNamespace>,
    vsock: Option<Vsock>,
    interfaces: OnceLock<HashMap<(VirtualAddress, u64), Text>>,
}

impl Context {
    fn read(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let namespaces = namespaces(guest, table)?;
        let owners = Owners::read(guest, table, Behind::File, "socket_file_ops", &[])
            .unwrap_or_else(|error| {
                guest.diagnostics().record(Diagnostic {
                    table,
                    subject: "files_struct".to_owned(),
                    address: None,
                    reason: format!("sockets are without their owners: {error}"),
                });
                Owners::default()
            });
        Ok(Self {
            table,
            owners,
            namespaces,
            vsock: Vsock::find(guest, table),
            interfaces: OnceLock::new(),
        })
    }

    /// How vsock sockets are read, if there are any.
    pub fn vsock(&self) -> Option<&Vsock> {
        self.vsock.as_ref()
    }

    /// The name of the interface with that number.
    pub fn interface(&self, guest: &Guest, net: VirtualAddress, index: u64) -> Option<Text> {
        let names = self.interfaces.get_or_init(|| {
            let mut names = HashMap::new();
            for namespace in &self.namespaces {
                let devices = devices(guest, self.table, *namespace).unwrap_or_default();
                for device in devices {
                    names.insert(
                        (namespace.address, device.index()),
                        Text::new(device.name.as_slice()),
                    );
                }
            }
            names
        });
        names.get(&(net, index)).cloned()
    }
}

/// A socket of the listing.
pub struct Socket {
    /// The socket.
    pub sock: Sock,
    /// The table that it was found in; none if only a file led to it.
    pub source: Option<Source>,
    /// The number of its inode: 0 if no user holds it (any more).
    pub inode: Result<u64, String>,
    /// The inode number of its network namespace, if that is in the list.
    pub namespace_inode: Option<u64>,
    context: Arc<Context>,
}

impl Socket {
    /// What the listing shares.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Who has it open.
    pub fn owners(&self) -> &[Owner] {
        match self.sock.socket() {
            Some(socket) => self.context.owners.of(socket),
            None => &[],
        }
    }

    /// Whether there is an open file behind it.
    ///
    /// # Errors
    /// The reason why that can't be told.
    pub fn has_file(&self, guest: &Guest) -> Result<bool, String> {
        let Some(socket) = self.sock.socket() else {
            return Ok(false);
        };
        let layout = guest
            .layout::<SocketLayout>(self.context.table)
            .map_err(|error| error.to_string())?;
        guest
            .pointer(socket, &layout.file)
            .map(|file| !file.is_null())
            .map_err(|error| error.to_string())
    }
}

/// Whether the socket is linked into a chain: the pointer at its node's back
/// link leads to it.
fn is_linked(guest: &Guest, sock: VirtualAddress, node: u64) -> bool {
    let node = sock.wrapping_add(node);
    let space = guest.space();
    space
        .read_pointer(node.wrapping_add(8))
        .is_ok_and(|previous| {
            is_object_address(space, previous) && space.read_pointer(previous) == Ok(node)
        })
}

/// The families that a table holds.
fn families(source: Source) -> &'static [u16] {
    match source {
        Source::Tcp | Source::TcpPorts | Source::Udp | Source::Raw | Source::Ping => {
            &[AF_INET, AF_INET6]
        }
        Source::Unix => &[AF_UNIX],
        Source::Packet => &[AF_PACKET],
        Source::Netlink => &[AF_NETLINK],
        Source::Vsock => &[AF_VSOCK],
    }
}

/// Gives all sockets to `sink`: first those in tables, then the others.
///
/// # Errors
/// [`TableError`] if the kernel's types or symbols lack what sockets are found
/// by.
pub fn sockets(
    guest: &Guest,
    table: &'static str,
    sink: &mut dyn FnMut(Socket) -> ControlFlow<()>,
) -> Result<(), TableError> {
    let model = guest.layout::<SockModel>(table)?;
    let context = Arc::new(Context::read(guest, table)?);
    let tables = Tables::new(guest, table)?;
    let mut lister = Lister {
        guest,
        table,
        context: context.clone(),
        known: Known::new(&context.namespaces),
        seen: HashSet::new(),
        sink,
        flow: ControlFlow::Continue(()),
    };
    let (node, bind_node) = (model.layout.node.offset, model.layout.bind_node.offset);
    let mut visit = |address, source| {
        // Members of a hash table that is not a chain of this kind have no
        // back links.
        let is_there = || {
            matches!(source, Source::Netlink | Source::Vsock)
                || is_linked(guest, address, node)
                || is_linked(guest, address, bind_node)
        };
        lister.found(address, Found::In(source), families(source), &is_there);
    };
    tables.walk(&context.namespaces, &mut visit);
    if let Some(vsock) = &context.vsock {
        for address in vsock.sockets(guest, table) {
            visit(address, Source::Vsock);
        }
    }
    let layout = guest.layout::<SocketLayout>(table)?;
    for socket in context.owners.objects() {
        if lister.flow.is_break() {
            break;
        }
        let sock = match guest.pointer(socket, &layout.sk) {
            Ok(sock) if is_object_address(guest.space(), sock) => sock,
            // Being made, or being closed.
            _ => {
                lister.left_out(socket, "a socket behind a file has no struct sock");
                continue;
            }
        };
        let is_there = || guest.pointer(socket, &layout.sk) == Ok(sock);
        lister.found(sock, Found::Behind(socket), &[], &is_there);
    }
    Ok(())
}

/// Where a socket was found.
#[derive(Clone, Copy)]
enum Found {
    /// In a table of the kernel's.
    In(Source),
    /// Behind a file, as the `sk` of this `struct socket`.
    Behind(VirtualAddress),
}

struct Lister<'l> {
    guest: &'l Guest,
    table: &'static str,
    context: Arc<Context>,
    known: Known,
    seen: HashSet<VirtualAddress>,
    sink: &'l mut dyn FnMut(Socket) -> ControlFlow<()>,
    flow: ControlFlow<()>,
}

impl Lister<'_> {
    fn left_out(&self, address: VirtualAddress, reason: &str) {
        if self.guest.space().memory().volatility() == Volatility::Live {
            self.guest.diagnostics().count_torn_read();
            return;
        }
        self.guest.diagnostics().record(Diagnostic {
            table: self.table,
            subject: "socket".to_owned(),
            address: Some(address),
            reason: format!("left out: {reason}"),
        });
    }

    fn found(
        &mut self,
        address: VirtualAddress,
        place: Found,
        families: &[u16],
        is_there: &dyn Fn() -> bool,
    ) {
        if self.flow.is_break() || !self.seen.insert(address) {
            return;
        }
        let sock = match Sock::read(self.guest, self.table, address, families, is_there) {
            Ok(sock) => sock,
            Err(SockError::Released) => {
                self.guest.diagnostics().count_torn_read();
                // It may come again, in another table.
                self.seen.remove(&address);
                return;
            }
            Err(error) => {
                self.guest.diagnostics().record(Diagnostic {
                    table: self.table,
                    subject: match place {
                        Found::In(source) => format!("sock in the {source:?} table"),
                        Found::Behind(_) => "sock".to_owned(),
                    },
                    address: Some(address),
                    reason: format!("left out: {error}"),
                });
                return;
            }
        };
        // Each of the two names the other one.
        if let Found::Behind(socket) = place
            && sock.socket() != Some(socket)
        {
            self.left_out(socket, "its sock belongs to another socket");
            return;
        }
        let inode = match (sock.form, sock.socket()) {
            (Form::Full, Some(socket)) => {
                inode_of(self.guest, self.table, socket, address).map_err(|error| error.to_string())
            }
            _ => Ok(0),
        };
        let standing = self.known.standing(self.guest, self.table, sock.namespace);
        if standing == Standing::Ending {
            // So are its sockets, which only the kernel still has.
            return;
        }
        let socket = Socket {
            sock,
            source: match place {
                Found::In(source) => Some(source),
                Found::Behind(_) => None,
            },
            inode,
            namespace_inode: match standing {
                Standing::Listed(inode) => Some(inode),
                Standing::Ending | Standing::Unlisted => None,
            },
            context: self.context.clone(),
        };
        if standing == Standing::Unlisted && !self.is_passing(&socket) {
            self.guest.diagnostics().record(Diagnostic {
                table: self.table,
                subject: "sock.skc_net".to_owned(),
                address: Some(address),
                reason: format!(
                    "its network namespace {} is in no list and has users",
                    socket.sock.namespace
                ),
            });
        }
        self.flow = (self.sink)(socket);
    }

    /// Whether a socket in a namespace of no list is one of a moment of a
    /// running guest: it is gone by now, or the kernel's own in a namespace
    /// that is being made.
    fn is_passing(&self, socket: &Socket) -> bool {
        if self.guest.space().memory().volatility() != Volatility::Live {
            return false;
        }
        let passing =
            !socket.sock.is_unchanged(self.guest) || socket.has_file(self.guest) == Ok(false);
        if passing {
            self.guest.diagnostics().count_torn_read();
        }
        passing
    }
}

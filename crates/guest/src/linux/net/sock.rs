//! Sockets as all protocols share them (`struct sock_common`, `struct sock`,
//! `include/net/sock.h`).
//!
//! Not everything in TCP's tables is a `struct sock`: a connection that waits
//! out its end (`inet_timewait_sock`) or is not fully made yet
//! (`request_sock`) has the common part only, and its state says so. What
//! lies behind it is never read as the rest of a socket.

use std::net::IpAddr;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress, Volatility};
use secmon_profile::{Member, TypeError, Types};

use super::address::{ipv4, ipv6};
use crate::linux::list::is_object_address;
use crate::linux::snapshot::{Snapshot, Spans};
use crate::{Guest, Layout, TableError, layout};

/// `AF_UNIX`
pub const AF_UNIX: u16 = 1;
/// `AF_INET`
pub const AF_INET: u16 = 2;
/// `AF_INET6`
pub const AF_INET6: u16 = 10;
/// `AF_NETLINK`
pub const AF_NETLINK: u16 = 16;
/// `AF_PACKET`
pub const AF_PACKET: u16 = 17;
/// `AF_VSOCK`
pub const AF_VSOCK: u16 = 40;
/// One past the last family there may be (`AF_MAX` is 46 in Linux 7.2).
const MOST_FAMILIES: u16 = 128;

/// `TCP_ESTABLISHED` (`include/net/tcp_states.h`), used by other families too.
pub const ESTABLISHED: u8 = 1;
/// `TCP_TIME_WAIT`: the common part only.
const TIME_WAIT: u8 = 6;
/// `TCP_LISTEN`
pub const LISTEN: u8 = 10;
/// `TCP_NEW_SYN_RECV`: the common part only.
const NEW_SYN_RECV: u8 = 12;

/// How often a socket that changes while it is copied is copied again.
const ATTEMPTS: u32 = 8;

layout! {
    /// `include/net/sock.h`
    pub struct SockLayout: "sock" {
        family: "__sk_common.skc_family",
        state: "__sk_common.skc_state",
        local_ipv4: "__sk_common.skc_rcv_saddr",
        remote_ipv4: "__sk_common.skc_daddr",
        local_port: "__sk_common.skc_num",
        remote_port: "__sk_common.skc_dport",
        bound_device: "__sk_common.skc_bound_dev_if",
        node: "__sk_common.skc_node",
        bind_node: "__sk_common.skc_bind_node",
        flags: "__sk_common.skc_flags",
        socket_type: "sk_type",
        protocol: "sk_protocol",
        socket: "sk_socket",
        user: "sk_uid",
        receive_bytes: "sk_backlog.rmem_alloc",
        send_bytes: "sk_wmem_alloc",
        backlog: "sk_ack_backlog",
    } optional {
        /// Without network namespaces there is only the initial one.
        namespace: "__sk_common.skc_net.net",
        local_ipv6: "__sk_common.skc_v6_rcv_saddr",
        remote_ipv6: "__sk_common.skc_v6_daddr",
    }
}

layout! {
    /// `include/net/inet_timewait_sock.h`
    pub struct TimeWaitLayout: "inet_timewait_sock" {
        substate: "tw_substate",
    }
}

layout! {
    /// `include/linux/net.h`
    pub struct SocketLayout: "socket" {
        file: "file",
        sk: "sk",
    }
}

layout! {
    /// `include/net/sock.h`: a socket and its inode.
    pub struct SocketInodeLayout: "socket_alloc" {
        socket: "socket",
        inode: "vfs_inode",
        inode_number: "vfs_inode.i_ino",
    }
}

/// How sockets of a guest are read.
#[derive(Debug)]
pub struct SockModel {
    /// The members.
    pub layout: SockLayout,
    common: Spans,
    full: Spans,
}

impl Layout for SockModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = SockLayout::resolve(types)?;
        let common = [
            &layout.family,
            &layout.state,
            &layout.local_ipv4,
            &layout.remote_ipv4,
            &layout.local_port,
            &layout.remote_port,
            &layout.bound_device,
            &layout.node,
            &layout.bind_node,
            &layout.flags,
        ];
        let optional = [&layout.namespace, &layout.local_ipv6, &layout.remote_ipv6];
        let rest = [
            &layout.socket_type,
            &layout.protocol,
            &layout.socket,
            &layout.user,
            &layout.receive_bytes,
            &layout.send_bytes,
            &layout.backlog,
        ];
        let common = || {
            common
                .into_iter()
                .chain(optional.into_iter().filter_map(Option::as_ref))
        };
        let spans = Spans::covering(common());
        let full = Spans::covering(common().chain(rest));
        Ok(Self {
            common: spans,
            full,
            layout,
        })
    }
}

/// What an object in a table of sockets is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A `struct sock`.
    Full,
    /// An `inet_timewait_sock`: a closed connection that waits.
    TimeWait,
    /// A `request_sock`: a connection being made.
    Request,
}

/// Why there is no socket at an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SockError {
    /// Its memory can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It is of no family, or of one that its table does not hold.
    #[error("its family is {found}, which this table does not hold")]
    Family {
        /// The family.
        found: u16,
    },
    /// A pointer can't be one.
    #[error("{member} is {found}, which is no address of an object")]
    Pointer {
        /// The member.
        member: &'static str,
        /// What it holds.
        found: VirtualAddress,
    },
    /// The kernel's types lack a member.
    #[error("{0}")]
    Table(String),
    /// The socket was different in each copy.
    #[error("it changed during each of {attempts} reads")]
    Changing {
        /// How many copies were taken.
        attempts: u32,
    },
    /// It was not where it was found any more.
    #[error("it was released during the read")]
    Released,
}

impl From<TableError> for SockError {
    fn from(error: TableError) -> Self {
        Self::Table(error.to_string())
    }
}

/// A copy of a socket.
#[derive(Clone, Debug)]
pub struct Sock {
    /// Where it lies.
    pub address: VirtualAddress,
    /// What it is.
    pub form: Form,
    /// `AF_…`
    pub family: u16,
    /// `TCP_…`, also for other families; of a connection that waits, which
    /// end of a connection it stands for.
    pub state: u8,
    /// Its `struct net`; null in a kernel without namespaces.
    pub namespace: VirtualAddress,
    model: Arc<SockModel>,
    snapshot: Snapshot,
}

impl Sock {
    /// Copies the socket at `address`. `families` are those that it may have,
    /// all if there are none; `is_there` is asked, on a live guest, whether it
    /// still is where it was found.
    ///
    /// # Errors
    /// [`SockError`] if there is no socket there (any more).
    pub fn read(
        guest: &Guest,
        table: &'static str,
        address: VirtualAddress,
        families: &[u16],
        is_there: &dyn Fn() -> bool,
    ) -> Result<Self, SockError> {
        let model = guest.layout::<SockModel>(table)?;
        let live = guest.space().memory().volatility() == Volatility::Live;
        let mut attempts = 0;
        let (form, snapshot) = loop {
            let copied = Self::copy(guest, &model, address, families)?;
            if !live {
                break copied;
            }
            if !is_there() {
                return Err(SockError::Released);
            }
            let again = Self::copy(guest, &model, address, families)?;
            if copied.0 == again.0
                && model.identity(copied.0, &copied.1) == model.identity(again.0, &again.1)
            {
                break again;
            }
            guest.diagnostics().count_torn_read();
            attempts += 1;
            if attempts == ATTEMPTS {
                return Err(SockError::Changing { attempts });
            }
        };
        let spans = model.spans(form);
        let mut state = spans.number(&snapshot, &model.layout.state) as u8;
        if form == Form::TimeWait {
            let layout = guest.layout::<TimeWaitLayout>(table)?;
            state = guest.number(address, &layout.substate)? as u8;
        }
        let namespace = match &model.layout.namespace {
            Some(member) => spans.pointer(&snapshot, member),
            None => VirtualAddress::default(),
        };
        if !namespace.is_null() && !is_object_address(guest.space(), namespace) {
            return Err(SockError::Pointer {
                member: "skc_net",
                found: namespace,
            });
        }
        let sock = Self {
            address,
            form,
            family: spans.number(&snapshot, &model.layout.family) as u16,
            state,
            namespace,
            snapshot,
            model,
        };
        if let Some(found) = sock.socket()
            && !is_object_address(guest.space(), found)
        {
            return Err(SockError::Pointer {
                member: "sk_socket",
                found,
            });
        }
        Ok(sock)
    }

    fn copy(
        guest: &Guest,
        model: &SockModel,
        address: VirtualAddress,
        families: &[u16],
    ) -> Result<(Form, Snapshot), SockError> {
        let common = model.common.read(guest.space(), address)?;
        let family = model.common.number(&common, &model.layout.family) as u16;
        let known = match families {
            [] => family < MOST_FAMILIES,
            _ => families.contains(&family),
        };
        if !known {
            return Err(SockError::Family { found: family });
        }
        let state = model.common.number(&common, &model.layout.state) as u8;
        let has_short_forms = family == AF_INET || family == AF_INET6;
        let form = match state {
            TIME_WAIT if has_short_forms => return Ok((Form::TimeWait, common)),
            NEW_SYN_RECV if has_short_forms => return Ok((Form::Request, common)),
            _ => Form::Full,
        };
        Ok((form, model.full.read(guest.space(), address)?))
    }

    /// Whether the guest still holds what was copied, as far as it tells one
    /// socket from another.
    pub fn is_unchanged(&self, guest: &Guest) -> bool {
        let again = self
            .model
            .spans(self.form)
            .read(guest.space(), self.address);
        again.is_ok_and(|again| {
            self.model.identity(self.form, &again) == self.model.identity(self.form, &self.snapshot)
        })
    }

    fn number(&self, member: &Member) -> u64 {
        self.model.spans(self.form).number(&self.snapshot, member)
    }

    fn full(&self, member: &Member) -> Option<u64> {
        (self.form == Form::Full).then(|| self.number(member))
    }

    /// Its `struct socket`, which user space holds; none if it has none (any
    /// more).
    pub fn socket(&self) -> Option<VirtualAddress> {
        let socket = self.full(&self.model.layout.socket)?;
        (socket != 0).then_some(VirtualAddress::new(socket))
    }

    /// `SOCK_…`: 1 stream, 2 datagram, 3 raw, 5 sequenced packets.
    pub fn socket_type(&self) -> Option<u16> {
        self.full(&self.model.layout.socket_type)
            .map(|kind| kind as u16)
    }

    /// The protocol in its family: `IPPROTO_…`, `NETLINK_…`.
    pub fn protocol(&self) -> Option<u16> {
        self.full(&self.model.layout.protocol)
            .map(|protocol| protocol as u16)
    }

    /// The user that made it.
    pub fn user(&self) -> Option<u32> {
        self.full(&self.model.layout.user).map(|user| user as u32)
    }

    /// Memory of what was received and not read yet, in bytes.
    pub fn receive_bytes(&self) -> Option<u64> {
        self.full(&self.model.layout.receive_bytes)
            .map(|bytes| u64::from(bytes as u32))
    }

    /// Memory of what was written and not sent yet, in bytes.
    pub fn send_bytes(&self) -> Option<u64> {
        // The kernel counts one more than there are, until the socket goes.
        self.full(&self.model.layout.send_bytes)
            .map(|bytes| u64::from((bytes as u32).saturating_sub(1)))
    }

    /// Connections that wait to be accepted.
    pub fn backlog(&self) -> Option<u64> {
        self.full(&self.model.layout.backlog)
    }

    /// The number of the interface that it is bound to; 0 for none.
    pub fn bound_device(&self) -> u64 {
        u64::from(self.number(&self.model.layout.bound_device) as u32)
    }

    /// The local port (of a raw socket the protocol) of an IP socket.
    pub fn local_port(&self) -> u16 {
        self.number(&self.model.layout.local_port) as u16
    }

    /// The remote port of an IP socket; 0 if there is none.
    pub fn remote_port(&self) -> u16 {
        (self.number(&self.model.layout.remote_port) as u16).swap_bytes()
    }

    fn ip(&self, version4: &Member, version6: Option<&Member>) -> Option<IpAddr> {
        let spans = self.model.spans(self.form);
        match (self.family, version6) {
            (AF_INET, _) => ipv4(spans.member(&self.snapshot, version4)).map(IpAddr::V4),
            (AF_INET6, Some(member)) => ipv6(spans.member(&self.snapshot, member)).map(IpAddr::V6),
            _ => None,
        }
    }

    /// The local address of an IP socket.
    pub fn local_ip(&self) -> Option<IpAddr> {
        let layout = &self.model.layout;
        self.ip(&layout.local_ipv4, layout.local_ipv6.as_ref())
    }

    /// The remote address of an IP socket.
    pub fn remote_ip(&self) -> Option<IpAddr> {
        let layout = &self.model.layout;
        self.ip(&layout.remote_ipv4, layout.remote_ipv6.as_ref())
    }
}

impl SockModel {
    fn spans(&self, form: Form) -> &Spans {
        match form {
            Form::Full => &self.full,
            Form::TimeWait | Form::Request => &self.common,
        }
    }

    /// What must be the same in two copies for these to be one socket in one
    /// state.
    fn identity(&self, form: Form, snapshot: &Snapshot) -> [u64; 8] {
        let layout = &self.layout;
        let spans = self.spans(form);
        let number = |member: &Member| spans.number(snapshot, member);
        let optional = |member: &Option<Member>| {
            member
                .as_ref()
                .map_or(0, |member| spans.number(snapshot, member))
        };
        [
            number(&layout.family),
            number(&layout.state),
            number(&layout.local_ipv4),
            number(&layout.remote_ipv4),
            number(&layout.local_port),
            number(&layout.remote_port),
            optional(&layout.namespace),
            match form {
                Form::Full => number(&layout.socket),
                Form::TimeWait | Form::Request => 0,
            },
        ]
    }
}

/// The inode number of the `struct socket` at `socket`, if it is still that of
/// the `struct sock` at `sock`.
///
/// # Errors
/// [`SockError`] if it can't be read, or is another's.
pub fn inode_of(
    guest: &Guest,
    table: &'static str,
    socket: VirtualAddress,
    sock: VirtualAddress,
) -> Result<u64, SockError> {
    let layout = guest.layout::<SocketLayout>(table)?;
    let inode = guest.layout::<SocketInodeLayout>(table)?;
    if guest.pointer(socket, &layout.sk)? != sock {
        return Err(SockError::Released);
    }
    let start = socket.wrapping_sub(inode.socket.offset);
    Ok(guest.number(start, &inode.inode_number)?)
}

/// The inode number of the `struct sock` at `sock`; none if no user holds it.
///
/// # Errors
/// [`ReadError`] of the memory.
pub fn inode_of_sock(
    guest: &Guest,
    table: &'static str,
    sock: VirtualAddress,
) -> Result<Option<u64>, ReadError> {
    let (Ok(model), Ok(inode)) = (
        guest.layout::<SockModel>(table),
        guest.layout::<SocketInodeLayout>(table),
    ) else {
        return Ok(None);
    };
    let socket = guest.pointer(sock, &model.layout.socket)?;
    if socket.is_null() {
        return Ok(None);
    }
    let start = socket.wrapping_sub(inode.socket.offset);
    guest.number(start, &inode.inode_number).map(Some)
}

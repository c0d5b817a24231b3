//! The kernel's tables of sockets, by protocol.
//!
//! Where a table lies and how its chains end changed over the years; the
//! guest's types and symbols say which way it is:
//! - TCP: `inet_hashinfo`, one for all or one a namespace; connections in
//!   `ehash`, listeners in `listening_hash` or (since 5.19) `lhash2`, whatever
//!   is bound in `bhash`.
//! - UDP: `udp_table` and `udplite_table`, a namespace may have its own.
//! - raw IP and ping sockets: arrays of chains.
//! - UNIX: one array of chains for all, or (since 6.0) one a namespace.
//! - packet: a list a namespace. Netlink: a resizable hash table a protocol.

use std::collections::HashSet;

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::Member;

use super::namespace::NetworkNamespace;
use super::sock::SockModel;
use crate::linux::list::chain::{ChainEnd, chain_entries};
use crate::linux::list::is_object_address;
use crate::linux::rhashtable;
use crate::{Diagnostic, Guest, TableError, layout};

/// `LISTENING_NULLS_BASE` (`include/net/tcp.h`): what is added to a bucket's
/// number in the end mark of chains of listeners.
const LISTENING_BASE: u64 = 1 << 29;
/// More buckets than this has no table: the kernel's own limit for
/// connections (`thash_entries`) is 2^19, for a namespace 2^24.
const MOST_BUCKETS: u64 = 1 << 24;
/// So many diagnostics of one array, and it is no array of chains: what is left
/// of it is given up. A chain that changes while it is read makes one at most.
const MOST_BROKEN: u64 = 256;
/// More members than this have the chains of no array.
const MOST_MEMBERS: u64 = 1 << 22;
/// `2 * UNIX_HASH_SIZE`, alike in all kernels (`include/net/af_unix.h`).
const UNIX_BUCKETS: u64 = 512;
/// `MAX_LINKS` (`include/uapi/linux/netlink.h`).
const NETLINK_PROTOCOLS: u64 = 32;
/// Bytes of a table that are read at once.
const CHUNK_BYTES: u64 = 64 << 10;
/// More than this is no size of a bucket.
const LARGEST_BUCKET: u64 = 4096;

/// Which table a socket was found in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// TCP's, of connections and listeners.
    Tcp,
    /// TCP's, of what has a port.
    TcpPorts,
    /// UDP's, and that of UDP-Lite.
    Udp,
    /// Raw IP, both versions.
    Raw,
    /// Ping sockets, both versions.
    Ping,
    /// UNIX sockets.
    Unix,
    /// Packet sockets.
    Packet,
    /// Netlink.
    Netlink,
    /// Sockets between a virtual machine and its host.
    Vsock,
}

layout! {
    /// `include/net/inet_hashtables.h`
    struct HashInfoLayout: "inet_hashinfo" {
        connections: "ehash",
        connections_mask: "ehash_mask",
        bound: "bhash",
        bound_count: "bhash_size",
    } optional {
        listeners: "listening_hash",
        listeners2: "lhash2",
        listeners2_mask: "lhash2_mask",
    }
}

layout! {
    /// `include/net/inet_hashtables.h`
    struct ConnectionBucketLayout: "inet_ehash_bucket" {
        chain: "chain",
    }
}

layout! {
    /// `include/net/inet_hashtables.h`
    struct ListenBucketLayout: "inet_listen_hashbucket" {
        chain: "nulls_head" | "head",
    } optional {
        nulls: "nulls_head",
    }
}

layout! {
    /// `include/net/inet_hashtables.h`
    struct BindHeadLayout: "inet_bind_hashbucket" {
        chain: "chain",
    }
}

layout! {
    /// `include/net/inet_hashtables.h`: a port in use.
    struct BindBucketLayout: "inet_bind_bucket" {
        node: "node",
    } optional {
        /// The sockets bound to it, until 6.7.
        owners: "owners",
        /// The addresses in use with it, since then.
        addresses: "bhash2",
    }
}

layout! {
    /// `include/net/inet_hashtables.h`: an address and port in use.
    struct BindAddressLayout: "inet_bind2_bucket" {
        node: "bhash_node",
        owners: "owners",
    }
}

layout! {
    /// `include/net/udp.h`
    struct UdpTableLayout: "udp_table" {
        buckets: "hash",
        mask: "mask",
    }
}

layout! {
    /// `include/net/udp.h`
    struct UdpBucketLayout: "udp_hslot" {
        chain: "head",
    }
}

layout! {
    /// `include/net/raw.h`
    struct RawLayout: "raw_hashinfo" {
        buckets: "ht",
    }
}

layout! {
    /// `include/net/ping.h`
    struct PingLayout: "ping_table" {
        buckets: "hash",
    }
}

layout! {
    /// `include/net/net_namespace.h`: tables that belong to a namespace.
    struct NetTablesLayout: "net" {
    } optional {
        tcp: "ipv4.tcp_death_row.hashinfo",
        udp: "ipv4.udp_table",
        unix: "unx.table.buckets",
        packet: "packet.sklist",
    }
}

layout! {
    /// `net/netlink/af_netlink.h`
    struct NetlinkTableLayout: "netlink_table" {
        hash: "hash",
    }
}

layout! {
    /// `net/netlink/af_netlink.h`
    struct NetlinkSockLayout: "netlink_sock" {
        node: "node",
    }
}

/// What is done with a socket that was found: its address and its table.
pub type Visit<'v> = dyn FnMut(VirtualAddress, Source) + 'v;

/// An array of chains.
struct Chains<'c> {
    subject: &'c str,
    first: VirtualAddress,
    count: u64,
    /// Bytes from one bucket to the next.
    stride: u64,
    /// Where in a bucket the chain's first pointer is.
    head: u64,
    /// Where in a member the chain's node is.
    node: u64,
    end: fn(u64) -> ChainEnd,
}

fn numbered(bucket: u64) -> ChainEnd {
    ChainEnd::Nulls(Some(bucket))
}

fn numbered_listeners(bucket: u64) -> ChainEnd {
    ChainEnd::Nulls(Some(LISTENING_BASE + bucket))
}

fn marked(_: u64) -> ChainEnd {
    ChainEnd::Nulls(None)
}

fn null(_: u64) -> ChainEnd {
    ChainEnd::Null
}

/// How the chains of an array of heads end, by the type of the array.
fn end_by_type(array: &Member) -> fn(u64) -> ChainEnd {
    if array.type_name.contains("nulls") {
        marked
    } else {
        null
    }
}

/// Walks the tables of one guest.
pub struct Tables<'g> {
    guest: &'g Guest,
    table: &'static str,
    node: u64,
    bind_node: u64,
}

impl<'g> Tables<'g> {
    /// The tables of this guest, for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack sockets.
    pub fn new(guest: &'g Guest, table: &'static str) -> Result<Self, TableError> {
        let model = guest.layout::<SockModel>(table)?;
        Ok(Self {
            guest,
            table,
            node: model.layout.node.offset,
            bind_node: model.layout.bind_node.offset,
        })
    }

    fn complain(&self, subject: &str, address: Option<VirtualAddress>, reason: &str) {
        self.guest.diagnostics().record(Diagnostic {
            table: self.table,
            subject: subject.to_owned(),
            address,
            reason: reason.to_owned(),
        });
    }

    /// Walks one table after the other. One that can't be found or read is a
    /// diagnostic, and the rest is walked all the same.
    pub fn walk(&self, namespaces: &[NetworkNamespace], visit: &mut Visit<'_>) {
        let parts: [(&str, Part<'_>); 6] = [
            ("tcp_hashinfo", Self::tcp),
            ("udp_table", Self::udp),
            ("raw_hashinfo", Self::raw_and_ping),
            ("unix_socket_table", Self::unix),
            ("net.packet.sklist", Self::packet),
            ("nl_table", Self::netlink),
        ];
        for (subject, part) in parts {
            if let Err(error) = part(self, namespaces, visit) {
                self.complain(subject, None, &error.to_string());
            }
        }
    }

    fn read_error(&self, what: &'static str) -> impl Fn(ReadError) -> TableError {
        let table = self.table;
        move |source| TableError::Read {
            table,
            what,
            source,
        }
    }

    /// The members of all chains of an array. All arrays have a power of two
    /// of them, so that a mask picks one.
    fn chains(
        &self,
        chains: &Chains<'_>,
        visit: &mut dyn FnMut(VirtualAddress),
    ) -> Result<(), TableError> {
        if !chains.count.is_power_of_two()
            || chains.count > MOST_BUCKETS
            || !(8..=LARGEST_BUCKET).contains(&chains.stride)
        {
            let reason = format!("{} is no number of chains", chains.count);
            self.complain(chains.subject, Some(chains.first), &reason);
            return Ok(());
        }
        if !is_object_address(self.guest.space(), chains.first) {
            self.complain(
                chains.subject,
                Some(chains.first),
                "the table's address is none of an object",
            );
            return Ok(());
        }
        let at_once = (CHUNK_BYTES / chains.stride).max(1);
        let mut bytes = vec![0; (at_once * chains.stride) as usize];
        let diagnostics = self.guest.diagnostics();
        let before = diagnostics.recorded();
        let (mut bucket, mut members) = (0, 0_u64);
        while bucket < chains.count {
            let broken = diagnostics.recorded().saturating_sub(before);
            if broken > MOST_BROKEN || members > MOST_MEMBERS {
                let reason = format!(
                    "given up after {bucket} of {} chains, {members} members and {broken} \
                     diagnostics: the rest is not shown",
                    chains.count
                );
                self.complain(chains.subject, Some(chains.first), &reason);
                return Ok(());
            }
            let now = at_once.min(chains.count - bucket);
            let start = chains.first.wrapping_add(bucket * chains.stride);
            let part = bytes
                .get_mut(..(now * chains.stride) as usize)
                .unwrap_or_default();
            if let Err(error) = self.guest.space().read(start, part) {
                self.complain(chains.subject, Some(start), &error.to_string());
                bucket += now;
                continue;
            }
            // Most chains are empty: only the others are walked.
            let heads = part.chunks_exact(chains.stride as usize);
            for (number, head) in (bucket..).zip(heads) {
                let first = head
                    .get(chains.head as usize..)
                    .and_then(|head| head.get(..8)?.try_into().ok())
                    .map_or(0, u64::from_le_bytes);
                if first == 0 || first & 1 == 1 {
                    continue;
                }
                let head = chains
                    .first
                    .wrapping_add(number * chains.stride + chains.head);
                let end = (chains.end)(number);
                for member in chain_entries(
                    self.guest,
                    self.table,
                    chains.subject,
                    head,
                    chains.node,
                    end,
                ) {
                    members += 1;
                    if members > MOST_MEMBERS {
                        break;
                    }
                    visit(member);
                }
            }
            bucket += now;
        }
        Ok(())
    }

    /// A table that all share, and those that namespaces have of their own.
    fn shared_and_own(
        &self,
        symbol: &'static str,
        own: Option<&Member>,
        namespaces: &[NetworkNamespace],
    ) -> Vec<VirtualAddress> {
        let mut seen = HashSet::new();
        let shared = self.guest.address(symbol);
        let own = namespaces.iter().filter_map(|namespace| {
            let table = self.guest.pointer(namespace.address, own?);
            match table {
                Ok(table) => is_object_address(self.guest.space(), table).then_some(table),
                Err(error) => {
                    self.complain(symbol, Some(namespace.address), &error.to_string());
                    None
                }
            }
        });
        shared
            .into_iter()
            .chain(own)
            .filter(|table| seen.insert(*table))
            .collect()
    }

    fn tcp(
        &self,
        namespaces: &[NetworkNamespace],
        visit: &mut Visit<'_>,
    ) -> Result<(), TableError> {
        let own = self.guest.layout::<NetTablesLayout>(self.table)?;
        for table in self.shared_and_own("tcp_hashinfo", own.tcp.as_ref(), namespaces) {
            self.tcp_table(table, visit)?;
        }
        Ok(())
    }

    fn tcp_table(&self, info: VirtualAddress, visit: &mut Visit<'_>) -> Result<(), TableError> {
        let layout = self.guest.layout::<HashInfoLayout>(self.table)?;
        let error = self.read_error("tcp_hashinfo");
        let number = |member| self.guest.number(info, member).map_err(&error);
        let mut found = |address| visit(address, Source::Tcp);

        let bucket = self.guest.layout::<ConnectionBucketLayout>(self.table)?;
        let connections = Chains {
            subject: "tcp_hashinfo.ehash",
            first: VirtualAddress::new(number(&layout.connections)?),
            count: number(&layout.connections_mask)?.saturating_add(1),
            stride: bucket.size,
            head: bucket.chain.offset,
            node: self.node,
            end: numbered,
        };
        self.chains(&connections, &mut found)?;

        let bucket = self.guest.layout::<ListenBucketLayout>(self.table)?;
        let (first, count) = match (
            &layout.listeners,
            &layout.listeners2,
            &layout.listeners2_mask,
        ) {
            (Some(array), _, _) => (
                info.wrapping_add(array.offset),
                array.count.unwrap_or_default(),
            ),
            (None, Some(array), Some(mask)) => (
                VirtualAddress::new(number(array)?),
                number(mask)?.saturating_add(1),
            ),
            _ => (VirtualAddress::default(), 0),
        };
        let listeners = Chains {
            subject: "tcp_hashinfo.lhash2",
            first,
            count,
            stride: bucket.size,
            head: bucket.chain.offset,
            node: self.node,
            end: if bucket.nulls.is_some() {
                numbered_listeners
            } else {
                null
            },
        };
        self.chains(&listeners, &mut found)?;
        self.bound(&layout, info, &mut |address| {
            visit(address, Source::TcpPorts);
        })
    }

    /// What is bound to a port, connected or not.
    fn bound(
        &self,
        layout: &HashInfoLayout,
        info: VirtualAddress,
        visit: &mut dyn FnMut(VirtualAddress),
    ) -> Result<(), TableError> {
        let error = self.read_error("tcp_hashinfo.bhash");
        let head = self.guest.layout::<BindHeadLayout>(self.table)?;
        let bucket = self.guest.layout::<BindBucketLayout>(self.table)?;
        let address = self.guest.layout::<BindAddressLayout>(self.table).ok();
        let ports = Chains {
            subject: "tcp_hashinfo.bhash",
            first: self.guest.pointer(info, &layout.bound).map_err(&error)?,
            count: self
                .guest
                .number(info, &layout.bound_count)
                .map_err(&error)?,
            stride: head.size,
            head: head.chain.offset,
            node: bucket.node.offset,
            end: null,
        };
        let (guest, table) = (self.guest, self.table);
        self.chains(&ports, &mut |port| {
            if let Some(owners) = &bucket.owners {
                let first = port.wrapping_add(owners.offset);
                let subject = "inet_bind_bucket.owners";
                chain_entries(guest, table, subject, first, self.bind_node, ChainEnd::Null)
                    .for_each(&mut *visit);
                return;
            }
            let (Some(addresses), Some(address)) = (&bucket.addresses, &address) else {
                return;
            };
            let first = port.wrapping_add(addresses.offset);
            let subject = "inet_bind_bucket.bhash2";
            let node = address.node.offset;
            for used in chain_entries(guest, table, subject, first, node, ChainEnd::Null) {
                let first = used.wrapping_add(address.owners.offset);
                let subject = "inet_bind2_bucket.owners";
                chain_entries(guest, table, subject, first, self.bind_node, ChainEnd::Null)
                    .for_each(&mut *visit);
            }
        })
    }

    fn udp(
        &self,
        namespaces: &[NetworkNamespace],
        visit: &mut Visit<'_>,
    ) -> Result<(), TableError> {
        let own = self.guest.layout::<NetTablesLayout>(self.table)?;
        let layout = self.guest.layout::<UdpTableLayout>(self.table)?;
        let bucket = self.guest.layout::<UdpBucketLayout>(self.table)?;
        let error = self.read_error("udp_table");
        let mut tables = self.shared_and_own("udp_table", own.udp.as_ref(), namespaces);
        tables.extend(self.guest.address("udplite_table"));
        for table in tables {
            let buckets = Chains {
                subject: "udp_table.hash",
                first: self.guest.pointer(table, &layout.buckets).map_err(&error)?,
                count: self
                    .guest
                    .number(table, &layout.mask)
                    .map_err(&error)?
                    .saturating_add(1),
                stride: bucket.size,
                head: bucket.chain.offset,
                node: self.node,
                end: null,
            };
            self.chains(&buckets, &mut |address| visit(address, Source::Udp))?;
        }
        Ok(())
    }

    fn raw_and_ping(
        &self,
        _namespaces: &[NetworkNamespace],
        visit: &mut Visit<'_>,
    ) -> Result<(), TableError> {
        let raw = self.guest.layout::<RawLayout>(self.table)?;
        for symbol in ["raw_v4_hashinfo", "raw_v6_hashinfo"] {
            // Version 6 may be a module, or not be there.
            if let Some(address) = self.guest.address(symbol) {
                self.array(symbol, address, &raw.buckets, Source::Raw, visit)?;
            }
        }
        if let (Ok(ping), Some(address)) = (
            self.guest.layout::<PingLayout>(self.table),
            self.guest.address("ping_table"),
        ) {
            self.array("ping_table", address, &ping.buckets, Source::Ping, visit)?;
        }
        Ok(())
    }

    /// An array of heads that is a member of the structure at `address`.
    fn array(
        &self,
        subject: &str,
        address: VirtualAddress,
        array: &Member,
        source: Source,
        visit: &mut Visit<'_>,
    ) -> Result<(), TableError> {
        let chains = Chains {
            subject,
            first: address.wrapping_add(array.offset),
            count: array.count.unwrap_or_default(),
            stride: 8,
            head: 0,
            node: self.node,
            end: end_by_type(array),
        };
        self.chains(&chains, &mut |address| visit(address, source))
    }

    fn unix(
        &self,
        namespaces: &[NetworkNamespace],
        visit: &mut Visit<'_>,
    ) -> Result<(), TableError> {
        let own = self.guest.layout::<NetTablesLayout>(self.table)?;
        let mut tables: Vec<VirtualAddress> = Vec::new();
        match &own.unix {
            Some(member) => tables.extend(self.shared_and_own("", Some(member), namespaces)),
            None => tables.push(self.guest.symbol(self.table, "unix_socket_table")?),
        }
        for first in tables {
            let chains = Chains {
                subject: "unix_socket_table",
                first,
                count: UNIX_BUCKETS,
                stride: 8,
                head: 0,
                node: self.node,
                end: null,
            };
            self.chains(&chains, &mut |address| visit(address, Source::Unix))?;
        }
        Ok(())
    }

    fn packet(
        &self,
        namespaces: &[NetworkNamespace],
        visit: &mut Visit<'_>,
    ) -> Result<(), TableError> {
        let own = self.guest.layout::<NetTablesLayout>(self.table)?;
        let Some(list) = &own.packet else {
            return Ok(());
        };
        for namespace in namespaces {
            let first = namespace.address.wrapping_add(list.offset);
            let subject = "net.packet.sklist";
            chain_entries(
                self.guest,
                self.table,
                subject,
                first,
                self.node,
                ChainEnd::Null,
            )
            .for_each(|address| visit(address, Source::Packet));
        }
        Ok(())
    }

    fn netlink(
        &self,
        _namespaces: &[NetworkNamespace],
        visit: &mut Visit<'_>,
    ) -> Result<(), TableError> {
        let layout = self.guest.layout::<NetlinkTableLayout>(self.table)?;
        let sock = self.guest.layout::<NetlinkSockLayout>(self.table)?;
        let pointer = self.guest.symbol(self.table, "nl_table")?;
        let tables = self
            .guest
            .space()
            .read_pointer(pointer)
            .map_err(self.read_error("nl_table"))?;
        for protocol in 0..NETLINK_PROTOCOLS {
            let table = tables.wrapping_add(protocol * layout.size + layout.hash.offset);
            let members =
                rhashtable::members(self.guest, self.table, "nl_table", table, sock.node.offset)?;
            for address in members {
                visit(address, Source::Netlink);
            }
        }
        Ok(())
    }
}

/// A part of [`Tables::walk`].
type Part<'g> = fn(&Tables<'g>, &[NetworkNamespace], &mut Visit<'_>) -> Result<(), TableError>;

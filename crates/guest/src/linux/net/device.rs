//! Network devices (`struct net_device`, `include/linux/netdevice.h`) and
//! their addresses.

use std::net::IpAddr;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{Member, TypeError, Types};

use super::address::{ipv4, ipv6};
use super::namespace::NetworkNamespace;
use crate::linux::list::{entries, is_object_address};
use crate::linux::per_cpu::PerCpu;
use crate::linux::snapshot::{Snapshot, Spans};
use crate::{Diagnostic, Guest, Layout, TableError, layout};

/// More devices than this are in no namespace.
const MOST_DEVICES: usize = 1 << 16;
/// More addresses than this has no device.
const MOST_ADDRESSES: usize = 1 << 16;
/// `MAX_ADDR_LEN`.
const LONGEST_HARDWARE_ADDRESS: u64 = 32;
/// `IFNAMSIZ`.
const LONGEST_NAME: u64 = 16;
/// Bytes of `rtnl_link_ops.kind` that are read.
const LONGEST_KIND: usize = 64;

/// `IFF_UP`.
pub const IFF_UP: u32 = 1;
/// Bits of `net_device.state`: `__LINK_STATE_START`, `…_NOCARRIER`.
const STATE_START: u64 = 1;
const STATE_NO_CARRIER: u64 = 1 << 2;
/// `IF_OPER_UNKNOWN` and `IF_OPER_UP` count as running.
const OPERATIONAL_UNKNOWN: u64 = 0;
const OPERATIONAL_UP: u64 = 6;

layout! {
    /// `include/linux/netdevice.h`
    pub struct DeviceLayout: "net_device" {
        name: "name",
        index: "ifindex",
        mtu: "mtu",
        flags: "flags",
        state: "state",
        link_type: "type",
        list: "dev_list",
        hardware_address: "dev_addr",
        hardware_address_length: "addr_len",
        promiscuity: "promiscuity",
    } optional {
        operational_state: "operstate",
        link_operations: "rtnl_link_ops",
        operations: "netdev_ops",
        ipv4: "ip_ptr",
        ipv6: "ip6_ptr",
        statistics_kind: "pcpu_stat_type",
        link_statistics: "lstats",
        namespace: "nd_net.net",
        uppers: "adj_list.upper",
    }
}

layout! {
    /// `net/core/dev.h`, until Linux 6.1 `net/core/dev.c`: a device above
    /// another one.
    struct AdjacentLayout: "netdev_adjacent" {
        device: "dev",
        master: "master",
        list: "list",
    }
}

layout! {
    /// `include/linux/inetdevice.h`
    struct InDeviceLayout: "in_device" {
        first: "ifa_list",
    }
}

layout! {
    /// `include/linux/inetdevice.h`
    struct InAddressLayout: "in_ifaddr" {
        next: "ifa_next",
        local: "ifa_local",
        prefix_length: "ifa_prefixlen",
    }
}

layout! {
    /// `include/net/if_inet6.h`
    struct Inet6DeviceLayout: "inet6_dev" {
        addresses: "addr_list",
    }
}

layout! {
    /// `include/net/if_inet6.h`
    struct Inet6AddressLayout: "inet6_ifaddr" {
        address: "addr",
        prefix_length: "prefix_len",
        list: "if_list",
    }
}

layout! {
    /// `include/net/rtnetlink.h`
    struct LinkOperationsLayout: "rtnl_link_ops" {
        kind: "kind",
    }
}

layout! {
    /// `include/linux/netdevice.h`
    struct NetLayout: "net" {
        devices: "dev_base_head",
    }
}

layout! {
    /// `include/linux/netdevice.h`: counters of each CPU, one pair for both
    /// directions.
    struct LinkStatisticsLayout: "pcpu_lstats" {
        packets: "packets",
        bytes: "bytes",
    }
}

layout! {
    /// `include/linux/netdevice.h`: counters of each CPU.
    struct SoftwareStatisticsLayout: "pcpu_sw_netstats" {
        received_packets: "rx_packets",
        received_bytes: "rx_bytes",
        sent_packets: "tx_packets",
        sent_bytes: "tx_bytes",
    }
}

layout! {
    /// `include/linux/netdevice.h`: counters of each CPU, with drops.
    struct DetailedStatisticsLayout: "pcpu_dstats" {
        received_packets: "rx_packets",
        received_bytes: "rx_bytes",
        sent_packets: "tx_packets",
        sent_bytes: "tx_bytes",
    }
}

/// How devices of a guest are read.
#[derive(Debug)]
pub struct DeviceModel {
    layout: DeviceLayout,
    spans: Spans,
}

impl Layout for DeviceModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = DeviceLayout::resolve(types)?;
        let required = [
            &layout.name,
            &layout.index,
            &layout.mtu,
            &layout.flags,
            &layout.state,
            &layout.link_type,
            &layout.list,
            &layout.hardware_address,
            &layout.hardware_address_length,
            &layout.promiscuity,
        ];
        let optional = [
            &layout.operational_state,
            &layout.link_operations,
            &layout.operations,
            &layout.ipv4,
            &layout.ipv6,
            &layout.statistics_kind,
            &layout.link_statistics,
            &layout.namespace,
        ];
        let spans = Spans::covering(
            required
                .into_iter()
                .chain(optional.into_iter().filter_map(Option::as_ref)),
        );
        Ok(Self { layout, spans })
    }
}

/// What a device has sent and received, where the kernel itself counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets received.
    pub received_packets: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
}

/// A device above another one: a bridge over its ports, a VLAN over its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upper {
    /// Where its `struct net_device` lies.
    pub address: VirtualAddress,
    /// Whether the other one is its port, and no device by itself any more.
    pub is_master: bool,
}

/// A copy of a `struct net_device`.
#[derive(Clone, Debug)]
pub struct Device {
    /// Where it lies.
    pub address: VirtualAddress,
    /// Its name, never empty.
    pub name: Vec<u8>,
    /// Its namespace.
    pub namespace: NetworkNamespace,
    model: Arc<DeviceModel>,
    snapshot: Snapshot,
}

/// Why there is no device at an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Its memory can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Its name is empty or has no end.
    #[error("name is {found:?}, which no device has")]
    Name {
        /// What it holds.
        found: crate::Text,
    },
    /// It belongs to another namespace than that in whose list it is.
    #[error("it is in the list of namespace {expected} and says {found}")]
    Namespace {
        /// The namespace that lists it.
        expected: VirtualAddress,
        /// The namespace that it names.
        found: VirtualAddress,
    },
}

impl Device {
    fn read(
        guest: &Guest,
        model: &Arc<DeviceModel>,
        address: VirtualAddress,
        namespace: NetworkNamespace,
    ) -> Result<Self, DeviceError> {
        let snapshot = model.spans.read(guest.space(), address)?;
        let layout = &model.layout;
        if let Some(member) = &layout.namespace {
            let found = model.spans.pointer(&snapshot, member);
            if found != namespace.address {
                return Err(DeviceError::Namespace {
                    expected: namespace.address,
                    found,
                });
            }
        }
        let name = model.spans.member(&snapshot, &layout.name);
        let name = match name.iter().position(|byte| *byte == 0) {
            Some(end) if end > 0 => name.get(..end).unwrap_or_default().to_vec(),
            _ => {
                return Err(DeviceError::Name {
                    found: crate::Text::new(name),
                });
            }
        };
        Ok(Self {
            address,
            name,
            namespace,
            model: model.clone(),
            snapshot,
        })
    }

    fn number(&self, member: &Member) -> u64 {
        self.model.spans.number(&self.snapshot, member)
    }

    fn pointer(&self, member: Option<&Member>) -> Option<VirtualAddress> {
        let pointer = self.model.spans.pointer(&self.snapshot, member?);
        (!pointer.is_null()).then_some(pointer)
    }

    /// Its number in its namespace, from 1 on.
    pub fn index(&self) -> u64 {
        self.number(&self.model.layout.index)
    }

    /// The largest packet it takes, in bytes.
    pub fn mtu(&self) -> u64 {
        self.number(&self.model.layout.mtu)
    }

    /// `flags`: `IFF_…`, those that the kernel computes on request left out.
    pub fn flags(&self) -> u32 {
        self.number(&self.model.layout.flags) as u32
    }

    /// How many users want it to be promiscuous.
    pub fn promiscuity(&self) -> u64 {
        self.number(&self.model.layout.promiscuity)
    }

    /// `type`: `ARPHRD_…`.
    pub fn link_type(&self) -> u64 {
        self.number(&self.model.layout.link_type)
    }

    fn is_started(&self) -> bool {
        self.number(&self.model.layout.state) & STATE_START != 0
    }

    /// `operstate`: `IF_OPER_…`, 2 (down) for a device that is not started.
    pub fn operational_state(&self) -> Option<u64> {
        let member = self.model.layout.operational_state.as_ref()?;
        Some(if self.is_started() {
            self.number(member)
        } else {
            2
        })
    }

    /// Whether it is up and can pass packets (`IFF_RUNNING`).
    pub fn is_running(&self) -> bool {
        let state = self.operational_state();
        self.is_started() && matches!(state, Some(OPERATIONAL_UNKNOWN | OPERATIONAL_UP))
    }

    /// Whether the link below is up (`IFF_LOWER_UP`).
    pub fn has_carrier(&self) -> bool {
        self.is_started() && self.number(&self.model.layout.state) & STATE_NO_CARRIER == 0
    }

    /// Its hardware address.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn hardware_address(&self, guest: &Guest) -> Result<Vec<u8>, ReadError> {
        let layout = &self.model.layout;
        let length = self.number(&layout.hardware_address_length);
        let mut bytes = vec![0; length.min(LONGEST_HARDWARE_ADDRESS) as usize];
        match self.pointer(Some(&layout.hardware_address)) {
            Some(address) => guest.space().read(address, &mut bytes)?,
            None => bytes.clear(),
        }
        Ok(bytes)
    }

    /// The kind of driver that `ip link` names: `veth`, `bridge`; none for
    /// hardware.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn kind(&self, guest: &Guest, table: &'static str) -> Result<Option<Vec<u8>>, ReadError> {
        let operations = self.pointer(self.model.layout.link_operations.as_ref());
        let (Some(operations), Ok(layout)) =
            (operations, guest.layout::<LinkOperationsLayout>(table))
        else {
            return Ok(None);
        };
        let kind = guest.pointer(operations, &layout.kind)?;
        guest.space().read_c_string(kind, LONGEST_KIND).map(Some)
    }

    /// The devices above it; what can't be read becomes a diagnostic.
    pub fn uppers(&self, guest: &Guest, table: &'static str) -> Vec<Upper> {
        let (Some(member), Ok(layout)) = (
            &self.model.layout.uppers,
            guest.layout::<AdjacentLayout>(table),
        ) else {
            return Vec::new();
        };
        let subject = "net_device.adj_list.upper";
        let head = self.address.wrapping_add(member.offset);
        let read = |adjacent| -> Result<Upper, ReadError> {
            Ok(Upper {
                address: guest.pointer(adjacent, &layout.device)?,
                is_master: guest.number(adjacent, &layout.master)? != 0,
            })
        };
        let mut found = Vec::new();
        for adjacent in entries(guest, table, subject, head, layout.list.offset).take(MOST_DEVICES)
        {
            match read(adjacent) {
                Ok(upper) => found.push(upper),
                Err(error) => guest.diagnostics().record(Diagnostic {
                    table,
                    subject: subject.to_owned(),
                    address: Some(adjacent),
                    reason: error.to_string(),
                }),
            }
        }
        found
    }

    /// The name of the bridge, bond or the like that it is a port of.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn master(&self, guest: &Guest, table: &'static str) -> Result<Option<Vec<u8>>, ReadError> {
        let uppers = self.uppers(guest, table);
        let Some(master) = uppers.iter().find(|upper| upper.is_master) else {
            return Ok(None);
        };
        let name = &self.model.layout.name;
        let place = master.address.wrapping_add(name.offset);
        let length = name.size.min(LONGEST_NAME) as usize;
        guest.space().read_c_string(place, length).map(Some)
    }

    /// Its IPv4 addresses with their prefix lengths.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn ipv4_addresses(
        &self,
        guest: &Guest,
        table: &'static str,
    ) -> Result<Vec<(IpAddr, u64)>, ReadError> {
        let mut found = Vec::new();
        let device = self.pointer(self.model.layout.ipv4.as_ref());
        let (Some(device), Ok(head), Ok(layout)) = (
            device,
            guest.layout::<InDeviceLayout>(table),
            guest.layout::<InAddressLayout>(table),
        ) else {
            return Ok(found);
        };
        let mut seen = std::collections::HashSet::new();
        let mut address = guest.pointer(device, &head.first)?;
        while !address.is_null() && found.len() < MOST_ADDRESSES {
            if !is_object_address(guest.space(), address) || !seen.insert(address) {
                guest.diagnostics().record(Diagnostic {
                    table,
                    subject: "in_device.ifa_list".to_owned(),
                    address: Some(device),
                    reason: format!("the list of addresses leads to {address}, where none can be"),
                });
                break;
            }
            let mut bytes = [0; 4];
            guest
                .space()
                .read(address.wrapping_add(layout.local.offset), &mut bytes)?;
            let prefix = guest.number(address, &layout.prefix_length)?;
            found.extend(ipv4(&bytes).map(|local| (IpAddr::V4(local), prefix)));
            address = guest.pointer(address, &layout.next)?;
        }
        Ok(found)
    }

    /// Its IPv6 addresses with their prefix lengths.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn ipv6_addresses(
        &self,
        guest: &Guest,
        table: &'static str,
    ) -> Result<Vec<(IpAddr, u64)>, ReadError> {
        let mut found = Vec::new();
        let device = self.pointer(self.model.layout.ipv6.as_ref());
        let (Some(device), Ok(head), Ok(layout)) = (
            device,
            guest.layout::<Inet6DeviceLayout>(table),
            guest.layout::<Inet6AddressLayout>(table),
        ) else {
            return Ok(found);
        };
        let list = device.wrapping_add(head.addresses.offset);
        let subject = "inet6_dev.addr_list";
        for address in entries(guest, table, subject, list, layout.list.offset).take(MOST_ADDRESSES)
        {
            let mut bytes = [0; 16];
            guest
                .space()
                .read(address.wrapping_add(layout.address.offset), &mut bytes)?;
            let prefix = guest.number(address, &layout.prefix_length)?;
            found.extend(ipv6(&bytes).map(|local| (IpAddr::V6(local), prefix)));
        }
        Ok(found)
    }

    /// What it sent and received: none where the driver keeps that to itself.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn counters(
        &self,
        guest: &Guest,
        table: &'static str,
        cpus: &PerCpu,
    ) -> Result<Option<Counters>, ReadError> {
        let layout = &self.model.layout;
        let Some(statistics) = self.pointer(layout.link_statistics.as_ref()) else {
            return Ok(None);
        };
        let loopback = guest.address("loopback_ops");
        let is_loopback =
            loopback.is_some() && self.pointer(layout.operations.as_ref()) == loopback;
        // `enum netdev_stat_type`
        let kind = match (is_loopback, &layout.statistics_kind) {
            (true, _) => 1,
            (false, Some(member)) => self.number(member),
            (false, None) => 0,
        };
        let members: [Option<Member>; 4] = match kind {
            1 => {
                let Ok(one) = guest.layout::<LinkStatisticsLayout>(table) else {
                    return Ok(None);
                };
                // Only the loopback device receives what it sends.
                let received = |member: &Member| is_loopback.then(|| member.clone());
                [
                    received(&one.packets),
                    received(&one.bytes),
                    Some(one.packets.clone()),
                    Some(one.bytes.clone()),
                ]
            }
            2 => {
                let Ok(four) = guest.layout::<SoftwareStatisticsLayout>(table) else {
                    return Ok(None);
                };
                [
                    Some(four.received_packets.clone()),
                    Some(four.received_bytes.clone()),
                    Some(four.sent_packets.clone()),
                    Some(four.sent_bytes.clone()),
                ]
            }
            3 => {
                let Ok(four) = guest.layout::<DetailedStatisticsLayout>(table) else {
                    return Ok(None);
                };
                [
                    Some(four.received_packets.clone()),
                    Some(four.received_bytes.clone()),
                    Some(four.sent_packets.clone()),
                    Some(four.sent_bytes.clone()),
                ]
            }
            _ => return Ok(None),
        };
        let mut sums = [0_u64; 4];
        for cpu in cpus.possible() {
            let Some(copy) = cpus.checked_address(guest, statistics, cpu) else {
                continue;
            };
            for (sum, member) in sums.iter_mut().zip(&members) {
                if let Some(member) = member {
                    *sum = sum.wrapping_add(guest.number(copy, member)?);
                }
            }
        }
        let [received_packets, received_bytes, sent_packets, sent_bytes] = sums;
        Ok(Some(Counters {
            received_packets,
            received_bytes,
            sent_packets,
            sent_bytes,
        }))
    }
}

/// The devices of one namespace, in the kernel's order.
///
/// # Errors
/// [`TableError`] if the kernel's types lack the list.
pub fn devices(
    guest: &Guest,
    table: &'static str,
    namespace: NetworkNamespace,
) -> Result<Vec<Device>, TableError> {
    let model = guest.layout::<DeviceModel>(table)?;
    let net = guest.layout::<NetLayout>(table)?;
    let head = namespace.address.wrapping_add(net.devices.offset);
    let mut found = Vec::new();
    let subject = "net.dev_base_head";
    for address in entries(guest, table, subject, head, model.layout.list.offset).take(MOST_DEVICES)
    {
        match Device::read(guest, &model, address, namespace) {
            Ok(device) => found.push(device),
            Err(error) => guest.diagnostics().record(Diagnostic {
                table,
                subject: "net_device".to_owned(),
                address: Some(address),
                reason: error.to_string(),
            }),
        }
    }
    Ok(found)
}

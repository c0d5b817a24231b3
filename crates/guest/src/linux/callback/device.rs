//! Functions of network devices (`include/linux/netdevice.h`): their tables of
//! operations, who takes their packets first, and handlers of packets that are
//! for one device.

use secmon_memory::{ReadError, VirtualAddress};

use super::{LeadsTo, Walk};
use crate::linux::list::entries;
use crate::linux::net::device::devices as devices_of;
use crate::linux::net::namespace::namespaces;
use crate::{TableError, Text, layout};

/// More handlers than this has no device.
const MOST_HANDLERS: usize = 1 << 12;
/// `ARPHRD_LOOPBACK`.
const LOOPBACK: u64 = 772;

layout! {
    /// `include/linux/netdevice.h`
    struct DeviceLayout: "net_device" {
        operations: "netdev_ops",
    } optional {
        ethtool: "ethtool_ops",
        headers: "header_ops",
        receiver: "rx_handler",
        all_packets: "ptype_all",
        some_packets: "ptype_specific",
    }
}

layout! {
    /// `include/linux/netdevice.h`
    struct HandlerLayout: "packet_type" {
        list: "list",
        function: "func",
    }
}

/// All functions of all devices.
pub(super) fn devices(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let layout = guest.layout::<DeviceLayout>(table)?;
    let handler = guest.layout::<HandlerLayout>(table)?;
    let types = guest.types(table)?;
    let size = |name| types.size_of(name).unwrap_or(0);
    let (operations, ethtool, headers) = (
        size("net_device_ops"),
        size("ethtool_ops"),
        size("header_ops"),
    );
    for namespace in namespaces(guest, table)? {
        for device in devices_of(guest, table, namespace)? {
            let name = Text::new(&device.name);
            // That device is the kernel's own: no module can bring it.
            let own = match device.link_type() {
                LOOPBACK => LeadsTo::KernelTable(operations),
                _ => LeadsTo::Table(operations),
            };
            let members = [
                ("net_device_ops", Some(&layout.operations), own),
                (
                    "ethtool_ops",
                    layout.ethtool.as_ref(),
                    LeadsTo::Table(ethtool),
                ),
                (
                    "header_ops",
                    layout.headers.as_ref(),
                    LeadsTo::Table(headers),
                ),
                ("rx_handler", layout.receiver.as_ref(), LeadsTo::Function),
            ];
            for (kind, member, leads_to) in members {
                let Some(member) = member else {
                    continue;
                };
                let location = device.address.wrapping_add(member.offset);
                if let Err(error) = walk.add(kind, &name, location, leads_to) {
                    walk.complain("net_device", device.address, &error);
                }
            }
            let lists = [layout.all_packets.as_ref(), layout.some_packets.as_ref()];
            for list in lists.into_iter().flatten() {
                let head = device.address.wrapping_add(list.offset);
                if let Err(error) = handlers(walk, &handler, head, &name) {
                    walk.complain("net_device", device.address, &error);
                }
            }
        }
    }
    Ok(())
}

/// The functions of the handlers in a device's list.
fn handlers(
    walk: &mut Walk<'_>,
    layout: &HandlerLayout,
    head: VirtualAddress,
    name: &Text,
) -> Result<(), ReadError> {
    let (guest, table) = (walk.guest, walk.table);
    let found = entries(
        guest,
        table,
        "net_device.ptype_all",
        head,
        layout.list.offset,
    );
    for handler in found.take(MOST_HANDLERS) {
        let location = handler.wrapping_add(layout.function.offset);
        walk.add("packet_type", name, location, LeadsTo::Function)?;
    }
    Ok(())
}

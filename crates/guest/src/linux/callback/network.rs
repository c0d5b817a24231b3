//! Functions that packets pass: netfilter's hooks (`net/netfilter/core.c`) and
//! handlers of protocols (`net/core/dev.c`).

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::Member;

use super::{LeadsTo, Walk};
use crate::linux::list::{entries, is_object_address};
use crate::linux::net::namespace::namespaces;
use crate::{Guest, TableError, Text, layout};

/// More hooks than this are in no list (`MAX_HOOK_COUNT` is 1024).
const MOST_HOOKS: u64 = 1 << 12;
/// More lists than this has no family.
const MOST_LISTS: u64 = 16;
/// `PTYPE_HASH_SIZE`.
const HASH_SIZE: u64 = 16;
/// No `struct proto` has more bytes.
const LARGEST_PROTOCOL: u64 = 4096;
/// More handlers than this are in no list.
const MOST_HANDLERS: usize = 1 << 12;

layout! {
    /// `include/net/net_namespace.h`, `include/net/netns/netfilter.h`
    struct NetLayout: "net" {} optional {
        ipv4: "nf.hooks_ipv4",
        ipv6: "nf.hooks_ipv6",
        arp: "nf.hooks_arp",
        bridge: "nf.hooks_bridge",
        /// Handlers of packets, since Linux 6.14 and its backports.
        all_packets: "ptype_all",
        some_packets: "ptype_specific",
    }
}

layout! {
    /// `include/net/hotdata.h`
    struct HotLayout: "net_hotdata" {} optional {
        /// From Linux 6.9 until handlers belong to namespaces.
        all_packets: "ptype_all",
    }
}

layout! {
    /// `include/linux/netfilter.h`
    struct HooksLayout: "nf_hook_entries" {
        count: "num_hook_entries",
        hooks: "hooks",
    }
}

layout! {
    /// `include/linux/netfilter.h`
    struct HookLayout: "nf_hook_entry" {
        function: "hook",
    }
}

layout! {
    /// `include/linux/netdevice.h`
    struct HandlerLayout: "packet_type" {
        list: "list",
        function: "func",
    }
}

/// All hooks of all network namespaces.
pub(super) fn netfilter(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    if !guest.types(table)?.has_type("nf_hook_entries") {
        return Ok(());
    }
    let net = guest.layout::<NetLayout>(table)?;
    let hooks = guest.layout::<HooksLayout>(table)?;
    let hook = guest.layout::<HookLayout>(table)?;
    let families: [(&str, Option<&Member>); 4] = [
        ("ipv4", net.ipv4.as_ref()),
        ("ipv6", net.ipv6.as_ref()),
        ("arp", net.arp.as_ref()),
        ("bridge", net.bridge.as_ref()),
    ];
    for namespace in namespaces(guest, table)? {
        for (family, member) in families {
            let Some(member) = member else {
                continue;
            };
            let count = (member.size / 8).min(MOST_LISTS);
            for number in 0..count {
                let place = namespace
                    .address
                    .wrapping_add(member.offset)
                    .wrapping_add(number * 8);
                let name = Text::from(format!("{family} hook {number}").as_str());
                if let Err(error) = hooks_at(walk, guest, &hooks, &hook, place, &name) {
                    walk.complain("nf_hook_entries", place, &error);
                }
            }
        }
    }
    Ok(())
}

fn hooks_at(
    walk: &mut Walk<'_>,
    guest: &Guest,
    hooks: &HooksLayout,
    hook: &HookLayout,
    place: VirtualAddress,
    name: &Text,
) -> Result<(), ReadError> {
    let list = guest.space().read_pointer(place)?;
    if !is_object_address(guest.space(), list) {
        return Ok(());
    }
    let count = guest.number(list, &hooks.count)? & 0xffff;
    for index in 0..count.min(MOST_HOOKS) {
        let location = list
            .wrapping_add(hooks.hooks.offset)
            .wrapping_add(index.wrapping_mul(hook.size))
            .wrapping_add(hook.function.offset);
        walk.add("nf_hook_entry", name, location, LeadsTo::Function)?;
    }
    Ok(())
}

/// The protocols whose operations can be written, by their symbols.
const PROTOCOLS: [&str; 8] = [
    "tcp_prot",
    "tcpv6_prot",
    "udp_prot",
    "udpv6_prot",
    "raw_prot",
    "rawv6_prot",
    "ping_prot",
    "packet_proto",
];

/// Every pointer in the operations of the kernel's own protocols.
pub(super) fn protocols(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let guest = walk.guest;
    let size = guest.types(walk.table)?.size_of("proto").unwrap_or(0);
    for symbol in PROTOCOLS {
        let Some(protocol) = guest.address(symbol) else {
            continue;
        };
        let name = Text::from(symbol);
        for word in 0..size.min(LARGEST_PROTOCOL) / 8 {
            let location = protocol.wrapping_add(word * 8);
            if let Err(error) = walk.add("proto", &name, location, LeadsTo::KernelFunction) {
                walk.complain("proto", location, &error);
                break;
            }
        }
    }
    Ok(())
}

/// Handlers of packets for all devices; older kernels keep those for all
/// protocols in a list of their own, newer ones in each namespace.
pub(super) fn packet_handlers(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let layout = guest.layout::<HandlerLayout>(table)?;
    let mut heads = Vec::new();
    if let Some(base) = guest.address("ptype_base") {
        heads.extend((0..HASH_SIZE).map(|bucket| ("ptype_base", base.wrapping_add(bucket * 16))));
    }
    heads.extend(guest.address("ptype_all").map(|head| ("ptype_all", head)));
    if let Some(hot) = guest.address("net_hotdata")
        && let Ok(layout) = guest.layout::<HotLayout>(table)
        && let Some(member) = &layout.all_packets
    {
        heads.push(("ptype_all", hot.wrapping_add(member.offset)));
    }
    let net = guest.layout::<NetLayout>(table)?;
    let members = [net.all_packets.as_ref(), net.some_packets.as_ref()];
    if members.iter().any(Option::is_some) {
        for namespace in namespaces(guest, table)? {
            heads.extend(members.into_iter().flatten().map(|member| {
                let head = namespace.address.wrapping_add(member.offset);
                ("net.ptype_all", head)
            }));
        }
    }
    for (symbol, head) in heads {
        let name = Text::from(symbol);
        for handler in entries(guest, table, symbol, head, layout.list.offset).take(MOST_HANDLERS) {
            let location = handler.wrapping_add(layout.function.offset);
            if let Err(error) = walk.add("packet_type", &name, location, LeadsTo::Function) {
                walk.complain("packet_type", handler, &error);
            }
        }
    }
    Ok(())
}

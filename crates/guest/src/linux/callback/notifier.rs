//! Notifier chains (`include/linux/notifier.h`), by the symbols of their heads.

use secmon_memory::{ReadError, VirtualAddress};

use super::{LeadsTo, Walk};
use crate::linux::hash::AddressSet;
use crate::linux::list::is_object_address;
use crate::{TableError, Text, layout};

/// More notifiers than this are in no chain.
const MOST_NOTIFIERS: usize = 1 << 12;

layout! {
    /// `include/linux/notifier.h`
    struct NotifierLayout: "notifier_block" {
        function: "notifier_call",
        next: "next",
    }
}

layout! {
    /// `include/linux/notifier.h`
    struct AtomicLayout: "atomic_notifier_head" {
        head: "head",
    }
}

layout! {
    /// `include/linux/notifier.h`
    struct BlockingLayout: "blocking_notifier_head" {
        head: "head",
    }
}

/// What protects a chain: its head lies behind that.
#[derive(Clone, Copy)]
enum Kind {
    Atomic,
    Blocking,
    Raw,
}

/// Chains, by their heads.
const CHAINS: &[(&str, Kind)] = &[
    ("keyboard_notifier_list", Kind::Atomic),
    ("vt_notifier_list", Kind::Atomic),
    ("panic_notifier_list", Kind::Atomic),
    ("die_chain", Kind::Atomic),
    ("netevent_notif_chain", Kind::Atomic),
    ("inetaddr_chain", Kind::Blocking),
    ("inet6addr_chain", Kind::Atomic),
    ("reboot_notifier_list", Kind::Blocking),
    ("module_notify_list", Kind::Blocking),
    ("tracepoint_notify_list", Kind::Blocking),
    ("oom_notify_list", Kind::Blocking),
    ("crypto_chain", Kind::Blocking),
    ("fb_notifier_list", Kind::Blocking),
    ("netlink_chain", Kind::Blocking),
    ("netdev_chain", Kind::Raw),
];

/// The functions of all notifiers.
pub(super) fn chains(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let guest = walk.guest;
    let layout = guest.layout::<NotifierLayout>(walk.table)?;
    let atomic = guest.layout::<AtomicLayout>(walk.table)?.head.offset;
    let blocking = guest.layout::<BlockingLayout>(walk.table)?.head.offset;
    for (symbol, kind) in CHAINS {
        let Some(head) = guest.address(symbol) else {
            continue;
        };
        let mut link = head.wrapping_add(match kind {
            Kind::Atomic => atomic,
            Kind::Blocking => blocking,
            Kind::Raw => 0,
        });
        let name = Text::from(*symbol);
        let mut seen = AddressSet::default();
        let mut step = |link: &mut VirtualAddress| -> Result<bool, ReadError> {
            let notifier = guest.space().read_pointer(*link)?;
            if !is_object_address(guest.space(), notifier)
                || seen.len() >= MOST_NOTIFIERS
                || !seen.insert(notifier)
            {
                return Ok(false);
            }
            let function = notifier.wrapping_add(layout.function.offset);
            walk.add("notifier_block", &name, function, LeadsTo::Function)?;
            *link = notifier.wrapping_add(layout.next.offset);
            Ok(true)
        };
        loop {
            match step(&mut link) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    walk.complain("notifier_block", link, &error);
                    break;
                }
            }
        }
    }
    Ok(())
}

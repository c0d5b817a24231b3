//! Network namespaces (`struct net`, `include/net/net_namespace.h`).

use std::collections::HashMap;

use secmon_memory::{ReadError, VirtualAddress, Volatility};

use crate::linux::list::entries;
use crate::{Diagnostic, Guest, TableError, layout};

/// More network namespaces than this are in no guest.
const MOST_NAMESPACES: usize = 1 << 16;

layout! {
    /// `include/net/net_namespace.h`
    struct NetLayout: "net" {
        list: "list",
        inode: "ns.inum",
    } optional {
        /// Zero once nobody can enter it any more and it is taken apart.
        users: "ns.count" | "ns.__ns_ref" | "count",
    }
}

/// How often the list is read anew for namespaces that were not in it: whoever
/// writes the guest's memory may name any number of them.
const MOST_LISTINGS: u32 = 8;

/// A network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkNamespace {
    /// Where its `struct net` lies.
    pub address: VirtualAddress,
    /// The inode number that `/proc/PID/ns/net` shows.
    pub inode: u64,
}

/// All network namespaces, the initial one first as a rule.
///
/// # Errors
/// [`TableError`] if the list can't be found.
pub fn namespaces(guest: &Guest, table: &'static str) -> Result<Vec<NetworkNamespace>, TableError> {
    let layout = guest.layout::<NetLayout>(table)?;
    let head = guest.symbol(table, "net_namespace_list")?;
    let read = |address| -> Result<NetworkNamespace, ReadError> {
        Ok(NetworkNamespace {
            address,
            inode: guest.number(address, &layout.inode)?,
        })
    };
    let mut found = Vec::new();
    for address in
        entries(guest, table, "net_namespace_list", head, layout.list.offset).take(MOST_NAMESPACES)
    {
        match read(address) {
            Ok(namespace) => found.push(namespace),
            Err(error) => guest.diagnostics().record(Diagnostic {
                table,
                subject: "net".to_owned(),
                address: Some(address),
                reason: error.to_string(),
            }),
        }
    }
    Ok(found)
}

/// What a network namespace is that a socket names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// One of the list, with this inode.
    Listed(u64),
    /// It has no users any more: the kernel takes it apart, with what is left
    /// in it.
    Ending,
    /// In no list, and in use: it is being made, or was taken out of the list.
    Unlisted,
}

/// The namespaces that sockets are in.
pub struct Known {
    inodes: HashMap<VirtualAddress, u64>,
    /// That of a kernel without namespaces.
    initial: Option<u64>,
    listings: u32,
}

impl Known {
    /// Those of a list that was read.
    pub fn new(listed: &[NetworkNamespace]) -> Self {
        let pairs = listed.iter().map(|one| (one.address, one.inode));
        Self {
            inodes: pairs.collect(),
            initial: listed.first().map(|one| one.inode),
            listings: 0,
        }
    }

    /// What the namespace at `net` is. One that a running guest made since the
    /// list was read is looked for in it again.
    pub fn standing(
        &mut self,
        guest: &Guest,
        table: &'static str,
        net: VirtualAddress,
    ) -> Standing {
        if net.is_null() {
            return self.initial.map_or(Standing::Unlisted, Standing::Listed);
        }
        if let Some(inode) = self.inodes.get(&net) {
            return Standing::Listed(*inode);
        }
        let live = guest.space().memory().volatility() == Volatility::Live;
        if live && self.listings < MOST_LISTINGS {
            self.listings += 1;
            let now = namespaces(guest, table).unwrap_or_default();
            let now = now.iter().map(|one| (one.address, one.inode));
            self.inodes.extend(now);
            if let Some(inode) = self.inodes.get(&net) {
                return Standing::Listed(*inode);
            }
        }
        let layout = guest.layout::<NetLayout>(table);
        let users = layout.ok().and_then(|layout| {
            let member = layout.users.as_ref()?;
            guest.number(net, member).ok()
        });
        match users {
            Some(0) => Standing::Ending,
            _ => Standing::Unlisted,
        }
    }
}

//! Network namespaces (`struct net`, `include/net/net_namespace.h`).

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::entries;
use crate::{Diagnostic, Guest, TableError, layout};

/// More network namespaces than this are in no guest.
const MOST_NAMESPACES: usize = 1 << 16;

layout! {
    /// `include/net/net_namespace.h`
    struct NetLayout: "net" {
        list: "list",
        inode: "ns.inum",
    }
}

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

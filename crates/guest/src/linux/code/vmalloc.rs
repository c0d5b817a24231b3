//! Areas of the kernel's virtual memory (`mm/vmalloc.c`): `vmap_area_list`
//! until Linux 6.8, the busy lists of `vmap_nodes` since.

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::{entries, is_object_address};
use crate::{Diagnostic, Guest, TableError, layout};

/// More areas than this are read of no list.
const MOST_AREAS: usize = 1 << 20;
/// More nodes than this has no kernel: one for each CPU, at most 128.
const MOST_NODES: u64 = 1 << 13;

layout! {
    /// `include/linux/vmalloc.h`: a piece of the address space.
    struct AreaLayout: "vmap_area" {
        list: "list",
        described: "vm",
    }
}

layout! {
    /// `include/linux/vmalloc.h`: what lies in an area.
    struct DescriptionLayout: "vm_struct" {
        address: "addr",
        bytes: "size",
        flags: "flags",
        caller: "caller",
    }
}

layout! {
    /// `mm/vmalloc.c`, since Linux 6.9.
    struct NodeLayout: "vmap_node" {
        busy: "busy.head",
    }
}

/// An area that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its first address.
    pub start: VirtualAddress,
    /// Its bytes, a guard page included as a rule.
    pub size: u64,
    /// `VM_` flags.
    pub flags: u64,
    /// The instruction behind the call that asked for it.
    pub caller: VirtualAddress,
}

impl Area {
    /// Whether the address lies in it.
    pub fn contains(&self, address: VirtualAddress) -> bool {
        address.as_u64().wrapping_sub(self.start.as_u64()) < self.size
    }
}

/// The areas in use, in the order of the kernel's lists. What can't be read
/// becomes a diagnostic of `table`.
///
/// # Errors
/// [`TableError`] if the lists can't be found.
pub fn areas(guest: &Guest, table: &'static str) -> Result<Vec<Area>, TableError> {
    let area = guest.layout::<AreaLayout>(table)?;
    let description = guest.layout::<DescriptionLayout>(table)?;
    let space = guest.space();
    let mut found = Vec::new();
    let mut walk = |head| {
        for entry in entries(guest, table, "vmap_area", head, area.list.offset).take(MOST_AREAS) {
            let read = || -> Result<Option<Area>, ReadError> {
                let described = guest.pointer(entry, &area.described)?;
                // Pieces without a description are of `vm_map_ram`.
                if !is_object_address(space, described) {
                    return Ok(None);
                }
                Ok(Some(Area {
                    start: guest.pointer(described, &description.address)?,
                    size: guest.number(described, &description.bytes)?,
                    flags: guest.number(described, &description.flags)?,
                    caller: guest.pointer(described, &description.caller)?,
                }))
            };
            match read() {
                Ok(area) => found.extend(area),
                Err(error) => guest.diagnostics().record(Diagnostic {
                    table,
                    subject: "vmap_area".to_owned(),
                    address: Some(entry),
                    reason: error.to_string(),
                }),
            }
        }
    };
    if let Some(head) = guest.address("vmap_area_list") {
        walk(head);
        return Ok(found);
    }
    let read = |what| {
        move |source| TableError::Read {
            table,
            what,
            source,
        }
    };
    let node = guest.layout::<NodeLayout>(table)?;
    let first = guest.symbol(table, "vmap_nodes")?;
    let first = space.read_pointer(first).map_err(read("vmap_nodes"))?;
    let count = guest.symbol(table, "nr_vmap_nodes")?;
    let count = space.read_u32(count).map_err(read("nr_vmap_nodes"))?;
    for number in 0..u64::from(count).min(MOST_NODES) {
        let at = first.wrapping_add(number.wrapping_mul(node.size));
        walk(at.wrapping_add(node.busy.offset));
    }
    Ok(found)
}

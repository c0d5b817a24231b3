//! Other places than the list of modules where the kernel keeps track of them:
//! the kobjects behind `/sys/module` (`kernel/params.c`), the tree that finds
//! the module of an address (`kernel/module/tree_lookup.c`), and the memory
//! that modules are put into, where each `struct module` holds a pointer to
//! itself.

use std::ops::Range;

use secmon_memory::{MappedPage, MappingsError, PAGE_SIZE, VirtualAddress};

use crate::linux::list::{entries, is_object_address};
use crate::linux::rb_tree;
use crate::{Diagnostic, Guest, TableError, layout};

/// More modules than this has no guest.
const MOST_MODULES: usize = 1 << 16;
/// `struct module` is aligned to a line of the cache
/// (`____cacheline_aligned`).
const ALIGNMENT: usize = 64;
/// Where the modules' memory ends on x86-64 (`MODULES_END`).
const AREA_END: u64 = 0xffff_ffff_ff00_0000;
/// Bytes of a large page.
const LARGE_PAGE: u64 = 2 << 20;
/// More page tables than this map no gigabyte.
const MOST_TABLES: usize = 1 << 10;
/// More bytes than this are not searched.
const MOST_BYTES: u64 = 1 << 30;
/// `MODULE_NAME_LEN`, or what the types say if that is less.
const LONGEST_NAME: u64 = 64;

layout! {
    /// `include/linux/module.h`
    struct KobjectLayout: "module_kobject" {
        module: "mod",
        entry: "kobj.entry",
    }
}

layout! {
    /// `include/linux/kobject.h`
    struct KsetLayout: "kset" {
        list: "list",
    }
}

layout! {
    /// `include/linux/module.h`
    struct TreeNodeLayout: "mod_tree_node" {
        module: "mod",
        node: "node.node",
    }
}

layout! {
    /// `kernel/module/internal.h`
    struct TreeLayout: "mod_tree_root" {
        tree: "root.tree",
    }
}

layout! {
    /// `include/linux/module.h`
    struct SelfLayout: "module" {
        own: "mkobj.mod",
        name: "name",
        state: "state",
    }
}

/// The modules that have a kobject in `module_kset`, by the addresses of their
/// `struct module`. What is built in has none of the latter and is left out.
///
/// # Errors
/// [`TableError`] if the set can't be found.
pub fn kobjects(guest: &Guest, table: &'static str) -> Result<Vec<VirtualAddress>, TableError> {
    let layout = guest.layout::<KobjectLayout>(table)?;
    let kset = guest.layout::<KsetLayout>(table)?;
    let set = guest
        .space()
        .read_pointer(guest.symbol(table, "module_kset")?)
        .map_err(|source| TableError::Read {
            table,
            what: "module_kset",
            source,
        })?;
    let head = set.wrapping_add(kset.list.offset);
    let mut found = Vec::new();
    let subject = "module_kset";
    for kobject in entries(guest, table, subject, head, layout.entry.offset).take(MOST_MODULES) {
        match guest.pointer(kobject, &layout.module) {
            Ok(module) if module.is_null() => {}
            Ok(module) => found.push(module),
            Err(error) => guest.diagnostics().record(Diagnostic {
                table,
                subject: subject.to_owned(),
                address: Some(kobject),
                reason: error.to_string(),
            }),
        }
    }
    Ok(found)
}

/// The modules in the tree of modules' addresses, each once, by the addresses
/// of their `struct module`.
///
/// # Errors
/// [`TableError`] if there is no such tree.
pub fn tree(guest: &Guest, table: &'static str) -> Result<Vec<VirtualAddress>, TableError> {
    let layout = guest.layout::<TreeNodeLayout>(table)?;
    let root = guest.layout::<TreeLayout>(table)?;
    let root = guest
        .symbol(table, "mod_tree")?
        .wrapping_add(root.tree.offset);
    let walk = rb_tree::nodes(guest.space(), guest.diagnostics(), root, 16 * MOST_MODULES);
    let mut found: Vec<VirtualAddress> = Vec::new();
    for node in walk.report(guest, table, "mod_tree") {
        let node = node.wrapping_sub(layout.node.offset);
        match guest.pointer(node, &layout.module) {
            Ok(module) => found.push(module),
            Err(error) => guest.diagnostics().record(Diagnostic {
                table,
                subject: "mod_tree".to_owned(),
                address: Some(node),
                reason: error.to_string(),
            }),
        }
    }
    // A module has a node for each kind of its memory.
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// A `struct module` found by what it says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// Where it lies.
    pub address: VirtualAddress,
    /// The name that it bears.
    pub name: Vec<u8>,
    /// Its `state`: 0 live, 1 coming, 2 going, 3 not formed.
    pub state: u64,
}

/// The addresses where modules are loaded: behind the kernel's image.
///
/// # Errors
/// [`TableError::Symbol`] if the image's end is not known.
pub fn module_area(
    guest: &Guest,
    table: &'static str,
) -> Result<Range<VirtualAddress>, TableError> {
    let end = VirtualAddress::new(AREA_END);
    // The rest of the image's last large page is still the image's.
    let image = guest.symbol(table, "_end")?.as_u64();
    let start = VirtualAddress::new(image.checked_next_multiple_of(LARGE_PAGE).unwrap_or(image));
    Ok(start..end.max(start))
}

/// Searches the modules' memory for `struct module`s: each holds, in its own
/// kobject, a pointer to itself, whatever list it was taken out of. Memory of
/// modules that went is not mapped any more.
///
/// # Errors
/// [`TableError`] if types or symbols are missing.
pub fn traces(guest: &Guest, table: &'static str) -> Result<Vec<Trace>, TableError> {
    let layout = guest.layout::<SelfLayout>(table)?;
    let area = module_area(guest, table)?;
    let mut pages: Vec<Range<u64>> = Vec::new();
    let mut bytes = 0_u64;
    let mut each = |page: MappedPage| {
        let (start, end) = (page.address.as_u64(), page.end().as_u64());
        // Structures lie in memory that is written.
        if !page.rights.writable || start < area.start.as_u64() || bytes > MOST_BYTES {
            return;
        }
        bytes += end - start;
        match pages.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => pages.push(start..end),
        }
    };
    let outcome = guest
        .space()
        .mapped_pages(area.clone(), MOST_TABLES, &mut each);
    let complain = |address, error: &dyn std::fmt::Display| {
        guest.diagnostics().record(Diagnostic {
            table,
            subject: "modules' memory".to_owned(),
            address,
            reason: format!("modules may be missing: {error}"),
        });
    };
    if let Err(error @ (MappingsError::TooMany { .. } | MappingsError::Unreadable { .. })) = outcome
    {
        complain(None, &error);
    }
    let mut found = Vec::new();
    let mut page = [0; PAGE_SIZE as usize];
    let name_limit = layout.name.size.min(LONGEST_NAME) as usize;
    // The pointer may lie in another page than the structure starts in: it is
    // what is searched, and says where that would be.
    let back = layout.own.offset;
    for run in pages {
        for start in run.step_by(PAGE_SIZE as usize) {
            let address = VirtualAddress::new(start);
            if let Err(error) = guest.space().read(address, &mut page) {
                complain(Some(address), &error);
                continue;
            }
            let lead = (back % ALIGNMENT as u64) as usize;
            let words = page.get(lead..).unwrap_or_default();
            for (index, word) in words.chunks(ALIGNMENT).enumerate() {
                let Some(word) = word.first_chunk::<8>() else {
                    continue;
                };
                let at = start + lead as u64 + (index * ALIGNMENT) as u64;
                let module = VirtualAddress::new(u64::from_le_bytes(*word));
                if module.as_u64() != at.wrapping_sub(back)
                    || !is_object_address(guest.space(), module)
                    || found.len() >= MOST_MODULES
                {
                    continue;
                }
                let name = module.wrapping_add(layout.name.offset);
                let (Ok(name), Ok(state)) = (
                    guest.space().read_c_string(name, name_limit),
                    guest.number(module, &layout.state),
                ) else {
                    continue;
                };
                found.push(Trace {
                    address: module,
                    name,
                    state: state & 0xffff_ffff,
                });
            }
        }
    }
    Ok(found)
}

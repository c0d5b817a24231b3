//! ftrace (`kernel/trace/ftrace.c`): who is called by traced functions, and the
//! sites in functions where such calls are put.

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::hash::AddressSet;
use crate::linux::list::is_object_address;
use crate::{Diagnostic, Guest, TableError, layout};

/// More `ftrace_ops` than this are in no list.
const MOST_OPS: usize = 1 << 14;
/// More pages of sites than this has no kernel.
const MOST_PAGES: usize = 1 << 16;
/// More sites than this lie in no page group (`index` of a `ftrace_page`).
const MOST_SITES_A_PAGE: u64 = 1 << 20;
/// More sites than this has no kernel with its modules.
const MOST_SITES: usize = 1 << 22;
/// `FTRACE_FL_ENABLED` and `FTRACE_FL_DISABLED` (`include/linux/ftrace.h`).
const ENABLED: u64 = 1 << 31;

layout! {
    /// `include/linux/ftrace.h`
    struct OpsLayout: "ftrace_ops" {
        function: "func",
        next: "next",
        flags: "flags",
        trampoline: "trampoline",
    } optional {
        /// What was asked for, where `func` is something around it.
        saved_function: "saved_func",
    }
}

layout! {
    /// `kernel/trace/ftrace.c`
    struct PageLayout: "ftrace_page" {
        next: "next",
        records: "records",
        count: "index",
    }
}

layout! {
    /// `include/linux/ftrace.h`
    struct RecordLayout: "dyn_ftrace" {
        address: "ip",
        flags: "flags",
    }
}

/// A registered `struct ftrace_ops`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FtraceOps {
    /// Where it lies.
    pub address: VirtualAddress,
    /// What it calls.
    pub function: VirtualAddress,
    /// What it was made to call, where that is another function.
    pub saved_function: Option<VirtualAddress>,
    /// `FTRACE_OPS_FL_` flags.
    pub flags: u64,
    /// Its own trampoline, or null.
    pub trampoline: VirtualAddress,
}

/// The addresses in the list that the variable at `first` starts; each node's
/// link lies `next` bytes inside of it. The node that ends the list is left
/// out.
pub fn ftrace_ops(
    guest: &Guest,
    table: &'static str,
    first: VirtualAddress,
    next: u64,
) -> Vec<VirtualAddress> {
    let space = guest.space();
    let end = guest.address("ftrace_list_end");
    let mut found = Vec::new();
    let mut seen = AddressSet::default();
    let mut link = first;
    loop {
        let problem = match space.read_pointer(link) {
            Ok(node) if node.is_null() || Some(node) == end => return found,
            Ok(node) if !is_object_address(space, node) => {
                format!("the list goes on at {node}, which is no address of an object")
            }
            Ok(node) if !seen.insert(node) => format!("the list leads back to {node}"),
            Ok(_) if found.len() >= MOST_OPS => format!("more than {MOST_OPS} entries"),
            Ok(node) => {
                found.push(node);
                link = node.wrapping_add(next);
                continue;
            }
            Err(error) => error.to_string(),
        };
        guest.diagnostics().record(Diagnostic {
            table,
            subject: "ftrace_ops_list".to_owned(),
            address: Some(link),
            reason: format!("entries are missing: {problem}"),
        });
        return found;
    }
}

/// The `ftrace_ops` that are registered; none in a kernel without ftrace.
///
/// # Errors
/// [`TableError`] if the kernel's types lack them.
pub fn ftrace_ops_in_use(guest: &Guest, table: &'static str) -> Result<Vec<FtraceOps>, TableError> {
    let Some(first) = guest.address("ftrace_ops_list") else {
        return Ok(Vec::new());
    };
    let layout = guest.layout::<OpsLayout>(table)?;
    let read = |address| -> Result<FtraceOps, ReadError> {
        let function = guest.pointer(address, &layout.function)?;
        let saved = match &layout.saved_function {
            Some(member) => Some(guest.pointer(address, member)?),
            None => None,
        };
        Ok(FtraceOps {
            address,
            function,
            saved_function: saved.filter(|saved| !saved.is_null() && *saved != function),
            flags: guest.number(address, &layout.flags)?,
            trampoline: guest.pointer(address, &layout.trampoline)?,
        })
    };
    let mut found = Vec::new();
    for address in ftrace_ops(guest, table, first, layout.next.offset) {
        match read(address) {
            Ok(ops) => found.push(ops),
            Err(error) => guest.diagnostics().record(Diagnostic {
                table,
                subject: "ftrace_ops".to_owned(),
                address: Some(address),
                reason: error.to_string(),
            }),
        }
    }
    Ok(found)
}

/// A place in a function where a call for tracing may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FtraceSite {
    /// Its address.
    pub address: VirtualAddress,
    /// The kernel's flags of it.
    pub flags: u64,
}

impl FtraceSite {
    /// Whether the kernel means a call to stand there.
    pub fn is_enabled(self) -> bool {
        self.flags & ENABLED != 0
    }
}

/// All such places, of the kernel and its modules, by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FtraceSites(Vec<FtraceSite>);

impl FtraceSites {
    /// The site at this address.
    pub fn at(&self, address: VirtualAddress) -> Option<FtraceSite> {
        let index = self
            .0
            .binary_search_by_key(&address, |site| site.address)
            .ok()?;
        self.0.get(index).copied()
    }

    /// All sites, by ascending address.
    pub fn iter(&self) -> impl Iterator<Item = FtraceSite> + '_ {
        self.0.iter().copied()
    }
}

/// The sites that the kernel has records of; none in a kernel without ftrace.
///
/// # Errors
/// [`TableError`] if types are missing or the first record can't be read.
pub fn ftrace_sites(guest: &Guest, table: &'static str) -> Result<FtraceSites, TableError> {
    let Some(start) = guest.address("ftrace_pages_start") else {
        return Ok(FtraceSites::default());
    };
    let page_layout = guest.layout::<PageLayout>(table)?;
    let record = guest.layout::<RecordLayout>(table)?;
    let space = guest.space();
    let mut sites = Vec::new();
    let mut seen = AddressSet::default();
    let mut bytes = Vec::new();
    let mut link = start;
    let size = record.size.max(16) as usize;
    let problem = loop {
        let page = match space.read_pointer(link) {
            Ok(page) if page.is_null() => break None,
            Ok(page) if !is_object_address(space, page) || !seen.insert(page) => {
                break Some(format!("the list goes on at {page}"));
            }
            Ok(page) => page,
            Err(error) => break Some(error.to_string()),
        };
        link = page.wrapping_add(page_layout.next.offset);
        let read = || -> Result<(VirtualAddress, u64), ReadError> {
            Ok((
                guest.pointer(page, &page_layout.records)?,
                guest.number(page, &page_layout.count)? & 0xffff_ffff,
            ))
        };
        let (records, count) = match read() {
            Ok(read) => read,
            Err(error) => break Some(error.to_string()),
        };
        if count > MOST_SITES_A_PAGE || sites.len() > MOST_SITES || seen.len() > MOST_PAGES {
            break Some(format!("{count} more records are said to follow"));
        }
        bytes.resize(count as usize * size, 0);
        if let Err(error) = space.read(records, &mut bytes) {
            break Some(error.to_string());
        }
        for entry in bytes.chunks_exact(size) {
            let word = |offset: u64| {
                let offset = usize::try_from(offset).unwrap_or(usize::MAX);
                let bytes = entry.get(offset..).and_then(|rest| rest.first_chunk::<8>());
                bytes.map(|bytes| u64::from_le_bytes(*bytes))
            };
            if let (Some(address), Some(flags)) =
                (word(record.address.offset), word(record.flags.offset))
                && address != 0
            {
                sites.push(FtraceSite {
                    address: VirtualAddress::new(address),
                    flags,
                });
            }
        }
    };
    if let Some(problem) = problem {
        guest.diagnostics().record(Diagnostic {
            table,
            subject: "ftrace_pages".to_owned(),
            address: Some(link),
            reason: format!("sites are missing: {problem}"),
        });
    }
    sites.sort_unstable();
    Ok(FtraceSites(sites))
}

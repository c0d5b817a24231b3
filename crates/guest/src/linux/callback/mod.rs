//! Functions that the kernel calls through pointers in its objects, and tables
//! of such functions: notifier chains, binary formats, netfilter, files of
//! `/proc`, file systems, handlers of packets, network devices, terminals,
//! timers, work queues, kernel threads, performance events, security hooks.
//!
//! It is told where each pointer lies and where it leads, nothing more.

mod device;
mod file_system;
mod high_resolution_timer;
mod list;
mod network;
mod notifier;
mod performance;
mod security;
mod task;
mod timer;
mod workqueue;

use secmon_memory::{ReadError, VirtualAddress};

use crate::{Diagnostic, Guest, TableError, Text};

/// A pointer to a function or to a table of functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Callback {
    /// What it is part of, by its kernel name: `nf_hook_entry`.
    pub kind: &'static str,
    /// Which of them: the chain, the file, the file system.
    pub name: Text,
    /// Where the pointer lies.
    pub location: VirtualAddress,
    /// Where it leads.
    pub target: VirtualAddress,
    /// Whether it leads to a function or to a table of them.
    pub leads_to: LeadsTo,
}

/// What a [`Callback`] leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeadsTo {
    /// A function.
    Function,
    /// A function, if to code at all, and then one of the kernel itself.
    KernelFunction,
    /// A function of a security module, which are all part of the kernel.
    SecurityHook,
    /// What the kernel made of a security module's hook at its start: an object
    /// of its image.
    SecurityRecord,
    /// A table of functions of that many bytes.
    Table(u64),
    /// The same, and one of the kernel's own.
    KernelTable(u64),
}

/// What the objects of this kernel lead to.
#[derive(Debug)]
pub struct Callbacks {
    /// All such pointers that are known how to be found in this kernel.
    pub found: Vec<Callback>,
    /// The first kind of objects that could not be walked at all.
    pub error: Option<TableError>,
}

/// A walk over one kind of objects.
type WalkOver = fn(&mut Walk<'_>) -> Result<(), TableError>;

const WALKS: &[WalkOver] = &[
    notifier::chains,
    list::binary_formats,
    list::line_disciplines,
    network::netfilter,
    network::packet_handlers,
    network::protocols,
    device::devices,
    timer::timers,
    high_resolution_timer::timers,
    workqueue::works,
    task::tasks,
    performance::events,
    security::hooks,
    file_system::super_blocks,
    file_system::proc_entries,
];

/// Walks over all such objects. What can't be read becomes a diagnostic of
/// `table`; a kind of objects that the kernel has and its types lack keeps no
/// other from being walked.
pub fn callbacks(guest: &Guest, table: &'static str) -> Callbacks {
    let mut walk = Walk {
        guest,
        table,
        found: Vec::new(),
    };
    let mut error = None;
    for over in WALKS {
        if let Err(failed) = over(&mut walk) {
            error.get_or_insert(failed);
        }
    }
    Callbacks {
        found: walk.found,
        error,
    }
}

/// More pointers than this are not kept; a hostile guest can have any number.
const MOST_CALLBACKS: usize = 1 << 18;

/// A walk over such objects.
struct Walk<'g> {
    guest: &'g Guest,
    table: &'static str,
    found: Vec<Callback>,
}

impl Walk<'_> {
    /// Reads the pointer at `location` and keeps it unless it is null.
    fn add(
        &mut self,
        kind: &'static str,
        name: &Text,
        location: VirtualAddress,
        leads_to: LeadsTo,
    ) -> Result<(), ReadError> {
        let target = self.guest.space().read_pointer(location)?;
        self.keep(kind, name, location, target, leads_to);
        Ok(())
    }

    /// Keeps a pointer that was read unless it is null.
    fn keep(
        &mut self,
        kind: &'static str,
        name: &Text,
        location: VirtualAddress,
        target: VirtualAddress,
        leads_to: LeadsTo,
    ) {
        if !target.is_null() && self.found.len() < MOST_CALLBACKS {
            self.found.push(Callback {
                kind,
                name: name.clone(),
                location,
                target,
                leads_to,
            });
        }
    }

    /// What could not be read.
    fn complain(&self, kind: &'static str, address: VirtualAddress, error: &ReadError) {
        self.guest.diagnostics().record(Diagnostic {
            table: self.table,
            subject: kind.to_owned(),
            address: Some(address),
            reason: error.to_string(),
        });
    }
}

//! Functions that the kernel calls through pointers in its objects, and tables
//! of such functions: notifier chains, binary formats, netfilter, files of
//! `/proc`, file systems, handlers of packets, terminals, timers.
//!
//! It is told where each pointer lies and where it leads, nothing more.

mod file_system;
mod list;
mod network;
mod notifier;
mod timer;

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
    /// A table of functions of that many bytes.
    Table(u64),
}

/// All such pointers that are known how to be found in this kernel. What can't
/// be read becomes a diagnostic of `table`.
///
/// # Errors
/// [`TableError`] if the kernel has such objects, and its types lack them.
pub fn callbacks(guest: &Guest, table: &'static str) -> Result<Vec<Callback>, TableError> {
    let mut walk = Walk {
        guest,
        table,
        found: Vec::new(),
    };
    notifier::chains(&mut walk)?;
    list::binary_formats(&mut walk)?;
    list::line_disciplines(&mut walk)?;
    network::netfilter(&mut walk)?;
    network::packet_handlers(&mut walk)?;
    network::protocols(&mut walk)?;
    timer::timers(&mut walk)?;
    file_system::super_blocks(&mut walk)?;
    file_system::proc_entries(&mut walk)?;
    Ok(walk.found)
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
        if !target.is_null() && self.found.len() < MOST_CALLBACKS {
            self.found.push(Callback {
                kind,
                name: name.clone(),
                location,
                target,
                leads_to,
            });
        }
        Ok(())
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

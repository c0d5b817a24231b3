//! Looks places in a target's memory up.

use std::sync::Arc;

use secmon_guest::Guest;
use secmon_guest::linux::task;
use secmon_guest::linux::user::UserMemory;
use secmon_memory::{AddressSpace, PhysicalAddress, PhysicalMemory, VirtualAddress};

use crate::protocol::{Place, Refusal};

/// Where bytes are read.
pub(super) enum Found {
    /// Guest physical memory.
    Physical(Arc<dyn PhysicalMemory>, u64),
    /// The memory of the kernel or of a process.
    Virtual(Box<AddressSpace>, u64),
}

impl Found {
    /// The address of the first byte.
    pub(super) fn start(&self) -> u64 {
        match self {
            Self::Physical(_, address) | Self::Virtual(_, address) => *address,
        }
    }

    /// Reads bytes at an address of the same kind.
    pub(super) fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Physical(memory, _) => memory
                .read(PhysicalAddress::new(address), buffer)
                .map_err(|error| error.to_string()),
            Self::Virtual(space, _) => space
                .read(VirtualAddress::new(address), buffer)
                .map_err(|error| error.to_string()),
        }
    }
}

/// Looks a place up in the guest.
pub(super) fn find(guest: &Guest, place: &Place) -> Result<Found, Refusal> {
    let refuse = |reason: String| Refusal::NoPlace { reason };
    let kernel = |address| Found::Virtual(Box::new(guest.space().clone()), address);
    match place {
        Place::Physical(address) => Ok(Found::Physical(guest.space().memory().clone(), *address)),
        Place::Kernel(address) => Ok(kernel(*address)),
        Place::Symbol { name, offset } => {
            let mut found = guest.symbols().addresses(name);
            let Some(address) = found.next() else {
                return Err(refuse(format!("the kernel has no symbol `{name}`")));
            };
            match found.count() {
                0 => Ok(kernel(address.as_u64().wrapping_add_signed(*offset))),
                others => Err(refuse(format!(
                    "{} symbols of the kernel are called `{name}`: give the address",
                    others.saturating_add(1)
                ))),
            }
        }
        Place::Process { pid, address } => {
            let mut tasks =
                task::leaders(guest, "processes").map_err(|error| refuse(error.to_string()))?;
            let Some(task) = tasks.find(|task| u64::from(task.tgid) == *pid) else {
                return Err(refuse(format!("no process has the id {pid}")));
            };
            if task.mm.is_null() {
                return Err(refuse(format!(
                    "process {pid} is a kernel thread or has ended: it has no memory of its own"
                )));
            }
            let memory = UserMemory::new(guest, task.mm)
                .map_err(|error| refuse(format!("the memory of process {pid}: {error}")))?;
            Ok(Found::Virtual(Box::new(memory.space().clone()), *address))
        }
    }
}

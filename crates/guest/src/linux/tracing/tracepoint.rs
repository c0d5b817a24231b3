//! Tracepoints (`include/linux/tracepoint-defs.h`): which functions are called
//! where the kernel and its modules pass one.

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::is_object_address;
use crate::linux::module::Module;
use crate::{Diagnostic, Guest, TableError, Text, layout};

/// More tracepoints than this has neither kernel nor module.
const MOST_TRACEPOINTS: u64 = 1 << 16;
/// More functions than this has no tracepoint.
const MOST_FUNCTIONS: u64 = 1 << 8;
/// Bytes of a name that are read.
const LONGEST_NAME: usize = 128;

layout! {
    /// `include/linux/tracepoint-defs.h`
    struct TracepointLayout: "tracepoint" {
        name: "name",
        functions: "funcs",
    }
}

layout! {
    /// `include/linux/tracepoint-defs.h`
    struct FunctionLayout: "tracepoint_func" {
        function: "func",
        data: "data",
    }
}

layout! {
    /// `include/linux/module.h`
    struct ModuleTracepointsLayout: "module" {
        pointers: "tracepoints_ptrs",
        count: "num_tracepoints",
    }
}

/// A function that a tracepoint calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The `struct tracepoint`.
    pub tracepoint: VirtualAddress,
    /// Its name.
    pub name: Text,
    /// The function.
    pub function: VirtualAddress,
    /// What it is given: of an event its `trace_event_file` or program.
    pub data: VirtualAddress,
}

/// All functions that tracepoints of the kernel and of `modules` call. None
/// in a kernel without tracepoints.
///
/// # Errors
/// [`TableError`] if the kernel's types lack them.
pub fn probes(
    guest: &Guest,
    table: &'static str,
    modules: &[Module],
) -> Result<Vec<Probe>, TableError> {
    let (Some(start), Some(end)) = (
        guest.address("__start___tracepoints_ptrs"),
        guest.address("__stop___tracepoints_ptrs"),
    ) else {
        return Ok(Vec::new());
    };
    let layout = guest.layout::<TracepointLayout>(table)?;
    let function = guest.layout::<FunctionLayout>(table)?;
    // Distances from where they are written, of 4 bytes each
    // (`HAVE_ARCH_PREL32_RELOCATIONS`, as on x86-64).
    let mut arrays = vec![(start, end.as_u64().saturating_sub(start.as_u64()) / 4)];
    if let Ok(of_module) = guest.layout::<ModuleTracepointsLayout>(table) {
        for module in modules {
            let read = || -> Result<(VirtualAddress, u64), ReadError> {
                Ok((
                    guest.pointer(module.address, &of_module.pointers)?,
                    guest.number(module.address, &of_module.count)?,
                ))
            };
            if let Ok((pointers, count)) = read()
                && count > 0
            {
                arrays.push((pointers, count));
            }
        }
    }
    let mut found = Vec::new();
    for (pointers, count) in arrays {
        for index in 0..count.min(MOST_TRACEPOINTS) {
            let place = pointers.wrapping_add(index * 4);
            let mut read = || -> Result<(), ReadError> {
                let distance = guest.space().read_u32(place)? as i32;
                let tracepoint =
                    VirtualAddress::new(place.as_u64().wrapping_add_signed(distance.into()));
                probes_of(guest, &layout, &function, tracepoint, &mut found)
            };
            if let Err(error) = read() {
                guest.diagnostics().record(Diagnostic {
                    table,
                    subject: "tracepoint".to_owned(),
                    address: Some(place),
                    reason: error.to_string(),
                });
            }
        }
    }
    Ok(found)
}

/// The functions of one tracepoint.
fn probes_of(
    guest: &Guest,
    layout: &TracepointLayout,
    function: &FunctionLayout,
    tracepoint: VirtualAddress,
    found: &mut Vec<Probe>,
) -> Result<(), ReadError> {
    let functions = guest.pointer(tracepoint, &layout.functions)?;
    if !is_object_address(guest.space(), functions) {
        return Ok(());
    }
    let name = guest.pointer(tracepoint, &layout.name)?;
    let name = Text::new(guest.space().read_c_string(name, LONGEST_NAME)?);
    for index in 0..MOST_FUNCTIONS {
        let entry = functions.wrapping_add(index.wrapping_mul(function.size));
        let target = guest.pointer(entry, &function.function)?;
        if target.is_null() {
            break;
        }
        found.push(Probe {
            tracepoint,
            name: name.clone(),
            function: target,
            data: guest.pointer(entry, &function.data)?,
        });
    }
    Ok(())
}

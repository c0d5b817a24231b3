//! The tables of system calls (`arch/x86/entry/syscall_64.c`) and what the
//! kernel noted at its start about each number
//! (`kernel/trace/trace_syscalls.c`).

use secmon_memory::{ReadError, VirtualAddress};

use super::list::is_object_address;
use crate::{Guest, TableError, Text, layout};

/// More system calls than this has no kernel.
const MOST_CALLS: u64 = 1 << 11;
/// Bytes of a name that are read.
const LONGEST_NAME: usize = 128;

layout! {
    /// `include/trace/syscall.h`
    struct MetadataLayout: "syscall_metadata" {
        name: "name",
        number: "syscall_nr",
    }
}

/// A table of the functions behind system calls, by their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemCallTable {
    /// Its symbol.
    pub symbol: &'static str,
    /// Where it lies.
    pub address: VirtualAddress,
    /// The functions; null where padding follows the table.
    pub calls: Vec<VirtualAddress>,
}

/// The tables that this kernel has, up to the symbol that follows each.
///
/// # Errors
/// [`TableError::Read`] if one can't be read.
pub fn tables(guest: &Guest, table: &'static str) -> Result<Vec<SystemCallTable>, TableError> {
    let mut found = Vec::new();
    for symbol in [
        "sys_call_table",
        "ia32_sys_call_table",
        "x32_sys_call_table",
    ] {
        let Some(address) = guest.address(symbol) else {
            continue;
        };
        let belongs = |place| {
            let nearest = guest.symbols().nearest(place);
            nearest.is_some_and(|(nearest, _)| nearest.address == address)
        };
        let mut calls = Vec::new();
        for number in 0..MOST_CALLS {
            let place = address.wrapping_add(number * 8);
            if !belongs(place) {
                break;
            }
            let call = guest.space().read_pointer(place);
            calls.push(call.map_err(|source| TableError::Read {
                table,
                what: symbol,
                source,
            })?);
        }
        found.push(SystemCallTable {
            symbol,
            address,
            calls,
        });
    }
    Ok(found)
}

/// The name of the function that the kernel found behind each number of
/// `sys_call_table` when it started: `sys_read`. None for numbers that it
/// traces nothing of, and in kernels that trace no system calls.
///
/// # Errors
/// [`TableError`] if the kernel's types lack the notes.
pub fn noted_names(
    guest: &Guest,
    table: &'static str,
    count: usize,
) -> Result<Vec<Option<Text>>, TableError> {
    let mut names = vec![None; count];
    let Some(symbol) = guest.address("syscalls_metadata") else {
        return Ok(names);
    };
    let layout = guest.layout::<MetadataLayout>(table)?;
    let space = guest.space();
    let Ok(notes) = space.read_pointer(symbol) else {
        return Ok(names);
    };
    // Since 6.13 or so a kernel may keep them sparsely, in another form.
    if !is_object_address(space, notes) {
        return Ok(names);
    }
    for (number, slot) in (0_u64..).zip(&mut names) {
        let read = || -> Result<Option<Text>, ReadError> {
            let note = space.read_pointer(notes.wrapping_add(number * 8))?;
            if !is_object_address(space, note) {
                return Ok(None);
            }
            if guest.number(note, &layout.number)? & 0xffff_ffff != number {
                return Ok(None);
            }
            let name = guest.pointer(note, &layout.name)?;
            let name = space.read_c_string(name, LONGEST_NAME)?;
            Ok(Some(Text::new(name)))
        };
        *slot = read().unwrap_or_default();
    }
    Ok(names)
}

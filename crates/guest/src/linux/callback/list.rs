//! Formats of programs (`fs/exec.c`) and line disciplines of terminals
//! (`drivers/tty/tty_ldisc.c`).

use secmon_memory::ReadError;

use super::{LeadsTo, Walk};
use crate::linux::list::{entries, is_object_address};
use crate::{TableError, Text, layout};

/// More formats than this has no kernel.
const MOST_FORMATS: usize = 1 << 10;
/// `NR_LDISCS` of the newest kernels; older ones have 30.
const DISCIPLINES: u64 = 30;
/// Bytes of a name that are read.
const LONGEST_NAME: usize = 64;

layout! {
    /// `include/linux/binfmts.h`
    struct FormatLayout: "linux_binfmt" {
        list: "lh",
        load: "load_binary",
    } optional {
        library: "load_shlib",
        dump: "core_dump",
    }
}

layout! {
    /// `include/linux/tty_ldisc.h`
    struct DisciplineLayout: "tty_ldisc_ops" {
        name: "name",
    }
}

/// What loads programs, by format.
pub(super) fn binary_formats(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let Some(head) = guest.address("formats") else {
        return Ok(());
    };
    let layout = guest.layout::<FormatLayout>(table)?;
    let members = [
        Some(&layout.load),
        layout.library.as_ref(),
        layout.dump.as_ref(),
    ];
    for format in entries(guest, table, "formats", head, layout.list.offset).take(MOST_FORMATS) {
        for member in members.into_iter().flatten() {
            let location = format.wrapping_add(member.offset);
            let name = Text::from("formats");
            if let Err(error) = walk.add("linux_binfmt", &name, location, LeadsTo::Function) {
                walk.complain("linux_binfmt", format, &error);
            }
        }
    }
    Ok(())
}

/// The operations of line disciplines.
pub(super) fn line_disciplines(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let guest = walk.guest;
    let Some(first) = guest.address("tty_ldiscs") else {
        return Ok(());
    };
    let layout = guest.layout::<DisciplineLayout>(walk.table)?;
    for number in 0..DISCIPLINES {
        let location = first.wrapping_add(number * 8);
        let mut read = || -> Result<(), ReadError> {
            let operations = guest.space().read_pointer(location)?;
            if !is_object_address(guest.space(), operations) {
                return Ok(());
            }
            let name = guest.pointer(operations, &layout.name)?;
            let name = match is_object_address(guest.space(), name.page()) {
                true => Text::new(guest.space().read_c_string(name, LONGEST_NAME)?),
                false => Text::from("tty_ldisc"),
            };
            walk.add(
                "tty_ldisc_ops",
                &name,
                location,
                LeadsTo::Table(layout.size),
            )
        };
        if let Err(error) = read() {
            walk.complain("tty_ldisc_ops", location, &error);
        }
    }
    Ok(())
}

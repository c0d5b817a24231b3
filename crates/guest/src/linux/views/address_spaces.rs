//! The owners of address spaces (`mm_struct.owner`), of all that there are in
//! memory.

use secmon_memory::VirtualAddress;

use super::View;
use crate::linux::list::is_object_address;
use crate::{Guest, TableError, layout};

layout! {
    /// `include/linux/mm_types.h`
    struct MmOwnerLayout: "mm_struct" {
        users: "mm_users",
    } optional {
        /// Where memory is counted by control groups.
        owner: "owner",
    }
}

/// The tasks that own one of the `mm_struct`s at these addresses, which may be
/// free.
///
/// # Errors
/// [`TableError`] if the kernel's types lack something.
pub fn owners(
    guest: &Guest,
    table: &'static str,
    spaces: &[VirtualAddress],
) -> Result<View, TableError> {
    let layout = guest.layout::<MmOwnerLayout>(table)?;
    let mut view = View::default();
    let Some(owner) = &layout.owner else {
        view.fail("the kernel has no mm_struct.owner");
        return Ok(view);
    };
    for space in spaces {
        let used = guest.number(*space, &layout.users);
        if used.is_ok_and(|users| users as i32 > 0)
            && let Ok(task) = guest.pointer(*space, owner)
            && is_object_address(guest.space(), task)
        {
            view.tasks.insert(task);
        }
    }
    Ok(view)
}

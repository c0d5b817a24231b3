//! What the way up needs of a guest: memory to read, and where to count what
//! was torn.

use secmon_memory::{AddressSpace, ReadError, VirtualAddress};
use secmon_profile::Member;

use super::{PathError, is_kernel_pointer};
use crate::{Diagnostics, Guest, Text, extract};

/// A guest without its symbols and types, which were looked up before.
#[derive(Clone, Copy)]
pub(super) struct View<'g> {
    pub(super) space: &'g AddressSpace,
    pub(super) diagnostics: &'g Diagnostics,
}

impl<'g> View<'g> {
    pub(super) fn of(guest: &'g Guest) -> Self {
        Self {
            space: guest.space(),
            diagnostics: guest.diagnostics(),
        }
    }

    /// As [`Guest::number`].
    pub(super) fn number(self, base: VirtualAddress, member: &Member) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        let size = member.size.clamp(1, 8) as usize;
        let address = base.wrapping_add(member.offset);
        self.space
            .read(address, bytes.get_mut(..size).unwrap_or_default())?;
        Ok(extract(member, u64::from_le_bytes(bytes)))
    }

    /// As [`Guest::pointer`].
    pub(super) fn pointer(
        self,
        base: VirtualAddress,
        member: &Member,
    ) -> Result<VirtualAddress, ReadError> {
        self.space.read_pointer(base.wrapping_add(member.offset))
    }
}

pub(super) fn kernel_pointer(
    what: &'static str,
    value: VirtualAddress,
) -> Result<VirtualAddress, PathError> {
    if is_kernel_pointer(value) {
        Ok(value)
    } else {
        Err(PathError::Pointer { what, value })
    }
}

/// The pointer `member` of the structure at `base`, which is `what`.
pub(super) fn pointer(
    view: View<'_>,
    what: &'static str,
    base: VirtualAddress,
    member: &Member,
) -> Result<VirtualAddress, PathError> {
    let base = kernel_pointer(what, base)?;
    view.pointer(base, member)
        .map_err(|source| PathError::Read {
            what,
            address: base,
            source,
        })
}

/// The short string at `address`.
pub(super) fn c_string(
    view: View<'_>,
    what: &'static str,
    address: VirtualAddress,
) -> Result<Text, PathError> {
    let address = kernel_pointer(what, address)?;
    let bytes = view
        .space
        .read_c_string(address, 256)
        .map_err(|source| PathError::Read {
            what,
            address,
            source,
        })?;
    Ok(Text::new(bytes))
}

//! The name of a terminal (`tty_line_name`, `drivers/tty/tty_io.c`).

use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};

use crate::{Guest, TableError, layout};

/// `tty_struct.name` has 64 bytes.
const LONGEST: u64 = 64;

layout! {
    /// `include/linux/tty.h`
    struct TtyLayout: "tty_struct" {
        name: "name",
    }
}

/// Reads the names of terminals.
pub struct Terminals {
    layout: Arc<TtyLayout>,
}

impl Terminals {
    /// A reader for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack terminals.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let layout = guest.layout(table)?;
        Ok(Self { layout })
    }

    /// The name of the terminal whose `tty_struct` is at `tty`, below `/dev`:
    /// `tty1`, `ttyS0`, `pts/0`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn name(&self, guest: &Guest, tty: VirtualAddress) -> Result<Vec<u8>, ReadError> {
        let member = &self.layout.name;
        let limit = member.size.clamp(1, LONGEST) as usize;
        let address = tty.wrapping_add(member.offset);
        let name = guest.space().read_c_string(address, limit)?;
        Ok(device_name(&name))
    }
}

/// The name of the device below `/dev`: the kernel calls the terminal
/// `/dev/pts/3` `pts3`.
fn device_name(name: &[u8]) -> Vec<u8> {
    match name.strip_prefix(b"pts") {
        Some(number) if !number.is_empty() && number.iter().all(u8::is_ascii_digit) => {
            [b"pts/", number].concat()
        }
        _ => name.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        assert_eq!(device_name(b"pts12"), b"pts/12");
        assert_eq!(device_name(b"pts"), b"pts");
        assert_eq!(device_name(b"ttyS0"), b"ttyS0");
        assert_eq!(device_name(b"ttyp0"), b"ttyp0");
    }
}

//! The name of a terminal (`tty_line_name`, `drivers/tty/tty_io.c`).

use secmon_memory::VirtualAddress;

use crate::{Guest, Value, layout};

/// `tty_struct.name` has 64 bytes.
const LONGEST: u64 = 64;

layout! {
    /// `include/linux/tty.h`
    struct TtyLayout: "tty_struct" {
        name: "name",
    }
}

/// The name of the terminal whose `tty_struct` is at `tty`, below `/dev`:
/// `tty1`, `ttyS0`, `pts/0`; null for none.
pub fn terminal(guest: &Guest, table: &'static str, tty: VirtualAddress) -> Value {
    if tty.is_null() {
        return Value::Null;
    }
    let layout = match guest.layout::<TtyLayout>(table) {
        Ok(layout) => layout,
        Err(error) => return Value::unreadable(error),
    };
    let limit = layout.name.size.clamp(1, LONGEST) as usize;
    let name = guest
        .space()
        .read_c_string(tty.wrapping_add(layout.name.offset), limit);
    Value::from_read(name, |name| Value::text(device_name(&name)))
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

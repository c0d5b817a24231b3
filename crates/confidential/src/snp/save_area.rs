//! The page of first registers of a virtual processor (VMSA), as QEMU and KVM
//! set it.

use super::launch::PAGE;

/// Where the first processor starts.
pub(super) const RESET: u32 = 0xffff_fff0;

/// The page for a processor that starts at `entry` (AMD64 Architecture
/// Programmer's Manual 2, table B-4; values of `x86_cpu_reset` in QEMU).
pub(super) fn page(entry: u32, signature: u32, features: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = page.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    // Offset, selector, attributes, base; all have the limit 0xffff.
    let code = u64::from(entry & 0xffff_0000);
    for (at, selector, attributes, base) in [
        (0x00, 0, 0x93_u16, 0),
        (0x10, 0xf000_u16, 0x9b, code),
        (0x20, 0, 0x93, 0),
        (0x30, 0, 0x93, 0),
        (0x40, 0, 0x93, 0),
        (0x50, 0, 0x93, 0),
        (0x60, 0, 0, 0),
        (0x70, 0, 0x82, 0),
        (0x80, 0, 0, 0),
        (0x90, 0, 0x8b, 0),
    ] {
        put(at, &selector.to_le_bytes());
        put(at + 2, &attributes.to_le_bytes());
        put(at + 4, &0xffff_u32.to_le_bytes());
        put(at + 8, &base.to_le_bytes());
    }
    for (at, value) in [
        // EFER: SVME.
        (0xd0, 0x1000_u64),
        // CR4: MCE.
        (0x148, 0x40),
        // CR0: ET.
        (0x158, 0x10),
        // DR7, DR6, RFLAGS, RIP.
        (0x160, 0x400),
        (0x168, 0xffff_0ff0),
        (0x170, 2),
        (0x178, u64::from(entry & 0xffff)),
        // PAT.
        (0x268, 0x0007_0406_0007_0406),
        // RDX.
        (0x310, u64::from(signature)),
        (0x3b0, features),
        // XCR0.
        (0x3e8, 1),
    ] {
        put(at, &value.to_le_bytes());
    }
    // MXCSR and the x87 control word.
    put(0x408, &0x1f80_u32.to_le_bytes());
    put(0x410, &0x37f_u16.to_le_bytes());
    page
}

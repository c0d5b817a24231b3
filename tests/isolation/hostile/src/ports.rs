//! The processor's I/O ports.

#![allow(unsafe_code)]

use std::arch::asm;
use std::io;

/// The right to use all ports.
#[derive(Clone, Copy, Debug)]
pub struct Ports(());

impl Ports {
    /// Asks the kernel for it.
    pub fn open() -> io::Result<Self> {
        // SAFETY: changes what this process may do, and none of its memory.
        if unsafe { libc::syscall(libc::SYS_iopl, 3) } == 0 {
            Ok(Self(()))
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// One byte of a port.
    pub fn read_u8(self, port: u16) -> u8 {
        let value;
        // SAFETY: allowed by `open`; what a port does is the device's matter.
        unsafe {
            asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags));
        }
        value
    }

    /// Four bytes of a port.
    pub fn read_u32(self, port: u16) -> u32 {
        let value;
        // SAFETY: as in `read_u8`.
        unsafe {
            asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags));
        }
        value
    }

    /// Writes one byte.
    pub fn write_u8(self, port: u16, value: u8) {
        // SAFETY: as in `read_u8`.
        unsafe {
            asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags));
        }
    }

    /// Writes two bytes.
    pub fn write_u16(self, port: u16, value: u16) {
        // SAFETY: as in `read_u8`.
        unsafe {
            asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags));
        }
    }

    /// Writes four bytes.
    pub fn write_u32(self, port: u16, value: u32) {
        // SAFETY: as in `read_u8`.
        unsafe {
            asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
        }
    }

    /// What VMware's back door answers to a command: `eax` and `ebx`.
    pub fn vmware(self, command: u32) -> (u32, u32) {
        let (mut eax, mut ebx) = (0x564d_5868_u32, 0_u64);
        // SAFETY: as in `read_u8`. rbx can't be named, so it is kept in
        // another register.
        unsafe {
            asm!(
                "xchg {ebx:r}, rbx",
                "in eax, dx",
                "xchg {ebx:r}, rbx",
                ebx = inout(reg) ebx,
                inout("eax") eax,
                inout("ecx") command => _,
                inout("edx") 0x5658_u32 => _,
                out("esi") _, out("edi") _,
                options(nostack, preserves_flags)
            );
        }
        ebx &= 0xffff_ffff;
        (eax, u32::try_from(ebx).unwrap_or(0))
    }
}

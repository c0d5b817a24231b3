//! Memory of devices and of files, read and written in every way that the
//! processor has. All unsafe access to memory of this program is here.

#![allow(unsafe_code)]

use std::arch::asm;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// The size of a page.
pub const PAGE: usize = 4096;

/// A shared mapping of something.
#[derive(Debug)]
pub struct Window {
    base: NonNull<u8>,
    length: usize,
}

/// A store of so many bytes by one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// `mov` of 1, 2, 4 and 8 bytes.
    Byte,
    Word,
    Long,
    Quad,
    /// `movdqu`, `movups` of 16 bytes.
    Vector16,
    /// `vmovdqu` of 32 bytes.
    Vector32,
    /// `movnti`: past the caches.
    NonTemporal,
}

impl Store {
    /// All of them that this processor has.
    pub fn all() -> Vec<Self> {
        let mut all = vec![
            Self::Byte,
            Self::Word,
            Self::Long,
            Self::Quad,
            Self::Vector16,
            Self::NonTemporal,
        ];
        if std::arch::is_x86_feature_detected!("avx") {
            all.push(Self::Vector32);
        }
        all
    }

    /// How many bytes it stores.
    pub fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Long => 4,
            Self::Quad | Self::NonTemporal => 8,
            Self::Vector16 => 16,
            Self::Vector32 => 32,
        }
    }
}

/// A locked instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Atomic {
    /// `lock cmpxchg` that finds what it expects.
    CompareExchange,
    /// `xchg`.
    Exchange,
    /// `lock xadd`.
    Add,
    /// `lock not`.
    Not,
    /// `lock btc`.
    FlipBit,
}

impl Atomic {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::CompareExchange,
        Self::Exchange,
        Self::Add,
        Self::Not,
        Self::FlipBit,
    ];
}

impl Window {
    /// Maps `length` bytes of `file` from `offset` on.
    pub fn map(file: &File, offset: u64, length: usize) -> io::Result<Self> {
        Self::map_with(file, offset, length, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// The same, not to be written.
    pub fn map_read_only(file: &File, offset: u64, length: usize) -> io::Result<Self> {
        Self::map_with(file, offset, length, libc::PROT_READ)
    }

    fn map_with(file: &File, offset: u64, length: usize, access: i32) -> io::Result<Self> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice; nothing
        // else of this program refers to it.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        Self::mapped(base, length)
    }

    /// A page of this VM's own RAM that stays where it is, and its physical
    /// address.
    pub fn page() -> io::Result<(Self, u64)> {
        // SAFETY: as in `map`.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        let page = Self::mapped(base, PAGE)?;
        page.fill(0);
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut entry = [0; 8];
        let index = page.base.as_ptr() as u64 / PAGE as u64;
        std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entry, index * 8)?;
        // Bits 0 to 54 are the frame, bit 63 says that it is there.
        let entry = u64::from_le_bytes(entry);
        let frame = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 || frame == 0 {
            return Err(io::Error::other("no physical address in pagemap"));
        }
        Ok((page, frame * PAGE as u64))
    }

    fn mapped(base: *mut libc::c_void, length: usize) -> io::Result<Self> {
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, length })
    }

    /// How many bytes are mapped.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The address of the bytes from `offset` on, of which there must be
    /// `count`.
    fn at(&self, offset: usize, count: usize) -> *mut u8 {
        let end = offset.checked_add(count);
        assert!(
            end.is_some_and(|end| end <= self.length),
            "{count} bytes at {offset:#x} of {:#x}",
            self.length
        );
        // SAFETY: within the mapping, as just seen.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// The bytes at `offset`.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: as many bytes are mapped there; `into` is our own. One opaque
        // instruction, as a device or the other VM may write meanwhile.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") into.len() => _,
                inout("rsi") from => _,
                inout("rdi") into.as_mut_ptr() => _,
                options(nostack, preserves_flags)
            );
        }
    }

    /// `count` bytes at `offset`.
    pub fn bytes(&self, offset: usize, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.read(offset, &mut bytes);
        bytes
    }

    /// The four bytes at `offset`, in one access.
    pub fn u32(&self, offset: usize) -> u32 {
        assert_eq!(offset % 4, 0);
        // SAFETY: mapped and aligned.
        unsafe { self.at(offset, 4).cast::<u32>().read_volatile() }
    }

    /// Writes one byte by one access.
    pub fn set_u8(&self, offset: usize, value: u8) {
        // SAFETY: mapped; nothing of this program's own lies there.
        unsafe { self.at(offset, 1).write_volatile(value) }
    }

    /// Writes two bytes by one access.
    pub fn set_u16(&self, offset: usize, value: u16) {
        assert_eq!(offset % 2, 0);
        // SAFETY: mapped and aligned; nothing of this program's own lies there.
        unsafe { self.at(offset, 2).cast::<u16>().write_volatile(value) }
    }

    /// Writes four bytes by one access.
    pub fn set_u32(&self, offset: usize, value: u32) {
        assert_eq!(offset % 4, 0);
        // SAFETY: mapped and aligned; nothing of this program's own lies there.
        unsafe { self.at(offset, 4).cast::<u32>().write_volatile(value) }
    }

    /// Writes eight bytes, the lower half first, as devices take them.
    pub fn set_u64(&self, offset: usize, value: u64) {
        let [low, high] = [value & 0xffff_ffff, value >> 32];
        self.set_u32(offset, u32::try_from(low).unwrap_or(0));
        self.set_u32(offset + 4, u32::try_from(high).unwrap_or(0));
    }

    /// Fills the window.
    pub fn fill(&self, byte: u8) {
        self.store_string(0, self.length, byte);
    }

    /// `rep stosb` of `count` bytes.
    pub fn store_string(&self, offset: usize, count: usize, byte: u8) {
        // SAFETY: mapped; nothing of this program's own lies there.
        unsafe {
            asm!(
                "rep stosb",
                inout("rcx") count => _,
                inout("rdi") self.at(offset, count) => _,
                in("al") byte,
                options(nostack, preserves_flags)
            );
        }
    }

    /// `rep movsb` from own memory.
    pub fn copy_string(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: as many bytes are mapped there; nothing of this program's own
        // lies there.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") bytes.len() => _,
                inout("rsi") bytes.as_ptr() => _,
                inout("rdi") self.at(offset, bytes.len()) => _,
                options(nostack, preserves_flags)
            );
        }
    }

    /// One store of bytes that all are `byte`, aligned or not.
    pub fn store(&self, offset: usize, store: Store, byte: u8) {
        let to = self.at(offset, store.bytes());
        let bytes = [byte; 32];
        let quad = u64::from_le_bytes([byte; 8]);
        // SAFETY: as many bytes as the store has are mapped at `to`, where
        // nothing of this program's own lies; `bytes` holds 32. AVX is used
        // only where `Store::all` found it.
        unsafe {
            match store {
                Store::Byte => {
                    asm!("mov [{to}], {value}", to = in(reg) to, value = in(reg_byte) byte, options(nostack, preserves_flags));
                }
                Store::Word => {
                    asm!("mov [{to}], {value:x}", to = in(reg) to, value = in(reg) quad, options(nostack, preserves_flags));
                }
                Store::Long => {
                    asm!("mov [{to}], {value:e}", to = in(reg) to, value = in(reg) quad, options(nostack, preserves_flags));
                }
                Store::Quad => {
                    asm!("mov [{to}], {value:r}", to = in(reg) to, value = in(reg) quad, options(nostack, preserves_flags));
                }
                Store::NonTemporal => {
                    asm!("movnti [{to}], {value:r}", "sfence", to = in(reg) to, value = in(reg) quad, options(nostack, preserves_flags));
                }
                Store::Vector16 => {
                    asm!("movdqu {v}, [{from}]", "movdqu [{to}], {v}", to = in(reg) to, from = in(reg) bytes.as_ptr(), v = out(xmm_reg) _, options(nostack, preserves_flags));
                }
                Store::Vector32 => {
                    asm!("vmovdqu ymm0, [{from}]", "vmovdqu [{to}], ymm0", "vzeroupper", to = in(reg) to, from = in(reg) bytes.as_ptr(), out("ymm0") _, options(nostack, preserves_flags));
                }
            }
        }
    }

    /// One locked instruction on four bytes that would change them.
    pub fn atomic(&self, offset: usize, atomic: Atomic) {
        let to = self.at(offset, 4);
        // SAFETY: four bytes are mapped at `to`, where nothing of this
        // program's own lies.
        unsafe {
            match atomic {
                Atomic::CompareExchange => asm!(
                    "mov eax, [{to}]",
                    "mov {value:e}, eax",
                    "not {value:e}",
                    "lock cmpxchg [{to}], {value:e}",
                    to = in(reg) to, value = out(reg) _, out("eax") _, options(nostack)
                ),
                Atomic::Exchange => asm!(
                    "mov {value:e}, [{to}]",
                    "not {value:e}",
                    "xchg [{to}], {value:e}",
                    to = in(reg) to, value = out(reg) _, options(nostack)
                ),
                Atomic::Add => asm!(
                    "lock xadd [{to}], {value:e}",
                    to = in(reg) to, value = inout(reg) 0x0101_0101_u32 => _, options(nostack)
                ),
                Atomic::Not => {
                    asm!("lock not dword ptr [{to}]", to = in(reg) to, options(nostack));
                }
                Atomic::FlipBit => {
                    asm!("lock btc dword ptr [{to}], 3", to = in(reg) to, options(nostack));
                }
            }
        }
    }

    /// Lets the kernel write `bytes` here, as it would into any buffer of a
    /// process.
    pub fn write_by_pipe(&self, offset: usize, bytes: &[u8]) -> io::Result<usize> {
        let (reader, mut writer) = io::pipe()?;
        io::Write::write_all(&mut writer, bytes)?;
        // SAFETY: as many bytes are mapped there; nothing of this program's own
        // lies there.
        let count = unsafe {
            libc::read(
                reader.as_raw_fd(),
                self.at(offset, bytes.len()).cast(),
                bytes.len(),
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// The address at which it is mapped, for `/proc/self/mem`.
    pub fn address(&self, offset: usize) -> u64 {
        self.at(offset, 1) as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped here, and no address of it is given away but as a
        // number.
        unsafe {
            libc::munmap(self.base.as_ptr().cast(), self.length);
        }
    }
}

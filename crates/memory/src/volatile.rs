//! Bytes that somebody else may be writing: the only place of this crate with
//! unsafe code.
//!
//! A live target's RAM is mapped shared and read-only; its vCPUs write it from
//! other threads or another process while we read. A `&[u8]` over it would be
//! undefined behaviour, as the compiler may assume that what a shared
//! reference points to does not change. So no reference to these bytes is ever
//! made. They are read in two ways only:
//!
//! * up to 8 bytes by volatile reads of naturally aligned integers (or bytes):
//!   the compiler makes exactly one access of each, never invents a second
//!   one, and assumes nothing about the value; the hardware makes an aligned
//!   access of up to 8 bytes in one piece;
//! * longer runs in an `asm!` block, which is opaque to the compiler: whatever
//!   the bytes are, they arrive in a private buffer. Up to [`VECTORS`] bytes are
//!   moved 16 at a time, so that the lines of a structure that are not in the
//!   cache are fetched side by side; `rep movsb`, which is the faster one for
//!   whole pages, fetches them one after the other.
//!
//! The value of a racing read is thus some mixture of old and new bytes, never
//! undefined; who needs more than 8 bytes in one piece validates and reads
//! again.

use std::marker::PhantomData;

/// A run of bytes that may change at any time.
#[derive(Clone, Copy)]
pub struct VolatileBytes<'a> {
    pointer: *const u8,
    length: usize,
    mapping: PhantomData<&'a ()>,
}

// SAFETY: the bytes are only ever read, by volatile or opaque accesses that
// allow concurrent writers; a pointer to them may be used from any thread for
// as long as the mapping lives, which 'a stands for.
unsafe impl Send for VolatileBytes<'_> {}
// SAFETY: as for Send.
unsafe impl Sync for VolatileBytes<'_> {}

impl<'a> VolatileBytes<'a> {
    /// # Safety
    /// `pointer` must be readable for `length` bytes during the whole of `'a`.
    /// Others may write the bytes meanwhile.
    pub const unsafe fn new(pointer: *const u8, length: usize) -> Self {
        Self {
            pointer,
            length,
            mapping: PhantomData,
        }
    }

    /// The bytes of a private buffer, for tests and sources that copy.
    pub const fn from_slice(bytes: &'a [u8]) -> Self {
        Self {
            pointer: bytes.as_ptr(),
            length: bytes.len(),
            mapping: PhantomData,
        }
    }

    /// The number of bytes.
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The `length` bytes from `offset` on, or `None` if they are not all there.
    pub fn part(&self, offset: usize, length: usize) -> Option<VolatileBytes<'a>> {
        if offset > self.length || self.length - offset < length {
            return None;
        }
        Some(Self {
            pointer: self.pointer.wrapping_add(offset),
            length,
            mapping: PhantomData,
        })
    }

    /// Asks the processor to fetch the cache line at `offset`.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        #[cfg(target_arch = "x86_64")]
        if offset < self.length {
            let pointer = self.pointer.wrapping_add(offset).cast::<i8>();
            // SAFETY: a prefetch is a hint without an architectural effect,
            // whatever the address; this one is in bounds.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(pointer);
            };
        }
    }

    /// The little-endian 8-byte integer at `offset`, or `None` past the end.
    /// In one piece where its address is a multiple of 8.
    #[inline]
    pub fn read_u64(&self, offset: usize) -> Option<u64> {
        if offset > self.length || self.length - offset < 8 {
            return None;
        }
        let pointer = self.pointer.wrapping_add(offset);
        if pointer.addr().is_multiple_of(8) {
            // SAFETY: in bounds as checked, aligned, and readable by the
            // contract of `new`; volatile allows others to write.
            let value = unsafe { pointer.cast::<u64>().read_volatile() };
            return Some(u64::from_le(value));
        }
        let mut bytes = [0; 8];
        self.copy_bytes(offset, &mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

    /// Copies `buffer.len()` bytes from `offset` on; false (and nothing
    /// copied) if they are not all there.
    #[inline]
    #[must_use]
    pub fn copy_to(&self, offset: usize, buffer: &mut [u8]) -> bool {
        if offset > self.length || self.length - offset < buffer.len() {
            return false;
        }
        let pointer = self.pointer.wrapping_add(offset);
        match buffer.len() {
            // SAFETY (each arm): in bounds as checked, aligned as the guard
            // says, readable by the contract of `new`.
            8 if pointer.addr().is_multiple_of(8) => {
                // SAFETY: see above.
                let value = unsafe { pointer.cast::<u64>().read_volatile() };
                buffer.copy_from_slice(&value.to_ne_bytes());
            }
            4 if pointer.addr().is_multiple_of(4) => {
                // SAFETY: see above.
                let value = unsafe { pointer.cast::<u32>().read_volatile() };
                buffer.copy_from_slice(&value.to_ne_bytes());
            }
            2 if pointer.addr().is_multiple_of(2) => {
                // SAFETY: see above.
                let value = unsafe { pointer.cast::<u16>().read_volatile() };
                buffer.copy_from_slice(&value.to_ne_bytes());
            }
            _ => self.copy_bytes(offset, buffer),
        }
        true
    }

    /// Copies without a bounds check of its own; callers have checked.
    #[inline]
    fn copy_bytes(&self, offset: usize, buffer: &mut [u8]) {
        debug_assert!(offset + buffer.len() <= self.length);
        let source = self.pointer.wrapping_add(offset);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the source is readable for `buffer.len()` bytes by the
        // callers' check and the contract of `new`; the destination is a
        // private buffer of that length.
        unsafe {
            match buffer.len() {
                16..=VECTORS => copy_vectors(source, buffer),
                _ => copy_string(source, buffer),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        for (index, byte) in buffer.iter_mut().enumerate() {
            // SAFETY: in bounds by the callers' check, readable by the
            // contract of `new`.
            *byte = unsafe { source.add(index).read_volatile() };
        }
    }
}

/// The longest run that is copied 16 bytes at a time.
#[cfg(target_arch = "x86_64")]
const VECTORS: usize = 2048;

/// Copies by one string instruction.
///
/// # Safety
/// `source` must be readable for as many bytes as the buffer has; others may
/// write them meanwhile.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_string(source: *const u8, buffer: &mut [u8]) {
    // SAFETY: the caller vouches for the source, the buffer is private; the
    // direction flag is clear on entry to an asm block (System V ABI). The
    // block is opaque: the compiler assumes nothing about the bytes it reads.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rsi") source => _,
            inout("rdi") buffer.as_mut_ptr() => _,
            inout("rcx") buffer.len() => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Copies 16 bytes at a time, the last ones together with some that were
/// copied before; the buffer must have 16 bytes or more.
///
/// # Safety
/// As for [`copy_string`]; SSE2 belongs to x86-64.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_vectors(source: *const u8, buffer: &mut [u8]) {
    debug_assert!(buffer.len() >= 16);
    let last = buffer.len() - 16;
    // SAFETY: the caller vouches for `last + 16` bytes of the source, the
    // buffer is private and has as many; the block accesses 16 bytes at each
    // multiple of 16 below `last`, and at `last`. It is opaque to the compiler.
    unsafe {
        std::arch::asm!(
            "movups {bytes}, [{source} + {last}]",
            "movups [{target} + {last}], {bytes}",
            "2:",
            "sub {last}, 32",
            "jb 3f",
            "movups {bytes}, [{source}]",
            "movups {more}, [{source} + 16]",
            "movups [{target}], {bytes}",
            "movups [{target} + 16], {more}",
            "add {source}, 32",
            "add {target}, 32",
            "jmp 2b",
            "3:",
            "add {last}, 32",
            "jz 4f",
            "movups {bytes}, [{source}]",
            "movups [{target}], {bytes}",
            "cmp {last}, 16",
            "jbe 4f",
            "movups {bytes}, [{source} + 16]",
            "movups [{target} + 16], {bytes}",
            "4:",
            source = inout(reg) source => _,
            target = inout(reg) buffer.as_mut_ptr() => _,
            last = inout(reg) last => _,
            bytes = out(xmm_reg) _,
            more = out(xmm_reg) _,
            options(nostack)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_width_at_every_offset() {
        let bytes: Vec<u8> = (0..64).collect();
        let view = VolatileBytes::from_slice(&bytes);
        for offset in 0..=64 {
            for length in 0..=(64 - offset) {
                let mut buffer = vec![0xaa; length];
                assert!(view.copy_to(offset, &mut buffer));
                assert_eq!(buffer, bytes[offset..offset + length]);
            }
            let expected = bytes
                .get(offset..offset + 8)
                .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")));
            assert_eq!(view.read_u64(offset), expected);
        }
    }

    #[test]
    fn refuses_what_is_out_of_bounds() {
        let view = VolatileBytes::from_slice(&[1, 2, 3]);
        assert_eq!(view.read_u64(0), None);
        assert_eq!(view.read_u64(usize::MAX), None);
        assert!(!view.copy_to(2, &mut [0; 2]));
        assert!(!view.copy_to(usize::MAX, &mut [0; 2]));
        assert!(view.copy_to(3, &mut []));
    }
}

//! Mappings of this process that are made for what they look like, and
//! memory shared with its children.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64};

use super::sys;

/// Size of a page.
pub const PAGE: usize = 4096;

/// What process 1 shares with all it forks.
#[repr(C)]
pub struct Shared {
    /// Plain processes that stand.
    pub standing: AtomicU32,
    /// 1 while the busy mode is on.
    pub busy: AtomicU32,
    /// Busy processes that rest at the moment.
    pub busy_resting: AtomicU32,
    /// Rounds of the busy mode so far.
    pub busy_rounds: AtomicU64,
    /// How often new short-lived sockets were asked for, and made.
    pub sockets_asked: AtomicU32,
    /// See `sockets_asked`.
    pub sockets_made: AtomicU32,
}

/// Makes the shared page.
pub fn shared() -> io::Result<&'static Shared> {
    let address = map(
        PAGE,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        None::<&std::fs::File>,
        0,
    )?;
    // SAFETY: a fresh zeroed page, aligned, larger than the structure, never
    // unmapped; all its fields are atomics, for which zero is valid.
    Ok(unsafe { &*(address as *const Shared) })
}

/// `mmap(2)` at an address of the kernel's choice.
pub fn map(
    length: usize,
    protection: libc::c_int,
    flags: libc::c_int,
    file: Option<&impl AsRawFd>,
    offset: i64,
) -> io::Result<usize> {
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: without MAP_FIXED a new mapping touches no existing memory.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            flags & !libc::MAP_FIXED,
            fd,
            offset,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(address as usize)
}

/// `mprotect(2)` of memory that [`map`] gave and nobody refers to, or of code
/// that stays executable.
pub fn protect(address: usize, length: usize, protection: libc::c_int) -> io::Result<()> {
    // SAFETY: no reference into the mapping exists, or code stays as it is.
    sys::check(unsafe { libc::mprotect(address as *mut libc::c_void, length, protection) })
        .map(drop)
}

/// `munmap(2)` of memory that [`map`] gave and nobody refers to.
pub fn unmap(address: usize, length: usize) -> io::Result<()> {
    // SAFETY: no reference into the mapping exists.
    sys::check(unsafe { libc::munmap(address as *mut libc::c_void, length) }).map(drop)
}

/// `madvise(2)` with advice that keeps the contents.
pub fn advise(address: usize, length: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the callers' advice doesn't change contents.
    sys::check(unsafe { libc::madvise(address as *mut libc::c_void, length, advice) }).map(drop)
}

/// Fills writable memory that [`map`] gave.
pub fn fill(address: usize, length: usize, byte: u8) {
    // SAFETY: the mapping is at least that long and writable, and no
    // reference into it exists.
    unsafe { std::ptr::write_bytes(address as *mut u8, byte, length) }
}

/// Copies bytes into writable memory.
pub fn store(address: usize, bytes: &[u8]) {
    // SAFETY: as for `fill`; or a function that nothing calls.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
}

/// Changes two bytes of this program's own code, in a function that nothing
/// calls. The page becomes this process's alone.
pub fn change_code() -> io::Result<()> {
    let place = never_called as *const () as usize;
    let page = place / PAGE * PAGE;
    let code = libc::PROT_READ | libc::PROT_EXEC;
    protect(page, PAGE, code | libc::PROT_WRITE)?;
    // xor eax, eax: no breakpoint, which a debugger may have set.
    store(place, &[0x31, 0xc0]);
    protect(page, PAGE, code)
}

/// What [`change_code`] changes.
#[inline(never)]
extern "C" fn never_called() {
    std::hint::black_box(0u8);
}

/// `mlock(2)`.
pub fn lock(address: usize, length: usize) -> io::Result<()> {
    // SAFETY: contents stay as they are.
    sys::check(unsafe { libc::mlock(address as *const libc::c_void, length) }).map(drop)
}

/// Names an anonymous mapping (`PR_SET_VMA_ANON_NAME`).
pub fn name(address: usize, length: usize, name: &str) -> io::Result<()> {
    let name = sys::c_string(name)?;
    // SAFETY: a NUL-terminated string; the mapping's contents stay.
    sys::check(unsafe { libc::prctl(0x5356_4d41, 0, address, length, name.as_ptr()) }).map(drop)
}

/// A System V shared memory segment, attached and marked for removal.
pub fn system_v(length: usize) -> io::Result<usize> {
    // SAFETY: numbers, and null where that is allowed.
    unsafe {
        let id = sys::check(libc::shmget(
            libc::IPC_PRIVATE,
            length,
            libc::IPC_CREAT | 0o600,
        ))?;
        let address = libc::shmat(id, std::ptr::null(), 0);
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        if address as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(address as usize)
    }
}

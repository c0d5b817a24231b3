//! The system calls that the standard library doesn't offer, each as a safe
//! function. All unsafe code of this crate is in this file and in the few
//! beside it that say so.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// A system call's answer as a result.
pub fn check(value: libc::c_int) -> io::Result<libc::c_int> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// A raw system call's answer as a result.
pub fn check_long(value: libc::c_long) -> io::Result<i64> {
    if value < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// A C string of any bytes without NUL.
pub fn c_string(bytes: impl AsRef<OsStr>) -> io::Result<CString> {
    CString::new(bytes.as_ref().as_bytes()).map_err(io::Error::from)
}

/// Takes a new descriptor into an owner.
pub fn own(fd: libc::c_int) -> io::Result<OwnedFd> {
    let fd = check(fd)?;
    // SAFETY: the kernel just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `mount(2)`.
pub fn mount(
    source: impl AsRef<OsStr>,
    target: impl AsRef<OsStr>,
    fstype: &str,
    flags: libc::c_ulong,
    data: &str,
) -> io::Result<()> {
    let shown = target.as_ref().to_string_lossy().into_owned();
    let (source, target) = (c_string(source)?, c_string(target)?);
    let (fstype, data) = (c_string(fstype)?, c_string(data)?);
    // SAFETY: four NUL-terminated strings that outlive the call.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fstype.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    })
    .map(drop)
    .map_err(|error| io::Error::new(error.kind(), format!("mount {shown}: {error}")))
}

/// `umount2(2)`.
pub fn unmount(target: impl AsRef<OsStr>, flags: libc::c_int) -> io::Result<()> {
    let target = c_string(target)?;
    // SAFETY: a NUL-terminated string that outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), flags) }).map(drop)
}

/// `pivot_root(2)`.
pub fn pivot_root(new: &str, old: &str) -> io::Result<()> {
    let (new, old) = (c_string(new)?, c_string(old)?);
    // SAFETY: two NUL-terminated strings that outlive the call.
    check_long(unsafe { libc::syscall(libc::SYS_pivot_root, new.as_ptr(), old.as_ptr()) }).map(drop)
}

/// `chroot(2)`.
pub fn chroot(path: impl AsRef<OsStr>) -> io::Result<()> {
    std::os::unix::fs::chroot(Path::new(path.as_ref()))
}

/// `finit_module(2)`.
pub fn load_module(file: RawFd, parameters: &str) -> io::Result<()> {
    let parameters = c_string(parameters)?;
    // SAFETY: a descriptor and a NUL-terminated string.
    check_long(unsafe { libc::syscall(libc::SYS_finit_module, file, parameters.as_ptr(), 0) })
        .map(drop)
}

/// Switches the guest off at once.
pub fn power_off() -> ! {
    // SAFETY: no memory is involved.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    loop {
        pause();
    }
}

/// `pause(2)`.
pub fn pause() {
    // SAFETY: no memory is involved.
    unsafe {
        libc::pause();
    }
}

/// Sleeps for ever, whatever signals come.
pub fn rest() -> ! {
    loop {
        pause();
    }
}

/// `prctl(PR_SET_NAME)`: the calling thread's name, 15 bytes of it.
pub fn set_name(name: &[u8]) {
    let mut buffer = [0u8; 16];
    for (to, from) in buffer.iter_mut().take(15).zip(name) {
        *to = *from;
    }
    // SAFETY: a NUL-terminated buffer of 16 bytes.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, buffer.as_ptr(), 0, 0, 0);
    }
}

/// `prctl(2)` with numbers only.
pub fn prctl(option: libc::c_int, second: u64, third: u64) -> io::Result<i32> {
    // SAFETY: used with options whose arguments are numbers.
    check(unsafe { libc::prctl(option, second, third, 0, 0) })
}

/// Forks; the child runs `body` and then rests for ever.
///
/// The program has one thread whenever this is called, so the child may do
/// anything.
pub fn fork(body: impl FnOnce()) -> io::Result<libc::pid_t> {
    // SAFETY: the calling process has one thread, so no lock can be held by
    // a thread that the child lacks.
    let pid = check(unsafe { libc::fork() })?;
    if pid == 0 {
        body();
        rest();
    }
    Ok(pid)
}

/// `clone(2)` without a new stack: a fork with `flags` (`CLONE_NEW…`,
/// `CLONE_VFORK` …); the child runs `body` and then rests for ever.
pub fn clone(flags: libc::c_int, body: impl FnOnce()) -> io::Result<libc::pid_t> {
    // SAFETY: no CLONE_VM among the flags, so the child has its own copy of
    // the address space and goes on on its own copy of this stack; one thread
    // as in `fork`.
    let pid = check_long(unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::c_long::from(flags | libc::SIGCHLD),
            0,
            0,
            0,
            0,
        )
    })?;
    if pid == 0 {
        body();
        rest();
    }
    Ok(pid as libc::pid_t)
}

/// `unshare(2)`.
pub fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::unshare(flags) }).map(drop)
}

/// `setns(2)`.
pub fn set_namespace(file: &impl AsRawFd, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: a descriptor and a number.
    check(unsafe { libc::setns(file.as_raw_fd(), kind) }).map(drop)
}

/// `execve(2)` with arguments and environment of any bytes.
pub fn execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|text| text.as_ptr())
            .chain(std::iter::once(std::ptr::null()))
            .collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: NULL-terminated arrays of NUL-terminated strings that outlive
    // the call.
    unsafe {
        libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr());
    }
    io::Error::last_os_error()
}

/// `wait4(2)` for any child, without blocking; whether one was reaped.
pub fn reap_one() -> bool {
    // SAFETY: a null status pointer is allowed.
    unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 }
}

/// Waits for one child.
pub fn wait_for(pid: libc::pid_t, options: libc::c_int) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: a valid pointer to an integer.
    check(unsafe { libc::waitpid(pid, &raw mut status, options) })?;
    Ok(status)
}

/// `kill(2)`.
pub fn kill(pid: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// `setsid(2)`.
pub fn set_session() -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::setsid() }).map(drop)
}

/// Waits until one of the descriptors can be read, at most `timeout_ms`.
pub fn poll_readable(fds: &[RawFd], timeout_ms: libc::c_int) -> io::Result<Vec<bool>> {
    let mut polled: Vec<libc::pollfd> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: an array of the length given.
    check(unsafe {
        libc::poll(
            polled.as_mut_ptr(),
            polled.len() as libc::nfds_t,
            timeout_ms,
        )
    })?;
    Ok(polled.iter().map(|one| one.revents != 0).collect())
}

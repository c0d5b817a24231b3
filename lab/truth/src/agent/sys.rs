//! The system calls that the standard library doesn't offer, each as a safe
//! function. All unsafe code of this crate is in this file and in the few
//! beside it that say so.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::AtomicU32;

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

/// `delete_module(2)`.
pub fn unload_module(name: &str) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: a NUL-terminated string.
    check_long(unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) })
        .map(drop)
}

/// Whether the kernel finds a process of a user, by the system call of
/// `getpriority(2)`: `ESRCH` if not.
pub fn user_has_process(uid: u32) -> io::Result<bool> {
    // SAFETY: no memory is involved.
    match check_long(unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_USER, uid) }) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(error),
    }
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

/// `socket(2)`.
pub fn socket(
    domain: libc::c_int,
    kind: libc::c_int,
    protocol: libc::c_int,
) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    own(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })
}

/// `socketpair(2)` of UNIX sockets.
pub fn socket_pair(kind: libc::c_int) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut pair = [0; 2];
    // SAFETY: an array of two integers.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) })?;
    Ok((own(pair[0])?, own(pair[1])?))
}

/// `bind(2)` with an address as bytes.
pub fn bind(socket: &impl AsRawFd, address: &[u8]) -> io::Result<()> {
    let length = address.len() as libc::socklen_t;
    // SAFETY: a buffer of the length given.
    check(unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr().cast(), length) }).map(drop)
}

/// `connect(2)` with an address as bytes.
pub fn connect(socket: &impl AsRawFd, address: &[u8]) -> io::Result<()> {
    let length = address.len() as libc::socklen_t;
    // SAFETY: a buffer of the length given.
    check(unsafe { libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), length) }).map(drop)
}

/// `listen(2)`.
pub fn listen(socket: &impl AsRawFd, backlog: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::listen(socket.as_raw_fd(), backlog) }).map(drop)
}

/// `accept(2)`, the peer's address left out.
pub fn accept(socket: &impl AsRawFd) -> io::Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: null pointers are allowed.
    own(unsafe { libc::accept(socket.as_raw_fd(), none, std::ptr::null_mut()) })
}

/// `setsockopt(2)` with a value as bytes.
pub fn set_socket_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    // SAFETY: a buffer of the length given.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    })
    .map(drop)
}

/// `memfd_create(2)`.
pub fn memfd(name: &[u8], flags: libc::c_uint) -> io::Result<OwnedFd> {
    let name = c_string(OsStr::from_bytes(name))?;
    // SAFETY: a NUL-terminated string.
    own(unsafe { libc::memfd_create(name.as_ptr(), flags) })
}

/// `eventfd(2)`.
pub fn eventfd(value: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    own(unsafe { libc::eventfd(value, 0) })
}

/// `epoll_create1(2)`, watching one descriptor.
pub fn epoll(watched: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let epoll = own(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 7,
    };
    // SAFETY: a pointer to an event.
    check(unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            watched.as_raw_fd(),
            &raw mut event,
        )
    })?;
    Ok(epoll)
}

/// `timerfd_create(2)`, set to go off in a day.
pub fn timerfd() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let timer = own(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK) })?;
    let never = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let day = libc::timespec {
        tv_sec: 86_400,
        tv_nsec: 0,
    };
    let value = libc::itimerspec {
        it_interval: never,
        it_value: day,
    };
    // SAFETY: a pointer to a value, and a null one where that is allowed.
    check(unsafe {
        libc::timerfd_settime(timer.as_raw_fd(), 0, &raw const value, std::ptr::null_mut())
    })?;
    Ok(timer)
}

/// `signalfd(2)` for `SIGUSR2`.
pub fn signalfd() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by `sigemptyset` before it is used; all
    // pointers are to it.
    own(unsafe {
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGUSR2);
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC)
    })
}

/// `inotify_init1(2)` with a watch on `path`.
pub fn inotify(path: &str) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    // SAFETY: no memory is involved.
    let inotify = own(unsafe { libc::inotify_init1(libc::IN_CLOEXEC) })?;
    // SAFETY: a NUL-terminated string.
    check(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), libc::IN_CREATE) })?;
    Ok(inotify)
}

/// `fanotify_init(2)`.
pub fn fanotify() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    own(unsafe { libc::fanotify_init(libc::FAN_CLASS_NOTIF, libc::O_RDONLY as libc::c_uint) })
}

/// `pidfd_open(2)`.
pub fn pidfd(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) } as libc::c_int)
}

/// `userfaultfd(2)`.
pub fn userfaultfd() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    own(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as libc::c_int)
}

/// `io_uring_setup(2)` with four entries.
pub fn io_uring() -> io::Result<OwnedFd> {
    let mut parameters = [0u32; 30];
    // SAFETY: struct io_uring_params is 120 bytes, all zero allowed.
    own(
        unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) }
            as libc::c_int,
    )
}

/// `perf_event_open(2)`: a software clock of this process.
pub fn perf_event() -> io::Result<OwnedFd> {
    // struct perf_event_attr: type 1 (software), size, config 1 (task clock).
    let mut attribute = [0u8; 128];
    attribute[0] = 1;
    attribute[8] = 1;
    // SAFETY: there is no pointer in it.
    unsafe { open_event(&mut attribute, 0, -1) }
}

/// `perf_event_open(2)` with a `struct perf_event_attr`.
///
/// # Safety
/// Pointers in the attribute must be valid until it comes back.
unsafe fn open_event(
    attribute: &mut [u8; 128],
    pid: libc::pid_t,
    processor: libc::c_int,
) -> io::Result<OwnedFd> {
    // The size that it states.
    attribute[4] = 128;
    // SAFETY: an attribute of that size; its pointers are the caller's matter.
    own(unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            attribute.as_mut_ptr(),
            pid,
            processor,
            -1,
            0,
        )
    } as libc::c_int)
}

/// `perf_event_open(2)`: a kprobe at the start of a function.
pub fn kprobe_event(function: &str) -> io::Result<OwnedFd> {
    let kind = std::fs::read_to_string("/sys/bus/event_source/devices/kprobe/type")?;
    let kind: u32 = kind.trim().parse().map_err(io::Error::other)?;
    let function = c_string(function)?;
    // struct perf_event_attr: type, size, and the function's name in config1.
    let mut attribute = [0u8; 128];
    attribute[..4].copy_from_slice(&kind.to_ne_bytes());
    attribute[56..64].copy_from_slice(&(function.as_ptr() as u64).to_ne_bytes());
    // SAFETY: the string outlives the call.
    unsafe { open_event(&mut attribute, -1, 0) }
}

/// Has a BPF program run at an event.
pub fn run_at_event(event: &impl AsRawFd, program: &impl AsRawFd) -> io::Result<()> {
    // PERF_EVENT_IOC_SET_BPF of include/uapi/linux/perf_event.h
    const SET_PROGRAM: libc::c_ulong = 0x4004_2408;
    // SAFETY: descriptors and numbers.
    check(unsafe {
        libc::ioctl(
            event.as_raw_fd(),
            SET_PROGRAM as _,
            program.as_raw_fd() as libc::c_ulong,
        )
    })
    .map(drop)
}

/// `dup2(2)`.
pub fn duplicate_to(from: &impl AsRawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: descriptors only; nobody owns the target number.
    check(unsafe { libc::dup2(from.as_raw_fd(), to) }).map(drop)
}

/// `mkfifo(3)`.
pub fn make_fifo(path: &str) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: a NUL-terminated string.
    check(unsafe { libc::mkfifo(path.as_ptr(), 0o640) }).map(drop)
}

/// Real, effective and saved ids, and supplementary groups.
pub fn set_ids(uids: [u32; 3], gids: [u32; 3], groups: &[u32]) -> io::Result<()> {
    // SAFETY: an array of the length given, numbers otherwise.
    unsafe {
        check(libc::setgroups(groups.len(), groups.as_ptr()))?;
        check(libc::setresgid(gids[0], gids[1], gids[2]))?;
        check(libc::setresuid(uids[0], uids[1], uids[2]))?;
    }
    Ok(())
}

/// `setfsuid(2)`.
pub fn set_file_system_user(uid: u32) {
    // SAFETY: no memory is involved.
    unsafe {
        libc::setfsuid(uid);
    }
}

/// `setresuid(2)` of the calling thread alone, which the C library avoids.
pub fn set_thread_user(uid: u32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check_long(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}

/// `capset(2)`: effective, permitted, inheritable of this thread.
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    // Version 3 of the header, then two triples of 32 bits.
    let header = [0x2008_0522u32, 0];
    let data = [
        effective as u32,
        permitted as u32,
        inheritable as u32,
        (effective >> 32) as u32,
        (permitted >> 32) as u32,
        (inheritable >> 32) as u32,
    ];
    // SAFETY: both structures have the sizes that the version states.
    check_long(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// A seccomp filter that allows everything.
pub fn filter_system_calls() -> io::Result<()> {
    // BPF_RET | BPF_K, SECCOMP_RET_ALLOW.
    let mut program = [libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ALLOW,
    }];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: a program of the length that it states.
    check(unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter,
            0,
            0,
        )
    })
    .map(drop)
}

/// `sched_setscheduler(2)` of this process.
pub fn set_policy(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let parameter = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: a pointer to a parameter.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0,
            policy,
            &raw const parameter,
        )
    })
    .map(drop)
}

/// `setpriority(2)` of this process.
pub fn set_nice(nice: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }).map(drop)
}

/// `setpgid(2)`.
pub fn set_process_group(pid: libc::pid_t, group: libc::pid_t) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::setpgid(pid, group) }).map(drop)
}

/// Makes a terminal the controlling one of this session.
pub fn take_terminal(terminal: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the request takes a number.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 1) }).map(drop)
}

/// `tcsetpgrp(3)`.
pub fn set_foreground(terminal: &impl AsRawFd, group: libc::pid_t) -> io::Result<()> {
    // SAFETY: the request takes a pointer to a number.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSPGRP, &raw const group) }).map(drop)
}

/// Unlocks a pseudoterminal and tells its number.
pub fn unlock_terminal(main: &impl AsRawFd) -> io::Result<u32> {
    let unlock: libc::c_int = 0;
    let mut number: libc::c_uint = 0;
    // SAFETY: both requests take a pointer to a number.
    unsafe {
        check(libc::ioctl(
            main.as_raw_fd(),
            libc::TIOCSPTLCK,
            &raw const unlock,
        ))?;
        check(libc::ioctl(
            main.as_raw_fd(),
            libc::TIOCGPTN,
            &raw mut number,
        ))?;
    }
    Ok(number)
}

/// `sethostname(2)`.
pub fn set_host_name(name: &[u8]) -> io::Result<()> {
    // SAFETY: a buffer of the length given.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// `ptrace(PTRACE_SEIZE)` and stop it.
pub fn trace_and_stop(pid: libc::pid_t) -> io::Result<()> {
    let none: *mut libc::c_void = std::ptr::null_mut();
    // SAFETY: both requests take null pointers.
    unsafe {
        check_long(libc::ptrace(libc::PTRACE_SEIZE, pid, none, none))?;
        check_long(libc::ptrace(libc::PTRACE_INTERRUPT, pid, none, none))?;
    }
    wait_for(pid, libc::__WALL).map(drop)
}

/// `swapon(2)`.
pub fn swap_on(path: &str) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: a NUL-terminated string.
    check(unsafe { libc::swapon(path.as_ptr(), 0) }).map(drop)
}

/// `close(2)` of a number that nobody owns any more.
pub fn close(fd: RawFd) {
    // SAFETY: the callers give numbers without an owner.
    unsafe {
        libc::close(fd);
    }
}

/// Ends the calling thread alone, whatever runs beside it.
pub fn exit_thread() -> ! {
    // SAFETY: no memory is involved; nothing of this thread is used later.
    unsafe {
        libc::syscall(libc::SYS_exit, 0);
    }
    rest()
}

/// Waits until a child has ended, and leaves it a zombie.
pub fn wait_until_dead(pid: libc::pid_t) -> io::Result<()> {
    let mut information = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: a pointer to a structure of the right type.
    check(unsafe {
        libc::waitid(
            libc::P_PID,
            pid as libc::id_t,
            information.as_mut_ptr(),
            libc::WEXITED | libc::WNOWAIT,
        )
    })
    .map(drop)
}

/// Raises `RLIMIT_NOFILE`.
pub fn set_open_file_limit(limit: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: limit,
        rlim_max: limit,
    };
    // SAFETY: a pointer to a limit.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }).map(drop)
}

/// `if_nametoindex(3)`.
pub fn interface_index(name: &str) -> io::Result<u32> {
    let text = c_string(name)?;
    // SAFETY: a NUL-terminated string.
    match unsafe { libc::if_nametoindex(text.as_ptr()) } {
        0 => Err(io::Error::other(format!("no interface {name}"))),
        index => Ok(index),
    }
}

/// Sends a descriptor over a UNIX socket (`SCM_RIGHTS`).
pub fn send_descriptor(socket: &impl AsRawFd, sent: &impl AsRawFd) -> io::Result<()> {
    let mut byte = [0u8; 1];
    let mut part = libc::iovec {
        iov_base: byte.as_mut_ptr().cast(),
        iov_len: 1,
    };
    // One header and one descriptor, aligned as the header is.
    let mut ancillary = [0u64; 4];
    // SAFETY: all-zero is a valid message; the pointers set in it are to live
    // buffers of the lengths set beside them, and the ancillary buffer is as
    // large as CMSG_SPACE of one descriptor (24 bytes).
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = ancillary.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header)
            .cast::<RawFd>()
            .write_unaligned(sent.as_raw_fd());
        check_long(libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) as libc::c_long)?;
    }
    Ok(())
}

/// `flock(2)`, exclusive.
pub fn lock_file(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }).map(drop)
}

/// Waits, in memory that processes may share, until a word is not `value` and
/// [`wake`] was called, or a signal came.
pub fn wait_while(word: &AtomicU32, value: u32) {
    // SAFETY: the word outlives the call; there is no time limit.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            std::ptr::null::<libc::timespec>(),
        );
    }
}

/// Wakes all that [`wait_while`] waits for this word.
pub fn wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}

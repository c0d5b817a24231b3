//! Processes whose threads, memory or code are not as a library or the kernel
//! makes them. What they run does nothing but wait.

use std::arch::asm;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use super::report;
use crate::agent::memory::{self, PAGE};
use crate::agent::sys;

/// How long what is started may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// `mov $34, %eax` (pause), `syscall`, and again.
const WAIT: &[u8] = b"\xb8\x22\0\0\0\x0f\x05\xeb\xf7";
/// The same behind `mov $11, %eax` (munmap), `syscall`, with what it is
/// called with.
const LEAVE: &[u8] = b"\xb8\x0b\0\0\0\x0f\x05\xb8\x22\0\0\0\x0f\x05\xeb\xf7";

/// Memory of no file that holds code and can be executed.
fn code(code: &[u8], rights: libc::c_int) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let start = memory::map(PAGE, both, flags, None::<&fs::File>, 0)?;
    memory::store(start, code);
    memory::protect(start, PAGE, rights)?;
    Ok(start)
}

const RUN: libc::c_int = libc::PROT_READ | libc::PROT_EXEC;

/// Waits until `seen` sees it.
fn wait_for(what: &str, mut seen: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let start = Instant::now();
    while !seen()? {
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("{what} does not come")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Whether the thread waits in a system call that it made in the page at
/// `page`.
fn waits_in(task: &str, page: usize) -> io::Result<bool> {
    let line = fs::read_to_string(format!("{task}/syscall"))?;
    let last = line.split_whitespace().last().unwrap_or_default();
    let place = usize::from_str_radix(last.trim_start_matches("0x"), 16);
    Ok(place.is_ok_and(|place| place / PAGE == page / PAGE))
}

/// A process that waits in code of no file.
pub fn code_of_no_file() -> io::Result<()> {
    let start = code(WAIT, RUN)?;
    let pid = report::child(|| {
        // SAFETY: code that never comes back, for this processor.
        let run: extern "C" fn() = unsafe { std::mem::transmute(start) };
        run();
    })?;
    wait_for("the code", || waits_in(&format!("/proc/{pid}"), start))
}

/// A process that has given up the code of its program for code of no file.
pub fn without_own_code() -> io::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let program = fs::read_link("/proc/self/exe")?;
    let program = program.to_string_lossy().into_owned();
    let own = |line: &&str| line.contains(" r-xp ") && line.ends_with(&program);
    let range = maps.lines().find(own).and_then(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        Some((number(start)?, number(end)?))
    });
    let (first, end) = range.ok_or_else(|| io::Error::other("the program has no code"))?;
    let start = code(LEAVE, RUN)?;
    let pid = report::child(|| {
        // SAFETY: as above; it unmaps what it is called with, where nothing
        // runs from then on.
        let run: extern "C" fn(usize, usize) = unsafe { std::mem::transmute(start) };
        run(first, end - first);
    })?;
    wait_for("the end of its own code", || {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
        Ok(!maps.lines().any(|line| own(&line)))
    })
}

/// A thread that no library started: it runs code of no file, on a stack
/// beside that code.
pub fn thread_of_no_library() -> io::Result<()> {
    let start = code(WAIT, RUN | libc::PROT_WRITE)?;
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let tid = clone_to(start, start + PAGE - 64, flags)?;
    wait_for("the thread", || {
        waits_in(&format!("/proc/self/task/{tid}"), start)
    })
}

/// A process beside this one with the same memory.
pub fn process_with_our_memory() -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let stack = memory::map(PAGE, both, flags, None::<&fs::File>, 0)?;
    let place = pause_for_ever as *const () as usize;
    clone_to(place, stack + PAGE - 64, libc::CLONE_VM | libc::SIGCHLD).map(drop)
}

/// What a process with another's memory runs: nothing that uses its stack or
/// thread-local data.
extern "C" fn pause_for_ever() {
    loop {
        // SAFETY: pause(2) touches no memory.
        unsafe {
            asm!("syscall", inlateout("rax") libc::SYS_pause => _, lateout("rcx") _,
                 lateout("r11") _, options(nostack));
        }
    }
}

/// `clone(2)` of what starts at `place` on the stack below `stack`.
fn clone_to(place: usize, stack: usize, flags: libc::c_int) -> io::Result<i32> {
    let result: i64;
    // SAFETY: the new thread goes to `place` at once, on a stack of its own,
    // and never comes back; in this one it is a plain system call.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "jmp r12",
            "2:",
            in("r12") place,
            inlateout("rax") libc::SYS_clone => result,
            in("rdi") i64::from(flags),
            in("rsi") stack,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    i32::try_from(result)
        .ok()
        .filter(|id| *id > 0)
        .ok_or_else(|| io::Error::from_raw_os_error(-result as i32))
}

/// Changes a byte in the code of this process's vDSO, which no thread runs.
pub fn change_vdso() -> io::Result<()> {
    // SAFETY: it reads what the kernel gave this process at its start.
    let start = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    if start == 0 {
        return Err(io::Error::other("there is no vDSO"));
    }
    // Past the tables of its first half page: between functions or in one.
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    let mut page = vec![0; PAGE];
    memory.read_exact_at(&mut page, start as u64)?;
    // ret, and what fills up to the next function.
    let fill = page
        .windows(2)
        .position(|two| two[0] == 0xc3 && matches!(two[1], 0xcc | 0x90 | 0x66 | 0x0f));
    let place = fill.map_or(9, |place| place + 1);
    memory.write_all_at(&[page[place] ^ 1], (start + place) as u64)
}

/// Belongs to a container by its control group, and sees what the host sees.
pub fn container_with_the_hosts_root() -> io::Result<()> {
    let id = "5ec0".repeat(16);
    let cgroup = format!("/sys/fs/cgroup/docker/{id}");
    fs::create_dir_all(&cgroup)?;
    fs::write(format!("{cgroup}/cgroup.procs"), "0")?;
    sys::unshare(libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC)
}

//! Confines this process before it parses what a guest wrote.
//!
//! Whatever a hostile guest achieves in the parsers, the process can then
//! neither open files of its user, nor reach the network, nor run programs.
//! There are two stages, as finding the kernel may read and write the cache
//! of profiles:
//!
//! 1. [`Stage::Opening`]: files only where this run has business (landlock),
//!    and no system calls beyond memory, threads and files (seccomp);
//! 2. [`Stage::Reading`]: no file can be opened, made or removed any more.
//!
//! Each filter is inherited by threads started later and can't be taken off.
//! Both stages are best effort: a kernel without landlock or seccomp is told
//! about in what [`confine`] returns, and the second stage needs no landlock.
//!
//! Landlock would also keep the process from reading another process's memory
//! (`process_vm_readv` asks for the right to trace it, which a landlocked
//! process has over none that isn't), so it is left out when the target is one.
#![deny(unsafe_code)]

mod filter;

use std::path::PathBuf;

pub use filter::{Argument, Filter, FilterError};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// How far the process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Before files are parsed: those named here are all there is.
    Opening,
    /// All files are open.
    Reading,
}

/// What the process still needs of the file system while it opens.
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Files and folders to read.
    pub readable: Vec<PathBuf>,
    /// Folders to make, write, rename and remove files in.
    pub writable: Vec<PathBuf>,
    /// The target is another process whose memory is read by system calls.
    pub traces_process: bool,
}

/// What could not be put in force, for `--verbose`.
#[derive(Debug, thiserror::Error)]
pub enum Weakness {
    /// Landlock is missing or refused.
    #[error("files are not confined by landlock: {0}")]
    Landlock(String),
    /// Seccomp is missing or refused.
    #[error("system calls are not confined by seccomp: {0}")]
    Seccomp(String),
}

/// Puts a stage in force for this thread and all it starts.
pub fn confine(stage: Stage, needs: &Needs) -> Vec<Weakness> {
    let mut weaknesses = Vec::new();
    if stage == Stage::Opening {
        if needs.traces_process {
            let reason = "it would forbid to read another process's memory";
            weaknesses.push(Weakness::Landlock(reason.into()));
        } else if let Err(error) = restrict_files(needs) {
            weaknesses.push(Weakness::Landlock(error));
        }
    }
    if let Err(error) = restrict_system_calls(stage) {
        weaknesses.push(Weakness::Seccomp(error.to_string()));
    }
    weaknesses
}

/// The newest set of landlock's rights that this program knows; an older kernel
/// handles those it knows itself.
pub const KNOWN_RIGHTS: ABI = ABI::V6;

/// A landlock ruleset that forbids all that landlock can: files, TCP ports,
/// signals and abstract sockets. What is to be allowed is added to it.
///
/// # Errors
/// The kernel's, other than that it has no landlock: that shows when the
/// ruleset is put in force.
pub fn deny_all() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN_RIGHTS))?
        .handle_access(AccessNet::from_all(KNOWN_RIGHTS))?
        .scope(Scope::from_all(KNOWN_RIGHTS))?
        .create()
}

fn restrict_files(needs: &Needs) -> Result<(), String> {
    let text = |error: RulesetError| error.to_string();
    let mut ruleset = deny_all().map_err(text)?;
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::from_all(KNOWN_RIGHTS) & !(AccessFs::Execute | AccessFs::IoctlDev);
    let rules = (needs.readable.iter().map(|path| (path, read)))
        .chain(needs.writable.iter().map(|path| (path, write)));
    for (path, mut access) in rules {
        // What is not there can't be opened either.
        let Ok(opened) = PathFd::new(path) else {
            continue;
        };
        if !path.is_dir() {
            access &= AccessFs::from_file(KNOWN_RIGHTS);
        }
        ruleset = ruleset
            .add_rule(PathBeneath::new(opened, access))
            .map_err(text)?;
    }
    let status = ruleset.restrict_self().map_err(text)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("this kernel has no landlock".into()),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

/// Memory, threads, time, and files that are open already.
const ALWAYS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_process_vm_readv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    // To add the second filter; a filter can only take rights away.
    libc::SYS_seccomp,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_write,
    libc::SYS_writev,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What makes, opens, inspects and removes files.
const WHILE_OPENING: &[libc::c_long] = &[
    libc::SYS_dup,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_flock,
    libc::SYS_fstatfs,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

fn restrict_system_calls(stage: Stage) -> Result<(), FilterError> {
    let opening = match stage {
        Stage::Opening => WHILE_OPENING,
        Stage::Reading => &[],
    };
    // A terminal's size and settings may be asked for, not changed.
    let asked = [libc::TCGETS, libc::TIOCGWINSZ].map(Argument::Is);
    // Of all threads: one may wait for the watcher of a paused guest.
    Filter::default()
        .allow_mapping()?
        .allow_protecting()?
        .allow_threads()?
        .allow_own_end()?
        .allow_if(libc::SYS_ioctl, 1, &asked)?
        .allow(ALWAYS)
        .allow(opening)
        .install()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::process::{Command, Stdio};

    /// Set in the child processes that confine themselves.
    const MARK: &str = "SECMON_TEST_CONFINED";

    /// Runs one test of this module in a process of its own, which a sandbox
    /// needs as it can't be left again.
    fn in_child(test: &str, folder: &std::path::Path) {
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", &format!("tests::{test}"), "--nocapture"])
            .env(MARK, folder)
            .output()
            .expect("it runs again");
        let said = String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success(), "{said}");
    }

    #[test]
    fn opening_reaches_only_what_is_needed() {
        let Some(folder) = std::env::var_os(MARK).map(PathBuf::from) else {
            let folder = tempfile::tempdir().expect("a folder");
            fs::create_dir(folder.path().join("cache")).expect("a folder");
            fs::write(folder.path().join("image"), "image").expect("a file");
            fs::write(folder.path().join("secret"), "secret").expect("a file");
            return in_child("opening_reaches_only_what_is_needed", folder.path());
        };
        let needs = Needs {
            readable: vec![folder.join("image")],
            writable: vec![folder.join("cache")],
            traces_process: false,
        };
        let weaknesses = confine(Stage::Opening, &needs);
        assert!(weaknesses.is_empty(), "{weaknesses:?}");
        assert_eq!(fs::read(folder.join("image")).expect("readable"), b"image");
        fs::write(folder.join("cache/new"), "x").expect("writable");
        fs::rename(folder.join("cache/new"), folder.join("cache/old")).expect("writable");
        fs::remove_file(folder.join("cache/old")).expect("writable");
        assert!(fs::read(folder.join("secret")).is_err());
        assert!(fs::write(folder.join("image"), "x").is_err());
        assert!(fs::read_dir("/proc").is_err());
        assert!(std::net::TcpListener::bind("127.0.0.1:0").is_err());
        assert!(Command::new("/bin/true").status().is_err());
    }

    #[test]
    fn reading_has_threads_and_open_files_and_nothing_else() {
        let Some(folder) = std::env::var_os(MARK).map(PathBuf::from) else {
            let folder = tempfile::tempdir().expect("a folder");
            fs::write(folder.path().join("image"), "image").expect("a file");
            let test = "reading_has_threads_and_open_files_and_nothing_else";
            return in_child(test, folder.path());
        };
        use std::os::unix::fs::FileExt;
        let image = fs::File::open(folder.join("image")).expect("before");
        let needs = Needs {
            traces_process: true,
            ..Needs::default()
        };
        let weaknesses = confine(Stage::Opening, &needs);
        assert!(
            matches!(weaknesses[..], [Weakness::Landlock(_)]),
            "{weaknesses:?}"
        );
        assert!(fs::read(folder.join("image")).is_ok());
        let started = std::time::Instant::now();
        assert!(confine(Stage::Reading, &needs).is_empty());
        println!("the second stage took {:?}", started.elapsed());
        let mut bytes = [0; 5];
        image.read_exact_at(&mut bytes, 0).expect("it is open");
        let sum = std::thread::spawn(|| (0..1000u64).sum::<u64>()).join();
        assert_eq!(sum.expect("threads run"), 499_500);
        assert!(fs::read(folder.join("image")).is_err());
        assert!(fs::remove_file(folder.join("image")).is_err());
        assert!(std::os::unix::net::UnixStream::pair().is_err());
        assert!(Command::new("/bin/true").status().is_err());
    }

    #[test]
    fn another_process_can_still_be_read() {
        if std::env::var_os(MARK).is_none() {
            let folder = tempfile::tempdir().expect("a folder");
            return in_child("another_process_can_still_be_read", folder.path());
        }
        // It ends with its input: the sandbox lets nobody kill it.
        let mut other = Command::new("/bin/cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("runs");
        // The program's own file is mapped a moment after the spawn.
        let address = std::iter::repeat_with(|| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let maps = fs::read_to_string(format!("/proc/{}/maps", other.id())).expect("maps");
            let line = maps.lines().find(|line| line.contains("r--p 00000000"))?;
            usize::from_str_radix(line.split('-').next()?, 16).ok()
        })
        .take(1000)
        .flatten()
        .next()
        .expect("a readable mapping");
        let needs = Needs {
            traces_process: true,
            ..Needs::default()
        };
        confine(Stage::Opening, &needs);
        confine(Stage::Reading, &needs);
        let mut byte = [0_u8; 4];
        let local = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: byte.len(),
        };
        let remote = libc::iovec {
            iov_base: std::ptr::without_provenance_mut(address),
            iov_len: byte.len(),
        };
        let pid = other.id() as libc::pid_t;
        #[allow(unsafe_code, reason = "there is no safe form of the call")]
        // SAFETY: the local buffer is valid for its length; the remote one is
        // only looked up in the other process.
        let count = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
        let error = std::io::Error::last_os_error();
        drop(other.stdin.take());
        let _ = other.wait();
        assert_eq!(count, 4, "{error}");
        assert_eq!(&byte, b"\x7fELF");
    }
}

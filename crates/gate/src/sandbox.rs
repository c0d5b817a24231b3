//! What is left to the gate's processes once they run.
//!
//! All of them run as an unprivileged user and can't gain rights by running a
//! program (`no_new_privs`). The gate itself, which listens to monitors, and
//! its keeper are confined further: files by landlock, system calls by
//! seccomp. The supervisor, which starts them again when they die, listens to
//! nobody but the kernel.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{AccessFs, PathBeneath, PathFd, RulesetCreatedAttr, RulesetStatus};
use nix::unistd::{Uid, User, initgroups, setgid, setgroups, setuid};
use secmon_sandbox::{Argument, Filter, FilterError};

/// Why a process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// It runs as root and nobody said as whom it should.
    #[error("a gate does not run as root: name an unprivileged user with --user")]
    Root,
    /// There is no such user.
    #[error("there is no user {0:?} on this machine")]
    NoUser(String),
    /// It can't become that user.
    #[error("becoming user {user:?}: {source}")]
    User {
        /// The user.
        user: String,
        /// The host's reason.
        source: io::Error,
    },
    /// Landlock failed or is missing.
    #[error("confining files by landlock: {0}")]
    Landlock(String),
    /// Seccomp failed or is missing.
    #[error("confining system calls by seccomp: {0}")]
    Seccomp(#[from] FilterError),
    /// It can't give up gaining rights by running a program.
    #[error("giving up to gain rights (no_new_privs): {0}")]
    NoNewPrivileges(io::Error),
}

/// Becomes an unprivileged user, if this process is root. With that all
/// capabilities are gone, and no program that is run brings them back.
///
/// # Errors
/// [`SandboxError`].
pub fn drop_rights(user: Option<&str>) -> Result<(), SandboxError> {
    if Uid::effective().is_root() {
        let name = user.ok_or(SandboxError::Root)?;
        let failed = |error: nix::Error| SandboxError::User {
            user: name.to_owned(),
            source: error.into(),
        };
        let account = User::from_name(name)
            .map_err(failed)?
            .ok_or_else(|| SandboxError::NoUser(name.to_owned()))?;
        if !account.uid.is_root() {
            setgroups(&[]).map_err(failed)?;
            // The groups that its administrator gave it, for QEMU's sockets.
            let c_name =
                std::ffi::CString::new(name).map_err(|_| SandboxError::NoUser(name.to_owned()))?;
            initgroups(&c_name, account.gid).map_err(failed)?;
            setgid(account.gid).map_err(failed)?;
            setuid(account.uid).map_err(failed)?;
        }
    }
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| SandboxError::NoNewPrivileges(error.into()))
}

/// The system calls of the gate, whatever their arguments.
pub const GATE: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_openat,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rename,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_unlink,
    libc::SYS_write,
];

/// System calls of the gate that are allowed for some arguments only:
/// `mmap` and `mprotect` (nothing executable), `clone` (threads, no
/// processes), `socket` (UNIX sockets), `ioctl` (`FIONBIO`), `tgkill` (its own
/// process).
pub const GATE_CONDITIONAL: usize = 6;

/// The system calls of the keeper.
pub const KEEPER: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigreturn,
    libc::SYS_sendto,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// System calls of the keeper that are allowed for some arguments only:
/// `mmap` (nothing executable).
pub const KEEPER_CONDITIONAL: usize = 1;

/// Confines the gate: it may make and rename files in `folders` and nowhere
/// else, and open none but those.
///
/// # Errors
/// [`SandboxError`]; a gate that is not confined does not serve.
pub fn confine_gate(folders: &[PathBuf]) -> Result<(), SandboxError> {
    restrict_files(folders)?;
    let filter = Filter::default()
        .allow_mapping()?
        .allow_protecting()?
        .allow_threads()?
        .allow_own_end()?
        .allow_if(libc::SYS_socket, 0, &[Argument::Is(libc::AF_UNIX as u64)])?
        .allow_if(libc::SYS_ioctl, 1, &[Argument::Is(libc::FIONBIO)])?;
    debug_assert_eq!(filter.conditional(), GATE_CONDITIONAL);
    Ok(filter.allow(GATE).install()?)
}

/// Confines the keeper: no files, and the sockets that it is given.
///
/// # Errors
/// [`SandboxError`].
pub fn confine_keeper() -> Result<(), SandboxError> {
    restrict_files(&[])?;
    let filter = Filter::default().allow_mapping()?;
    debug_assert_eq!(filter.conditional(), KEEPER_CONDITIONAL);
    Ok(filter.allow(KEEPER).install()?)
}

fn restrict_files(folders: &[PathBuf]) -> Result<(), SandboxError> {
    let text = |error: landlock::RulesetError| SandboxError::Landlock(error.to_string());
    let mut ruleset = secmon_sandbox::deny_all().map_err(text)?;
    let files = AccessFs::ReadFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile;
    for folder in folders {
        let opened = open_folder(folder)?;
        ruleset = ruleset
            .add_rule(PathBeneath::new(opened, files))
            .map_err(text)?;
    }
    let status = ruleset.restrict_self().map_err(text)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(SandboxError::Landlock(
            "this kernel has no landlock (Linux 5.13 and later, `lsm=…,landlock`)".to_owned(),
        )),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

fn open_folder(folder: &Path) -> Result<PathFd, SandboxError> {
    PathFd::new(folder).map_err(|error| SandboxError::Landlock(error.to_string()))
}

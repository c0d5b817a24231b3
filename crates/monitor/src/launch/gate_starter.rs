//! The process that becomes a gate's supervisor: finds the target's sockets,
//! gives up every right, and runs the gate (crate `secmon-gate`).
//!
//! A gate runs as a user of its own, who can enter neither QEMU's folder nor
//! most others. So, in this order:
//!
//! 1. open the target's sockets as places (`O_PATH`), through which a process
//!    can connect whatever folder they lie in, and give the gate's user the
//!    right to connect: one entry in the socket's access control list;
//! 2. bind the gate's own socket, and give it to the user of the monitor's
//!    QEMU;
//! 3. become the gate's user.
//!
//! Started by somebody who is not root, it stays that user.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{Gid, Uid};
use secmon_gate::configuration::Configuration;
use secmon_gate::supervisor::{self, Part, SupervisorError};
use serde::{Deserialize, Serialize};

use super::account::Account;
use super::acl;
use super::command_line::descriptor_path;
use super::process::ProcessRecord;

/// What becomes a gate, and of what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatePlan {
    /// The target's QEMU.
    pub target: ProcessRecord,
    /// The user that the gate runs as; the caller's own if there is none.
    pub account: Option<Account>,
    /// The user of the monitor's QEMU, who may connect to the gate.
    pub client: Option<Account>,
    /// The gate's configuration, with the places of the target's sockets as
    /// this process sees them.
    pub configuration: Configuration,
}

/// Why a gate could not be started.
#[derive(Debug, thiserror::Error)]
pub enum GateStartError {
    /// The plan can't be read.
    #[error("the plan {path}: {reason}")]
    Plan {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The target ended meanwhile.
    #[error("the target's QEMU, process {0}, ended before its gate was started")]
    TargetEnded(u32),
    /// A socket of the target.
    #[error("{what} {path}: {source}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// On which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A socket of somebody else.
    #[error(
        "{path} belongs to user {user}, and the target's QEMU to user {owner}: its control socket must be its own"
    )]
    Owner {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        user: u32,
        /// QEMU's user.
        owner: u32,
    },
    /// The gate's user can't be let in.
    #[error(
        "{path} lies on a file system without access control lists, so that the gate's own user can't be let in: put the target's sockets into /run or /dev/shm, or run secmon as the user of the target's QEMU"
    )]
    NoList {
        /// The socket.
        path: PathBuf,
    },
    /// Rights could not be given up.
    #[error("becoming the gate's user {user}: {source}")]
    User {
        /// Its number.
        user: u32,
        /// The system's reason.
        source: io::Error,
    },
    /// The gate itself.
    #[error(transparent)]
    Gate(#[from] SupervisorError),
}

/// Reads the plan in the file `plan` and runs its gate in this process, until
/// it can't be run any more. `command` makes the commands for the gate's
/// parts.
#[must_use]
pub fn become_gate(plan: &Path, command: impl Fn(Part) -> io::Result<Command>) -> GateStartError {
    match run(plan, command) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn run(
    plan_file: &Path,
    command: impl Fn(Part) -> io::Result<Command>,
) -> Result<std::convert::Infallible, GateStartError> {
    // Of a terminal's session no more, so that its end isn't this one's.
    let _ = rustix::process::setsid();
    let invalid = |reason: String| GateStartError::Plan {
        path: plan_file.to_owned(),
        reason,
    };
    let text = fs::read(plan_file).map_err(|error| invalid(error.to_string()))?;
    let plan: GatePlan =
        serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    let mut configuration = plan.configuration;
    let ended = || GateStartError::TargetEnded(plan.target.pid);
    let owner = plan.target.user().ok_or_else(ended)?;
    let place = |path: &Path| open_socket(path, owner, plan.account);
    let qmp = place(&configuration.qmp)?;
    let gdb = configuration.gdb.as_deref().map(place).transpose()?;
    // The paths may be another QEMU's by now, if this one is gone.
    if !plan.target.is_alive() {
        return Err(ended());
    }
    // The gate's processes have the same descriptors open.
    configuration.qmp = descriptor_path(qmp.as_raw_fd()).into();
    configuration.gdb = gdb
        .as_ref()
        .map(|gdb| descriptor_path(gdb.as_raw_fd()).into());
    let listener = supervisor::listen(&configuration.socket)?;
    let own = |source| GateStartError::Socket {
        what: "giving to the monitor's user",
        path: configuration.socket.clone(),
        source,
    };
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(&configuration.socket, private).map_err(own)?;
    if let Some(client) = plan.client {
        std::os::unix::fs::chown(&configuration.socket, Some(client.id), None).map_err(own)?;
    }
    if let Some(account) = plan.account {
        // The group that may pass through the monitor's folder.
        let group = plan.client.unwrap_or(account);
        become_user(account, group).map_err(|source| GateStartError::User {
            user: account.id,
            source,
        })?;
    }
    Ok(supervisor::run_on(&listener, &configuration, command)?)
}

/// Opens a socket as a place, for this process and those that it starts, and
/// lets the gate's user connect to it.
///
/// QEMU may be in the hands of its guest by now and have put something else in
/// the socket's place: that leads nowhere, and what is another user's is not
/// opened to anybody.
fn open_socket(
    path: &Path,
    owner: u32,
    account: Option<Account>,
) -> Result<OwnedFd, GateStartError> {
    let failed = |what, source| GateStartError::Socket {
        what,
        path: path.to_owned(),
        source,
    };
    let place = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
        .map_err(|error| failed("looking for the target's socket", error.into()))?;
    let metadata = fs::metadata(descriptor_path(place.as_raw_fd()))
        .map_err(|error| failed("looking at the target's socket", error))?;
    if !metadata.file_type().is_socket() {
        let error = io::Error::other("it is no socket");
        return Err(failed("looking at the target's socket", error));
    }
    if metadata.uid() != owner {
        return Err(GateStartError::Owner {
            path: path.to_owned(),
            user: metadata.uid(),
            owner,
        });
    }
    let Some(account) = account else {
        return Ok(place);
    };
    if metadata.uid() == account.id || metadata.mode() & 0o002 != 0 {
        return Ok(place);
    }
    match acl::give(&place, metadata.mode(), account.id, acl::WRITE) {
        Ok(()) => Ok(place),
        Err(Errno::OPNOTSUPP) => Err(GateStartError::NoList {
            path: path.to_owned(),
        }),
        Err(error) => Err(failed(
            "letting the gate's user connect to the target's socket",
            error.into(),
        )),
    }
}

/// Takes back what [`become_gate`] gave to the gate's user.
pub(super) fn forbid_connecting(path: &Path, account: Account) {
    // The socket may be gone, and its entry with it.
    if let Ok(place) = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        let _ = acl::take(&place, account.id);
    }
}

/// Gives up root for good.
fn become_user(account: Account, group: Account) -> io::Result<()> {
    if account.id == 0 || group.id == 0 {
        return Err(io::Error::other("it is root"));
    }
    let (user, own) = (Uid::from_raw(account.id), Gid::from_raw(account.id));
    rustix::thread::set_thread_groups(&[Gid::from_raw(group.id)])?;
    rustix::thread::set_thread_res_gid(own, own, own)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    if rustix::process::geteuid().is_root() || rustix::process::getuid().is_root() {
        return Err(io::Error::other("still root"));
    }
    Ok(())
}

/// Gives a file or folder to a gate's user, if it is a plain one: what the
/// user of an earlier gate may have left in its folder is not followed.
pub(super) fn give_to(path: &Path, account: Option<Account>) -> io::Result<()> {
    let Some(account) = account else {
        return Ok(());
    };
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if metadata.is_dir() || (metadata.is_file() && metadata.nlink() == 1) {
        let id = account.id;
        return std::os::unix::fs::fchown(file.as_fd(), Some(id), Some(id));
    }
    Err(io::Error::other("it is no plain file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_files_are_given_away() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        fs::write(path("log"), "x").expect("a file");
        fs::hard_link(path("log"), path("second")).expect("a link");
        std::os::unix::fs::symlink(path("log"), path("link")).expect("a link");
        let own = rustix::process::geteuid().as_raw();
        let account = Some(Account { id: own });
        assert!(give_to(&path("link"), account).is_err());
        assert!(give_to(&path("log"), account).is_err(), "it has two names");
        fs::remove_file(path("second")).expect("removed");
        give_to(&path("log"), account).expect("its own already");
        give_to(folder.path(), account).expect("a folder");
        give_to(&path("none"), None).expect("nothing to do");
    }

    #[test]
    fn only_sockets_are_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let own = ProcessRecord::of(std::process::id()).expect("it runs");
        let own = own.user().expect("known");
        let path = folder.path().join("file");
        fs::write(&path, "x").expect("a file");
        let error = open_socket(&path, own, None).expect_err("no socket");
        assert!(error.to_string().contains("no socket"), "{error}");
        let path = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let error = open_socket(&path, own + 1, None).expect_err("somebody else's");
        assert!(error.to_string().contains("its own"), "{error}");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("a link");
        assert!(open_socket(&link, own, None).is_err(), "it is followed");
        let place = open_socket(&path, own, None).expect("a place");
        fs::rename(&path, folder.path().join("moved")).expect("moved");
        let way = descriptor_path(place.as_raw_fd());
        std::os::unix::net::UnixStream::connect(way).expect("the same socket");
    }
}

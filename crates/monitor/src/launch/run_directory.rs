//! A monitor's folder on the host: its sockets, keys, and what is known of its
//! processes.
//!
//! | file | what |
//! |---|---|
//! | `lock` | held by the supervisor as long as it runs |
//! | `settings.json` | what the monitor was started with |
//! | `configuration.json` | what the monitor itself is told, with its secret key |
//! | `client.key`, `monitor.key` | the key pairs of the host and of the monitor |
//! | `processes.json` | the processes that belong to it |
//! | `state.json` | what the supervisor last saw |
//! | `channel.sock`, `channel-N.sock`, `qmp.sock` | QEMU's ends |
//! | `gate-N.sock` | where the monitor's QEMU reaches the gate of target N |
//! | `gate-N/` | that gate's key, which is its user's, and its grants |
//! | `gate-N.json`, `gate-N.messages` | how it was started, what its processes said |
//! | `channel.lock`, `channel-N.lock` | held by whoever talks to the monitor on that channel |
//! | `console.log`, `supervisor.log` | bounded logs |
//!
//! The folder lies in `$XDG_RUNTIME_DIR/secmon`, else in `/run/secmon` for root
//! and `~/.local/state/secmon` for others, and nobody but its owner may look
//! into it. Root's own processes for a monitor run as users who must be able to
//! pass through, so a `$XDG_RUNTIME_DIR` that is root's alone is not used.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::MonitorName;
use crate::protocol::CHANNELS;

/// The longest path of a UNIX socket (`sockaddr_un`, without its final zero).
const LONGEST_SOCKET_PATH: usize = 107;

/// The most of a file of the folder that is read.
const MAX_FILE: u64 = 1 << 20;

/// Why a monitor's folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirectoryError {
    /// There is no place for it.
    #[error(
        "there is no place for a monitor's folder: neither XDG_RUNTIME_DIR nor HOME is set; set one, or run as root"
    )]
    NoPlace,
    /// The system refused.
    #[error("{what} {path}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// On which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The folder is not this user's alone.
    #[error(
        "{path} belongs to user {owner} with mode {mode:o}: a monitor's folder must be this user's and closed to others; remove it, or set XDG_RUNTIME_DIR"
    )]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// Sockets in it would have no valid path.
    #[error(
        "{path} is too long for the path of a UNIX socket ({LONGEST_SOCKET_PATH} bytes): choose a shorter name, or set XDG_RUNTIME_DIR to a shorter folder"
    )]
    TooLong {
        /// The longest socket's path.
        path: PathBuf,
    },
    /// A file of it holds something else.
    #[error("{path}: {reason}; `secmon monitor down NAME` removes it")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A monitor's folder, which may not exist yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunDirectory {
    path: PathBuf,
}

/// A lock that is free again when this value, or this process, ends.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, never read")] File);

fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirectoryError {
    let path = path.to_owned();
    move |source| RunDirectoryError::Host { what, path, source }
}

/// The folder of all monitors' folders.
///
/// # Errors
/// [`RunDirectoryError::NoPlace`].
pub fn base() -> Result<PathBuf, RunDirectoryError> {
    let variable = |name| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let root = rustix::process::geteuid().is_root();
    let passable = |path: &PathBuf| {
        let metadata = fs::metadata(path);
        !root || metadata.is_ok_and(|metadata| metadata.mode() & 0o001 != 0)
    };
    if let Some(runtime) = variable("XDG_RUNTIME_DIR").filter(passable) {
        return Ok(runtime.join("secmon"));
    }
    if root {
        return Ok(PathBuf::from("/run/secmon"));
    }
    let state = variable("HOME").map(|home| home.join(".local/state/secmon"));
    state.ok_or(RunDirectoryError::NoPlace)
}

fn channel_file(number: u32, kind: &str) -> String {
    match number {
        0 => format!("channel.{kind}"),
        number => format!("channel-{number}.{kind}"),
    }
}

impl RunDirectory {
    /// The folder of the monitor of this name.
    ///
    /// # Errors
    /// If there is no place for it, or its sockets' paths would be too long.
    pub fn of(name: &MonitorName) -> Result<Self, RunDirectoryError> {
        Self::in_base(&base()?, name)
    }

    pub(super) fn in_base(base: &Path, name: &MonitorName) -> Result<Self, RunDirectoryError> {
        let directory = Self {
            path: base.join(name.as_str()),
        };
        let longest = directory.file("gate-00.sock");
        let channels = directory.channel_sockets();
        let lengths = channels.iter().chain([&longest]);
        let length = lengths.map(|path| path.as_os_str().len()).max();
        if length.unwrap_or(0) > LONGEST_SOCKET_PATH {
            return Err(RunDirectoryError::TooLong { path: longest });
        }
        Ok(directory)
    }

    /// The names of the monitors that have a folder, sorted.
    ///
    /// # Errors
    /// The system's.
    pub fn names() -> Result<Vec<MonitorName>, RunDirectoryError> {
        let base = base()?;
        let entries = match fs::read_dir(&base) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(host("listing", &base)(source)),
        };
        let mut names: Vec<MonitorName> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// QEMU's ends of the channels. A monitor that an older release started has
    /// the first alone.
    #[must_use]
    pub fn channel_sockets(&self) -> Vec<PathBuf> {
        let names = (0..CHANNELS).map(|number| channel_file(number, "sock"));
        names.map(|name| self.file(&name)).collect()
    }

    /// Takes the turn to talk on one of the channels; `None` if others talk on
    /// all of them.
    ///
    /// # Errors
    /// The system's.
    pub fn free_channel(&self) -> Result<Option<(Lock, PathBuf)>, RunDirectoryError> {
        for (number, socket) in (0..).zip(self.channel_sockets()) {
            // The first is waited for: the VM may just be starting.
            if number > 0 && !socket.exists() {
                continue;
            }
            if let Some(turn) = self.lock(&channel_file(number, "lock"))? {
                return Ok(Some((turn, socket)));
            }
        }
        Ok(None)
    }

    /// QEMU's QMP.
    #[must_use]
    pub fn qmp_socket(&self) -> PathBuf {
        self.file("qmp.sock")
    }

    /// Whether it is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Makes it, or checks that the one that is there is this user's alone.
    ///
    /// # Errors
    /// The system's, or [`RunDirectoryError::Foreign`].
    pub fn make(&self) -> Result<(), RunDirectoryError> {
        let base = self.path.parent().unwrap_or(Path::new("/"));
        for folder in [base, &self.path] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.map_err(host("making", folder))?;
            let metadata = fs::symlink_metadata(folder).map_err(host("looking at", folder))?;
            let own = metadata.uid() == rustix::process::geteuid().as_raw();
            if !own || !metadata.is_dir() || metadata.mode() & 0o022 != 0 {
                return Err(RunDirectoryError::Foreign {
                    path: folder.to_owned(),
                    owner: metadata.uid(),
                    mode: metadata.mode() & 0o7777,
                });
            }
        }
        Ok(())
    }

    /// Lets one user's processes pass through it, to a socket whose path they
    /// know: the gates' sockets lie here. Files have modes of their own.
    ///
    /// # Errors
    /// The system's.
    pub fn let_pass(&self, group: u32) -> Result<(), RunDirectoryError> {
        let base = self.path.parent().unwrap_or(Path::new("/"));
        std::os::unix::fs::chown(&self.path, None, Some(group))
            .map_err(host("changing the group of", &self.path))?;
        // The folder above holds nothing but folders.
        for (folder, mode) in [(base, 0o711), (&self.path, 0o710)] {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode))
                .map_err(host("changing the mode of", folder))?;
        }
        Ok(())
    }

    /// Removes it with all that is in it.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self) -> Result<(), RunDirectoryError> {
        match fs::remove_dir_all(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(host("removing", &self.path)(source))
            }
            _ => Ok(()),
        }
    }

    /// Takes a lock of it; `None` if another process holds it.
    ///
    /// # Errors
    /// The system's.
    pub fn lock(&self, name: &str) -> Result<Option<Lock>, RunDirectoryError> {
        let path = self.file(name);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(host("opening", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(host("locking", &path)(error.into())),
        }
    }

    /// Writes a file as JSON, so that readers see all of it or the one before.
    ///
    /// # Errors
    /// The system's.
    pub fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), RunDirectoryError> {
        let path = self.file(name);
        let draft = self.file(&format!(".{name}.{}", std::process::id()));
        let text =
            serde_json::to_vec_pretty(value).map_err(|error| RunDirectoryError::Content {
                path: path.clone(),
                reason: error.to_string(),
            })?;
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            options.open(&draft)?.write_all(&text)?;
            fs::rename(&draft, &path)
        };
        write().map_err(host("writing", &path))
    }

    /// Reads a JSON file; `None` if it isn't there.
    ///
    /// # Errors
    /// The system's, or [`RunDirectoryError::Content`].
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, RunDirectoryError> {
        let path = self.file(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(host("opening", &path)(source)),
        };
        let mut text = Vec::new();
        let read = file.take(MAX_FILE).read_to_end(&mut text);
        read.map_err(host("reading", &path))?;
        let value = serde_json::from_slice(&text);
        value.map(Some).map_err(|error| RunDirectoryError::Content {
            path,
            reason: error.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(base: &Path) -> RunDirectory {
        RunDirectory::in_base(base, &"web1".parse().expect("a name")).expect("a folder")
    }

    #[test]
    fn a_folder_is_its_owners_alone() {
        let base = tempfile::tempdir().expect("a folder");
        let directory = directory(&base.path().join("secmon"));
        directory.make().expect("made");
        let mode = directory.path().metadata().expect("there").mode();
        assert_eq!(mode & 0o777, 0o700);
        directory.make().expect("made again");
        let open = fs::Permissions::from_mode(0o777);
        fs::set_permissions(directory.path(), open).expect("chmod");
        let error = directory.make().expect_err("open to all");
        assert!(error.to_string().contains("777"), "{error}");
    }

    #[test]
    fn a_lock_has_one_holder() {
        let base = tempfile::tempdir().expect("a folder");
        let directory = directory(base.path());
        directory.make().expect("made");
        let first = directory.lock("lock").expect("a file").expect("free");
        assert!(directory.lock("lock").expect("a file").is_none());
        drop(first);
        assert!(directory.lock("lock").expect("a file").is_some());
    }

    #[test]
    fn as_many_talk_as_there_are_channels() {
        let base = tempfile::tempdir().expect("a folder");
        let directory = directory(base.path());
        directory.make().expect("made");
        let take = || directory.free_channel().expect("a file");
        let first = take().expect("free");
        assert!(take().is_none(), "of the others there is no socket");
        for socket in directory.channel_sockets() {
            fs::write(socket, "").expect("a file");
        }
        let others: Vec<_> = std::iter::from_fn(take).collect();
        assert_eq!(others.len(), CHANNELS as usize - 1);
        drop(first);
        let (_turn, socket) = take().expect("free again");
        assert_eq!(socket, directory.file("channel.sock"));
    }

    #[test]
    fn files_are_whole_or_not_there() {
        let base = tempfile::tempdir().expect("a folder");
        let directory = directory(base.path());
        directory.make().expect("made");
        assert_eq!(directory.read::<u32>("x.json").expect("nothing"), None);
        directory.write("x.json", &7_u32).expect("written");
        assert_eq!(directory.read("x.json").expect("read"), Some(7_u32));
        fs::write(directory.file("x.json"), b"{").expect("damaged");
        assert!(directory.read::<u32>("x.json").is_err());
        directory.remove().expect("removed");
        assert!(!directory.exists());
        directory.remove().expect("removed already");
    }

    #[test]
    fn a_socket_with_no_valid_path_is_told_at_once() {
        let base = PathBuf::from("/").join("x".repeat(100));
        let name: MonitorName = "web1".parse().expect("a name");
        let error = RunDirectory::in_base(&base, &name).expect_err("too long");
        assert!(error.to_string().contains("shorter"), "{error}");
    }
}

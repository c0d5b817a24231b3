//! Talking to a running monitor.
//!
//! A monitor's channel is one virtio-serial port, which QEMU connects to one
//! client at a time. Clients on this host take turns: whoever talks holds a
//! lock in the monitor's folder.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_channel::{Descriptor, KeyError, KeyPair, Stream};

use super::run_directory::{Lock, RunDirectory, RunDirectoryError};
use super::up::Known;
use super::{MonitorName, files};
use crate::protocol::{Client, ClientError};

/// How long one attempt waits for the monitor's answer. One that is still
/// booting does not answer, and the port may lose what was said to it.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Why there is no conversation.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// There is none of this name.
    #[error("there is no monitor {name}; {known}")]
    Unknown {
        /// The name.
        name: MonitorName,
        /// Those that there are.
        known: Known,
    },
    /// Another client talks to it.
    #[error("another process talks to monitor {0} (`secmon monitor attach`?): one at a time can")]
    Busy(MonitorName),
    /// Its VM does not run.
    #[error(
        "monitor {name} can't be reached: {path}: {source}; `secmon monitor status --name {name}` says how it is"
    )]
    Socket {
        /// The name.
        name: MonitorName,
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It does not answer.
    #[error("monitor {name} does not answer: {source}; its console is in {console}")]
    Silent {
        /// The name.
        name: MonitorName,
        /// How the last attempt ended.
        source: ClientError,
        /// The console's log.
        console: PathBuf,
    },
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Its folder.
    #[error(transparent)]
    RunDirectory(#[from] RunDirectoryError),
}

/// A conversation, and the turn that it holds.
pub struct Connection {
    /// The conversation.
    pub client: Client,
    _turn: Lock,
}

/// Begins a conversation with the monitor `name`, waiting for a turn and for a
/// monitor that still boots until `deadline`.
///
/// # Errors
/// [`ConnectError`].
pub fn connect(name: &MonitorName, deadline: Instant) -> Result<Connection, ConnectError> {
    let directory = RunDirectory::of(name)?;
    if !directory.exists() {
        return Err(ConnectError::Unknown {
            name: name.clone(),
            known: Known(RunDirectory::names().unwrap_or_default()),
        });
    }
    let own = KeyPair::read(&directory.file(files::CLIENT_KEY))?;
    let monitor = KeyPair::read(&directory.file(files::MONITOR_KEY))?.public();
    let turn = loop {
        if let Some(turn) = directory.lock(files::CHANNEL_LOCK)? {
            break turn;
        }
        if Instant::now() >= deadline {
            return Err(ConnectError::Busy(name.clone()));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let path = directory.channel_socket();
    loop {
        let attempt = Instant::now() + ATTEMPT;
        let failed = match UnixStream::connect(&path).and_then(Descriptor::new) {
            Ok(stream) => {
                let stream: Arc<dyn Stream> = Arc::new(stream);
                match Client::connect(&stream, &own, &monitor, Some(attempt.min(deadline))) {
                    Ok(client) => {
                        return Ok(Connection {
                            client,
                            _turn: turn,
                        });
                    }
                    Err(source) => ConnectError::Silent {
                        name: name.clone(),
                        source,
                        console: directory.file(files::CONSOLE_LOG),
                    },
                }
            }
            Err(source) => ConnectError::Socket {
                name: name.clone(),
                path: path.clone(),
                source,
            },
        };
        if Instant::now() >= deadline {
            return Err(failed);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

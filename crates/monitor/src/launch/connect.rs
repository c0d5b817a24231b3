//! Talking to a running monitor.
//!
//! A channel of a monitor is a virtio-serial port, which QEMU connects to one
//! client at a time. A monitor has several, each with a lock in the monitor's
//! folder that its client holds; when all are taken, clients take turns.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_channel::{Descriptor, KeyError, KeyPair, PublicKey, Stream};

use super::run_directory::{Lock, RunDirectory, RunDirectoryError};
use super::up::Known;
use super::{MonitorName, files};
use crate::protocol::{CHANNELS, Client, ClientError};

/// How long one attempt waits for the monitor's answer. One that is still
/// booting does not answer, and the port may lose what was said to it.
const ATTEMPT: Duration = Duration::from_secs(5);

/// How long it is waited for a turn without a word.
const MOMENT: Duration = Duration::from_secs(1);

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
    /// Other clients talk to it.
    #[error(
        "as many others as can at once ({CHANNELS}) talk to monitor {name} (`secmon monitor attach`?), and none of them ended within {waited:.0?}"
    )]
    Busy {
        /// The name.
        name: MonitorName,
        /// How long it was waited for one to end.
        waited: Duration,
    },
    /// Its VM does not run.
    #[error(
        "monitor {name} can't be reached: {path}: {source}; `secmon monitor status {name}` says how it is"
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
    /// The monitor's key, a new one for each monitor that is started.
    pub monitor: PublicKey,
    _turn: Lock,
}

/// Begins a conversation with the monitor `name`, waiting for a turn and for a
/// monitor that still boots until `deadline`. When others talk on all channels
/// for a moment, `waits` is told how long it is going to be waited.
///
/// # Errors
/// [`ConnectError`].
pub fn connect(
    name: &MonitorName,
    deadline: Instant,
    waits: &mut dyn FnMut(Duration),
) -> Result<Connection, ConnectError> {
    let directory = RunDirectory::of(name)?;
    if !directory.exists() {
        return Err(ConnectError::Unknown {
            name: name.clone(),
            known: Known(RunDirectory::names().unwrap_or_default()),
        });
    }
    let own = KeyPair::read(&directory.file(files::CLIENT_KEY))?;
    let monitor = KeyPair::read(&directory.file(files::MONITOR_KEY))?.public();
    let asked = Instant::now();
    let mut told = false;
    let (turn, path) = loop {
        if let Some(free) = directory.free_channel()? {
            break free;
        }
        let now = Instant::now();
        let waited = now.saturating_duration_since(asked);
        if now >= deadline {
            let name = name.clone();
            return Err(ConnectError::Busy { name, waited });
        }
        if waited >= MOMENT && !told {
            told = true;
            waits(deadline.saturating_duration_since(now));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    loop {
        let attempt = Instant::now() + ATTEMPT;
        let failed = match UnixStream::connect(&path).and_then(Descriptor::new) {
            Ok(stream) => {
                let stream: Arc<dyn Stream> = Arc::new(stream);
                match Client::connect(&stream, &own, &monitor, Some(attempt.min(deadline))) {
                    Ok(client) => {
                        return Ok(Connection {
                            client,
                            monitor,
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

//! Why QEMU did not do as asked.

use std::path::PathBuf;
use std::time::Duration;

/// Why QEMU did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket can't be connected to.
    #[error("connecting to QMP at {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// Somebody else is connected: QEMU serves one client at a time.
    #[error(
        "QMP at {path} did not greet: another client is connected (libvirt, a management tool), or QEMU hangs"
    )]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// No answer in time.
    #[error("QMP at {path}: no answer to {command:?} within {timeout:?}")]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: String,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The connection ended.
    #[error("QMP at {path}: the connection ended during {command:?}: {reason}")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: String,
        /// How it ended.
        reason: String,
    },
    /// What came is no QMP.
    #[error("QMP at {path}: {reason}")]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// QEMU refused.
    #[error("QEMU refused {command:?}: {description}")]
    Refused {
        /// What was asked.
        command: String,
        /// QEMU's words.
        description: String,
    },
}

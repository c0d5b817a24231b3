//! What a gate is told when it is started.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A gate's configuration. It travels from the supervisor to the processes
/// that it starts as one argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The grant file.
    pub grants: PathBuf,
    /// The file of the gate's secret key.
    pub key: PathBuf,
    /// The target's QMP socket.
    pub qmp: PathBuf,
    /// The target's gdbstub socket, if it has one.
    pub gdb: Option<PathBuf>,
    /// Where monitors connect.
    pub socket: PathBuf,
    /// The log. Its folder must be the gate's own.
    pub log: PathBuf,
    /// The bytes after which a new log file is begun.
    pub log_bytes: u64,
    /// How many earlier log files are kept.
    pub log_files: u32,
    /// The folder for dumps, if dumps are to be made.
    pub dumps: Option<PathBuf>,
    /// The user to run as, if the gate is started by root.
    pub user: Option<String>,
}

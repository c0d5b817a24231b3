//! What a guard has to know of a monitor that was started here.

use std::fs;
use std::path::PathBuf;

use super::process::ProcessRecord;
use super::run_directory::{RunDirectory, RunDirectoryError};
use super::state::{Processes, Settings};
use super::up::Known;
use super::{MonitorName, files};

/// Why a monitor can't be guarded.
#[derive(Debug, thiserror::Error)]
pub enum GuardedError {
    /// There is none of this name.
    #[error("there is no monitor {name}; {known}")]
    Unknown {
        /// The name.
        name: MonitorName,
        /// Those that there are.
        known: Known,
    },
    /// Its folder.
    #[error(transparent)]
    RunDirectory(#[from] RunDirectoryError),
    /// What it was told.
    #[error("reading {path}: {source}")]
    Configuration {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// A monitor, as it was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guarded {
    /// Its VM's QEMU; `None` while there is none.
    pub machine: Option<ProcessRecord>,
    /// The kernel it was started from.
    pub kernel: PathBuf,
    /// The initial file system it was started from.
    pub initramfs: PathBuf,
    /// What it was told, byte by byte.
    pub configuration: Vec<u8>,
}

impl Guarded {
    /// Looks the monitor up.
    ///
    /// # Errors
    /// [`GuardedError`].
    pub fn of(name: &MonitorName) -> Result<Self, GuardedError> {
        let directory = RunDirectory::of(name)?;
        let settings: Option<Settings> = directory.read(files::SETTINGS)?;
        let Some(settings) = settings else {
            return Err(GuardedError::Unknown {
                name: name.clone(),
                known: Known(RunDirectory::names().unwrap_or_default()),
            });
        };
        let processes: Processes = directory.read(files::PROCESSES)?.unwrap_or_default();
        let path = directory.file(files::CONFIGURATION);
        let configuration = fs::read(&path);
        let configuration =
            configuration.map_err(|source| GuardedError::Configuration { path, source })?;
        Ok(Self {
            machine: processes.machine.filter(|machine| machine.is_alive()),
            kernel: settings.kernel,
            initramfs: settings.initramfs,
            configuration,
        })
    }
}

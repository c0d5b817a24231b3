//! The gate's own process: from its arguments to its sandbox to its service.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use rustix::net::RecvFlags;
use secmon_channel::KeyPair;

use crate::configuration::Configuration;
use crate::descriptors;
use crate::grants::{GrantError, Grants};
use crate::keeper::Keeper;
use crate::log::{Bounds, Log, LogError};
use crate::sandbox::{self, SandboxError};
use crate::service::Service;
use crate::steward::{Parts, Steward};
use crate::supervisor::{Given, HOPELESS};

/// Why a gate can't run.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The grant file.
    #[error(transparent)]
    Grants(#[from] GrantError),
    /// The key file.
    #[error(transparent)]
    Key(#[from] secmon_channel::KeyError),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The argument or the supervisor's messages are not what they should be.
    #[error("this is an internal command, started by `secmon gate`: {0}")]
    Internal(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
}

/// The gate's whole life, for a process started by the supervisor: `argument`
/// is its configuration, `control` its standard input.
pub fn run(argument: &str, control: OwnedFd) -> ExitCode {
    crate::signals::block_usual();
    match serve(argument, control) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("secmon gate: {error}");
            ExitCode::from(HOPELESS)
        }
    }
}

fn serve(argument: &str, control: OwnedFd) -> Result<ExitCode, GateError> {
    let host = |what| move |source| GateError::Host { what, source };
    let configuration: Configuration =
        serde_json::from_str(argument).map_err(|error| GateError::Internal(error.to_string()))?;
    let listener = UnixListener::from(given(&control, Given::Listener)?);
    let keeper = Keeper::new(given(&control, Given::Keeper)?);
    let grants = Grants::read(&configuration.grants)?;
    let key = KeyPair::read(&configuration.key)?;
    let bounds = Bounds {
        file_bytes: configuration.log_bytes,
        kept_files: configuration.log_files,
    };
    let log = Log::open(&configuration.log, bounds, &grants.target)?;
    let log = Arc::new(Mutex::new(log));
    let mut folders = vec![folder_of(&configuration.log)];
    folders.extend(configuration.dumps.clone());
    let (steward, door) = Steward::new(Parts {
        qmp: configuration.qmp,
        gdb: configuration.gdb,
        dumps: configuration.dumps,
        keeper,
        control,
        log: Arc::clone(&log),
    })
    .map_err(host("making a socket pair"))?;
    // A statically linked program takes random numbers from a file, which
    // stays open from the first time on.
    KeyPair::generate()?;
    sandbox::confine_gate(&folders)?;
    let service = Arc::new(Service::new(grants, key, door, log));
    std::thread::Builder::new()
        .name("gate-accept".to_owned())
        .spawn(move || {
            let error = service.run(&listener);
            eprintln!("secmon gate: accepting monitors: {error}");
            // The keeper lets the target run; the supervisor starts anew.
            std::process::exit(1);
        })
        .map_err(host("starting a thread"))?;
    Ok(steward.run())
}

/// What the supervisor gives first.
fn given(control: &OwnedFd, wanted: Given) -> Result<OwnedFd, GateError> {
    let message = descriptors::receive(control.as_fd(), RecvFlags::empty());
    match message {
        Ok(Some((kind, Some(descriptor)))) if kind == wanted as u8 => Ok(descriptor),
        Ok(other) => Err(GateError::Internal(format!(
            "{wanted:?} was expected from the supervisor, not {other:?}"
        ))),
        Err(error) => Err(GateError::Internal(error.to_string())),
    }
}

fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

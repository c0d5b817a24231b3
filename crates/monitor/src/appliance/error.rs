//! Why an appliance can't be built.

use std::io;
use std::path::{Path, PathBuf};

/// What went wrong while an appliance was built.
#[derive(Debug, thiserror::Error)]
pub enum ApplianceError {
    /// A file can't be read or written.
    #[error("{path}: {what}: {source}", path = path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A program can't be started.
    #[error("cannot run {program}: {source}; is it installed? {advice}")]
    Start {
        /// The program.
        program: String,
        /// The system's reason.
        source: io::Error,
        /// What else can be done.
        advice: &'static str,
    },
    /// A program failed.
    #[error("{command} ended with {status}:\n{message}")]
    Program {
        /// The command line.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote on its standard error.
        message: String,
    },
    /// A program wrote something that isn't text.
    #[error("{program} wrote something that isn't text")]
    NoText {
        /// The program.
        program: String,
    },
    /// apt knows no archive to fetch from.
    #[error(
        "apt knows no Debian archive here: run `apt-get update` once, as root, or give --kernel and --modules"
    )]
    NoArchive,
    /// A package is not what its name says.
    #[error("package {package}: {what}")]
    Package {
        /// The package, or its file.
        package: String,
        /// What is wrong.
        what: String,
    },
    /// The kernel is not one that a boot loader takes.
    #[error("{path} is no x86 Linux kernel image (bzImage): {what}", path = path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The kernel lacks a driver.
    #[error(
        "kernel {release} has no module {module}, and does not say that it is built in: the monitor can't do without it; use another kernel, such as Debian's cloud flavour"
    )]
    NoModule {
        /// The kernel.
        release: String,
        /// The module.
        module: String,
    },
    /// The program can't run in the appliance.
    #[error("{path} can't be the appliance's program: {what}; `cargo xtask appliance` makes one, --binary FILE names it", path = path.display())]
    Binary {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// More than an initramfs or an image can hold.
    #[error("{what} has {bytes} bytes, more than {limit}")]
    TooLarge {
        /// What.
        what: String,
        /// Its bytes.
        bytes: u64,
        /// The bound.
        limit: u64,
    },
    /// A document can't be written.
    #[error("writing the manifest: {0}")]
    Json(#[from] serde_json::Error),
}

impl ApplianceError {
    /// For `map_err` on what is done to a file.
    pub(crate) fn file(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            path: path.to_owned(),
            what,
            source,
        }
    }
}

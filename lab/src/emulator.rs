//! The QEMU that runs a guest: this machine's own, or a newer one fetched
//! from the archive and never installed.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use secmon_monitor::appliance::archive::Archive;

use crate::cache;

/// Goes up when what is kept of the packages changes.
const LAYOUT: u32 = 1;

/// The suite that carries QEMU 10.0 for this Debian's libraries.
const BACKPORTS: &str = "bookworm-backports";

/// The program and what it loads: option ROMs, firmware.
const PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-system-data", "seabios"];

/// Which QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Emulator {
    /// The one that is installed: 7.2 on Debian 12.
    Installed,
    /// 10.0, from Debian 12's backports.
    Backports,
}

impl Emulator {
    /// The program, fetched from the archive if it is neither installed nor
    /// in the cache.
    ///
    /// # Errors
    /// If the archive can't be reached, or a library is missing that QEMU of
    /// Debian 12 needs (`apt-get install qemu-system-x86` brings them).
    pub fn program(self) -> Result<PathBuf> {
        match self {
            Emulator::Installed => Ok(PathBuf::from("qemu-system-x86_64")),
            Emulator::Backports => {
                let folder = cache::entry(&format!("qemu-{BACKPORTS}-{LAYOUT}"), unpack)
                    .with_context(|| format!("cannot fetch QEMU of {BACKPORTS}"))?;
                Ok(folder.join("root/usr/bin/qemu-system-x86_64"))
            }
        }
    }
}

/// QEMU looks for its data relative to its own place, so that the unpacked
/// tree works where it is.
fn unpack(draft: &Path) -> Result<()> {
    let scratch = draft.join("apt");
    let archive = Archive::open(BACKPORTS, &scratch)?;
    let root = draft.join("root");
    for package in PACKAGES {
        archive.unpack(package, &root)?;
    }
    let program = root.join("usr/bin/qemu-system-x86_64");
    let output = std::process::Command::new(&program)
        .arg("--version")
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} does not start: {}; `apt-get install qemu-system-x86` brings the libraries",
        program.display(),
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    std::fs::remove_dir_all(scratch)?;
    Ok(())
}

//! The kernel image with debug information that Debian builds beside each
//! kernel, for tools that need one. Nothing of ours does.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use secmon_monitor::appliance::archive::Archive;

use crate::cache;
use crate::suite::Suite;

/// The uncompressed image (`vmlinux`) of a suite's kernel of that release, with
/// DWARF. Fetched from the archive the first time, 320 MB, and kept.
///
/// # Errors
/// If the archive no longer has this release's, or something else fails.
pub fn debug_image(suite: Suite, release: &str) -> Result<PathBuf> {
    let package = format!("linux-image-{release}-dbg");
    let entry = cache::entry(&format!("debug-{release}-1"), |draft| {
        let scratch = draft.join("scratch");
        let archive = Archive::open(suite.name(), &scratch.join("apt"))?;
        let file = archive.download(&package)?;
        // Modules make up four fifths of the package: they are left packed.
        let mut package = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(&file)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run dpkg-deb: is it installed?")?;
        let packed = package.stdout.take().context("the output of dpkg-deb")?;
        let unpacked = Command::new("tar")
            .args(["-x", "--wildcards", "--strip-components=5", "-C"])
            .arg(draft)
            .arg("./usr/lib/debug/boot/vmlinux-*")
            .stdin(packed)
            .status()
            .context("cannot run tar: is it installed?")?;
        let status = package.wait()?;
        ensure!(
            unpacked.success() && status.success(),
            "{} can't be unpacked: tar ended with {unpacked}, dpkg-deb with {status}",
            file.display()
        );
        fs::remove_dir_all(scratch)?;
        Ok(())
    })
    .with_context(|| format!("cannot fetch {package}"))?;
    let image = entry.join(format!("vmlinux-{release}"));
    ensure!(image.is_file(), "{package} holds no vmlinux-{release}");
    Ok(image)
}

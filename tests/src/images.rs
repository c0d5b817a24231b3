//! Memory images of real guests, made when a test asks for them.

use anyhow::{Context, Result};
use secmon_lab::{Backing, Guest, Suite, Workload};
use tempfile::TempPath;

use crate::open::{self, Opened};

/// The raw image of a guest that has some of everything, and not much of it.
///
/// # Errors
/// If the guest does not boot.
pub fn quiet_file(suite: Suite) -> Result<TempPath> {
    let workload = Workload {
        processes: 20,
        ..Workload::rich()
    };
    let guest = Guest::builder(suite)
        .backing(Backing::File)
        .workload(workload)
        .boot()?;
    let image = tempfile::NamedTempFile::new()?.into_temp_path();
    let ram = guest.ram_file().context("a RAM file")?;
    guest.while_stopped(|_| Ok(std::fs::copy(&ram, &image)?))?;
    Ok(image)
}

/// The same image, opened.
///
/// # Errors
/// If the guest does not boot or its kernel is not found.
pub fn quiet(suite: Suite) -> Result<Opened> {
    // The mapping outlives the file's name.
    open::image(&quiet_file(suite)?)
}

//! `cargo xtask demo`.

use std::process::Command;

use anyhow::Result;

use crate::prerequisites;
use crate::run::{cargo, run, target_folder};

/// Boots a guest and shows it from outside; the lab's `demo` program does the
/// work, built after what it needs is installed.
///
/// # Errors
/// What could not be installed, built or booted.
pub fn run_demo() -> Result<()> {
    prerequisites::for_guests()?;
    run(cargo().args(["build", "--release", "--package", "secmon"]))?;
    run(cargo().args([
        "build",
        "--release",
        "--package",
        "secmon-lab",
        "--example",
        "demo",
    ]))?;
    let programs = target_folder()?.join("release");
    run(Command::new(programs.join("examples/demo")).arg(programs.join("secmon")))
}

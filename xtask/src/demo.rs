//! `cargo xtask demo`.

use std::process::Command;

use anyhow::Result;

use crate::run::{cargo, run, target_folder};
use crate::{appliance, prerequisites};

/// Boots a guest and a monitoring VM beside it and shows what the latter sees;
/// the lab's `demo` program does the work, built after what it needs is
/// installed.
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
    let target = target_folder()?;
    let image = target.join("demo-appliance");
    appliance::build(&image, &[])?;
    let programs = target.join("release");
    run(Command::new(programs.join("examples/demo"))
        .arg(programs.join("secmon"))
        .arg(image))
}

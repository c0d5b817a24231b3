//! `cargo xtask appliance`: the program of the monitoring VM, linked
//! statically as there are no libraries, and the image that holds it.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::run::{cargo, root, run};

/// Static linking is a matter of the target, and naming the target keeps the
/// flags away from build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program that runs anywhere in memory has an entry of 24 bytes for each
/// pointer in it; packed they take a bit.
const STATIC_FLAGS: &str = "-Ctarget-feature=+crt-static -Clink-arg=-Wl,-z,pack-relative-relocs";

/// Builds both.
///
/// # Errors
/// If the program does not build, or the image can't be made.
pub fn build(output: &Path, arguments: &[String]) -> Result<()> {
    let program = program()?;
    run(std::process::Command::new(&program)
        .args(["monitor", "build", "--output"])
        .arg(output)
        .args(arguments))
}

/// Builds the static program, small.
fn program() -> Result<PathBuf> {
    // A folder of its own: the flags would undo the usual one's fingerprints.
    let folder = root().join("target/appliance");
    run(cargo()
        .args([
            "build",
            "--release",
            "--package",
            "secmon",
            // Without what takes events on a host.
            "--no-default-features",
            "--target",
            TARGET,
        ])
        .arg("--target-dir")
        .arg(&folder)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", STATIC_FLAGS)
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true"))?;
    Ok(folder.join(TARGET).join("release/secmon"))
}

//! `cargo xtask peers`: installs other tools from their packages into the build
//! folder and compares them with `secmon` on the same image.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::prerequisites;
use crate::run::{cargo, root, run, step, target_folder};

/// Installs, compares, and writes `docs/peers.md`.
///
/// # Errors
/// If a peer can't be installed, or a tool can't be started.
pub fn compare() -> Result<()> {
    prerequisites::for_guests()?;
    let folder = target_folder()?.join("peers");
    let scripts = root().join("benches/peers");
    let environment = folder.join("python");
    let python = environment.join("bin/python");
    let memflow = folder.join("memflow");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    step("volatility3 and drgn", || {
        if !python.exists() {
            let made = run(Command::new("python3")
                .args(["-m", "venv"])
                .arg(&environment));
            if made.is_err() {
                bail!("python3 can't make an environment; install python3-venv");
            }
        }
        run(Command::new(&python)
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ])
            .arg("--requirement")
            .arg(scripts.join("requirements.txt")))
    })?;
    step("memflow", || {
        run(cargo()
            .args(["build", "--release", "--locked"])
            .current_dir(scripts.join("memflow"))
            .env("CARGO_TARGET_DIR", &memflow))
    })?;
    step("secmon", || {
        run(cargo().args(["build", "--release", "--package", "secmon"]))
    })?;
    step("the comparison", || {
        run(cargo()
            .args(["run", "--release", "--package", "secmon-benches"])
            .args(["--bin", "peers", "--"])
            .arg(&python)
            .arg(memflow.join("release/peer-memflow"))
            .arg(folder.join("scratch")))
    })
}

//! Running other programs, with errors that say what was run.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The top of the repository.
pub fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest
        .parent()
        .map_or_else(|| manifest.clone(), PathBuf::from)
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command whose output goes where ours goes.
///
/// # Errors
/// If it can't be started or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Runs a command and returns what it prints.
///
/// # Errors
/// If it can't be started, fails, or prints something that is not UTF-8.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("the output of {command:?}"))
}

/// Runs one step under a headline and says how long it took.
///
/// # Errors
/// Those of the step, with its name.
pub fn step(name: &str, step: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("== {name}");
    let start = Instant::now();
    step().with_context(|| format!("step failed: {name}"))?;
    println!("== {name}: done in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// The folder that cargo builds into.
///
/// # Errors
/// If cargo can't say.
pub fn target_folder() -> Result<PathBuf> {
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version=1"]))?;
    // The one path of this name; a JSON parser would be all that needs one here.
    let folder = metadata
        .split_once("\"target_directory\":\"")
        .and_then(|(_, rest)| rest.split_once('"'));
    folder
        .map(|(folder, _)| PathBuf::from(folder))
        .context("cargo metadata names no target folder")
}

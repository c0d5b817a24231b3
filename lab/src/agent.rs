//! Builds static programs: `secmon-truth`, the guest's process 1, and `secmon`
//! for a monitoring VM.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context as _, Result, ensure};

/// Static linking is a matter of the target, and naming the target keeps the
/// flags away from build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// A program that runs anywhere in memory has an entry of 24 bytes for each
/// pointer in it; packed they take a bit.
const STATIC_FLAGS: &str = "-Ctarget-feature=+crt-static -Clink-arg=-Wl,-z,pack-relative-relocs";

/// The built program. Cargo decides whether there is anything to build, once
/// a process.
pub fn program() -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(path) = built.as_ref() {
        return Ok(path.clone());
    }
    let path = build()?;
    *built = Some(path.clone());
    Ok(path)
}

fn build() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("truth/Cargo.toml");
    // Small, as it is unpacked at each start.
    let profile = [("PANIC", "abort")];
    static_program(&manifest, "secmon-truth", &profile).context("the guest's agent")
}

/// `secmon` as a static program, as the appliance of a monitor needs it. Built
/// once a process, without the link-time optimisation of what is shipped, which
/// takes minutes.
pub fn static_secmon() -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(path) = built.as_ref() {
        return Ok(path.clone());
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cli/Cargo.toml");
    let path = static_binary(&manifest, "secmon")?;
    *built = Some(path.clone());
    Ok(path)
}

/// A binary of the package in `manifest` as a static program, built as
/// [`static_secmon`] is and beside it, so that both share what they depend on.
pub fn static_binary(manifest: &Path, binary: &str) -> Result<PathBuf> {
    // Without link-time optimisation what is compiled for speed would hardly
    // fit the image.
    let profile = [("LTO", "off"), ("CODEGEN_UNITS", "16"), ("OPT_LEVEL", "s")];
    static_program(manifest, binary, &profile)
}

/// Builds a binary as a static program, in a folder of its own: a test runs
/// under a cargo that may hold the lock of the usual one, and the flags here
/// would undo its fingerprints.
fn static_program(manifest: &Path, binary: &str, profile: &[(&str, &str)]) -> Result<PathBuf> {
    // A relative CARGO_TARGET_DIR is relative to where cargo was started,
    // which isn't known here.
    let folder = env::var_os("CARGO_TARGET_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"))
        .join(match binary {
            "secmon-truth" => "secmon-truth",
            _ => "secmon-static",
        });
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(&cargo);
    command
        // Of the program: without what takes events on a host.
        .args(["build", "--quiet", "--release", "--no-default-features"])
        .args(["--target", TARGET])
        .arg("--manifest-path")
        .arg(manifest)
        .arg("--target-dir")
        .arg(&folder)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", STATIC_FLAGS)
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true");
    for (setting, value) in profile {
        command.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }
    let output = command
        .output()
        .with_context(|| format!("cannot run {}", Path::new(&cargo).display()))?;
    ensure!(
        output.status.success(),
        "cannot build {binary} ({}):\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(folder.join(TARGET).join("release").join(binary))
}

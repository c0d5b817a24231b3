//! `cargo xtask test` and `cargo xtask bench`.

use std::process::Command;

use anyhow::Result;

use crate::run::{cargo, root, run, step, target_folder};
use crate::{docs, fuzz, prerequisites, tests};

/// Seconds for each fuzz target inside the tests.
const FUZZ_SECONDS: u32 = 2;

/// Seconds that Criterion takes for a benchmark inside the tests, where a limit
/// is held to and no figure is published.
const QUICK: [&str; 4] = ["--warm-up-time", "1", "--measurement-time", "2"];

/// Everything that must pass.
///
/// # Errors
/// The first step that fails.
pub fn run_all() -> Result<()> {
    step("what the tests need", prerequisites::for_tests)?;
    step("formatting", || {
        run(cargo().args(["fmt", "--all", "--check"]))?;
        // A workspace of its own.
        run(cargo()
            .args(["fmt", "--check", "--manifest-path"])
            .arg(root().join("fuzz/Cargo.toml")))
    })?;
    step("lints", || {
        run(cargo().args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))
    })?;
    step("documentation", || {
        run(cargo()
            .args([
                "doc",
                "--workspace",
                "--no-deps",
                "--document-private-items",
            ])
            .env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    step("tests", tests::run_all)?;
    step("generated documents", docs::check_built)?;
    step("fuzz targets", || fuzz::run_targets(FUZZ_SECONDS, None))?;
    step("benchmark limits", check_limits)
}

/// Holds what the tests were built from to the limits of the benchmarks. A
/// release build would take longer than all of them; what it publishes comes
/// from [`bench()`].
fn check_limits() -> Result<()> {
    // Of the whole workspace, as the tests: of a package alone the dependencies
    // would be built anew, with fewer features. With the benchmarks cargo
    // builds the programs of their package, with the tests `secmon`.
    let mut benchmarks = cargo();
    benchmarks.args(["bench", "--profile", "dev", "--workspace"]);
    for name in ["detectors", "reads", "tables"] {
        benchmarks.args(["--bench", name]);
    }
    run(benchmarks.arg("--").args(QUICK))?;
    run(Command::new(target_folder()?.join("debug/report")).arg("--check"))
}

/// Measures and writes `docs/performance.md`.
///
/// # Errors
/// If a benchmark fails or misses its limit.
pub fn bench() -> Result<()> {
    prerequisites::for_guests()?;
    run(cargo().args(["build", "--release", "--package", "secmon"]))?;
    run(cargo().args(["bench", "--package", "secmon-benches", "--benches"]))?;
    run(cargo()
        .args(["run", "--release", "--package", "secmon-benches"])
        .args(["--bin", "report"]))
}

/// Measures what a monitoring VM costs and writes `docs/costs.md`.
///
/// # Errors
/// If a guest does not start.
pub fn costs() -> Result<()> {
    prerequisites::for_guests()?;
    run(cargo().args([
        "run",
        "--release",
        "--package",
        "secmon-benches",
        "--bin",
        "costs",
    ]))
}

/// Measures what the detectors find of specimens and of clean guests, and
/// writes `docs/detection.md`.
///
/// # Errors
/// If a guest does not start, or a detector misses a specimen or finds
/// something in a clean guest.
pub fn detection(checks: u32, minutes: Option<u64>, arguments: &[String]) -> Result<()> {
    prerequisites::for_guests()?;
    let mut command = cargo();
    command
        .args(["run", "--release", "--package", "secmon-tests"])
        .args(["--bin", "detection", "--", "measure", "--checks"])
        .arg(checks.to_string());
    if let Some(minutes) = minutes {
        command.args(["--minutes", &minutes.to_string()]);
    }
    let measured = run(command.args(arguments));
    docs::run(false)?;
    measured
}

/// Attacks a monitoring VM after so many rounds of a clean one, and writes the
/// table of `SECURITY.md`.
///
/// # Errors
/// If an attack has another outcome than it must have, or something is found
/// in a clean monitor.
pub fn lifetime(rounds: u32) -> Result<()> {
    prerequisites::for_guests()?;
    run(cargo()
        .args(["run", "--release", "--package", "secmon-lifetime", "--"])
        .arg(rounds.to_string()))
}

//! `cargo xtask test` and `cargo xtask bench`.

use anyhow::Result;

use crate::run::{cargo, run, step};
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
        run(cargo().args(["fmt", "--all", "--check"]))
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
    step("benchmark limits", || bench_with(&["--check"], &QUICK))
}

/// Measures and writes `docs/performance.md`.
///
/// # Errors
/// If a benchmark fails or misses its limit.
pub fn bench() -> Result<()> {
    prerequisites::for_guests()?;
    bench_with(&[], &[])
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
pub fn detection(checks: u32) -> Result<()> {
    prerequisites::for_guests()?;
    let measured = run(cargo()
        .args(["run", "--release", "--package", "secmon-tests"])
        .args(["--bin", "detection", "--", "measure"])
        .arg(checks.to_string()));
    docs::run(false)?;
    measured
}

fn bench_with(arguments: &[&str], criterion: &[&str]) -> Result<()> {
    run(cargo().args(["build", "--release", "--package", "secmon"]))?;
    run(cargo()
        .args(["bench", "--package", "secmon-benches", "--benches", "--"])
        .args(criterion))?;
    run(cargo()
        .args([
            "run",
            "--release",
            "--package",
            "secmon-benches",
            "--bin",
            "report",
            "--",
        ])
        .args(arguments))
}

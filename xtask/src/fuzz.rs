//! `cargo xtask fuzz`: builds the targets of `fuzz/` with libFuzzer's coverage
//! instrumentation by the stable compiler and runs each for a bounded time.
//!
//! The parsers have no unsafe code to sanitize, so no sanitizer (and with it
//! no nightly compiler) is needed; overflow checks and debug assertions are on.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{cargo, output, root, run};

/// What `cargo fuzz` passes, less the sanitizer.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Cdebug-assertions=on -Coverflow-checks=on -Ccodegen-units=1";
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Memory bound of a target in MiB: parsers must stay far below.
const MEMORY_LIMIT: &str = "-rss_limit_mb=1024";
/// Seconds that one input may take.
const TIMEOUT: &str = "-timeout=10";

/// Runs the targets whose name contains `only`, `seconds` each.
///
/// # Errors
/// If one can't be built, or finds a failing input.
pub fn run_targets(seconds: u32, only: Option<&str>) -> Result<()> {
    let folder = root().join("fuzz");
    run(cargo()
        .args([
            "build",
            "--release",
            "--quiet",
            "--target",
            TRIPLE,
            "--manifest-path",
        ])
        .arg(folder.join("Cargo.toml"))
        .env("RUSTFLAGS", FLAGS))?;
    let listing = output(
        cargo()
            .args([
                "metadata",
                "--no-deps",
                "--format-version=1",
                "--manifest-path",
            ])
            .arg(folder.join("Cargo.toml")),
    )?;
    let mut ran = 0;
    for target in targets(&folder)? {
        if only.is_some_and(|only| !target.contains(only)) {
            continue;
        }
        if !listing.contains(&format!("\"{target}\"")) {
            bail!("fuzz/targets/{target}.rs is not a binary of fuzz/Cargo.toml");
        }
        run_target(&folder, &target, seconds)?;
        ran += 1;
    }
    if ran == 0 {
        bail!(
            "no fuzz target is named like {}",
            only.unwrap_or("anything")
        );
    }
    println!("{ran} fuzz targets ran {seconds} s each and found nothing");
    Ok(())
}

fn targets(folder: &Path) -> Result<Vec<String>> {
    let sources = folder.join("targets");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&sources).with_context(|| sources.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(stem) = path.file_stem().and_then(|stem| stem.to_str())
        {
            names.push(stem.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn run_target(folder: &Path, target: &str, seconds: u32) -> Result<()> {
    let program = folder
        .join("target")
        .join(TRIPLE)
        .join("release")
        .join(target);
    let stored = folder.join("corpus").join(target);
    let artifacts = folder.join("artifacts").join(target);
    // New inputs go to a folder of the run, so that a test changes no source.
    let found = folder.join("target").join("found").join(target);
    for folder in [&stored, &artifacts, &found] {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    println!("-- {target}");
    let output = Command::new(&program)
        .arg(&found)
        .arg(&stored)
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(format!("-max_total_time={seconds}"))
        .args([
            TIMEOUT,
            MEMORY_LIMIT,
            "-print_final_stats=1",
            "-verbosity=0",
        ])
        .output()
        .with_context(|| format!("starting {}", program.display()))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!(
            "{target}: {}; the input is in {}\n{messages}",
            output.status,
            artifacts.display()
        );
    }
    for line in messages
        .lines()
        .filter(|line| line.contains("number_of_executed_units"))
    {
        println!("   {line}");
    }
    Ok(())
}

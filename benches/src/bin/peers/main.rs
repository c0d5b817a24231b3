//! The same jobs on the same image by SecMon, volatility3, drgn and memflow:
//! how long, how much memory, and how much of it is true. Writes
//! `docs/peers.md`. `cargo xtask peers` installs the peers and starts it.
//!
//! Usage: peers PYTHON MEMFLOW SCRATCH
#![forbid(unsafe_code)]

mod jobs;
mod reads;
mod report;
mod runs;
mod truth;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secmon_benches::image;
use secmon_lab::{Suite, debug_image};

use jobs::Setup;
use report::Facts;
use truth::Truth;

fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes a file with `secmon`, anew, and says how long that took.
fn make(secmon: &Path, image: &Path, path: &Path, arguments: &[&str]) -> Result<Duration> {
    if path.exists() {
        fs::remove_file(path)?;
    }
    let start = Instant::now();
    output(
        Command::new(secmon)
            .arg("-t")
            .arg(format!("file:{}", image.display()))
            .arg("--no-cache")
            .args(arguments)
            .arg(path),
    )?;
    Ok(start.elapsed())
}

/// The version of a package in `cargo`'s lock file.
fn locked_version(lock: &Path, package: &str) -> Result<String> {
    let text = fs::read_to_string(lock).with_context(|| lock.display().to_string())?;
    let version = text
        .split_once(&format!("name = \"{package}\"\nversion = \""))
        .and_then(|(_, rest)| rest.split_once('"'));
    let (version, _) = version.with_context(|| format!("no {package} in {}", lock.display()))?;
    Ok(version.to_owned())
}

fn main() -> Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [python, memflow, scratch] = arguments.as_slice() else {
        bail!("usage: peers PYTHON MEMFLOW SCRATCH; `cargo xtask peers` does it all");
    };
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| manifest.join("../target"), PathBuf::from);
    let folder = image::with_truth()?;
    let truth = Truth::read(&folder)?;
    let release = truth.release()?;
    let debug_image = debug_image(Suite::Trixie, &release).map_err(|error| format!("{error:#}"));
    let setup = Setup {
        image: folder.join("ram.raw"),
        core: scratch.join("core.elf"),
        symbols: scratch.join("symbols"),
        debug_image,
        secmon: target.join("release/secmon"),
        python: python.clone(),
        scripts: manifest.join("peers"),
        memflow: memflow.clone(),
        scratch: scratch.clone(),
    };
    if scratch.exists() {
        fs::remove_dir_all(scratch).with_context(|| scratch.display().to_string())?;
    }
    fs::create_dir_all(setup.symbols.join("linux"))?;
    let isf = setup.symbols.join("linux/guest.json");
    let isf_time = make(&setup.secmon, &setup.image, &isf, &["isf"])?;
    let core = make(
        &setup.secmon,
        &setup.image,
        &setup.core,
        &["dump", "--as", "elf"],
    )?;
    let python_version = |package: &str| {
        let code = format!("import importlib.metadata as m; print(m.version({package:?}))");
        output(Command::new(python).arg("-c").arg(code)).map(|text| text.trim().to_owned())
    };
    let lock = manifest.join("peers/memflow/Cargo.lock");
    let facts = Facts {
        versions: vec![
            ("SecMon".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("volatility3".to_owned(), python_version("volatility3")?),
            ("drgn".to_owned(), python_version("drgn")?),
            ("memflow".to_owned(), locked_version(&lock, "memflow")?),
        ],
        release,
        isf: (isf_time, fs::metadata(&isf)?.len()),
        core,
        debug_image: match &setup.debug_image {
            Ok(path) => Ok(fs::metadata(path)?.len()),
            Err(reason) => Err(reason.clone()),
        },
    };
    let pat = reads::large_page_with_pat(&setup)?;
    let reads = reads::compete(&setup)?;
    let path = manifest.join("../docs/peers.md");
    let mut results = Vec::new();
    for job in jobs::jobs(&setup, &truth) {
        let outcomes = runs::compete(&setup, &job)?;
        results.push((job, outcomes));
        // After each, as all of it takes long.
        let text = report::document(&facts, &results, &reads, &pat)?;
        fs::write(&path, &text).with_context(|| path.display().to_string())?;
    }
    println!("written: {}", path.display());
    let wrong = results.iter().flat_map(|(job, outcomes)| {
        let own = outcomes.iter().filter(|outcome| outcome.tool == "SecMon");
        own.filter(|outcome| !outcome.verdict.as_ref().is_ok_and(truth::Verdict::is_right))
            .map(|_| job.title)
    });
    let wrong: Vec<_> = wrong.collect();
    ensure!(
        wrong.is_empty() && reads.iter().all(|read| read.tool != "SecMon" || read.right),
        "SecMon itself is not right in: {}",
        wrong.join("; ")
    );
    Ok(())
}

//! Puts Criterion's results and whole runs of `secmon` beside the limits that
//! the project holds itself to, writes `docs/performance.md`, and fails if a
//! limit is missed. `cargo xtask bench` runs the benchmarks before it.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use secmon_benches::process::{median, peak_memory, processor, secmon_ps, time};
use secmon_benches::{image, watch};
use serde_json::Value;

/// Whole runs of each kind; the middle one counts.
const RUNS: usize = 21;

/// How far over its limit a value may be under `--check`, which runs on
/// machines that others share.
const CHECK_TOLERANCE: f64 = 2.5;

/// One line of the report.
struct Line {
    what: String,
    value: f64,
    unit: &'static str,
    limit: Option<f64>,
}

impl Line {
    fn is_missed(&self, tolerance: f64) -> bool {
        self.limit
            .is_some_and(|limit| self.value > limit * tolerance)
    }
}

fn json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path)
        .with_context(|| format!("{} (made by `cargo xtask bench`)", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

/// Nanoseconds for each element of a benchmark, the median of its samples.
fn per_element(folder: &Path, name: &str) -> Result<f64> {
    let folder = folder.join("criterion").join(name).join("new");
    let nanoseconds = json(&folder.join("estimates.json"))?["median"]["point_estimate"].as_f64();
    let elements = json(&folder.join("benchmark.json"))?["throughput"]["Elements"].as_f64();
    Ok(nanoseconds.context("a median")? / elements.unwrap_or(1.0))
}

fn whole_runs(secmon: &Path) -> Result<[Line; 4]> {
    let image = image::path()?;
    let milliseconds = |duration: std::time::Duration| duration.as_secs_f64() * 1000.0;
    let folder = tempfile::tempdir()?;
    let mut cold = Vec::new();
    let mut cold_memory = 0;
    for run in 0..RUNS {
        let cache = folder.path().join(run.to_string());
        cold.push(time(&mut secmon_ps(secmon, &image, &cache))?);
        let cache = folder.path().join(format!("{run}-memory"));
        let run = peak_memory(&mut secmon_ps(secmon, &image, &cache))?;
        cold_memory = cold_memory.max(run.peak_anonymous_kib);
    }
    ensure!(
        cold_memory > 0,
        "the runs were over before their memory was looked at"
    );
    let cache = folder.path().join("warm");
    let mut warm = Vec::new();
    let mut warm_memory = 0;
    for _ in 0..=RUNS {
        warm.push(time(&mut secmon_ps(secmon, &image, &cache))?);
        let run = peak_memory(&mut secmon_ps(secmon, &image, &cache))?;
        warm_memory = warm_memory.max(run.peak_anonymous_kib);
    }
    // The first one filled the cache.
    warm.remove(0);
    let mebibytes = |kibibytes: u64| kibibytes as f64 / 1024.0;
    let line = |what: &str, value, unit, limit| Line {
        what: what.to_owned(),
        value,
        unit,
        limit,
    };
    Ok([
        line(
            "`secmon ps`, 1,000 tasks, cold profile cache",
            milliseconds(median(cold)),
            "ms",
            Some(150.0),
        ),
        line(
            "– its own memory at most",
            mebibytes(cold_memory),
            "MiB",
            Some(64.0),
        ),
        line(
            "`secmon ps`, 1,000 tasks, warm profile cache",
            milliseconds(median(warm)),
            "ms",
            Some(15.0),
        ),
        line(
            "– its own memory at most",
            mebibytes(warm_memory),
            "MiB",
            None,
        ),
    ])
}

fn lines(target: &Path, check: bool) -> Result<Vec<Line>> {
    let line = |what: &str, value, unit, limit| Line {
        what: what.to_owned(),
        value,
        unit,
        limit,
    };
    // Built with the same profile as this program.
    let secmon = std::env::current_exe()?.with_file_name("secmon");
    let read = |name: &str| per_element(target, &format!("reads/{name}"));
    let memcpy = read("sequential_4KiB_memcpy")?;
    let sequential = read("sequential_4KiB")?;
    let tasks = |name: &str| -> Result<f64> {
        let folder = format!("tables/{name}");
        Ok(per_element(target, &folder)? * 1000.0 / 1e6)
    };
    let mut lines = vec![
        line(
            "8-byte read, hot (1 MiB)",
            read("hot_u64")?,
            "ns",
            Some(30.0),
        ),
        line(
            "8-byte read, random over 480 MiB, one by one",
            read("random_u64")?,
            "ns",
            None,
        ),
        line(
            "8-byte read, random over 480 MiB, batched",
            read("random_u64_batched")?,
            "ns",
            Some(150.0),
        ),
        line("4 KiB read, sequential", sequential, "ns", None),
        line("– memcpy of the same pages", memcpy, "ns", None),
        line(
            "– beyond memcpy",
            (sequential - memcpy).max(0.0),
            "ns",
            Some(150.0),
        ),
        line(
            "1,000 tasks, every column without user pages",
            tasks("processes_kernel_columns")?,
            "ms",
            Some(1.0),
        ),
        line(
            "1,000 tasks, one column",
            tasks("processes_one_column")?,
            "ms",
            None,
        ),
        line(
            "1,000 tasks, every column",
            tasks("processes_all_columns")?,
            "ms",
            None,
        ),
        line(
            "finding kernel, symbols and types, no cache",
            per_element(target, "find_kernel")? / 1e6,
            "ms",
            None,
        ),
    ];
    lines.extend(whole_runs(&secmon)?);
    lines.push(line(
        "all detectors once, 300 processes",
        per_element(target, "detectors/all")? / 1e6,
        "ms",
        Some(250.0),
    ));
    for detector in secmon_detect::detectors() {
        lines.push(Line {
            what: format!("– {}", detector.name()),
            value: per_element(target, &format!("detectors/{}", detector.name()))? / 1e6,
            unit: "ms",
            limit: None,
        });
    }
    // What is used to find the kernel is a larger part of a shorter time.
    let (seconds, loads): (u32, &[(bool, &str)]) = if check {
        (15, &[(false, "at rest")])
    } else {
        (60, &[(false, "at rest"), (true, "that fork and exit")])
    };
    for (busy, load) in loads {
        lines.push(Line {
            what: format!("`secmon watch` for {seconds} s, 300 processes {load}, of one core"),
            value: watch::share(&secmon, *busy, seconds)?,
            unit: "%",
            limit: Some(5.0),
        });
    }
    Ok(lines)
}

fn document(lines: &[Line]) -> Result<String> {
    let mut text = String::from(
        "# Performance\n\n\
         Written by `cargo xtask bench`; do not edit. The image: 512 MiB of a Linux 6.12 guest with \
         1,000 tasks, raw, mapped. Reads and tables are Criterion's medians \
         (`benches/benches/`), whole runs the median of 21 processes, memory the largest \
         `RssAnon` seen in any of them (`benches/src/process.rs`). A whole run uses a second thread \
         while it reads types and while it makes rows. Detectors look at the image of another guest of \
         that kernel and size, with 300 processes. A watch is measured from its start to its end, \
         all its processes together, on a running guest.\n\n",
    );
    writeln!(text, "Machine: {}.\n", processor())?;
    writeln!(text, "| what | measured | limit |\n|---|---:|---:|")?;
    for line in lines {
        let limit = line
            .limit
            .map_or(String::new(), |limit| format!("{limit} {}", line.unit));
        let missed = if line.is_missed(1.0) { ", missed" } else { "" };
        writeln!(
            text,
            "| {} | {:.2} {} | {limit}{missed} |",
            line.what, line.value, line.unit
        )?;
    }
    Ok(text)
}

fn main() -> Result<()> {
    let check = std::env::args().any(|argument| argument == "--check");
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| manifest.join("../target"), PathBuf::from);
    let lines = lines(&target, check)?;
    let text = document(&lines)?;
    println!("{text}");
    if !check {
        let path = manifest.join("../docs/performance.md");
        std::fs::write(&path, &text).with_context(|| path.display().to_string())?;
    }
    let tolerance = if check { CHECK_TOLERANCE } else { 1.0 };
    let missed = lines
        .iter()
        .filter(|line| line.is_missed(tolerance))
        .map(|line| line.what.as_str());
    let missed: Vec<_> = missed.collect();
    if !missed.is_empty() {
        bail!("over {tolerance} × the limit: {}", missed.join("; "));
    }
    Ok(())
}

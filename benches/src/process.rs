//! Whole processes: how long one runs and how much memory of its own it has.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// From the start of the process to its end.
    pub elapsed: Duration,
    /// The largest `RssAnon` seen, in KiB: memory of its own, without the
    /// mapped image. The kernel keeps no peak of it, so it is looked at all
    /// the time; 0 if the process was over before the first look.
    pub peak_anonymous_kib: u64,
}

/// Anonymous memory of a process in KiB (`RssAnon`), while it runs.
pub fn anonymous_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Runs a command whose output nobody reads, and times it.
///
/// # Errors
/// If it can't be started or fails.
pub fn time(command: &mut Command) -> Result<Duration> {
    let start = Instant::now();
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    let elapsed = start.elapsed();
    let status = status.with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(elapsed)
}

/// Runs a command and looks at its memory all the time.
///
/// # Errors
/// If it can't be started or fails.
pub fn peak_memory(command: &mut Command) -> Result<Run> {
    let start = Instant::now();
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut child = child.with_context(|| format!("starting {command:?}"))?;
    let mut peak_anonymous_kib = 0;
    let status = loop {
        peak_anonymous_kib = peak_anonymous_kib.max(anonymous_kib(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait()? {
            break status;
        }
    };
    ensure!(status.success(), "{command:?}: {status}");
    Ok(Run {
        elapsed: start.elapsed(),
        peak_anonymous_kib,
    })
}

/// The middle one of these durations.
pub fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort();
    durations
        .get(durations.len() / 2)
        .copied()
        .unwrap_or_default()
}

/// `secmon -t file:IMAGE ps` with all columns, its profiles in `cache`.
pub fn secmon_ps(secmon: &Path, image: &Path, cache: &Path) -> Command {
    let mut command = Command::new(secmon);
    command.arg("-t").arg(format!("file:{}", image.display()));
    command
        .arg("--cache-dir")
        .arg(cache)
        .args(["ps", "--format", "json"]);
    command
}

/// How many processors this machine has, and of which model.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or_default();
    let cores = text
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    format!("{cores} × {}", model.trim_start_matches([' ', '\t', ':']))
}

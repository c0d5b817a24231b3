//! Runs of the jobs: every tool in turn, several rounds, each run a process of
//! its own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::jobs::{Caches, Contestant, Job, Setup};
use crate::truth::Verdict;
use secmon_benches::process::{anonymous_kib, median};

/// Rounds of each job.
pub const ROUNDS: usize = 3;
/// A tool that has had this long for a job is not run again.
pub const BUDGET: Duration = Duration::from_secs(40);
/// Our own runs in a round: short ones vary more.
const OWN_RUNS: usize = 3;
/// How often a process's memory is looked at.
const LOOK: Duration = Duration::from_millis(3);

/// What a tool made of a job.
pub struct Outcome {
    /// The tool.
    pub tool: &'static str,
    /// What it was asked for, and with which caches.
    pub how: String,
    /// How often it was run.
    pub runs: usize,
    /// The median of its runs.
    pub median: Duration,
    /// The largest `RssAnon` seen, in KiB.
    pub memory: u64,
    /// How its rows compare with the truth; or why it gave none.
    pub verdict: Result<Verdict, String>,
}

/// One run of a process.
struct Run {
    elapsed: Duration,
    memory: u64,
    failure: Option<String>,
}

fn run(command: &mut Command, output: &Path) -> Result<Run> {
    let errors = output.with_extension("errors");
    let start = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(File::create(output)?)
        .stderr(File::create(&errors)?)
        .spawn();
    let mut child = child.with_context(|| format!("starting {command:?}"))?;
    let pid = child.id();
    let over = AtomicBool::new(false);
    let (status, elapsed, memory) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut most = 0;
            while !over.load(Ordering::Relaxed) {
                most = most.max(anonymous_kib(pid).unwrap_or(0));
                std::thread::sleep(LOOK);
            }
            most
        });
        let status = child.wait();
        let elapsed = start.elapsed();
        over.store(true, Ordering::Relaxed);
        (status, elapsed, watch.join().unwrap_or(0))
    });
    let failure = match status?.success() {
        true => None,
        false => {
            let text = fs::read(&errors).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let last = text.lines().rfind(|line| !line.trim().is_empty());
            Some(last.unwrap_or("it failed and said nothing").to_owned())
        }
    };
    Ok(Run {
        elapsed,
        memory,
        failure,
    })
}

fn cache_folder(setup: &Setup, contestant: &Contestant, warm: bool) -> Result<PathBuf> {
    let kind = if warm { "warm" } else { "cold" };
    let folder = setup.scratch.join(format!("{}-{kind}", contestant.tool));
    if !warm && folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Does one job with every tool.
///
/// # Errors
/// If a tool can't be started, or ours fails.
pub fn compete(setup: &Setup, job: &Job) -> Result<Vec<Outcome>> {
    let output = setup.scratch.join("output.json");
    let mut elapsed: Vec<Vec<Duration>> = vec![Vec::new(); job.contestants.len()];
    let mut memory = vec![0; job.contestants.len()];
    let mut verdicts: Vec<Option<Result<Verdict, String>>> = vec![None; job.contestants.len()];
    // Whoever needs a filled cache gets it filled, once for all jobs.
    for contestant in &job.contestants {
        let cache = cache_folder(setup, contestant, true)?;
        if contestant.caches == Caches::Warm && fs::read_dir(&cache)?.next().is_none() {
            run(&mut contestant.command(setup, &cache), &output)?;
        }
    }
    for round in 0..ROUNDS {
        for (number, contestant) in job.contestants.iter().enumerate() {
            if elapsed[number].iter().sum::<Duration>() > BUDGET {
                continue;
            }
            let runs = match contestant.tool {
                "SecMon" => OWN_RUNS,
                _ => 1,
            };
            for _ in 0..runs {
                let warm = contestant.caches == Caches::Warm;
                let cache = cache_folder(setup, contestant, warm)?;
                let run = run(&mut contestant.command(setup, &cache), &output)?;
                eprintln!(
                    "{}, round {round}: {} {} {:.3} s",
                    job.title,
                    contestant.tool,
                    contestant.how,
                    run.elapsed.as_secs_f64()
                );
                elapsed[number].push(run.elapsed);
                memory[number] = run.memory.max(memory[number]);
                let verdict = match run.failure {
                    Some(failure) => Err(failure),
                    None => (contestant.rows)(&fs::read(&output)?)
                        .map(|rows| job.expected.judge(rows))
                        .map_err(|error| format!("{error:#}")),
                };
                ensure!(
                    contestant.tool != "SecMon" || verdict.is_ok(),
                    "{}: SecMon failed: {}",
                    job.title,
                    verdict.err().unwrap_or_default()
                );
                verdicts[number] = Some(verdict);
            }
        }
    }
    let outcomes = job
        .contestants
        .iter()
        .zip(elapsed)
        .zip(memory)
        .zip(verdicts);
    Ok(outcomes
        .map(|(((contestant, elapsed), memory), verdict)| Outcome {
            tool: contestant.tool,
            how: match contestant.caches {
                Caches::Cold => format!("`{}`, cold cache", contestant.how),
                Caches::Warm => format!("`{}`, warm cache", contestant.how),
                Caches::None => format!("`{}`", contestant.how),
            },
            runs: elapsed.len(),
            median: median(elapsed),
            memory,
            verdict: verdict.unwrap_or_else(|| Err("it was never run".to_owned())),
        })
        .collect())
}

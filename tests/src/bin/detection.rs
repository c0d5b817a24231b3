//! Measures what the detectors find of each specimen and of clean guests, and
//! writes or prints `docs/detection.md`.
//!
//! `detection measure` stores what it measures in `docs/detection.json`, each
//! part as soon as it is there; `detection print` prints the document from
//! that file and from what the detectors and the specimens say of themselves,
//! and measures nothing.
#![forbid(unsafe_code)]

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use secmon_lab::Suite;
use secmon_lab::specimens::BLINKING;
use secmon_tests::detection::blinking::{self, Blinking};
use secmon_tests::detection::plan::{self, Parts, Plan, SEVERAL};
use secmon_tests::detection::{Effort, Measured, measure};
use secmon_tests::document;

/// How many guests run at a time: with one more, the checks wait for the
/// guests' own work.
const AT_ONCE: usize = 2;
/// Of guests with several processors so much fewer checks are made.
const FEWER: u32 = 10;
/// Checks while one specimen hides and shows itself.
const BLINKS: u32 = 20;

#[derive(Parser)]
#[command(name = "detection", about = "What the detectors find, measured")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Print the document from what was measured
    Print,
    /// Measure, and keep what was measured in docs/detection.json
    Measure(Box<Measure>),
}

#[derive(Args)]
struct Measure {
    /// Checks of each clean guest under each load
    #[arg(long, default_value_t = 1000)]
    checks: u32,
    /// The same for guests with four processors; a tenth if not given
    #[arg(long)]
    smp_checks: Option<u32>,
    /// End after about so many minutes, with fewer checks, about as many of each
    #[arg(long)]
    minutes: Option<u64>,
    /// Add to the clean checks that this program made before
    #[arg(long)]
    resume: bool,
    /// Only this part
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Only these kernels: 5.10, 6.1 and so on
    #[arg(long = "kernel")]
    kernels: Vec<String>,
    /// Only loads of clean guests whose names contain this
    #[arg(long)]
    load: Option<String>,
    /// Let only the detector look at a specimen that is said to find it
    #[arg(long)]
    expected: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Specimens are made and looked for
    Specimens,
    /// Specimens hide and show themselves by turns
    Blinking,
    /// Guests without specimens are checked
    Clean,
}

fn stored() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/detection.json")
}

fn parts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/detection/clean.json")
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Print => {
            print!("{}", document::text(&read()?));
            Ok(())
        }
        What::Measure(arguments) => run(&arguments),
    }
}

fn read() -> Result<Vec<Measured>> {
    let path = stored();
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

/// Changes what is stored of one kernel.
fn change(kernel: &str, change: impl FnOnce(&mut Measured)) -> Result<()> {
    // Several guests are measured at a time.
    static STORE: Mutex<()> = Mutex::new(());
    let _one_at_a_time = STORE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut all = read()?;
    let place = |series: &str| Suite::ALL.iter().position(|one| one.series() == series);
    let measured = match all.iter_mut().find(|one| one.kernel == kernel) {
        Some(measured) => measured,
        None => {
            all.push(Measured::new(kernel));
            all.sort_by_key(|one| place(&one.kernel));
            let mut all = all.iter_mut();
            all.find(|one| one.kernel == kernel).context("a kernel")?
        }
    };
    change(measured);
    let mut text = serde_json::to_string_pretty(&all)?;
    text.push('\n');
    let path = stored();
    let new = path.with_extension("json.new");
    fs::write(&new, text).with_context(|| new.display().to_string())?;
    fs::rename(&new, &path).with_context(|| path.display().to_string())
}

fn run(arguments: &Measure) -> Result<()> {
    let started = Instant::now();
    let suites: Vec<Suite> = Suite::ALL
        .into_iter()
        .filter(|suite| {
            let wanted = &arguments.kernels;
            wanted.is_empty() || wanted.iter().any(|one| one == suite.series())
        })
        .collect();
    ensure!(!suites.is_empty(), "no such kernel");
    let mut wrong = Vec::new();
    let wanted = |part| arguments.only.is_none_or(|only| only == part);
    if wanted(Part::Specimens) {
        wrong.extend(specimens(arguments, &suites)?);
    }
    if wanted(Part::Blinking) {
        wrong.extend(blinking(&suites)?);
    }
    if wanted(Part::Clean) {
        let limit = arguments.minutes.map(|minutes| minutes * 60);
        let until = limit.and_then(|limit| started.checked_add(Duration::from_secs(limit)));
        wrong.extend(clean(arguments, suites, until)?);
    }
    for text in &wrong {
        println!("WRONG: {text}");
    }
    let minutes = started.elapsed().as_secs_f64() / 60.0;
    println!("{minutes:.1} minutes");
    ensure!(
        wrong.is_empty(),
        "{} things are not as they have to be",
        wrong.len()
    );
    Ok(())
}

/// Tries all specimens; gives what is not as it has to be.
fn specimens(arguments: &Measure, suites: &[Suite]) -> Result<Vec<String>> {
    let effort = Effort {
        clean_checks: 0,
        look_for_unexpected: !arguments.expected,
        monitor: true,
    };
    // Those that take longest first.
    let waiting: Mutex<Vec<Suite>> = Mutex::new(suites.to_vec());
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop()
    };
    let complaints = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(suite) = next() {
                    let started = Instant::now();
                    let found = measure(suite, effort).and_then(|measured| keep(suite, measured));
                    println!("{suite}: {:.0} s", started.elapsed().as_secs_f64());
                    let mut all = complaints.lock().unwrap_or_else(PoisonError::into_inner);
                    match found {
                        Ok(found) => all.extend(found),
                        Err(error) => all.push(format!("{suite}: {error:#}")),
                    }
                }
            });
        }
    });
    Ok(complaints
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner))
}

/// Stores what was measured of specimens; gives what is not as it has to be.
fn keep(suite: Suite, measured: Measured) -> Result<Vec<String>> {
    for tried in &measured.specimens {
        println!("{suite}: {tried:?}");
    }
    println!("{suite}: {:?}", measured.detectors);
    println!("{suite}: not checked: {:?}", measured.not_checked);
    let complaints = measured.complaints.iter();
    let complaints = complaints.map(|complaint| format!("{suite}: {complaint}"));
    let complaints = complaints.collect();
    change(suite.series(), |stored| {
        let clean = std::mem::take(&mut stored.clean);
        let blinking = std::mem::take(&mut stored.blinking);
        *stored = Measured {
            clean,
            blinking,
            ..measured
        };
    })?;
    Ok(complaints)
}

/// Lets specimens hide and show themselves; gives what was found besides them.
fn blinking(suites: &[Suite]) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let made = |suite: &&Suite| BLINKING.iter().any(|one| one.suites.contains(suite));
    for suite in suites.iter().filter(made) {
        let outcomes: Vec<Result<Vec<Blinking>>> = thread::scope(|scope| {
            let start = |vcpus| scope.spawn(move || blinking::measure(*suite, vcpus, BLINKS));
            let started = [1, SEVERAL].map(start);
            let ended = started.into_iter().map(thread::ScopedJoinHandle::join);
            ended
                .map(|one| one.unwrap_or_else(|_| Err(anyhow!("a measurement panicked"))))
                .collect()
        });
        let mut measured = Vec::new();
        for outcome in outcomes {
            match outcome {
                Ok(some) => measured.extend(some),
                Err(error) => wrong.push(format!("{suite}: {error:#}")),
            }
        }
        for one in &measured {
            println!("{suite}: {one:?}");
            let others = one.wrong.iter();
            wrong.extend(others.map(|other| format!("{suite}, {}: {other}", one.name)));
        }
        change(suite.series(), |stored| stored.blinking = measured)?;
    }
    Ok(wrong)
}

/// Checks clean guests; gives what is not as it has to be.
fn clean(arguments: &Measure, suites: Vec<Suite>, until: Option<Instant>) -> Result<Vec<String>> {
    let program = program()?;
    let checks_of_several = arguments.smp_checks;
    let plan = Plan {
        checks: arguments.checks,
        checks_of_several: checks_of_several.unwrap_or(arguments.checks.div_ceil(FEWER)),
        until,
        suites,
        load: arguments.load.clone(),
    };
    let path = parts();
    let resumed = Parts::resume(&path, &program).filter(|_| arguments.resume);
    if arguments.resume && resumed.is_none() {
        println!("there are no checks of this very program to go on with; beginning anew");
    }
    let begin = resumed.unwrap_or(Parts {
        program,
        ..Parts::default()
    });
    let done = plan::run(&plan, &path, begin)?;
    for suite in &plan.suites {
        change(suite.series(), |stored| {
            let cells = done.cells.iter();
            for cell in cells.filter(|cell| cell.kernel == suite.series()) {
                stored.clean.retain(|known| {
                    (&known.load, known.vcpus) != (&cell.clean.load, cell.clean.vcpus)
                });
                stored.clean.push(cell.clean.clone());
            }
            stored.sort_clean();
        })?;
    }
    for cell in &done.cells {
        println!("{}: {:?}", cell.kernel, cell.clean);
    }
    let found = done.found.into_iter();
    Ok(found.chain(done.failed).collect())
}

/// What tells this program from others: checks of two are not added up.
fn program() -> Result<String> {
    let own = std::env::current_exe().context("finding this program's own file")?;
    let bytes = fs::read(&own).with_context(|| own.display().to_string())?;
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

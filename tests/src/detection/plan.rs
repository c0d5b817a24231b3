//! Many checks of clean guests: four kernels, under all loads, with one
//! processor and with several, two guests at a time, in a given time.
//!
//! They are made in passes over all kernels and loads, so that what is cut
//! short has been checked about equally often everywhere. After each few checks
//! what came of them is written down.

use std::collections::VecDeque;
use std::fs;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use secmon_lab::{Guest, Kernel, Suite};
use serde::{Deserialize, Serialize};

use super::clean::{Clean, check_under};
use super::loads::LOADS;
use crate::open;

/// How many guests run at a time: with one more, the checks wait for the
/// guests' own work.
const AT_ONCE: usize = 2;
/// Checks of each in the first pass, which shows how long they take.
const FIRST: u32 = 20;
/// In so many further passes the rest is done.
const PASSES: u32 = 2;
/// What of the time that is left a pass may plan with: guests boot, and loads
/// begin and end.
const USED: f64 = 0.8;
/// Between two lines about the progress, and between two times that what was
/// done is written down.
const TELL: Duration = Duration::from_secs(15);
/// So many words about findings are kept.
const MOST_FOUND: usize = 200;
/// Processors of the guests that have several.
pub const SEVERAL: u32 = 4;

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Checks of each kernel under each load.
    pub checks: u32,
    /// The same for guests with [`SEVERAL`] processors.
    pub checks_of_several: u32,
    /// When it has to end.
    pub until: Option<Instant>,
    /// The kernels.
    pub suites: Vec<Suite>,
    /// Only loads whose names contain this.
    pub load: Option<String>,
}

/// What was done.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Parts {
    /// What the program that did it was.
    pub program: String,
    /// Under which load how often, and what came of it.
    pub cells: Vec<Cell>,
    /// What was found and should not have been, not without end.
    pub found: Vec<String>,
    /// What guests or loads failed with.
    pub failed: Vec<String>,
}

/// One kernel under one load.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    /// The kernel's series.
    pub kernel: String,
    /// What came of it.
    pub clean: Clean,
}

impl Parts {
    /// What an earlier run of this program left in the file, or nothing.
    #[must_use]
    pub fn resume(path: &Path, program: &str) -> Option<Self> {
        let text = fs::read(path).ok()?;
        let parts: Self = serde_json::from_slice(&text).ok()?;
        (parts.program == program).then_some(parts)
    }

    fn store(&self, path: &Path) -> Result<()> {
        let folder = path.parent().context("a folder for what was done")?;
        fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.persist(path)
            .with_context(|| path.display().to_string())?;
        Ok(())
    }

    fn checks(&self) -> u32 {
        self.cells.iter().map(|cell| cell.clean.checks).sum()
    }
}

/// A guest of a pass.
#[derive(Debug, Clone, Copy)]
struct Job {
    suite: Suite,
    vcpus: u32,
}

struct Shared<'a> {
    plan: &'a Plan,
    path: PathBuf,
    started: Instant,
    state: Mutex<State>,
}

struct State {
    parts: Parts,
    /// How many checks there are to be in all, and were at the start.
    goal: u32,
    before: u32,
    told: Instant,
}

/// Does what is planned and writes it to the file as it goes on; gives all that
/// was done.
///
/// # Errors
/// If what was done can't be written. Guests that fail are among the parts.
pub fn run(plan: &Plan, path: &Path, parts: Parts) -> Result<Parts> {
    let now = Instant::now();
    let shared = Shared {
        plan,
        path: path.to_owned(),
        started: now,
        state: Mutex::new(State {
            before: parts.checks(),
            parts,
            goal: 0,
            told: now,
        }),
    };
    let first = |vcpus| plan.goal(vcpus).min(FIRST);
    shared.pass(&first)?;
    for pass in 0..PASSES {
        if plan.is_over() {
            break;
        }
        let goal = shared.goal(PASSES - pass);
        shared.pass(&goal)?;
    }
    let state = shared.lock();
    state.parts.store(&shared.path)?;
    Ok(state.parts.clone())
}

impl Plan {
    fn goal(&self, vcpus: u32) -> u32 {
        if vcpus == 1 {
            self.checks
        } else {
            self.checks_of_several
        }
    }

    fn jobs(&self) -> impl Iterator<Item = Job> + '_ {
        let vcpus = [1, SEVERAL].into_iter();
        let vcpus = vcpus.filter(|vcpus| self.goal(*vcpus) > 0);
        vcpus
            .flat_map(|vcpus| self.suites.iter().map(move |suite| (*suite, vcpus)))
            .map(|(suite, vcpus)| Job { suite, vcpus })
    }

    fn loads(&self) -> impl Iterator<Item = &'static super::loads::Load> + '_ {
        let wanted = self.load.as_deref().unwrap_or_default();
        LOADS.iter().filter(move |load| load.name.contains(wanted))
    }

    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }
}

/// How many checks a guest with so many processors is to have under each load.
type Goal<'a> = dyn Fn(u32) -> u32 + Sync + 'a;

impl Shared<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What can be done of what is left in the time that is left, divided by
    /// the passes that are left; the same for each kernel and load.
    fn goal(&self, passes: u32) -> impl Fn(u32) -> u32 + Sync + use<> {
        let state = self.lock();
        let mut needed = 0.0;
        let mut done = [0_u32; 2];
        for (index, vcpus) in [1, SEVERAL].into_iter().enumerate() {
            let cells = state.parts.cells.iter();
            let cells = cells.filter(|cell| cell.clean.vcpus == vcpus && cell.clean.checks > 0);
            let mut least = self.plan.goal(vcpus);
            for cell in cells {
                let clean = &cell.clean;
                let left = self.plan.goal(vcpus).saturating_sub(clean.checks);
                needed += clean.seconds / f64::from(clean.checks) * f64::from(left);
                least = least.min(clean.checks);
            }
            done[index] = least;
        }
        let left = self.plan.until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            left.as_secs_f64() * USED * AT_ONCE as f64
        });
        let part = match left {
            Some(left) if needed > left => left / needed,
            _ => 1.0,
        };
        let goals = [self.plan.checks, self.plan.checks_of_several];
        move |vcpus| {
            let index = usize::from(vcpus != 1);
            let left = goals[index].saturating_sub(done[index]);
            // Without a limit all is done in the first of them.
            let share = if part < 1.0 {
                part / f64::from(passes)
            } else {
                1.0
            };
            done[index] + (f64::from(left) * share).ceil() as u32
        }
    }

    /// Brings all kernels and loads to this number of checks.
    fn pass(&self, goal: &Goal<'_>) -> Result<()> {
        let loads = self.plan.loads().count();
        let jobs: VecDeque<Job> = self.plan.jobs().collect();
        let checks = jobs.iter().map(|job| goal(job.vcpus) * loads as u32);
        self.lock().goal = checks.sum();
        let jobs = Mutex::new(jobs);
        let next = || {
            let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
            jobs.pop_front()
        };
        thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    while let Some(job) = next() {
                        if let Err(error) = self.work(job, goal(job.vcpus)) {
                            self.fail(job, &error);
                        }
                    }
                });
            }
        });
        self.lock().parts.store(&self.path)
    }

    /// One guest under all loads.
    fn work(&self, job: Job, goal: u32) -> Result<()> {
        let kernel = job.suite.series();
        let missing = |load: &str| {
            let state = self.lock();
            let mut cells = state.parts.cells.iter();
            let known = cells.find(|cell| {
                cell.kernel == kernel && cell.clean.load == load && cell.clean.vcpus == job.vcpus
            });
            known.map_or_else(|| Clean::new(load, job.vcpus), |cell| cell.clean.clone())
        };
        let to_do = |load: &&super::loads::Load| missing(load.name).checks < goal;
        if self.plan.is_over() || !self.plan.loads().any(|load| to_do(&load)) {
            return Ok(());
        }
        let files = Kernel::fetch(job.suite)?;
        let file = open::kernel_file(&files.image())?;
        let boot = || -> Result<_> {
            let lab = Guest::builder(job.suite)
                .kernel(files.clone())
                .vcpus(job.vcpus)
                .tools()
                .boot()?;
            let opened = open::target(&format!("qemu:{}", lab.pid()))?;
            Ok((lab, opened.with_reference(&file)))
        };
        let mut booted = None;
        for load in self.plan.loads() {
            if self.plan.is_over() {
                break;
            }
            let (lab, opened) = match booted.take() {
                Some(booted) => booted,
                None => boot()?,
            };
            let mut clean = missing(load.name);
            let mut flow = |clean: &Clean, found: Vec<String>| {
                self.note(kernel, clean, found);
                match self.plan.is_over() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            // After a load that failed the others get another guest.
            match check_under(load, lab.truth(), &opened, goal, &mut clean, &mut flow) {
                Ok(()) => booted = Some((lab, opened)),
                Err(error) => self.fail(job, &error),
            }
        }
        Ok(())
    }

    fn fail(&self, job: Job, error: &anyhow::Error) {
        let text = format!("{}, {} vCPUs: {error:#}", job.suite, job.vcpus);
        eprintln!("{text}");
        self.lock().parts.failed.push(text);
    }

    /// Takes note of a check, and now and then writes down what there is.
    fn note(&self, kernel: &str, clean: &Clean, found: Vec<String>) {
        let mut state = self.lock();
        let cells = &mut state.parts.cells;
        let known = cells.iter_mut().find(|cell| {
            cell.kernel == kernel
                && cell.clean.load == clean.load
                && cell.clean.vcpus == clean.vcpus
        });
        match known {
            Some(cell) => cell.clean = clean.clone(),
            None => cells.push(Cell {
                kernel: kernel.to_owned(),
                clean: clean.clone(),
            }),
        }
        for finding in found {
            let start: String = finding.chars().take(1500).collect();
            let text = format!("{kernel}, {} vCPUs, {}: {start}", clean.vcpus, clean.load);
            println!("WRONG: {text}");
            if state.parts.found.len() < MOST_FOUND {
                state.parts.found.push(text);
            }
        }
        if state.told.elapsed() < TELL {
            return;
        }
        state.told = Instant::now();
        println!("{}", state.progress(self.started));
        if let Err(error) = state.parts.store(&self.path) {
            eprintln!("what was done can't be written: {error:#}");
        }
    }
}

impl State {
    fn progress(&self, started: Instant) -> String {
        let (mut alarms, mut incomplete) = (0, 0);
        for cell in &self.parts.cells {
            alarms += cell.clean.alarms;
            incomplete += cell.clean.incomplete;
        }
        let checks = self.parts.checks();
        let passed = started.elapsed().as_secs_f64();
        let rate = f64::from(checks.saturating_sub(self.before)) / passed.max(1.0);
        let left = f64::from(self.goal.saturating_sub(checks)) / rate.max(0.001);
        format!(
            "{checks} of {} checks of this pass, {alarms} findings, {incomplete} not complete; \
             {:.0} min passed, about {:.0} min to its end",
            self.goal,
            passed / 60.0,
            left / 60.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(plan: &Plan, seconds: f64) -> Shared<'_> {
        let cells = plan.jobs().flat_map(|job| {
            plan.loads().map(move |load| Cell {
                kernel: job.suite.series().to_owned(),
                clean: Clean {
                    checks: 10,
                    seconds,
                    ..Clean::new(load.name, job.vcpus)
                },
            })
        });
        let parts = Parts {
            cells: cells.collect(),
            ..Parts::default()
        };
        let now = Instant::now();
        Shared {
            plan,
            path: PathBuf::new(),
            started: now,
            state: Mutex::new(State {
                parts,
                goal: 0,
                before: 0,
                told: now,
            }),
        }
    }

    fn plan(until: Option<Duration>) -> Plan {
        Plan {
            checks: 1010,
            checks_of_several: 0,
            until: until.map(|time| Instant::now() + time),
            suites: vec![Suite::Bullseye, Suite::Sid],
            load: Some("idle".to_owned()),
        }
    }

    #[test]
    fn the_time_that_is_left_is_shared_equally() {
        let all = plan(None);
        assert_eq!(shared(&all, 1.0).goal(2)(1), 1010);
        // Two guests, 1,000 checks of 0.1 s each are left: 200 s of work, and
        // there are 80 s for each of two.
        let some = plan(Some(Duration::from_secs(100)));
        let goal = shared(&some, 1.0).goal(2)(1);
        assert!((400..=411).contains(&goal), "{goal}");
        let last = shared(&some, 1.0).goal(1)(1);
        assert!((800..=811).contains(&last), "{last}");
    }

    #[test]
    fn parts_of_another_program_are_not_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("parts/clean.json");
        let plan = plan(None);
        let mut parts = shared(&plan, 1.0).lock().parts.clone();
        parts.program = "this".to_owned();
        parts.store(&path).expect("stored");
        assert!(Parts::resume(&path, "other").is_none());
        let again = Parts::resume(&path, "this").expect("its own");
        assert_eq!(again.checks(), 20);
    }
}

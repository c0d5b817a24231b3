//! `secmon guard`: watches a monitoring VM from outside, says what is not as it
//! has to be, and does what it was told to about it.

mod answers;
mod reaction;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::{Args, ValueEnum};
use rustix::time::{ClockId, clock_gettime};
use secmon_guard::{Change, Finding, Guard, GuardError, Kind, Ledger, Reference};
use secmon_memory::PhysicalMemory;
use secmon_monitor::appliance::Image;
use secmon_monitor::launch::MonitorName;
use secmon_monitor::launch::guarded::Guarded;
use secmon_monitor::launch::process::ProcessRecord;
use secmon_platform::qemu::QmpUse;
use secmon_platform::target::{OpenOptions, Target};
use serde::Serialize;

use crate::arguments::{Common, Format};
use crate::output::escape;
use crate::report::{Advise, Reporter};
use answers::Answers;
use reaction::Reactions;

/// What the help says at its end.
pub const EXAMPLES: &str = "\
Examples:
  secmon guard --monitor web1                              look each second, tell what is found
  secmon guard --monitor web1 --reaction restart           and start the VM anew from its image
  secmon guard --monitor web1 --rounds 1000 --format json  for a test: a line of JSON for each change
  secmon -t qemu:other guard --image secmon-appliance      a monitoring VM that was started otherwise

With --monitor the monitor must also answer a challenge on its channel, and its QEMU must run and
have no debugger. With -t its memory alone is looked at.

Exit status:
  0  nothing was found in all rounds
  1  something was found, whether it is still there or not
  2  an error: there is no such monitor, or it does not start";

/// How long a monitor that still starts is waited for.
const STARTS: Duration = Duration::from_secs(180);
/// The source of what is found about the VM's process.
const PROCESS: &str = "process";
/// The source of what is found about the kernel as a whole.
const KERNEL: &str = "kernel";
/// The longest file of an image.
const LONGEST: u64 = 512 << 20;

/// Arguments of `secmon guard`.
#[derive(Args, Clone, Debug)]
pub struct GuardArguments {
    /// The monitor to guard; without it -t says where a monitoring VM's memory is
    #[arg(long, value_name = "NAME")]
    monitor: Option<MonitorName>,

    /// The folder of the image that the monitor must be of; the files that it was started from
    /// unless named
    #[arg(long, value_name = "FOLDER")]
    image: Option<PathBuf>,

    /// Milliseconds from the start of one round to the start of the next
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    interval: u64,

    /// Milliseconds within which the monitor must answer a challenge
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    deadline: u64,

    /// End after so many rounds
    #[arg(long, value_name = "COUNT")]
    rounds: Option<u64>,

    /// What is done when something is found
    #[arg(long, value_enum, default_value_t = Reaction::Alert)]
    reaction: Reaction,
}

/// What is done when something is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Reaction {
    /// It is told
    Alert,
    /// The VM is ended; its supervisor starts it anew from the image. At most three times in ten
    /// minutes
    Restart,
    /// The monitor is ended with all that was started for it
    Stop,
}

/// What is said at the end.
#[derive(Serialize)]
struct Summary {
    event: &'static str,
    rounds: u64,
    findings: u64,
    open: usize,
    /// Seconds of processor time that the rounds took, and all of the guard.
    busy_seconds: f64,
    processor_seconds: f64,
    /// Of one core, per cent.
    processor_percent: f64,
    longest_round_ms: f64,
}

/// Runs the command.
///
/// # Errors
/// If there is nothing to guard.
pub fn guard(common: &Common, arguments: &GuardArguments, reporter: Reporter) -> Result<ExitCode> {
    let mut run = Run {
        arguments,
        format: common.format,
        reporter,
        ledger: Ledger::default(),
        reactions: Reactions::new(arguments.reaction),
        findings: 0,
        rounds: 0,
        busy: Duration::ZERO,
        longest: Duration::ZERO,
    };
    let started = (Instant::now(), processor_time());
    match (&arguments.monitor, &common.target) {
        (Some(name), None) => run.monitor(name)?,
        (None, Some(target)) => run.target(target)?,
        (Some(_), Some(_)) => {
            return Err(anyhow!("both --monitor and -t were given"))
                .advise("name a monitor of this host, or where a VM's memory is, not both");
        }
        (None, None) => {
            return Err(anyhow!("nothing to guard was named"))
                .advise("name a monitor: --monitor NAME; `secmon monitor status` lists them");
        }
    }
    run.summary(started)?;
    Ok(ExitCode::from(u8::from(run.findings > 0)))
}

/// A run of the command.
struct Run<'a> {
    arguments: &'a GuardArguments,
    format: Format,
    reporter: Reporter,
    /// What is found beside the memory.
    ledger: Ledger,
    reactions: Reactions,
    findings: u64,
    rounds: u64,
    busy: Duration,
    longest: Duration,
}

impl Run<'_> {
    fn is_done(&self) -> bool {
        self.reactions.has_stopped()
            || self
                .arguments
                .rounds
                .is_some_and(|most| self.rounds >= most)
    }

    /// Guards memory alone.
    fn target(&mut self, target: &str) -> Result<()> {
        let Some(folder) = &self.arguments.image else {
            return Err(anyhow!("-t needs --image"))
                .advise("name the folder of the image that the VM was started from");
        };
        let reference = reference(&Image::open(folder)?.into_files())?;
        let memory = open(target)?;
        let mut guard = self.attach(&memory, reference, None)?;
        let changes = guard.look_with_all();
        self.tell(changes)?;
        while !self.is_done() {
            let began = Instant::now();
            self.round(&mut guard)?;
            self.wait(began);
        }
        Ok(())
    }

    /// Guards a monitor of this host, whatever VM it has.
    fn monitor(&mut self, name: &MonitorName) -> Result<()> {
        let answers = Answers::start(name.clone());
        while !self.is_done() {
            let guarded = self.running(name)?;
            let Some(machine) = guarded.machine else {
                continue;
            };
            let files = match &self.arguments.image {
                Some(folder) => Image::open(folder)?.into_files(),
                None => (guarded.kernel.clone(), guarded.initramfs.clone()),
            };
            let reference = reference(&files)?.with_configuration(guarded.configuration);
            let attached = open(&format!("qemu:{}", machine.pid))
                .and_then(|memory| self.attach(&memory, reference, Some(machine)));
            let mut guard = match attached {
                Ok(guard) => guard,
                // It ended meanwhile.
                Err(_) if !machine.is_alive() => continue,
                Err(error) => return Err(error),
            };
            answers.wait(STARTS);
            let gone = self.ledger.update(PROCESS, Vec::new());
            self.tell(gone)?;
            let changes = guard.look_with_all();
            self.found(name, machine, changes)?;
            while !self.is_done() {
                let began = Instant::now();
                let mut changes = self.ledger.update(PROCESS, about(machine));
                let silent = answers.silent(Duration::from_millis(self.arguments.deadline));
                changes.extend(self.ledger.update("channel", silent.into_iter().collect()));
                let ended = !machine.is_alive();
                self.found(name, machine, changes)?;
                if ended {
                    break;
                }
                self.memory(name, machine, &mut guard)?;
                self.wait(began);
            }
        }
        Ok(())
    }

    /// Waits until the monitor has a VM.
    fn running(&self, name: &MonitorName) -> Result<Guarded> {
        let deadline = Instant::now() + STARTS;
        loop {
            let guarded = Guarded::of(name)?;
            if guarded.machine.is_some() {
                return Ok(guarded);
            }
            if Instant::now() > deadline {
                return Err(anyhow!("monitor {name} has no VM"))
                    .advise(format!("`secmon monitor status {name}` says why"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the VM has started.
    fn attach(
        &mut self,
        memory: &Arc<dyn PhysicalMemory>,
        reference: Reference,
        machine: Option<ProcessRecord>,
    ) -> Result<Guard> {
        let deadline = Instant::now() + STARTS;
        let reference = Arc::new(reference);
        loop {
            let error = match Guard::new(memory, Arc::clone(&reference)) {
                Ok(guard) => {
                    self.reporter.note(guard.banner());
                    return Ok(guard);
                }
                Err(error) => error,
            };
            if let GuardError::OtherKernel { expected, found } = &error {
                let seen = found
                    .as_ref()
                    .map_or("none".to_owned(), ToString::to_string);
                let place = "the kernel's build id";
                let finding = Finding::new(Kind::OtherKernel, place, expected.clone(), seen);
                let changes = self.ledger.update(KERNEL, vec![finding]);
                self.tell(changes)?;
            }
            let ended = machine.is_some_and(|machine| !machine.is_alive());
            if ended || Instant::now() > deadline || matches!(error, GuardError::OtherKernel { .. })
            {
                return Err(error).context("the monitoring VM can't be guarded");
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn memory(
        &mut self,
        name: &MonitorName,
        machine: ProcessRecord,
        guard: &mut Guard,
    ) -> Result<()> {
        let round = guard.round();
        self.count(round.busy);
        self.found(name, machine, round.changes)
    }

    fn round(&mut self, guard: &mut Guard) -> Result<()> {
        let round = guard.round();
        self.count(round.busy);
        self.tell(round.changes)
    }

    fn count(&mut self, busy: Duration) {
        self.rounds += 1;
        self.busy += busy;
        self.longest = self.longest.max(busy);
    }

    /// Tells changes, and reacts to what appeared.
    fn found(
        &mut self,
        name: &MonitorName,
        machine: ProcessRecord,
        changes: Vec<Change>,
    ) -> Result<()> {
        let appeared = |change: &Change| match change {
            Change::Appeared { finding, .. } => finding.kind != Kind::Ended,
            Change::Gone { .. } => false,
        };
        let is_new = changes.iter().any(appeared);
        self.tell(changes)?;
        if is_new && let Some(done) = self.reactions.react(name, machine)? {
            self.reporter.say(done);
        }
        Ok(())
    }

    fn tell(&mut self, changes: Vec<Change>) -> Result<()> {
        for change in changes {
            let (word, finding) = match &change {
                Change::Appeared { finding, .. } => {
                    self.findings += 1;
                    ("found", finding)
                }
                Change::Gone { finding, .. } => ("gone", finding),
            };
            match self.format {
                Format::Json | Format::Ndjson => self.line(&serde_json::to_string(&change)?)?,
                _ => self.line(&format!("{word} {}", escape::message(&finding.to_string())))?,
            }
        }
        Ok(())
    }

    fn line(&self, text: &str) -> Result<()> {
        use std::io::Write as _;
        let mut out = std::io::stdout().lock();
        writeln!(out, "{text}").and_then(|()| out.flush())?;
        Ok(())
    }

    fn wait(&self, began: Instant) {
        let interval = Duration::from_millis(self.arguments.interval);
        if !self.is_done() {
            std::thread::sleep(interval.saturating_sub(began.elapsed()));
        }
    }

    fn summary(&self, (started, used): (Instant, Duration)) -> Result<()> {
        let used = processor_time().saturating_sub(used).as_secs_f64();
        let summary = Summary {
            event: "summary",
            rounds: self.rounds,
            findings: self.findings,
            open: self.ledger.len(),
            busy_seconds: self.busy.as_secs_f64(),
            processor_seconds: used,
            processor_percent: 100.0 * used / started.elapsed().as_secs_f64().max(0.001),
            longest_round_ms: self.longest.as_secs_f64() * 1000.0,
        };
        match self.format {
            Format::Json | Format::Ndjson => self.line(&serde_json::to_string(&summary)?),
            _ => {
                self.reporter.say(format_args!(
                    "{} rounds, {} findings, {:.2}% of a core, the longest round {:.0} ms",
                    summary.rounds,
                    summary.findings,
                    summary.processor_percent,
                    summary.longest_round_ms
                ));
                Ok(())
            }
        }
    }
}

/// The processor time that this process has used.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn open(target: &str) -> Result<Arc<dyn PhysicalMemory>> {
    let options = OpenOptions {
        qmp: QmpUse::Never,
        ..OpenOptions::default()
    };
    let target: Target = target.parse()?;
    Ok(target.open(&options)?.memory)
}

/// Reads the files of an image.
fn reference((kernel, initramfs): &(PathBuf, PathBuf)) -> Result<Reference> {
    let read = |path: &Path| -> Result<Vec<u8>> {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        let file = fs::File::open(path).with_context(|| path.display().to_string())?;
        file.take(LONGEST).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let reference = Reference::of_image(&read(kernel)?, &read(initramfs)?);
    reference.with_context(|| format!("{} and {}", kernel.display(), initramfs.display()))
}

/// What the host's kernel says of the VM's process.
fn about(machine: ProcessRecord) -> Vec<Finding> {
    let place = format!("QEMU, process {}", machine.pid);
    if !machine.is_alive() {
        return vec![Finding::new(Kind::Ended, place, "it runs", "it has ended")];
    }
    let status = fs::read_to_string(format!("/proc/{}/status", machine.pid)).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).unwrap_or_default().to_owned()
    };
    let mut findings = Vec::new();
    let state = field("State:");
    if state.starts_with(['T', 't']) {
        findings.push(Finding::new(Kind::Stopped, place.clone(), "it runs", state));
    }
    let tracer = field("TracerPid:");
    if !matches!(tracer.as_str(), "" | "0") {
        let seen = format!("process {tracer} traces it");
        findings.push(Finding::new(Kind::Traced, place, "nobody traces it", seen));
    }
    findings
}

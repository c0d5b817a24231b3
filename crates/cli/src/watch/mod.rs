//! `secmon watch`: what detectors find, all the time.
//!
//! Two processes. One looks at the guest, is confined as all that parse a
//! guest's memory, and writes events to a pipe ([`engine`]). This one starts
//! it, again when the target comes back, and hands its events to the sinks:
//! store, terminal, files. Of a target behind a monitor the events come from
//! there ([`remote`]).

pub mod arguments;
mod engine;
mod gate;
mod local;
mod remote;
mod sinks;
pub mod stored;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use secmon_guest::TrustLevel;
use secmon_store::{Keeper, Kept, Store};
use secmon_watch::{Event, Incident, Policy, Reactions, Sink, SinkError};

use crate::arguments::{Common, Format};
use crate::policy;
use crate::report::Reporter;
use arguments::WatchArguments;

/// The exit status of a watch that saw an alarm.
const ALARM: u8 = 1;
/// Events that may wait between a source and the sinks.
const QUEUE: usize = 1024;
/// Between two complaints about sinks that make events wait.
const COMPLAIN: Duration = Duration::from_secs(30);
/// How long one waits for an event before looking at signals.
const LOOK: Duration = Duration::from_millis(200);
/// How long what ends may take to tell its last events.
const LAST: Duration = Duration::from_secs(20);

/// What a source of events says.
pub enum News {
    /// An event, with the number by which it is acknowledged where that is
    /// wanted.
    Event(Box<Event>, Option<u64>),
    /// What the next events are told by: another run of a watch.
    Run(String),
    /// No more events come.
    End(Result<()>),
}

/// `secmon watch`.
///
/// # Errors
/// If the target can't be watched at all, or a sink can't be opened.
pub fn watch(common: &Common, arguments: &WatchArguments, reporter: Reporter) -> Result<ExitCode> {
    if arguments.engine {
        return engine::run(common, arguments, reporter);
    }
    if arguments.schema {
        let schema = serde_json::to_string_pretty(&secmon_watch::policy::schema::schema())?;
        println!("{schema}");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(path) = &arguments.check_policy {
        let (policy, _) = policy::read(path)?;
        reporter.say(format_args!(
            "{}: {} of {} detectors, {}% of a core, {} exceptions, {} responses",
            path.display(),
            policy.enabled().len(),
            secmon_detect::detectors().len(),
            policy.budget.percent(),
            policy.exceptions.len(),
            policy.responses.len()
        ));
        return Ok(ExitCode::SUCCESS);
    }
    let (mut policy, text) = match &arguments.policy {
        Some(path) => policy::read(path)?,
        None => (Policy::default(), "version = 1\n".to_owned()),
    };
    if let Some(budget) = arguments.budget {
        policy.budget = budget;
    }
    let keeper = match &arguments.store {
        Some(path) => Some(Keeper::new(Store::open(path)?, run_name())),
        None => None,
    };
    let sinks = sinks::open(common.format, arguments)?;
    let ending = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&ending))
            .context("taking signals that end the watch")?;
    }
    let (sender, news) = mpsc::sync_channel(QUEUE);
    let of_monitor = common.target.as_deref().and_then(crate::monitor::address);
    let source: Box<dyn Source> = match of_monitor {
        Some(address) => Box::new(remote::Remote::start(
            address?,
            common,
            &ending,
            sender.clone(),
            reporter,
        )?),
        None => Box::new(local::Local::start(text, &policy, &ending, sender.clone())?),
    };
    let mut desk = Desk {
        keeper,
        sinks,
        source,
        reporter,
        unacknowledged: None,
        alarms: 0,
        complained: None,
    };
    let target = common.target.clone().unwrap_or_default();
    let responder = gate::responder(&arguments.gate, &target)?;
    let mut reactions = if desk.source.reacts_here() {
        let telling = teller(sender.clone(), target);
        Some(Reactions::new(&policy, responder, telling))
    } else {
        None
    };
    drop(sender);
    let end = arguments
        .seconds
        .and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds)));
    desk.run(&news, &policy, &mut reactions, &ending, end)
}

/// Where events come from.
trait Source {
    /// Whether actions are to be taken here, and not where the events are from.
    fn reacts_here(&self) -> bool;

    /// An event is kept elsewhere for good.
    fn acknowledge(&mut self, number: u64);
}

/// Hands incidents that arise here to the sinks, as events.
fn teller(sender: SyncSender<News>, target: String) -> secmon_watch::Tell {
    Arc::new(move |incident| {
        // A full queue is no reason to lose what was done; at the end nobody
        // takes it any more.
        let _ = sender.send(News::Event(
            Box::new(event(&target, TrustLevel::L0, incident)),
            None,
        ));
    })
}

fn event(target: &str, trust_level: TrustLevel, incident: Incident) -> Event {
    Event {
        sequence: 0,
        time_ms: now_ms(),
        target: target.to_owned(),
        trust_level,
        incident,
    }
}

fn now_ms() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(time.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// What tells this run of the watch from all others.
fn run_name() -> String {
    format!("{}-{}", now_ms(), std::process::id())
}

/// Where events become lines, rows and documents.
struct Desk {
    keeper: Option<Keeper>,
    sinks: Vec<Box<dyn Sink>>,
    source: Box<dyn Source>,
    reporter: Reporter,
    /// The latest event that is to be acknowledged and waits in the keeper.
    unacknowledged: Option<u64>,
    alarms: u64,
    /// When trouble of a sink was last said.
    complained: Option<Instant>,
}

impl Desk {
    fn run(
        &mut self,
        news: &Receiver<News>,
        policy: &Policy,
        reactions: &mut Option<Reactions>,
        ending: &AtomicBool,
        end: Option<Instant>,
    ) -> Result<ExitCode> {
        let mut sequence = 0_u64;
        let mut deadline: Option<Instant> = None;
        let outcome = loop {
            if end.is_some_and(|end| Instant::now() >= end) {
                ending.store(true, Ordering::Relaxed);
            }
            if ending.load(Ordering::Relaxed) && deadline.is_none() {
                deadline = Instant::now().checked_add(LAST);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                break Err(anyhow!(
                    "what looks did not end within {} s",
                    LAST.as_secs()
                ));
            }
            match news.recv_timeout(LOOK) {
                Ok(News::Event(mut event, number)) => {
                    if number.is_none() {
                        sequence = sequence.saturating_add(1);
                        event.sequence = sequence;
                    }
                    self.alarms = self
                        .alarms
                        .saturating_add(u64::from(event.incident.is_alarm()));
                    self.take(&event, number)?;
                    if let Some(reactions) = reactions {
                        reactions.react(&event.incident, policy, Instant::now());
                    }
                }
                Ok(News::Run(run)) => {
                    if let Some(keeper) = &mut self.keeper {
                        keeper.set_run(run);
                    }
                }
                Ok(News::End(outcome)) => break outcome,
                Err(RecvTimeoutError::Timeout) => self.idle()?,
                Err(RecvTimeoutError::Disconnected) => break Ok(()),
            }
        };
        // What is under way is done, and what it tells is taken.
        *reactions = None;
        while let Ok(news) = news.try_recv() {
            if let News::Event(mut event, number) = news {
                if number.is_none() {
                    sequence = sequence.saturating_add(1);
                    event.sequence = sequence;
                }
                self.take(&event, number)?;
            }
        }
        outcome?;
        Ok(if self.alarms > 0 {
            ExitCode::from(ALARM)
        } else {
            ExitCode::SUCCESS
        })
    }

    /// Keeps an event, shows it, and acknowledges it once it is kept.
    fn take(&mut self, event: &Event, number: Option<u64>) -> Result<()> {
        self.unacknowledged = number.or(self.unacknowledged);
        let kept = match &mut self.keeper {
            Some(keeper) => keeper.take(event.clone()),
            None => Kept::Stored,
        };
        let taken: Vec<_> = self.sinks.iter_mut().map(|sink| sink.take(event)).collect();
        self.complain(taken);
        self.settle(kept)
    }

    fn idle(&mut self) -> Result<()> {
        let idle: Vec<_> = self.sinks.iter_mut().map(|sink| sink.idle()).collect();
        self.complain(idle);
        match &mut self.keeper {
            Some(keeper) if keeper.waiting() > 0 => {
                let kept = keeper.retry();
                self.settle(kept)
            }
            _ => Ok(()),
        }
    }

    /// Says what is wrong with sinks, now and then: it may be so for long. What
    /// they lost they count until it is said.
    fn complain(&mut self, results: Vec<Result<(), SinkError>>) {
        for error in results.into_iter().filter_map(Result::err) {
            let early = self
                .complained
                .is_some_and(|said| said.elapsed() < COMPLAIN);
            if early && matches!(error, SinkError::Delayed { .. }) {
                continue;
            }
            self.complained = Some(Instant::now());
            self.reporter.warn(error);
        }
    }

    fn settle(&mut self, kept: Kept) -> Result<()> {
        let lost = match kept {
            Kept::Stored => 0,
            Kept::StoredAgain { lost } => {
                self.reporter
                    .warn("the store takes events again; those that waited are in it");
                lost
            }
            Kept::Waits { reason } => {
                if let Some(reason) = reason {
                    self.reporter.warn(format_args!(
                        "events can't be stored and wait: {reason}; the watch goes on"
                    ));
                }
                return Ok(());
            }
        };
        if let Some(number) = self.unacknowledged.take() {
            self.source.acknowledge(number);
        }
        if lost > 0 {
            let incident = Incident::Lost {
                sink: "the store".to_owned(),
                events: lost,
                reason: "there was no room for them, neither on the disk nor in memory".to_owned(),
            };
            let event = event("", TrustLevel::L0, incident);
            self.take(&event, None)?;
        }
        Ok(())
    }
}

/// Whether events are to be written to stdout as JSON.
fn writes_json(format: Format) -> bool {
    matches!(format, Format::Json | Format::Ndjson)
}

//! The process that looks at the guest: opens the target, confines itself,
//! finds and follows the kernel, and writes events to stdout, one JSON object
//! a line. Its policy is the first line of stdin; when stdin ends, so does it.

use std::io::{self, BufRead, Read as _, Write as _};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use secmon_guest::{Guest, TrustLevel};
use secmon_memory::Volatility;
use secmon_monitor::inside::{FollowedGuest, Follower};
use secmon_profile::{Cache, FindOptions};
use secmon_sandbox::{Needs, Stage};
use secmon_watch::policy::MAX_BYTES;
use secmon_watch::{Event, Incident, Policy, Stop, TargetChange, Watched, watch};
use serde::{Deserialize, Serialize};

use super::arguments::WatchArguments;
use super::now_ms;
use crate::arguments::Common;
use crate::report::{Advise, Reporter};
use crate::session::{Session, remembering};

/// Between two looks at what the target does.
const FOLLOW: Duration = Duration::from_millis(500);

/// The first line of stdin.
#[derive(Debug, Serialize, Deserialize)]
pub struct Instructions {
    /// The policy's text, which was found right.
    pub policy: String,
    /// The budget in percent.
    pub budget: f64,
}

/// What is followed, as detectors look at it.
struct View<'a>(FollowedGuest<'a>);

impl Watched for View<'_> {
    fn guest(&self) -> Result<(Guest, u64), String> {
        let (mut kernel, boot) = self.0.kernel()?;
        kernel.space = remembering(kernel.space.clone(), &kernel);
        Ok((Guest::new(kernel), boot))
    }

    fn boot(&self) -> Option<u64> {
        self.0.boot()
    }
}

/// Runs until stdin ends or the target goes away.
///
/// # Errors
/// If the target can't be opened or is none that changes.
pub fn run(common: &Common, _: &WatchArguments, reporter: Reporter) -> Result<ExitCode> {
    crate::fault::install();
    let mut first = String::new();
    let longest = 8 * MAX_BYTES as u64;
    let mut input = io::stdin().lock();
    (&mut input).take(longest).read_line(&mut first)?;
    drop(input);
    let instructions: Instructions =
        serde_json::from_str(&first).context("the first line of stdin")?;
    let mut policy = Policy::parse(&instructions.policy, "policy")?;
    policy.budget = format!("{}%", instructions.budget)
        .parse()
        .map_err(anyhow::Error::msg)?;

    let session = Session::new(common, reporter);
    let source = session.open()?;
    if source.memory().volatility() == Volatility::Static {
        return Err(anyhow::anyhow!(
            "an image does not change: there is nothing to watch"
        ))
        .advise("`secmon check` looks at it once");
    }
    // Nothing is opened from here on, and then memory is looked at. An ISF file
    // is read again for each kernel that comes: then it, and nothing else, can
    // still be opened.
    if common.isf.is_none() {
        session.confine(Stage::Reading, &Needs::default());
    }

    let target = common.target.clone().unwrap_or_default();
    let out = Mutex::new(io::stdout());
    let stop = Stop::new();
    let tell = |incident: Incident| {
        let event = Event {
            sequence: 0,
            time_ms: now_ms(),
            target: target.clone(),
            trust_level: TrustLevel::L0,
            incident,
        };
        let written = serde_json::to_string(&event)
            .map_err(io::Error::other)
            .and_then(|line| {
                let mut out = out
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner);
                writeln!(out, "{line}")?;
                out.flush()
            });
        if written.is_err() {
            // Nobody hears us any more.
            stop.stop();
        }
    };
    thread::spawn(|| {
        // The end of stdin is the end of the watch.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        ENDED.store(true, Ordering::Relaxed);
    });
    let options = FindOptions {
        cache: Cache::Off,
        isf: common.isf.clone(),
        root_hints: Vec::new(),
        search: session.search(),
    };
    let follower = Follower::new(source.memory().clone(), options);
    let view = View(follower.guest());
    let (reason, tally) = thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let tally = watch(&view, &policy, &stop, &tell);
            stop.stop();
            tally
        });
        let reason = follow(&follower, &source, &stop, &tell);
        stop.stop();
        (reason, looking.join().unwrap_or_default())
    });
    tell(Incident::Stopped {
        reason: reason.to_owned(),
        tally,
    });
    Ok(ExitCode::SUCCESS)
}

/// Set when stdin has ended.
static ENDED: AtomicBool = AtomicBool::new(false);
const GONE: &str = "the target's QEMU has ended";

/// Follows what the target does until the watch ends, and says why it does.
fn follow(
    follower: &Follower,
    source: &crate::session::Source,
    stop: &Stop,
    tell: &(dyn Fn(Incident) + Sync),
) -> &'static str {
    loop {
        for (change, mut detail) in follower.look() {
            if matches!(change, TargetChange::Started | TargetChange::Rebooted)
                && let Ok((kernel, _)) = follower.guest().kernel()
            {
                for conflict in &kernel.conflicts {
                    detail.push_str("; ");
                    detail.push_str(&conflict.to_string());
                }
            }
            tell(Incident::Target { change, detail });
        }
        if ENDED.load(Ordering::Relaxed) {
            return "it was asked to";
        }
        if stop.is_stopped() {
            return "nobody takes what it finds";
        }
        if source.is_alive() == Some(false) {
            tell(Incident::Target {
                change: TargetChange::Gone,
                detail: GONE.to_owned(),
            });
            return GONE;
        }
        thread::sleep(FOLLOW);
    }
}

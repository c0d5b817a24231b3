//! The process that looks at the guest: opens the target, confines itself,
//! finds and follows the kernel, and writes events to stdout, one JSON object
//! a line. Its policy is the first line of stdin; when stdin ends, so does it.

use std::io::{self, BufRead, Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use secmon_guest::{Guest, TrustLevel};
use secmon_memory::Volatility;
use secmon_monitor::inside::{FollowedGuest, Follower};
use secmon_profile::{Cache, FindOptions};
use secmon_reference::{Expected, KernelFile};
use secmon_sandbox::{Needs, Stage};
use secmon_watch::policy::MAX_BYTES;
use secmon_watch::{Event, Incident, Policy, Stop, TargetChange, Watched, watch};
use serde::{Deserialize, Serialize};

use super::arguments::WatchArguments;
use super::now_ms;
use crate::arguments::Common;
use crate::check::REFERRING;
use crate::reference;
use crate::report::{Advise, Reporter};
use crate::session::{Session, Source, remembering};

/// Between two looks at what the target does.
const FOLLOW: Duration = Duration::from_millis(500);

/// The first line of stdin.
#[derive(Debug, Serialize, Deserialize)]
pub struct Instructions {
    /// The policy's text, which was found right.
    pub policy: String,
    /// The budget in percent.
    pub budget: f64,
    /// Whether the target was there before, and came back.
    pub again: bool,
}

/// What is followed, as detectors look at it.
struct View<'a> {
    followed: FollowedGuest<'a>,
    /// The file of the kernel that ran at the start.
    reference: Option<Arc<KernelFile>>,
    /// What the first look at a boot saw.
    first: Mutex<(u64, Arc<OnceLock<Expected>>)>,
}

impl Watched for View<'_> {
    fn guest(&self) -> Result<(Guest, u64), String> {
        let (mut kernel, boot) = self.followed.kernel()?;
        kernel.space = remembering(kernel.space.clone(), &kernel);
        let build_id = kernel.profile.build_id().cloned();
        let guest = Guest::new(kernel);
        // After a reboot it may be another kernel.
        let fits = |file: &&Arc<KernelFile>| build_id.is_some() && file.build_id == build_id;
        if let Some(file) = self.reference.as_ref().filter(fits) {
            return Ok((guest.with_reference(Arc::clone(file)), boot));
        }
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.0 != boot {
            *first = (boot, Arc::default());
        }
        Ok((guest.with_first_state(Arc::clone(&first.1)), boot))
    }

    fn boot(&self) -> Option<u64> {
        self.followed.boot()
    }
}

/// The kernel's own file, as long as files can be opened. Where nothing runs yet
/// none can be looked for.
fn reference(
    session: &Session<'_>,
    source: &Source,
    given: Option<&Path>,
    reporter: Reporter,
) -> Result<Option<Arc<KernelFile>>> {
    let found = match session.guest(source) {
        Ok(guest) => reference::find(guest.kernel(), given, reporter)?,
        // It is compared with each kernel that is started.
        Err(error) => match given.filter(|path| path.is_file()) {
            Some(path) => Some(reference::read(path)?),
            None => {
                reporter.note(format_args!("no kernel's file is looked for: {error:#}"));
                None
            }
        },
    };
    Ok(found.map(Arc::new))
}

/// Runs until stdin ends or the target goes away.
///
/// # Errors
/// If the target can't be opened or is none that changes.
pub fn run(common: &Common, arguments: &WatchArguments, reporter: Reporter) -> Result<ExitCode> {
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

    let given = arguments.kernel.as_deref();
    let mut session = Session::new(common, reporter);
    session.reads(reference::places(given));
    let source = session.open()?;
    if source.memory().volatility() == Volatility::Static {
        return Err(anyhow::anyhow!(
            "an image does not change: there is nothing to watch"
        ))
        .advise("`secmon check` looks at it once");
    }
    let compares = policy
        .enabled()
        .iter()
        .any(|detector| detector.name() == REFERRING);
    let reference = match compares
        .then(|| reference(&session, &source, given, reporter))
        .transpose()
    {
        // It came back with another kernel: what that is compared with is told.
        Err(_) if instructions.again => None,
        found => found?.flatten(),
    };
    // Nothing is opened from here on. An ISF file is read again for each kernel that comes: then it, and nothing else, can
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
                let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
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
        left_behind: Vec::new(),
    };
    let follower = Follower::new(source.memory().clone(), options);
    let view = View {
        followed: follower.guest(),
        reference,
        first: Mutex::default(),
    };
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
    source: &Source,
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

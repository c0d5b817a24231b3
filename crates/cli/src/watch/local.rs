//! Events of a target of this host: a process of this program looks at it,
//! and is started again when the target is there again.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use secmon_watch::{Event, Policy};

use super::engine::Instructions;
use super::{News, Source};

/// The longest line of the process that looks.
const LONGEST: u64 = 1 << 20;
/// Between two attempts to open a target that went away.
const AGAIN: Duration = Duration::from_secs(2);
/// How long the process that looks may take to end.
const LAST: Duration = Duration::from_secs(10);

/// The source of a target's events.
pub struct Local;

impl Source for Local {
    fn reacts_here(&self) -> bool {
        true
    }

    fn acknowledge(&mut self, _: u64) {}
}

impl Local {
    /// Starts to look.
    ///
    /// # Errors
    /// If a thread can't be started.
    pub fn start(
        policy: String,
        parsed: &Policy,
        ending: &Arc<AtomicBool>,
        news: SyncSender<News>,
    ) -> Result<Self> {
        let mut instructions = Instructions {
            policy,
            budget: parsed.budget.percent(),
            again: false,
        };
        let ending = Arc::clone(ending);
        thread::Builder::new()
            .name("looks".to_owned())
            .spawn(move || {
                let outcome = run(&mut instructions, &ending, &news);
                let _ = news.send(News::End(outcome));
            })
            .context("starting a thread")?;
        Ok(Self)
    }
}

/// Starts the process that looks, and again as long as the target comes back.
fn run(
    instructions: &mut Instructions,
    ending: &AtomicBool,
    news: &SyncSender<News>,
) -> Result<()> {
    let mut seen = false;
    loop {
        instructions.again = seen;
        let line = serde_json::to_string(instructions)?;
        let (events, ended_well) = look(&line, ending, news, !seen)?;
        seen |= events > 0;
        if ending.load(Ordering::Relaxed) {
            return Ok(());
        }
        if !seen && !ended_well {
            bail!("the target can't be watched, see above");
        }
        let again = Instant::now() + AGAIN;
        while Instant::now() < again {
            if ending.load(Ordering::Relaxed) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// One process that looks; says how many events it told, and whether it ended
/// without an error. `first`: what it says on stderr is for the user.
fn look(
    instructions: &str,
    ending: &AtomicBool,
    news: &SyncSender<News>,
    first: bool,
) -> Result<(u64, bool)> {
    let program = std::env::current_exe().context("finding this program's own file")?;
    let mut command = Command::new(program);
    command
        .args(std::env::args_os().skip(1))
        .arg("--engine")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(if first {
            Stdio::inherit()
        } else {
            Stdio::null()
        });
    // A terminal's signals are for this process, which ends the other one.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().context("starting the process that looks")?;
    let told = converse(&mut child, instructions, ending, news);
    let status = end(&mut child)?;
    Ok((told?, status))
}

fn converse(
    child: &mut Child,
    instructions: &str,
    ending: &AtomicBool,
    news: &SyncSender<News>,
) -> Result<u64> {
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        bail!("the process that looks has no pipes");
    };
    // If it ended at once, its status says so.
    let _ = writeln!(input, "{instructions}");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !ending.load(Ordering::Relaxed) && !done.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(50));
            }
            // Then it tells its last and ends.
            drop(input);
        });
        let told = read(BufReader::new(output), news);
        done.store(true, Ordering::Relaxed);
        told
    })
}

/// Hands on events until there are no more. What looks has parsed a hostile
/// guest: its lines are bounded, and nothing but events.
fn read(mut output: impl std::io::BufRead, news: &SyncSender<News>) -> Result<u64> {
    let mut told = 0_u64;
    loop {
        let mut line = Vec::new();
        let length = (&mut output).take(LONGEST).read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(told);
        }
        let event: Event = serde_json::from_slice(&line)
            .context("the process that looks wrote something that is no event")?;
        if news.send(News::Event(Box::new(event), None)).is_err() {
            return Ok(told);
        }
        told = told.saturating_add(1);
    }
}

/// Waits for its end, and brings it about.
fn end(child: &mut Child) -> Result<bool> {
    let deadline = Instant::now() + LAST;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if Instant::now() >= deadline {
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

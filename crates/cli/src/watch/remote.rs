//! Events of the targets of a monitoring VM, which looks at them itself: they
//! wait in its outbox until they are kept here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use secmon_channel::ChannelError;
use secmon_monitor::launch::MonitorName;
use secmon_monitor::launch::connect::Connection;
use secmon_monitor::protocol::{ClientError, Finding, Notice};
use secmon_watch::{Event, Incident};

use super::{News, Source};
use crate::arguments::Common;
use crate::monitor::{Address, connect_or_wait};
use crate::report::{Advise, Reporter};

/// How long a monitor may take until it answers: it may be booting.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long is listened before the next look at what is to be acknowledged.
const LISTEN: Duration = Duration::from_millis(200);
/// Between two attempts to reach a monitor.
const AGAIN: Duration = Duration::from_secs(2);

/// The source of a monitor's events.
pub struct Remote {
    acknowledged: Sender<u64>,
}

impl Source for Remote {
    fn reacts_here(&self) -> bool {
        false
    }

    fn acknowledge(&mut self, number: u64) {
        // If the conversation ended, the event comes again.
        let _ = self.acknowledged.send(number);
    }
}

impl Remote {
    /// Begins the conversation.
    ///
    /// # Errors
    /// If the monitor does not answer, or the options are not for one.
    pub fn start(
        address: Address,
        common: &Common,
        ending: &Arc<AtomicBool>,
        news: SyncSender<News>,
        reporter: Reporter,
    ) -> Result<Self> {
        if address.target.is_some() {
            return Err(anyhow!(
                "a monitor's events are taken for all of its targets"
            ))
            .advise(format!("write monitor:{}", address.monitor));
        }
        if common.pause {
            bail!("a monitor pauses its target for tables only");
        }
        let connection = connect_or_wait(&address.monitor, PATIENCE, reporter)?;
        let (acknowledged, to_acknowledge) = mpsc::channel();
        let ending = Arc::clone(ending);
        let mut listener = Listener {
            name: address.monitor,
            news,
            to_acknowledge,
            last: (0, 0),
            reporter,
        };
        thread::Builder::new()
            .name("listens".to_owned())
            .spawn(move || {
                let outcome = listener.run(connection, &ending);
                let _ = listener.news.send(News::End(outcome));
            })
            .context("starting a thread")?;
        Ok(Self { acknowledged })
    }
}

struct Listener {
    name: MonitorName,
    news: SyncSender<News>,
    to_acknowledge: Receiver<u64>,
    /// Number and time of the latest that was handed on.
    last: (u64, u64),
    reporter: Reporter,
}

impl Listener {
    /// Listens, and again after each end of the conversation.
    fn run(&mut self, mut connection: Connection, ending: &AtomicBool) -> Result<()> {
        loop {
            let run = format!("monitor:{} {}", self.name, connection.monitor);
            if self.news.send(News::Run(run)).is_err() {
                return Ok(());
            }
            let Some(error) = self.listen(&mut connection, ending)? else {
                return Ok(());
            };
            drop(connection);
            self.reporter.warn(format_args!(
                "monitor {} is not reached: {error}; trying again",
                self.name
            ));
            connection = loop {
                let again = Instant::now() + AGAIN;
                while Instant::now() < again {
                    if ending.load(Ordering::Relaxed) {
                        return Ok(());
                    }
                    thread::sleep(Duration::from_millis(50));
                }
                if let Ok(connection) = connect_or_wait(&self.name, AGAIN, self.reporter) {
                    break connection;
                }
            };
            self.reporter
                .warn(format_args!("monitor {} is reached again", self.name));
        }
    }

    /// Takes what the monitor tells until the conversation ends, and says why;
    /// none: the watch ends.
    fn listen(
        &mut self,
        connection: &mut Connection,
        ending: &AtomicBool,
    ) -> Result<Option<ClientError>> {
        loop {
            let mut through = None;
            while let Ok(number) = self.to_acknowledge.try_recv() {
                through = through.max(Some(number));
            }
            if let Some(through) = through
                && let Err(error) = connection.client.acknowledge(through)
            {
                return Ok(Some(error));
            }
            if ending.load(Ordering::Relaxed) {
                return Ok(None);
            }
            match connection.client.notice(Some(Instant::now() + LISTEN)) {
                Ok(Notice::Heartbeat(_)) => {}
                Ok(Notice::Finding(finding)) => {
                    let number = (finding.sequence, finding.time_ms);
                    // What was not acknowledged yet comes again with each
                    // conversation; a monitor that was started anew counts anew.
                    if number.0 <= self.last.0 && number.1 <= self.last.1 {
                        continue;
                    }
                    self.last = number;
                    let event = Box::new(event(&self.name, finding));
                    if self.news.send(News::Event(event, Some(number.0))).is_err() {
                        return Ok(None);
                    }
                }
                Err(ClientError::Channel(ChannelError::Deadline { .. })) => {}
                Err(error) => return Ok(Some(error)),
            }
        }
    }
}

/// A monitor's finding as an event. What the monitor says may be wrong: it has
/// parsed a hostile guest.
fn event(name: &MonitorName, finding: Finding) -> Event {
    let Finding {
        sequence,
        time_ms,
        target,
        kind,
        text,
        incident,
        trust_level,
        ..
    } = finding;
    let told = incident
        .as_deref()
        .and_then(|json| serde_json::from_str(json).ok());
    let incident = told.unwrap_or_else(|| match kind.target_change() {
        Some(change) => Incident::Target {
            change,
            detail: text,
        },
        None => Incident::Monitor {
            kind: serde_json::to_value(kind)
                .ok()
                .and_then(|value| value.as_str().map(str::to_owned))
                .unwrap_or_default(),
            detail: text,
        },
    });
    let target = target.map_or_else(
        || format!("monitor:{name}"),
        |target| format!("monitor:{name}/{target}"),
    );
    Event {
        sequence,
        time_ms,
        target,
        trust_level,
        incident,
    }
}

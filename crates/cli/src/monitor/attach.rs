//! `secmon monitor attach`: a console on a monitor.
//!
//! A line is what would follow `secmon -t monitor:NAME/TARGET`: `ps --limit 5`,
//! `read linux_banner`. `use TARGET` says which target is meant from then on.
//! What the monitor says unasked is shown before the next prompt. It ends with
//! the end of its input.

use std::cell::RefCell;
use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Write};
use std::rc::Rc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use secmon_channel::ChannelError;
use secmon_monitor::launch::MonitorName;
use secmon_monitor::protocol::{ClientError, Finding, Notice};

use super::remote::{self, Target};
use super::{Address, connect_or_wait};
use crate::arguments::{BuiltIn, Common};
use crate::command::{self, Action};
use crate::output::escape;
use crate::query::Query;
use crate::report::Reporter;

/// How long a monitor may take until it answers.
const PATIENCE: Duration = Duration::from_secs(120);
/// A monitor has a heartbeat each second; so long without one is told.
const SILENCE: Duration = Duration::from_secs(10);
/// How long is listened to the monitor before the next look at the input.
const LISTEN: Duration = Duration::from_millis(200);
/// The longest line.
const LONGEST: usize = 16 << 10;

/// Runs the console until its input ends.
pub fn attach(name: &MonitorName, common: &Common, reporter: Reporter) -> Result<()> {
    let mut connection = connect_or_wait(name, PATIENCE, reporter)?;
    remote::confine(common, reporter);
    let targets = connection.client.targets()?;
    let Some(first) = targets.first() else {
        bail!("monitor {name} has no target");
    };
    let address = Address {
        monitor: name.clone(),
        target: Some(first.name.clone()),
    };
    let interactive = io::stdin().is_terminal();
    if interactive {
        println!(
            "Connected to monitor {name}. A line is a command such as `ps --limit 5`; Ctrl-D ends."
        );
        for target in &targets {
            let state = remote::state(target);
            println!(
                "  {}: {}",
                escape::message(&target.name),
                escape::message(&state)
            );
        }
    }
    let target = Target::choose(connection, &address)?;
    let mut console = Console {
        names: targets.into_iter().map(|target| target.name).collect(),
        address,
        target: Some(target),
        common: common.clone(),
        reporter,
        heard: Instant::now(),
        silent: false,
    };
    console.run(interactive)
}

struct Console {
    names: Vec<String>,
    address: Address,
    /// Always there but while a command has it.
    target: Option<Target>,
    common: Common,
    reporter: Reporter,
    heard: Instant,
    silent: bool,
}

impl Console {
    fn run(&mut self, interactive: bool) -> Result<()> {
        let (sender, lines) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut input = io::stdin().lock();
            loop {
                let mut line = Vec::new();
                let mut limited = io::Read::take(&mut input, LONGEST as u64);
                match limited.read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) if sender.send(line).is_err() => return,
                    Ok(_) => {}
                }
            }
        });
        let prompt = |console: &Self| {
            if interactive {
                let target = console.address.target.as_deref().unwrap_or_default();
                print!("{}> ", escape::message(target));
                let _ = io::stdout().flush();
            }
        };
        prompt(self);
        loop {
            self.listen()?;
            match lines.recv_timeout(Duration::from_millis(1)) {
                Ok(line) => {
                    let line = String::from_utf8_lossy(&line).trim().to_owned();
                    if !line.is_empty()
                        && let Err(error) = self.command(&line)
                    {
                        if error.downcast_ref::<ClientError>().is_some_and(is_lost) {
                            return Err(error);
                        }
                        self.reporter.error(&error);
                    }
                    prompt(self);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    if interactive {
                        println!();
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Shows what the monitor says unasked.
    fn listen(&mut self) -> Result<()> {
        let Some(target) = &mut self.target else {
            return Ok(());
        };
        match target.client().notice(Some(Instant::now() + LISTEN)) {
            Ok(Notice::Heartbeat(_)) => {
                self.heard = Instant::now();
                if std::mem::take(&mut self.silent) {
                    println!("* the monitor has heartbeats again");
                }
            }
            Ok(Notice::Finding(finding)) => {
                self.heard = Instant::now();
                show(&finding);
                target.client().acknowledge(finding.sequence)?;
            }
            Err(ClientError::Channel(error)) if is_timeout(&error) => {
                if self.heard.elapsed() > SILENCE && !self.silent {
                    self.silent = true;
                    println!("* no heartbeat of the monitor for {SILENCE:?}");
                }
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn command(&mut self, line: &str) -> Result<()> {
        let words = split(line)?;
        if let [word, name] = words.as_slice()
            && word == "use"
        {
            if !self.names.contains(name) {
                bail!(
                    "the monitor has no target {name}; it has {}",
                    self.names.join(", ")
                );
            }
            self.address.target = Some(name.clone());
            if let Some(target) = self.target.take() {
                self.target = Some(Target::choose(target.into_connection(), &self.address)?);
            }
            return Ok(());
        }
        let arguments =
            std::iter::once(OsString::from("secmon")).chain(words.iter().map(Into::into));
        let (common, action) = match command::try_parse(arguments) {
            Ok(parsed) => parsed,
            Err(text) => {
                print!("{text}");
                return Ok(());
            }
        };
        let format = if words
            .iter()
            .any(|word| word == "-f" || word.starts_with("--format"))
        {
            common.format
        } else {
            self.common.format
        };
        let Some(mut target) = self.target.take() else {
            return Ok(());
        };
        let outcome = match action {
            Action::Show(table, options) => {
                target.set_pause(common.pause);
                Query::new(table, format, &options)
                    .and_then(|query| target.show(table, &query, &options, self.reporter))
            }
            Action::BuiltIn(built_in) => match *built_in {
                BuiltIn::Check(arguments) if !arguments.list => arguments.chosen().and_then(|_| {
                    target.set_pause(common.pause);
                    let policy = arguments.policy()?;
                    let code = target.check(&arguments, policy.as_ref(), format, self.reporter);
                    code.map(|_| ())
                }),
                BuiltIn::Targets => target.targets(&self.address, format),
                BuiltIn::Translate(arguments) => target.translate(&arguments.locations, format),
                BuiltIn::Tables { table } => crate::documents::tables(table.as_deref(), format),
                BuiltIn::Read(arguments) if arguments.output.is_none() => {
                    let shared = Rc::new(RefCell::new(target));
                    let sink = crate::sink(&arguments, format);
                    let outcome =
                        sink.and_then(|sink| Target::read_with(shared.clone(), &arguments, sink));
                    let Some(shared) = Rc::into_inner(shared) else {
                        bail!("the conversation is still in use");
                    };
                    target = shared.into_inner();
                    outcome
                }
                _ => Err(anyhow::anyhow!(
                    "not here: a line is a table's command, check, read, translate, targets or tables"
                )),
            },
        };
        self.target = Some(target);
        outcome
    }
}

fn is_timeout(error: &ChannelError) -> bool {
    matches!(error, ChannelError::Deadline { .. })
}

/// Whether nothing more will come.
fn is_lost(error: &ClientError) -> bool {
    matches!(error, ClientError::Channel(_) | ClientError::StartedAnew)
}

fn show(finding: &Finding) {
    let target = finding.target.as_deref().unwrap_or("the monitor");
    println!(
        "* {:?} [{}] {}: {} ({})",
        finding.severity,
        finding.sequence,
        escape::message(target),
        escape::message(&finding.text),
        finding.trust_level
    );
}

/// Words, which spaces part; quotes hold them together.
fn split(line: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for character in line.chars() {
        match (quote, character) {
            (Some(open), _) if character == open => quote = None,
            (Some(_), _) => word.get_or_insert_default().push(character),
            (None, '\'' | '"') => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (None, _) if character.is_whitespace() => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(character),
        }
    }
    if quote.is_some() {
        bail!("a quote is not closed");
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_hold_words_together() {
        let words = |line| split(line).expect("words");
        assert_eq!(words("ps  --limit 5"), ["ps", "--limit", "5"]);
        assert_eq!(words("ps -w 'comm=a b' \"\""), ["ps", "-w", "comm=a b", ""]);
        assert_eq!(words("  "), [""; 0]);
        assert!(split("ps 'x").is_err());
    }
}

//! Sinks that this program has itself: lines for people, JSON for programs.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use secmon_detect::Class;
use secmon_export::{Bounds, otlp, syslog};
use secmon_guest::Value;
use secmon_watch::{Event, Incident, Sink, SinkError, TargetChange};

use super::arguments::WatchArguments;
use super::writes_json;
use crate::arguments::Format;
use crate::listing;
use crate::output::escape;

const RED: &str = "\x1b[31m";
const YELLOW: &str = "\x1b[33m";
const GREEN: &str = "\x1b[32m";
const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Opens those that were asked for.
///
/// # Errors
/// If a file can't be opened.
pub fn open(format: Format, arguments: &WatchArguments) -> Result<Vec<Box<dyn Sink>>> {
    let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
    let is_stdout = |path: &Path| path.as_os_str() == "-";
    let to_stdout = arguments.ndjson.as_deref().is_some_and(is_stdout);
    match format {
        Format::Csv | Format::Markdown => {
            bail!("events are no rows: use --format ndjson, or the usual lines")
        }
        format if writes_json(format) || to_stdout => sinks.push(Box::new(JsonLines {
            name: "stdout".to_owned(),
            out: Box::new(io::stdout()),
        })),
        _ => sinks.push(Box::new(Lines {
            color: listing::style().color,
        })),
    }
    if let Some(path) = &arguments.ndjson
        && !is_stdout(path)
    {
        let file = File::options().append(true).create(true).open(path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        sinks.push(Box::new(JsonLines {
            name: path.display().to_string(),
            out: Box::new(file),
        }));
    }
    for address in &arguments.syslog {
        let facility = syslog::Facility::SECURITY;
        sinks.push(Box::new(syslog::start(
            address.clone(),
            facility,
            Bounds::default(),
        )?));
    }
    if let Some(endpoint) = &arguments.otlp {
        let collector = otlp::Collector {
            endpoint: endpoint.clone(),
            headers: arguments.otlp_header.clone(),
            authorities: arguments.otlp_ca.clone(),
        };
        sinks.push(Box::new(otlp::start(&collector, Bounds::default())?));
    }
    Ok(sinks)
}

/// One JSON object a line, each written in one piece.
struct JsonLines {
    name: String,
    out: Box<dyn Write + Send>,
}

impl Sink for JsonLines {
    fn take(&mut self, event: &Event) -> Result<(), SinkError> {
        let lost = |error: &dyn std::fmt::Display| SinkError::Lost {
            sink: self.name.clone(),
            reason: error.to_string(),
            lost: 1,
        };
        let mut line = serde_json::to_string(event).map_err(|error| lost(&error))?;
        line.push('\n');
        let written = self.out.write_all(line.as_bytes());
        let written = written.and_then(|()| self.out.flush());
        written.map_err(|error| SinkError::Lost {
            sink: self.name.clone(),
            reason: error.to_string(),
            lost: 1,
        })
    }
}

/// A line for people.
struct Lines {
    color: bool,
}

impl Sink for Lines {
    fn take(&mut self, event: &Event) -> Result<(), SinkError> {
        let line = line(event, self.color);
        let mut out = io::stdout().lock();
        writeln!(out, "{line}").map_err(|error| SinkError::Lost {
            sink: "stdout".to_owned(),
            reason: error.to_string(),
            lost: 1,
        })
    }
}

fn line(event: &Event, color: bool) -> String {
    let time = Value::time(i128::from(event.time_ms) * 1_000_000).to_string();
    // Seconds are enough for people.
    let time = time.get(..19).unwrap_or(&time).replace('T', " ");
    let (word, ink) = word(&event.incident);
    let about = match &event.incident {
        Incident::Appeared { finding }
        | Incident::Changed { finding, .. }
        | Incident::Gone { finding, .. } => format!(
            "{} {}/{}: ",
            finding.severity, finding.detector, finding.name
        ),
        _ => String::new(),
    };
    let text = format!("{about}{}", event.incident);
    let text = escape::message(&text);
    if color && !ink.is_empty() {
        format!("{DIM}{time}{PLAIN} {ink}{word:<11}{PLAIN} {text}")
    } else {
        format!("{time} {word:<11} {text}")
    }
}

/// What stands first in a line, and its colour.
fn word(incident: &Incident) -> (&'static str, &'static str) {
    match incident {
        Incident::Appeared { finding } | Incident::Changed { finding, .. } => match finding.class {
            Class::Attack => ("ATTACK", RED),
            Class::Suspicion => ("SUSPICION", YELLOW),
            Class::Information => ("information", ""),
        },
        Incident::Gone { .. } => ("gone", GREEN),
        Incident::Target { change, .. } => match change {
            TargetChange::Conflict => ("conflict", YELLOW),
            _ => ("target", ""),
        },
        Incident::Monitor { .. } => ("monitor", ""),
        Incident::Started { .. } => ("started", ""),
        Incident::Stopped { .. } => ("stopped", ""),
        Incident::Blind { .. } => ("blind", YELLOW),
        Incident::Sighted { .. } => ("sighted", GREEN),
        Incident::Behind { .. } => ("behind", YELLOW),
        Incident::Coverage { .. } => ("coverage", DIM),
        Incident::Excepted { .. } => ("excepted", DIM),
        Incident::ExceptionExpired { .. } => ("expired", YELLOW),
        Incident::ActionDone { .. } => ("done", RED),
        Incident::ActionRefused { .. } => ("refused", YELLOW),
        Incident::Lost { .. } => ("lost", YELLOW),
    }
}

#[cfg(test)]
mod tests {
    use secmon_guest::TrustLevel;

    use super::*;

    fn blind(reason: &str) -> Event {
        Event {
            sequence: 1,
            time_ms: 1_500,
            target: "qemu:web1".into(),
            trust_level: TrustLevel::L0,
            incident: Incident::Blind {
                detector: "tracing".into(),
                reason: reason.into(),
            },
        }
    }

    #[test]
    fn a_line_is_one_line_and_can_not_act_on_the_terminal() {
        let said = line(&blind("a\n\x1b[2Jb"), false);
        assert_eq!(
            said,
            "1970-01-01 00:00:01 blind       tracing can't look: a\\n\\x1b[2Jb"
        );
        assert!(line(&blind("x"), true).contains(YELLOW));
    }
}

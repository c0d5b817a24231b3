//! `secmon findings`: what a watch has stored.

use std::io::Write as _;

use anyhow::Result;
use secmon_guest::{Kind, Value};
use secmon_store::{Query, StateFilter, Store};
use serde_json::json;

use super::arguments::{FindingsArguments, Since, State};
use super::{now_ms, writes_json};
use crate::arguments::Format;
use crate::listing::{self, column};
use crate::output::json;

/// Shows findings or events of a store.
///
/// # Errors
/// If it can't be read, or the output fails.
pub fn findings(arguments: &FindingsArguments, format: Format) -> Result<()> {
    let store = Store::open_to_read(&arguments.store)?;
    let since_ms = arguments.since.map(|since| match since {
        Since::Ago(milliseconds) => now_ms().saturating_sub(milliseconds),
        Since::At(moment) => moment,
    });
    if arguments.events {
        return events(&store, since_ms.unwrap_or(0), format);
    }
    let found = store.findings(&Query {
        target: None,
        detectors: arguments.detectors.clone(),
        since_ms,
        state: arguments.state.map(|state| match state {
            State::Open => StateFilter::Open,
            State::Gone => StateFilter::Gone,
            State::Unknown => StateFilter::Unknown,
        }),
    })?;
    if writes_json(format) {
        return documents(
            found.iter().map(|found| {
                json!({
                    "number": found.number,
                    "target": found.target,
                    "state": found.state,
                    "first_seen_ms": found.first_seen_ms,
                    "last_told_ms": found.last_told_ms,
                    "appearances": found.appearances,
                    "finding": found.record,
                    "trust_level": found.trust_level,
                })
            }),
            format,
        );
    }
    let columns = [
        column("state", Kind::Text, "Open, gone or unknown."),
        column("first_seen", Kind::Time, "When it was first told."),
        column("last_told", Kind::Time, "When it was last told."),
        column("severity", Kind::Text, "How much harm it can do."),
        column("class", Kind::Text, "Attack, suspicion or information."),
        column("detector", Kind::Text, "Who found it."),
        column("finding", Kind::Text, "What was found."),
        column("target", Kind::Text, "Where."),
        column("summary", Kind::Text, "In a sentence."),
        column(
            "trust_level",
            Kind::Text,
            "How well who said so was protected.",
        ),
    ];
    let rows = found.into_iter().map(|found| {
        vec![
            found.state.into(),
            time(found.first_seen_ms),
            time(found.last_told_ms),
            Value::word(found.record.severity.name()),
            Value::word(found.record.class.name()),
            found.record.detector.into(),
            found.record.name.into(),
            found.target.into(),
            found.record.summary.into(),
            found.trust_level.into(),
        ]
    });
    Ok(listing::show(&columns, format, rows)?)
}

fn events(store: &Store, since_ms: u64, format: Format) -> Result<()> {
    let events = store.events(since_ms)?;
    if writes_json(format) {
        return documents(
            events
                .iter()
                .map(|stored| json!({ "run": stored.run, "event": stored.event })),
            format,
        );
    }
    let columns = [
        column("time", Kind::Time, "When."),
        column("event", Kind::Text, "What happened."),
        column("target", Kind::Text, "Where."),
        column("text", Kind::Text, "In words."),
        column(
            "trust_level",
            Kind::Text,
            "How well who said so was protected.",
        ),
    ];
    let rows = events.into_iter().map(|stored| {
        let event = stored.event;
        vec![
            time(event.time_ms),
            Value::word(event.incident.name()),
            event.target.into(),
            event.incident.to_string().into(),
            Value::word(event.trust_level.name()),
        ]
    });
    Ok(listing::show(&columns, format, rows)?)
}

fn time(milliseconds: u64) -> Value {
    Value::time(i128::from(milliseconds) * 1_000_000)
}

/// Objects as one array, or one a line.
fn documents(objects: impl Iterator<Item = serde_json::Value>, format: Format) -> Result<()> {
    let mut out = listing::stdout()?;
    if format == Format::Json {
        json::write(&mut out, &objects.collect::<Vec<_>>())?;
        out.write_all(b"\n")?;
    } else {
        for object in objects {
            json::write(&mut out, &object)?;
            out.write_all(b"\n")?;
        }
    }
    out.flush()?;
    Ok(())
}

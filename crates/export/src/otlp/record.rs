//! An event as a log record, by the names of the semantic conventions where
//! they have one.

use std::time::{SystemTime, UNIX_EPOCH};

use secmon_watch::{Event, Incident};
use serde_json::{Value, json};

use crate::level::Level;
use crate::queue::Encode;
use crate::text::clean;

/// The longest text of an attribute.
const LONGEST_VALUE: usize = 4096;
/// The longest evidence, as JSON.
const LONGEST_EVIDENCE: usize = 16 << 10;
/// The most parts of a subject.
const MOST_PARTS: usize = 32;

/// Makes records, as JSON.
pub(crate) struct Recorder;

impl Encode for Recorder {
    fn encode(&self, event: &Event) -> Vec<u8> {
        let (number, text) = Level::of(event).opentelemetry();
        let nanoseconds = u128::from(event.time_ms) * 1_000_000;
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let observed = since.map_or(nanoseconds, |since| since.as_nanos());
        let record = json!({
            "timeUnixNano": nanoseconds.to_string(),
            "observedTimeUnixNano": observed.to_string(),
            "severityNumber": number,
            "severityText": text,
            "body": string(&event.incident.to_string()),
            "attributes": attributes(event),
            "eventName": format!("secmon.{}", event.incident.name()),
        });
        // Of these types no serialisation fails.
        serde_json::to_vec(&record).unwrap_or_default()
    }
}

fn attributes(event: &Event) -> Vec<Value> {
    let mut attributes = Vec::new();
    let mut add = |key: &str, value: Value| attributes.push(json!({"key": key, "value": value}));
    add("secmon.sequence", integer(event.sequence));
    add("secmon.target", string(&event.target));
    add("secmon.trust_level", string(event.trust_level.name()));
    if let Some(finding) = event.incident.finding() {
        add("security_rule.name", string(&finding.name));
        add("security_rule.ruleset.name", string(&finding.detector));
        add("secmon.finding.id", string(&finding.id));
        add("secmon.finding.class", string(finding.class.name()));
        add("secmon.finding.severity", string(finding.severity.name()));
        if let Some(technique) = &finding.technique {
            add("secmon.finding.technique", string(technique));
        }
        add("secmon.finding.about", string(&finding.about));
        if let Some(process) = finding.process() {
            add("process.pid", integer(process.pid.into()));
        }
        for (name, value) in finding.subject.iter().take(MOST_PARTS) {
            let key = format!("secmon.subject.{}", clean(name, 64));
            let value = match value {
                Value::Null => continue,
                Value::String(text) => string(text),
                Value::Bool(value) => json!({"boolValue": value}),
                Value::Number(number) => match number.as_u64() {
                    Some(number) => integer(number),
                    None => string(&number.to_string()),
                },
                other => string(&other.to_string()),
            };
            add(&key, value);
        }
        if !finding.evidence.is_empty() {
            let evidence = serde_json::to_string(&finding.evidence).unwrap_or_default();
            let evidence = clean(&evidence, LONGEST_EVIDENCE);
            add("secmon.finding.evidence", json!({"stringValue": evidence}));
        }
    }
    match &event.incident {
        Incident::ActionDone {
            action, finding, ..
        }
        | Incident::ActionRefused {
            action, finding, ..
        } => {
            add("secmon.action", string(action.name()));
            add("secmon.finding.id", string(finding));
        }
        Incident::Blind { detector, .. }
        | Incident::Sighted { detector }
        | Incident::Behind { detector, .. } => {
            add("security_rule.ruleset.name", string(detector));
        }
        Incident::Lost { sink, events, .. } => {
            add("secmon.sink", string(sink));
            add("secmon.lost", integer(*events));
        }
        _ => {}
    }
    attributes
}

fn string(text: &str) -> Value {
    json!({"stringValue": clean(text, LONGEST_VALUE)})
}

/// 64 bits are a decimal text in JSON; what does not fit `int64` is a text.
fn integer(number: u64) -> Value {
    match i64::try_from(number) {
        Ok(number) => json!({"intValue": number.to_string()}),
        Err(_) => string(&number.to_string()),
    }
}

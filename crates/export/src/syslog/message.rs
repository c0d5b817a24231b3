//! An event as an RFC 5424 message.

use secmon_watch::{Event, Incident};
use serde_json::Value;

use crate::level::Level;
use crate::queue::Encode;
use crate::text::{clean, cut};

/// The name of the structured data. The number is the one for documentation
/// and examples (RFC 5612), as this project has none of its own.
const DATA_ID: &str = "secmon@32473";

/// The most parameters of the structured data.
const MOST_PARAMETERS: usize = 40;

/// Bytes of one value, from the first that lets a message fit.
const VALUE_LENGTHS: [usize; 4] = [1024, 256, 64, 16];

/// What a message has at least for its text.
const LEAST_TEXT: usize = 64;

/// Makes messages.
pub(crate) struct Formatter {
    facility: u8,
    longest: usize,
    host: String,
    process: u32,
}

impl Formatter {
    pub(crate) fn new(facility: u8, longest: usize) -> Self {
        let name = rustix::system::uname();
        Self {
            facility,
            longest,
            host: printable(&name.nodename().to_string_lossy(), 255),
            process: std::process::id(),
        }
    }
}

impl Encode for Formatter {
    fn encode(&self, event: &Event) -> Vec<u8> {
        let priority = self.facility * 8 + Level::of(event).syslog();
        let header = format!(
            "<{priority}>1 {} {} secmon {} {} ",
            timestamp(event.time_ms),
            self.host,
            self.process,
            printable(event.incident.name(), 32),
        );
        let parameters = parameters(event);
        let mut message = header.clone();
        for length in VALUE_LENGTHS {
            header.clone_into(&mut message);
            push_data(&mut message, &parameters, length);
            if message.len() + LEAST_TEXT <= self.longest {
                break;
            }
        }
        // Four bytes are the space and the mark that the text is UTF-8.
        let left = self.longest.saturating_sub(message.len() + 4);
        message.push_str(" \u{feff}");
        message.push_str(&clean(&event.incident.to_string(), left));
        cut(message, self.longest).into_bytes()
    }
}

fn timestamp(milliseconds: u64) -> String {
    let time = i64::try_from(milliseconds).ok();
    time.and_then(|time| jiff::Timestamp::from_millisecond(time).ok())
        .map_or_else(|| "-".to_owned(), |time| format!("{time:.3}"))
}

/// A field of the header: printable ASCII, `-` if nothing is left.
fn printable(text: &str, most: usize) -> String {
    let text: String = text
        .chars()
        .filter(char::is_ascii_graphic)
        .take(most)
        .collect();
    if text.is_empty() {
        "-".to_owned()
    } else {
        text
    }
}

/// What machines sort by.
fn parameters(event: &Event) -> Vec<(String, String)> {
    let mut parameters = Vec::new();
    let mut add = |name: &str, value: String| parameters.push((name.to_owned(), value));
    add("sequence", event.sequence.to_string());
    add("target", event.target.clone());
    add("trust_level", event.trust_level.name().to_owned());
    if let Some(finding) = event.incident.finding() {
        add("id", finding.id.clone());
        add("detector", finding.detector.clone());
        add("finding", finding.name.clone());
        add("class", finding.class.name().to_owned());
        add("severity", finding.severity.name().to_owned());
        if let Some(technique) = &finding.technique {
            add("technique", technique.clone());
        }
        add("about", finding.about.clone());
        for (name, value) in &finding.subject {
            let value = match value {
                Value::String(text) => text.clone(),
                Value::Null => continue,
                other => other.to_string(),
            };
            add(&format!("subject_{name}"), value);
        }
    }
    match &event.incident {
        Incident::ActionDone {
            action, finding, ..
        }
        | Incident::ActionRefused {
            action, finding, ..
        } => {
            add("action", action.name().to_owned());
            add("id", finding.clone());
        }
        Incident::Blind { detector, .. }
        | Incident::Sighted { detector }
        | Incident::Behind { detector, .. } => add("detector", detector.clone()),
        Incident::Lost { sink, events, .. } => {
            add("sink", sink.clone());
            add("events", events.to_string());
        }
        _ => {}
    }
    parameters.truncate(MOST_PARAMETERS);
    parameters
}

/// `[ID name="value" …]`, RFC 5424, 6.3: `"`, `\` and `]` are escaped.
fn push_data(message: &mut String, parameters: &[(String, String)], length: usize) {
    message.push('[');
    message.push_str(DATA_ID);
    for (name, value) in parameters {
        let name: String = name
            .chars()
            .filter(|character| {
                character.is_ascii_graphic() && !matches!(character, '=' | ']' | '"')
            })
            .take(32)
            .collect();
        if name.is_empty() {
            continue;
        }
        message.push(' ');
        message.push_str(&name);
        message.push_str("=\"");
        for character in clean(value, length).chars() {
            if matches!(character, '"' | '\\' | ']') {
                message.push('\\');
            }
            message.push(character);
        }
        message.push('"');
    }
    message.push(']');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secmon_detect::{Class, Severity};
    use secmon_guest::TrustLevel;
    use secmon_watch::FindingRecord;
    use serde_json::Map;

    use super::*;

    /// Header fields, structured data, and text of a message; none if it is
    /// not as RFC 5424's grammar has it. Written from the RFC, not from the
    /// code above.
    #[allow(clippy::type_complexity)]
    fn parse(message: &str) -> Option<(Vec<String>, Vec<(String, String)>, String)> {
        let rest = message.strip_prefix('<')?;
        let (priority, rest) = rest.split_once('>')?;
        if priority.parse::<u8>().ok()? > 191 || (priority.len() > 1 && priority.starts_with('0')) {
            return None;
        }
        let mut fields = vec![priority.to_owned()];
        let mut rest = rest;
        for limit in [2, 32, 255, 48, 128, 32] {
            let (field, after) = rest.split_once(' ')?;
            let fits = (1..=limit).contains(&field.len())
                && field.bytes().all(|byte| (33..=126).contains(&byte));
            if !fits {
                return None;
            }
            fields.push(field.to_owned());
            rest = after;
        }
        let mut characters = rest.strip_prefix('[')?.chars();
        let mut next = || characters.next();
        let mut id = String::new();
        let mut end = loop {
            match next()? {
                end @ (' ' | ']') => break end,
                character if character.is_ascii_graphic() && !"=\"".contains(character) => {
                    id.push(character);
                }
                _ => return None,
            }
        };
        if id.is_empty() || id.len() > 32 {
            return None;
        }
        let mut parameters = Vec::new();
        while end == ' ' {
            let (mut name, mut value) = (String::new(), String::new());
            loop {
                match next()? {
                    '=' => break,
                    character if character.is_ascii_graphic() && !"]\"".contains(character) => {
                        name.push(character);
                    }
                    _ => return None,
                }
            }
            if name.is_empty() || name.len() > 32 || next()? != '"' {
                return None;
            }
            loop {
                match next()? {
                    '"' => break,
                    ']' => return None,
                    '\\' => match next()? {
                        escaped @ ('"' | '\\' | ']') => value.push(escaped),
                        _ => return None,
                    },
                    character => value.push(character),
                }
            }
            parameters.push((name, value));
            end = next()?;
        }
        if end != ']' {
            return None;
        }
        let text: String = characters.collect();
        let text = text.strip_prefix(" \u{feff}")?;
        Some((fields, parameters, text.to_owned()))
    }

    fn event(texts: &[String; 6]) -> Event {
        let [target, id, about, summary, key, value] = texts.clone();
        let mut subject = Map::new();
        subject.insert(key, Value::String(value));
        Event {
            sequence: 7,
            time_ms: 1_790_000_000_123,
            target,
            trust_level: TrustLevel::L1,
            incident: Incident::Appeared {
                finding: Box::new(FindingRecord {
                    id,
                    detector: "processes".to_owned(),
                    name: "hidden_process".to_owned(),
                    class: Class::Attack,
                    severity: Severity::Critical,
                    technique: Some("T1014".to_owned()),
                    subject,
                    about,
                    summary,
                    evidence: Vec::new(),
                }),
            },
        }
    }

    #[test]
    fn a_message_says_what_happened() {
        let texts = ["web1", "i", "a \"b\"]\\", "it\nhides", "pid", "812"].map(str::to_owned);
        let message = Formatter::new(10, 2048).encode(&event(&texts));
        let message = String::from_utf8(message).expect("UTF-8");
        let (fields, parameters, text) = parse(&message).expect("RFC 5424");
        assert_eq!(fields[0], "82", "authpriv.crit");
        assert_eq!(fields[1..3], ["1", "2026-09-21T14:13:20.123Z"]);
        assert_eq!((&*fields[4], &*fields[6]), ("secmon", "appeared"));
        let has =
            |name: &str, value: &str| parameters.contains(&(name.to_owned(), value.to_owned()));
        assert!(
            has("about", "a \"b\"]\\") && has("subject_pid", "812"),
            "{message}"
        );
        assert!(has("technique", "T1014") && has("trust_level", "L1"));
        assert_eq!(text, "it\\nhides");
    }

    proptest! {
        #[test]
        fn any_text_gives_a_valid_and_bounded_message(
            texts: [String; 6],
            long in 0_usize..6,
            longest in prop_oneof![Just(2048_usize), Just(8192)],
        ) {
            let mut texts = texts;
            texts[long] = texts[long].repeat(2000);
            let message = Formatter::new(10, longest).encode(&event(&texts));
            prop_assert!(message.len() <= longest);
            let message = String::from_utf8(message).expect("UTF-8");
            prop_assert!(parse(&message).is_some(), "{message:?}");
            prop_assert!(!message.contains('\n'));
        }
    }
}

//! What selects findings, and what hides them.

use std::collections::BTreeMap;
use std::fmt;

use secmon_detect::Class;
use serde::Deserialize;
use serde::de::{Deserializer, Visitor};
use serde_json::{Map, Value};

use super::{Day, DetectorName};
use crate::FindingRecord;

/// The longest pattern.
const MAX_PATTERN: usize = 1024;

/// What a finding must be like. Each thing that is said must fit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selector {
    /// The detector.
    pub detector: Option<DetectorName>,
    /// The finding's name.
    pub name: Option<Pattern>,
    /// The technique of ATT&CK.
    pub technique: Option<Pattern>,
    /// Parts of what it is about.
    pub subject: BTreeMap<String, Pattern>,
    /// Columns that one piece of its evidence must have.
    pub evidence: BTreeMap<String, Pattern>,
}

impl Selector {
    /// Whether it selects everything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it selects this finding.
    #[must_use]
    pub fn matches(&self, finding: &FindingRecord) -> bool {
        let fits = |pattern: &Option<Pattern>, text: Option<&str>| match pattern {
            Some(pattern) => text.is_some_and(|text| pattern.fits(text)),
            None => true,
        };
        self.detector
            .is_none_or(|detector| detector.name() == finding.detector)
            && fits(&self.name, Some(&finding.name))
            && fits(&self.technique, finding.technique.as_deref())
            && all_fit(&self.subject, &finding.subject)
            && (self.evidence.is_empty()
                || finding
                    .evidence
                    .iter()
                    .any(|piece| all_fit(&self.evidence, &piece.row)))
    }
}

/// What is known to be innocent, for a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Exception {
    /// Which findings.
    pub selector: Selector,
    /// Only those of this class.
    pub class: Option<Class>,
    /// Why.
    pub reason: String,
    /// The last day on which it hides.
    pub expires: Day,
}

impl Exception {
    /// Whether it hides nothing any more.
    #[must_use]
    pub fn has_expired(&self, today: Day) -> bool {
        today > self.expires
    }

    /// Whether it hides this finding on this day.
    #[must_use]
    pub fn hides(&self, finding: &FindingRecord, today: Day) -> bool {
        !self.has_expired(today)
            && self.class.is_none_or(|class| class == finding.class)
            && self.selector.matches(finding)
    }
}

/// A text in which `*` stands for any characters, also none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether a text is like this.
    #[must_use]
    pub fn fits(&self, text: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = text.strip_prefix(first) else {
            return false;
        };
        let parts: Vec<&str> = parts.collect();
        let Some((last, middle)) = parts.split_last() else {
            return rest.is_empty();
        };
        for part in middle {
            let Some((_, after)) = rest.split_once(part) else {
                return false;
            };
            rest = after;
        }
        rest.ends_with(last)
    }

    fn fits_value(&self, value: &Value) -> bool {
        match value {
            Value::String(text) => self.fits(text),
            Value::Number(number) => self.fits(&number.to_string()),
            Value::Bool(flag) => self.fits(&flag.to_string()),
            Value::Array(values) => values.iter().any(|value| match value {
                Value::String(text) => self.fits(text),
                Value::Number(number) => self.fits(&number.to_string()),
                _ => false,
            }),
            // What could not be read is nothing that could be excepted.
            Value::Null | Value::Object(_) => false,
        }
    }
}

fn all_fit(patterns: &BTreeMap<String, Pattern>, values: &Map<String, Value>) -> bool {
    patterns.iter().all(|(name, pattern)| {
        values
            .get(name)
            .is_some_and(|value| pattern.fits_value(value))
    })
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PatternVisitor;

        impl Visitor<'_> for PatternVisitor {
            type Value = Pattern;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text in which * stands for anything, a number, true or false")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Pattern, E> {
                if text.len() > MAX_PATTERN {
                    return Err(E::custom(format_args!(
                        "a pattern of {} bytes; at most {MAX_PATTERN} are possible",
                        text.len()
                    )));
                }
                Ok(Pattern(text.to_owned()))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Pattern, E> {
                Ok(Pattern(number.to_string()))
            }

            fn visit_bool<E: serde::de::Error>(self, flag: bool) -> Result<Pattern, E> {
                Ok(Pattern(flag.to_string()))
            }
        }

        deserializer.deserialize_any(PatternVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(pattern: &str, text: &str) -> bool {
        Pattern(pattern.to_owned()).fits(text)
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, text) in [
            ("", ""),
            ("*", ""),
            ("*", "java"),
            ("java", "java"),
            ("/usr/lib/*/java", "/usr/lib/jvm/17/java"),
            ("a*b*c", "abc"),
            ("a*b*c", "a-b-b-c"),
            ("*.so", "x.so.so"),
        ] {
            assert!(fits(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("java", "javac"),
            ("java", "xjava"),
            ("a*a", "a"),
            ("a*b*c", "acb"),
            ("*.so", "x.so.1"),
        ] {
            assert!(!fits(pattern, text), "{pattern} {text}");
        }
    }
}

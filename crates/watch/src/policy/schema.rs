//! The JSON schema of a policy, for editors and other programs.

use secmon_detect::Class;
use serde_json::{Value, json};

use super::VERSION;
use crate::Action;

/// The schema (JSON Schema 2020-12) of the document that a policy's TOML is.
#[must_use]
pub fn schema() -> Value {
    let interval = json!({
        "type": "string",
        "pattern": "^[0-9]+ *(ms|s|m|h|d)$",
        "description": "A time from 1 ms to 7 d."
    });
    let class = |text: &str| {
        json!({
            "enum": [Class::Information, Class::Suspicion, Class::Attack],
            "description": text
        })
    };
    let detectors: Vec<&str> = secmon_detect::detectors()
        .iter()
        .map(|detector| detector.name())
        .collect();
    let detector = |text: &str| json!({ "enum": detectors, "description": text });
    let pattern = |text: &str| {
        json!({
            "type": ["string", "integer", "boolean"],
            "description": format!("{text} In a text, * stands for anything.")
        })
    };
    let patterns = |text: &str| {
        json!({
            "type": "object",
            "additionalProperties": { "type": ["string", "integer", "boolean"] },
            "description": format!("{text} In a text, * stands for anything.")
        })
    };
    let count = |least: u32, most: u32, text: &str| json!({ "type": "integer", "minimum": least, "maximum": most, "description": text });
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Policy of secmon watch",
        "type": "object",
        "additionalProperties": false,
        "required": ["version"],
        "properties": {
            "version": { "const": VERSION, "description": "The version of this form." },
            "budget": {
                "type": "string",
                "pattern": "^ *[0-9.]+ *% *$",
                "default": "5%",
                "description": "The share of one core that watching may use, 0.1% to 100%."
            },
            "report": class("The least class that is reported; by default all are."),
            "coverage_interval": interval,
            "detector": {
                "type": "object",
                "description": "What is said of single detectors, by their names.",
                "propertyNames": { "enum": detectors },
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": false,
                    "properties": {
                        "enabled": { "type": "boolean", "description": "Whether it looks." },
                        "shortest_interval": interval,
                        "longest_interval": interval,
                        "report": class("The least class that is reported of it."),
                        "needed": count(1, 32, "In how many looks a finding must be seen."),
                        "looks": count(1, 32, "How many looks there are for that.")
                    }
                }
            },
            "exception": {
                "type": "array",
                "description": "What is known to be innocent, for a time.",
                "items": {
                    "type": "object",
                    "additionalProperties": false,
                    "required": ["reason", "expires"],
                    "properties": {
                        "detector": detector("Only findings of this detector."),
                        "name": pattern("Only findings of this name."),
                        "class": class("Only findings of this class."),
                        "technique": pattern("Only findings with this technique of ATT&CK."),
                        "subject": patterns("Parts of what the finding is about."),
                        "evidence": patterns("Columns that one piece of its evidence has."),
                        "reason": { "type": "string", "description": "Why it is innocent." },
                        "expires": {
                            "type": "string",
                            "format": "date",
                            "description": "The last day on which it hides; in TOML without quotation marks."
                        }
                    }
                }
            },
            "response": {
                "type": "array",
                "description": "What is done about findings when they appear.",
                "items": {
                    "type": "object",
                    "additionalProperties": false,
                    "required": ["actions"],
                    "properties": {
                        "detector": detector("Only findings of this detector."),
                        "name": pattern("Only findings of this name."),
                        "class": class("Findings of this class and above; by default suspicions."),
                        "severity": {
                            "enum": ["low", "medium", "high", "critical"],
                            "description": "Findings of this severity and above."
                        },
                        "technique": pattern("Only findings with this technique of ATT&CK."),
                        "subject": patterns("Parts of what the finding is about."),
                        "evidence": patterns("Columns that one piece of its evidence has."),
                        "actions": {
                            "type": "array",
                            "minItems": 1,
                            "items": { "enum": Action::ALL }
                        },
                        "at_most_per_hour": count(0, u32::MAX, "How often at most within an hour; 6 by default.")
                    }
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::Policy;
    use super::*;

    /// The fields that a table of the policy takes, as its own error lists
    /// them.
    fn known(text: &str) -> BTreeSet<String> {
        let error = Policy::parse(text, "p").expect_err("an unknown field");
        error
            .message
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|word| *word != "no_such_field")
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn the_schema_has_the_fields_that_are_read() {
        let schema = schema();
        let fields = |pointer: &str| -> BTreeSet<String> {
            let object = schema.pointer(pointer).and_then(Value::as_object);
            object.expect(pointer).keys().cloned().collect()
        };
        for (text, pointer) in [
            ("no_such_field = 1", "/properties"),
            (
                "version = 1\n[detector.tracing]\nno_such_field = 1",
                "/properties/detector/additionalProperties/properties",
            ),
            (
                "version = 1\n[[exception]]\nno_such_field = 1",
                "/properties/exception/items/properties",
            ),
            (
                "version = 1\n[[response]]\nno_such_field = 1",
                "/properties/response/items/properties",
            ),
        ] {
            assert_eq!(fields(pointer), known(text), "{text}");
        }
    }
}

//! What the table `modules` should hold.

use secmon_guest::{Selection, Value};
use secmon_lab::truth::Module;

use super::Check;
use super::processes::number;
use crate::rows::{Comparison, Expected, ExpectedRow};

/// The check of `modules`.
pub const MODULES: Check = Check {
    comparison: Comparison {
        table: "modules",
        key: &["name"],
    },
    selection: Selection::default,
    expected: |truth| truth.modules.iter().map(expected).collect(),
    beyond_truth: |_| false,
};

/// Parameters whose values only the module's own code can write: the table has
/// their names alone.
const OWN_PARAMETERS: &[(&str, &str)] = &[("overlay", "check_copy_up")];

fn text_or_null(text: Option<&str>) -> Expected {
    Expected::Exactly(text.map_or(Value::Null, Value::from))
}

fn expected(module: &Module) -> ExpectedRow {
    // The kernel writes behind the taints whether it is coming (+) or going (-).
    let taints = module.taint.trim_matches(['+', '-']);
    let used_by = module.used_by.iter().map(|user| user.as_str().into());
    let parameters = module.parameters.iter().map(|(name, value)| {
        let mut text = name.clone().into_bytes();
        if !OWN_PARAMETERS.contains(&(module.name.as_str(), name)) {
            text.push(b'=');
            text.extend_from_slice(value.as_bytes());
        }
        Value::text(text)
    });
    ExpectedRow::from([
        ("name", Expected::Exactly(module.name.as_str().into())),
        ("base", Expected::Exactly(Value::Address(module.address))),
        ("size", Expected::Exactly(module.size.into())),
        (
            "refcount",
            module
                .refcount
                .map_or(Expected::Exactly(Value::Null), number),
        ),
        ("state", Expected::Exactly(module.state.as_str().into())),
        ("used_by", Expected::Exactly(Value::List(used_by.collect()))),
        (
            "taints",
            text_or_null(Some(taints).filter(|taints| !taints.is_empty())),
        ),
        ("version", text_or_null(module.version.as_deref())),
        ("srcversion", text_or_null(module.source_version.as_deref())),
        // Those without a file in /sys are in the table too.
        ("parameters", Expected::Includes(parameters.collect())),
    ])
}

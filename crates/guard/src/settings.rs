//! Switches of the kernel that a monitor sets for good.

use secmon_guest::Guest;

use crate::{Finding, Kind};

/// Variables of the kernel, `int`s, and what process 1 makes of them.
const SETTINGS: [(&str, &str, u32); 1] =
    [("modules_disabled", "no module can be loaded any more", 1)];

/// Compares them with what a monitor sets.
pub fn look(guest: &Guest, findings: &mut Vec<Finding>) {
    for (symbol, meaning, expected) in SETTINGS {
        let Some(address) = guest.address(symbol) else {
            continue;
        };
        let seen = match guest.space().read_u32(address) {
            Ok(seen) if seen == expected => continue,
            Ok(seen) => seen.to_string(),
            Err(error) => error.to_string(),
        };
        let expected = format!("{expected} ({meaning})");
        let finding = Finding::new(Kind::ChangedSetting, symbol, expected, seen);
        findings.push(finding.at(address.as_u64()));
    }
}

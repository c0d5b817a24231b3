//! Reads policy files.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use secmon_watch::Policy;
use secmon_watch::policy::MAX_BYTES;

use crate::report::Advise;

/// Reads a policy, and gives its text as well.
///
/// # Errors
/// If the file can't be read or is wrong.
pub fn read(path: &Path) -> Result<(Policy, String)> {
    let reading = || format!("reading the policy {}", path.display());
    let length = std::fs::metadata(path).with_context(reading)?.len();
    if length > MAX_BYTES as u64 {
        return Err(anyhow!(
            "it has {length} bytes, at most {MAX_BYTES} are read"
        ))
        .with_context(reading);
    }
    let text = std::fs::read_to_string(path).with_context(reading)?;
    let policy = Policy::parse(&text, &path.display().to_string())
        .advise("docs/policy.md describes all fields, docs/policy.toml is an example")?;
    Ok((policy, text))
}

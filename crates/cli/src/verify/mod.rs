//! `secmon verify`: whether evidence of a monitoring VM is to be trusted.
//!
//! Nothing here asks a monitor, a device or a network: evidence, certificates
//! and what is expected are files and arguments.

pub mod arguments;
mod snp;
mod tdx;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use secmon_confidential::{Hexadecimal, report_data};
use serde::Serialize;

use crate::arguments::Format;
use crate::listing;
use crate::output::escape;
use arguments::{Binding, VerifyCommand};

/// The exit status of evidence that is not to be trusted.
const NOT_TRUSTED: u8 = 1;
/// The largest file that is read.
const MAX_BYTES: u64 = 8 << 20;

/// `secmon verify …`.
pub fn verify(command: &VerifyCommand, format: Format) -> Result<ExitCode> {
    match command {
        VerifyCommand::Snp(arguments) => snp::verify(arguments, format),
        VerifyCommand::Tdx(arguments) => tdx::verify(arguments, format),
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .with_context(|| format!("reading {}", path.display()))?;
    if bytes.len() as u64 > MAX_BYTES {
        bail!("{} is larger than {MAX_BYTES} bytes", path.display());
    }
    Ok(bytes)
}

/// The time of judgement, in seconds since 1970.
fn time(at: Option<u64>) -> Result<u64> {
    if let Some(at) = at {
        return Ok(at);
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(since.context("this machine's clock")?.as_secs())
}

impl Binding {
    /// What must stand in the evidence.
    fn expected(&self) -> Result<Option<Hexadecimal<64>>> {
        Ok(match (self.report_data, self.nonce, &self.channel_key) {
            (Some(data), ..) => Some(data),
            (None, Some(nonce), Some(key)) => {
                Some(Hexadecimal(report_data(&nonce.0, key.as_bytes())))
            }
            (None, None, None) if self.unbound => None,
            _ => bail!(
                "nothing says what question and channel the evidence must be for: give --nonce \
                 with --channel-key, or --report-data, or --unbound"
            ),
        })
    }
}

/// How evidence was judged, as all formats show it.
#[derive(Serialize)]
struct Judged<'a, V, D> {
    trusted: bool,
    /// What the evidence was not asked for.
    not_checked: &'a [&'a str],
    #[serde(flatten)]
    verdict: &'a V,
    /// The differences in words, in their order.
    reasons: Vec<String>,
    #[serde(skip)]
    differences: &'a [D],
}

/// Shows a verdict, and gives the exit status for it.
fn show<V: Serialize, D: ToString>(
    format: Format,
    verdict: &V,
    differences: &[D],
    facts: &[(&str, String)],
    not_checked: &[&str],
) -> Result<ExitCode> {
    let judged = Judged {
        trusted: differences.is_empty(),
        not_checked,
        verdict,
        reasons: differences.iter().map(ToString::to_string).collect(),
        differences,
    };
    let mut out = listing::stdout()?;
    match format {
        Format::Json | Format::Ndjson => {
            serde_json::to_writer(&mut out, &judged)?;
            writeln!(out)?;
        }
        Format::Table => {
            let word = if judged.trusted {
                "trusted"
            } else {
                "NOT trusted"
            };
            writeln!(out, "verdict      {word}")?;
            for (name, value) in facts {
                writeln!(out, "{name:<12} {}", escape::message(value))?;
            }
            for reason in &judged.reasons {
                writeln!(out, "- {}", escape::message(reason))?;
            }
            for what in not_checked {
                writeln!(out, "not checked: {what}")?;
            }
        }
        Format::Csv | Format::Markdown => bail!("`verify` writes table, json or ndjson"),
    }
    out.flush()?;
    Ok(if judged.differences.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(NOT_TRUSTED)
    })
}

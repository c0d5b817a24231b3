//! Measures what the detectors find of each specimen and of clean guests, and
//! writes or prints `docs/detection.md`.
//!
//! `detection measure CHECKS` boots a guest a kernel, checks each clean one
//! CHECKS times under each load, tries all specimens and stores what was
//! measured in `docs/detection.json`; with `expected` behind it only the
//! detector that is said to find a specimen looks at it. `detection print` prints the document
//! from that file and from what the detectors and the specimens say of
//! themselves, and measures nothing.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use secmon_lab::Suite;
use secmon_tests::detection::{Effort, Measured, measure};
use secmon_tests::document;

fn stored() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/detection.json")
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["print"] => {
            let path = stored();
            let text = fs::read(&path).with_context(|| path.display().to_string())?;
            let measured: Vec<Measured> = serde_json::from_slice(&text)?;
            print!("{}", document::text(&measured));
            Ok(())
        }
        ["measure", checks, rest @ ..] if matches!(rest, [] | ["expected"]) => {
            let clean_checks = checks.parse().context("CHECKS is a number")?;
            run(Effort {
                clean_checks,
                look_for_unexpected: rest.is_empty(),
                monitor: true,
            })
        }
        _ => bail!("usage: detection print | detection measure CHECKS [expected]"),
    }
}

/// How many guests run at a time: with one more, the checks wait for the
/// guests' own work.
const AT_ONCE: usize = 2;

fn run(effort: Effort) -> Result<()> {
    // Those that take longest first.
    let waiting: Mutex<Vec<Suite>> = Mutex::new(Suite::ALL.to_vec());
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop()
    };
    let results = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(suite) = next() {
                    let started = Instant::now();
                    let measured = measure(suite, effort);
                    println!("{suite}: {:.0} s", started.elapsed().as_secs_f64());
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.push((suite, measured));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(suite, _)| Suite::ALL.iter().position(|known| known == suite));
    let mut all = Vec::new();
    let mut complaints = Vec::new();
    for (suite, measured) in results {
        let measured = measured?;
        for tried in &measured.specimens {
            println!("{suite}: {tried:?}");
        }
        println!("{suite}: {:?}", measured.detectors);
        println!("{suite}: not checked: {:?}", measured.not_checked);
        for complaint in &measured.complaints {
            println!("{suite}: WRONG: {complaint}");
            complaints.push(complaint.clone());
        }
        all.push(measured);
    }
    let mut text = serde_json::to_string_pretty(&all)?;
    text.push('\n');
    fs::write(stored(), text)?;
    ensure!(
        complaints.is_empty(),
        "{} things are not as they have to be",
        complaints.len()
    );
    Ok(())
}

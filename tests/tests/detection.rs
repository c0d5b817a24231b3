//! Detectors find each specimen, are silent before it and after it, and are
//! silent about a clean guest under several loads.
//!
//! A guest a kernel: the specimens come and go in it one after the other, and
//! the guest itself shows that they do. `cargo xtask detection` does the same
//! with more checks and writes down what it measured.

use anyhow::{Result, ensure};
use secmon_lab::Suite;
use secmon_tests::detection::{Effort, measure};

fn detection(suite: Suite) -> Result<()> {
    let effort = Effort {
        clean_checks: 2,
        look_for_unexpected: false,
        // One with modules, one with edits.
        monitor: matches!(suite, Suite::Bookworm | Suite::Sid),
    };
    let measured = measure(suite, effort)?;
    for tried in &measured.specimens {
        println!("{suite}: {tried:?}");
    }
    println!("{suite}: not checked: {:?}", measured.not_checked);
    let complaints = &measured.complaints;
    ensure!(complaints.is_empty(), "{suite}: {complaints:#?}");
    Ok(())
}

#[test]
fn linux_5_10() -> Result<()> {
    detection(Suite::Bullseye)
}

#[test]
fn linux_6_1() -> Result<()> {
    detection(Suite::Bookworm)
}

#[test]
fn linux_6_12() -> Result<()> {
    detection(Suite::Trixie)
}

#[test]
fn linux_7_2() -> Result<()> {
    detection(Suite::Sid)
}

//! What `secmon watch` uses of the processor, with all detectors and its
//! default budget.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use secmon_lab::{Backing, Guest, QmpAccess, Suite, Workload};

/// Processes of the guest.
const PROCESSES: u32 = 300;

/// Boots a guest with many processes, watches it for so many seconds, and gives
/// the part of one core that was used, in percent: from start to end, with all
/// processes and threads of the program and the search of the kernel.
///
/// # Errors
/// If the guest does not boot, or the watch ends otherwise than it should.
pub fn share(secmon: &Path, busy: bool, seconds: u32) -> Result<f64> {
    let workload = Workload {
        processes: PROCESSES,
        ..Workload::small()
    };
    let guest = Guest::builder(Suite::Trixie)
        .backing(Backing::File)
        .qmp(QmpAccess::Socket)
        .workload(workload)
        .boot()?;
    if busy {
        guest.truth().resume_busy()?;
    }
    // The shell tells what its children, and theirs, have used.
    let output = Command::new("sh")
        .args([
            "-c",
            "\"$1\" -t \"$2\" watch --seconds \"$3\" >/dev/null; echo $?; times",
        ])
        .arg("sh")
        .arg(secmon)
        .arg(format!("qemu:{}", guest.pid()))
        .arg(seconds.to_string())
        .output()
        .context("running sh")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = text.lines().collect();
    let [status, _, children] = lines.as_slice() else {
        anyhow::bail!("sh said {text:?}");
    };
    ensure!(
        *status == "0",
        "the watch ended with {status}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let used: f64 = children.split_whitespace().filter_map(parse).sum();
    Ok(used / f64::from(seconds) * 100.0)
}

/// Seconds of `0m1.250000s`.
fn parse(time: &str) -> Option<f64> {
    let (minutes, seconds) = time.strip_suffix('s')?.split_once('m')?;
    Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
}

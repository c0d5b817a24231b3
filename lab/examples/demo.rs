//! Boots a guest, starts a monitoring VM beside it, and shows what the
//! monitoring VM sees of the guest, next to what the guest says of itself.
//!
//! `cargo xtask demo` builds `secmon` and the monitoring VM's image and runs
//! this.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use secmon_lab::{Backing, ByteString, Guest, Suite, Workload};
use serde_json::Value;

const NAME: &str = "web1";

/// What the monitoring VM is called.
const MONITOR: &str = "secmon-demo";

/// The monitoring VM, which ends with this value.
struct Monitor<'a> {
    secmon: &'a Path,
    /// Where its gate writes what it does; removed with the demo.
    logs: tempfile::TempDir,
}

impl<'a> Monitor<'a> {
    fn up(secmon: &'a Path, image: &Path) -> Result<Self> {
        let logs = tempfile::tempdir()?;
        // The gate has a user of its own.
        fs::set_permissions(logs.path(), fs::Permissions::from_mode(0o755))?;
        let monitor = Self { secmon, logs };
        let logs = monitor.logs.path().display().to_string();
        let image = image.display().to_string();
        let target = format!("qemu:{NAME}");
        // One that an earlier demo was killed beside.
        let _ = monitor.command(&["down", MONITOR]).output();
        monitor.show(&[
            "up",
            "--target",
            &target,
            "--name",
            MONITOR,
            "--image",
            &image,
            "--gate-logs",
            &logs,
        ])?;
        Ok(monitor)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.secmon);
        command.arg("monitor").args(words);
        command
    }

    fn show(&self, words: &[&str]) -> Result<()> {
        println!("$ secmon monitor {}", words.join(" "));
        let status = self.command(words).status().context("starting secmon")?;
        ensure!(status.success(), "secmon monitor {words:?}: {status}");
        println!();
        Ok(())
    }
}

impl Drop for Monitor<'_> {
    fn drop(&mut self) {
        let _ = self.show(&["down", MONITOR]);
    }
}

/// A table, and what of it the guest is asked for itself.
struct Comparison {
    table: &'static str,
    /// What is shown of it here.
    arguments: &'static [&'static str],
    /// Which rows the guest can list itself.
    listed: &'static [&'static str],
    /// The columns that are compared.
    columns: &'static [&'static str],
    /// The same columns as the guest tells them, a line a row.
    truth: fn(&Guest) -> Result<BTreeSet<String>>,
}

const COMPARISONS: &[Comparison] = &[
    Comparison {
        table: "ps",
        arguments: &["--filter", "kernel_thread=false", "--limit", "14"],
        listed: &[],
        columns: &["pid", "ppid", "exe"],
        truth: |guest| {
            let processes = guest.truth().processes()?;
            let row = |process: &secmon_lab::truth::Process| {
                let exe = process.exe.as_ref().map(text).unwrap_or_default();
                format!("{} {} {exe}", process.pid, process.ppid)
            };
            Ok(processes.iter().map(row).collect())
        },
    },
    Comparison {
        table: "modules",
        arguments: &["--limit", "10"],
        listed: &[],
        columns: &["name", "base", "size"],
        truth: |guest| {
            let modules = guest.truth().modules()?;
            let row = |module: &secmon_lab::truth::Module| {
                format!("{} {:#x} {}", module.name, module.address, module.size)
            };
            Ok(modules.iter().map(row).collect())
        },
    },
    Comparison {
        table: "sockets",
        arguments: &["--filter", "protocol~^(tcp|udp)", "--limit", "12"],
        // Sockets that were never bound are in no list of the guest, only behind
        // file descriptors.
        listed: &["--filter", "in_table=true"],
        columns: &["protocol", "inode"],
        truth: |guest| {
            let sockets = guest.truth().sockets()?;
            let listed = sockets.iter().filter(|socket| socket.inode != 0);
            Ok(listed
                .map(|socket| format!("{} {}", socket.protocol, socket.inode))
                .collect())
        },
    },
    Comparison {
        table: "files",
        arguments: &["--filter", "type!=character", "--limit", "14"],
        listed: &[],
        columns: &["pid", "fd", "path"],
        truth: |guest| {
            let files = guest.truth().files()?;
            let row = |file: &secmon_lab::truth::OpenFile| {
                format!("{} {} {}", file.pid, file.fd, text(&file.path))
            };
            Ok(files.iter().map(row).collect())
        },
    },
];

/// Bytes as `secmon` writes them: what isn't UTF-8 as `\xNN`.
fn text(bytes: &ByteString) -> String {
    let mut text = String::new();
    for chunk in bytes.as_bytes().utf8_chunks() {
        text += chunk.valid();
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

fn main() -> Result<()> {
    let secmon = PathBuf::from(
        std::env::args_os()
            .nth(1)
            .context("the path of the secmon program as first argument")?,
    );
    let image = PathBuf::from(
        std::env::args_os()
            .nth(2)
            .context("the folder of the monitoring VM's image as second argument")?,
    );
    println!("Booting Linux 6.12 from Debian's archive in QEMU, its RAM shared …");
    let start = Instant::now();
    let workload = Workload {
        processes: 40,
        ..Workload::rich()
    };
    let guest = Guest::builder(Suite::Trixie)
        .name(NAME)
        .backing(Backing::File)
        .workload(workload)
        .boot()?;
    println!(
        "Up after {:.1} s under {}: QEMU process {}.\n",
        start.elapsed().as_secs_f32(),
        guest.acceleration().name(),
        guest.pid()
    );
    println!("Starting a monitoring VM beside it: all that follows comes out of that VM.");
    let monitor = Monitor::up(&secmon, &image)?;
    show(&secmon, &["info"])?;
    monitor.show(&["status", MONITOR])?;
    for comparison in COMPARISONS {
        let mut words = vec![comparison.table];
        words.extend(comparison.arguments);
        show(&secmon, &words)?;
        compare(&secmon, &guest, comparison)?;
    }
    Ok(())
}

fn command(secmon: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(secmon);
    command
        .args(["-t", &format!("monitor:{MONITOR}")])
        .args(words);
    command
}

/// Runs `secmon` on the guest so that its output is seen.
fn show(secmon: &Path, words: &[&str]) -> Result<()> {
    println!("$ secmon -t monitor:{MONITOR} {}", words.join(" "));
    let start = Instant::now();
    let status = command(secmon, words).status().context("starting secmon")?;
    ensure!(status.success(), "secmon {words:?}: {status}");
    println!("[{:.0} ms]\n", start.elapsed().as_secs_f32() * 1000.0);
    Ok(())
}

/// The rows of the columns that are compared, as `secmon` tells them.
fn from_outside(secmon: &Path, comparison: &Comparison) -> Result<BTreeSet<String>> {
    let mut columns = comparison.columns.join(",");
    if comparison.table == "sockets" {
        columns += ",state";
    }
    let mut words = vec![
        comparison.table,
        "--all-namespaces",
        "--format",
        "json",
        "--columns",
        &columns,
    ];
    words.extend(comparison.listed);
    let output = command(secmon, &words)
        .output()
        .context("starting secmon")?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).context("secmon's JSON")?;
    let cell = |row: &Value, column: &str| match &row[column] {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let line = |row: &Value| {
        comparison
            .columns
            .iter()
            .map(|column| cell(row, column))
            .collect::<Vec<_>>()
            .join(" ")
    };
    // Nor does the guest list a TCP socket that is bound and does nothing yet.
    let bound_only =
        |row: &&Value| cell(row, "protocol").starts_with("tcp") && cell(row, "state") == "CLOSE";
    Ok(rows
        .iter()
        .filter(|row| !bound_only(row))
        .map(line)
        .collect())
}

/// Says how many rows both sides have. What only one of them has must have
/// come or gone meanwhile: it is not in what the guest says before and after.
fn compare(secmon: &Path, guest: &Guest, comparison: &Comparison) -> Result<()> {
    let before = (comparison.truth)(guest)?;
    let outside = from_outside(secmon, comparison)?;
    let after = (comparison.truth)(guest)?;
    let lasting: BTreeSet<_> = before.intersection(&after).cloned().collect();
    let known: BTreeSet<_> = before.union(&after).cloned().collect();
    let missing: Vec<_> = lasting.difference(&outside).collect();
    // A socket that no file holds is in no list of inodes.
    let invented: Vec<_> = outside
        .difference(&known)
        .filter(|row| comparison.table != "sockets" || !row.ends_with(" 0"))
        .collect();
    println!(
        "   The guest itself lists {} of these ({}); {} seen from outside agree, {} missing, {} not \
         known to the guest.\n",
        lasting.len(),
        comparison.columns.join(", "),
        lasting.intersection(&outside).count(),
        missing.len(),
        invented.len()
    );
    if !missing.is_empty() || !invented.is_empty() {
        bail!(
            "{}: missing {missing:?}, not known to the guest {invented:?}",
            comparison.table
        );
    }
    Ok(())
}

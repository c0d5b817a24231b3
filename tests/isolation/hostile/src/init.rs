//! Process 1: mounts, loads every module it was given, and takes commands.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use secmon_hostile::{Command as Wanted, Progress, Reply, Report, STOP};
use secmon_monitor::protocol::CHANNEL_PORT;

use crate::port;
use crate::sys;

/// Where the modules are, in the order in which they load.
const MODULES: &str = "/lib/modules";
/// The longest command.
const LONGEST: usize = 1 << 20;

pub fn run() -> Result<()> {
    for (what, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        sys::mount(what, place).with_context(|| format!("mounting {place}"))?;
    }
    let _ = sys::mount("tmpfs", "/tmp");
    load_modules()?;
    println!("hostile: ready");
    let mut port = port::open(CHANNEL_PORT)?;
    let mut last = None;
    loop {
        let wanted = match next(&mut port)? {
            Some(Heard::Command(wanted)) => wanted,
            Some(Heard::Stop) => {
                // It has ended by itself, and nobody was there to hear it.
                if let Some(reply) = &last {
                    say(&mut port, reply)?;
                }
                continue;
            }
            None => continue,
        };
        let number = wanted.number;
        let begins = Reply {
            number,
            progress: Progress::Begins,
        };
        say(&mut port, &begins)?;
        // An attempt may want the port itself.
        drop(port);
        let progress = match run_apart(&wanted) {
            Ok(report) => Progress::Done(report),
            Err(error) => Progress::Failed(format!("{error:#}")),
        };
        // It stays open, as what comes while it is closed is lost.
        port = port::open(CHANNEL_PORT)?;
        say(&mut port, last.insert(Reply { number, progress }))?;
    }
}

/// What comes over the port.
enum Heard {
    Command(Wanted),
    /// The word that ends an attempt.
    Stop,
}

fn say(port: &mut File, reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.insert(0, b'\n');
    line.push(b'\n');
    Ok(port.write_all(&line)?)
}

/// What a module can't do without its device is no fault.
fn load_modules() -> Result<()> {
    let mut paths: Vec<_> = fs::read_dir(MODULES)
        .context(MODULES)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    paths.sort();
    for path in paths {
        let file = File::open(&path)?;
        let parameters = CString::default();
        if let Err(error) = sys::load_module(file.as_raw_fd(), &parameters) {
            println!("hostile: {}: {error}", path.display());
        }
        drop(file);
        fs::remove_file(&path)?;
    }
    Ok(())
}

/// The next command, if a whole line is one.
fn next(port: &mut File) -> Result<Option<Heard>> {
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    while line.len() < LONGEST {
        match port.read(&mut chunk)? {
            // Nobody is connected.
            0 => std::thread::sleep(Duration::from_millis(20)),
            count => line.extend_from_slice(&chunk[..count]),
        }
        while let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            let rest = line.split_off(end + 1);
            if let Ok(wanted) = serde_json::from_slice(&line) {
                return Ok(Some(Heard::Command(wanted)));
            }
            if STOP.ends_with(&line) && line.len() > 1 {
                return Ok(Some(Heard::Stop));
            }
            line = rest;
        }
    }
    Ok(None)
}

/// Makes the attempt in a process of its own.
fn run_apart(wanted: &Wanted) -> Result<Report> {
    let output = Command::new(Path::new("/proc/self/exe"))
        .args(["attempt", &wanted.attempt, &wanted.argument.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting the attempt")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().next_back().unwrap_or_default();
    let report: Result<Report, String> = serde_json::from_str(last)
        .with_context(|| format!("the attempt ended with {} and said: {last}", output.status))?;
    report.map_err(anyhow::Error::msg)
}

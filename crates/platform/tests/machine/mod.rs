//! Real QEMUs for tests: started with firmware alone, spoken to through a
//! human monitor that the code under test does not know of, ended with the
//! test however it goes.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A running QEMU.
pub struct Machine {
    child: Child,
    monitor: UnixStream,
    folder: TempDir,
}

impl Machine {
    /// Starts QEMU with these arguments and a monitor beside.
    pub fn start<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Self {
        Self::start_in(tempfile::tempdir().expect("a folder"), arguments)
    }

    /// As `start`, with QEMU's working folder.
    pub fn start_in<S: AsRef<std::ffi::OsStr>>(folder: TempDir, arguments: &[S]) -> Self {
        let path = folder.path().join("monitor");
        // A QEMU must not outlive a test that was killed.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-display", "none", "-nic", "none", "-monitor"])
            .arg(format!("unix:{},server=on,wait=off", path.display()))
            .args(arguments)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.path().join("errors")).expect("a file"))
            .spawn()
            .expect(
                "setpriv (package util-linux) and qemu-system-x86_64 (package qemu-system-x86)",
            );
        let mut machine = Self {
            monitor: UnixStream::pair().expect("a socket pair").0,
            child,
            folder,
        };
        let deadline = Instant::now() + PATIENCE;
        machine.monitor = loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                break stream;
            }
            let ended = machine.child.try_wait().expect("a state");
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "QEMU did not start: {ended:?} {}",
                std::fs::read_to_string(machine.path("errors")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        machine
            .monitor
            .set_read_timeout(Some(PATIENCE))
            .expect("a timeout");
        machine.answer();
        machine
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A path in the machine's own folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Text up to the monitor's prompt.
    fn answer(&mut self) -> String {
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        while !text.ends_with(b"(qemu) ") {
            let count = self.monitor.read(&mut chunk).expect("the monitor answers");
            assert!(count > 0, "the monitor closed");
            text.extend_from_slice(&chunk[..count]);
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Runs a command of the human monitor.
    pub fn command(&mut self, command: &str) -> String {
        self.monitor
            .write_all(format!("{command}\n").as_bytes())
            .expect("the monitor listens");
        let answer = self.answer();
        // The first line echoes the command as it was typed.
        let (_, answer) = answer.split_once('\n').unwrap_or_default();
        answer.to_owned()
    }

    /// Lets the firmware run until it has set up memory and looks for a disk,
    /// then stops the machine.
    pub fn run_firmware(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The BIOS data area's count of base memory, written by then.
            let text = self.command("xp /1hx 0x413");
            if text.contains("0x027f") || text.contains("0x0280") {
                break;
            }
            assert!(Instant::now() < deadline, "no firmware: {text}");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(300));
        self.command("stop");
    }

    /// What the guest's processor would read there.
    pub fn physical(&mut self, address: u64, length: u64) -> Vec<u8> {
        let path = self.path("saved");
        let _ = std::fs::remove_file(&path);
        let text = self.command(&format!(
            "pmemsave {address:#x} {length:#x} \"{}\"",
            path.display()
        ));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_eq!(bytes.len() as u64, length, "{text}");
        bytes
    }

    /// Kills QEMU.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

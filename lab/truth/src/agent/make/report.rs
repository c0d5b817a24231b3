//! How the pieces of the workload tell process 1 that they stand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use std::time::{Duration, Instant};

use crate::agent::sys;

/// The writing end's number in every process until it has reported. High, so
/// that it doesn't stand among a piece's own descriptors, and kept through
/// `execve`, so that a role can report as well.
const REPORT_FD: RawFd = 250;

/// Process 1's end.
pub struct Reports {
    reader: File,
    expected: usize,
}

/// A piece's right to report, once.
pub struct Reporter {
    name: String,
}

impl Reports {
    /// Makes the pipe.
    pub fn open() -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        sys::duplicate_to(&writer, REPORT_FD)?;
        Ok(Self {
            reader: File::from(OwnedFd::from(reader)),
            expected: 0,
        })
    }

    /// Forks a piece: the child named `name` runs `body` with the right to
    /// report, and rests.
    pub fn piece(&mut self, name: &str, body: impl FnOnce(Reporter)) -> io::Result<i32> {
        self.expected += 1;
        let reader = self.reader.as_raw_fd();
        sys::fork(|| {
            sys::close(reader);
            sys::set_name(name.as_bytes());
            body(Reporter::new(name));
        })
    }

    /// Waits for one report more than there are pieces: from a process that
    /// a piece starts with its right to report.
    pub fn expect_another(&mut self) {
        self.expected += 1;
    }

    /// Forks a piece that sets itself up without passing its report on.
    pub fn simple(
        &mut self,
        name: &str,
        body: impl FnOnce(&mut Vec<String>) -> io::Result<()>,
    ) -> io::Result<i32> {
        self.piece(name, |reporter| {
            let mut failures = Vec::new();
            if let Err(error) = body(&mut failures) {
                failures.push(error.to_string());
            }
            reporter.done(&failures);
        })
    }

    /// Waits for all reports; what failed is added to `failures`.
    pub fn collect(
        mut self,
        patience: Duration,
        failures: &mut Vec<String>,
    ) -> io::Result<BTreeMap<String, i32>> {
        close();
        let start = Instant::now();
        let mut text = Vec::new();
        let mut lines = 0;
        while lines < self.expected && start.elapsed() < patience {
            while sys::reap_one() {}
            if sys::poll_readable(&[self.reader.as_raw_fd()], 100)? == [true] {
                let mut chunk = [0; 4096];
                let count = self.reader.read(&mut chunk)?;
                if count == 0 {
                    break;
                }
                text.extend_from_slice(&chunk[..count]);
                lines = text.iter().filter(|byte| **byte == b'\n').count();
            }
        }
        let mut roles = BTreeMap::new();
        for line in String::from_utf8_lossy(&text).lines() {
            let mut fields = line.split('\t');
            let (Some(name), Some(pid)) = (fields.next(), fields.next()) else {
                continue;
            };
            roles.insert(name.to_owned(), pid.parse().unwrap_or(0));
            failures.extend(fields.map(|failure| format!("{name}: {failure}")));
        }
        if lines < self.expected {
            failures.push(format!(
                "only {lines} of {} pieces reported: {:?}",
                self.expected,
                roles.keys()
            ));
        }
        Ok(roles)
    }
}

impl Reporter {
    /// A reporter for a role that was executed by its piece.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
        }
    }

    /// Says that the piece stands, as this process unless the piece is in
    /// another pid namespace, and what of it failed.
    pub fn done(self, failures: &[String]) {
        self.done_as(std::process::id() as i32, failures);
    }

    /// As [`Reporter::done`], for a process that knows its outer id.
    pub fn done_as(self, pid: i32, failures: &[String]) {
        self.send(pid, failures);
        close();
    }

    /// Reports, and keeps the right to report again under another name.
    pub fn send(self, pid: i32, failures: &[String]) {
        let mut line = format!("{}\t{pid}", self.name);
        for failure in failures.iter().filter(|failure| !failure.is_empty()) {
            line.push('\t');
            line.push_str(&failure.replace(['\t', '\n'], " "));
        }
        // Longer than a pipe writes in one piece would mix with others.
        let mut end = line.len().min(4000);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push('\n');
        // SAFETY: the number is the writing end's, here only borrowed.
        let mut writer = ManuallyDrop::new(unsafe { File::from_raw_fd(REPORT_FD) });
        let _ = writer.write_all(line.as_bytes());
    }
}

/// Closes this process's writing end, in a child that has nothing to report.
pub fn close() {
    sys::close(REPORT_FD);
}

/// Forks a child that has nothing to report; it runs `body` and rests.
pub fn child(body: impl FnOnce()) -> io::Result<i32> {
    sys::fork(|| {
        close();
        body();
    })
}

/// As [`child`], back only when the child has run `body`; its error is ours.
pub fn child_that_stands(body: impl FnOnce() -> io::Result<()>) -> io::Result<i32> {
    let (mut reader, mut writer) = io::pipe()?;
    let read_end = reader.as_raw_fd();
    let pid = child(|| {
        sys::close(read_end);
        let outcome = body()
            .err()
            .map_or(String::new(), |error| error.to_string());
        let _ = writer.write_all(format!("{outcome}\n").as_bytes());
        sys::close(writer.as_raw_fd());
    })?;
    drop(writer);
    let mut outcome = Vec::new();
    let mut byte = [0];
    // Up to the line's end, not the pipe's: a child of the child may keep
    // the writing end open.
    while reader.read(&mut byte)? == 1 && byte != *b"\n" {
        outcome.extend_from_slice(&byte);
    }
    if outcome.is_empty() {
        return Ok(pid);
    }
    Err(io::Error::other(
        String::from_utf8_lossy(&outcome).into_owned(),
    ))
}

/// Notes an attempt that failed under its name.
pub fn attempt<T>(
    failures: &mut Vec<String>,
    name: &str,
    body: impl FnOnce() -> io::Result<T>,
) -> Option<T> {
    match body() {
        Ok(value) => Some(value),
        Err(error) => {
            failures.push(format!("{name}: {error}"));
            None
        }
    }
}

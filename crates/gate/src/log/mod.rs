//! The log of every use of the gate, allowed and denied, in which later
//! changes show.
//!
//! One JSON object a line. Each record carries the hash of the record before
//! and, as its last member, its own: SHA-256 over all bytes of its line that
//! stand before `,"hash":"`. So one record is checked with
//! `printf %s 'LINE UP TO ,"hash"' | sha256sum`.
//!
//! What the chain shows by itself is a record that was changed, dropped from
//! the middle, added or moved. Records cut off at the end, or a log written
//! anew from some record on, show only against a *head* (sequence number and
//! hash of the last record) that was kept elsewhere: the gate tells its head in
//! every status answer, and [`verify()`] compares.
//!
//! A record is written before what it allows is done. If it can't be written
//! (a full disk), the request is refused. A gate that is killed while it
//! writes leaves a torn line; the next one ends that line, records its length
//! and hash, and goes on with the chain. A file that has reached its size is
//! renamed to `FILE.1` (`.1` to `.2`, …) and the chain goes on in a new one.

mod record;
mod verify;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::protocol::LogHead;

pub use record::{Entry, Outcome};
pub use verify::{Fault, Report, TornTail, verify, verify_text};

/// The hash before the first record of all.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The longest line; a request's record is far shorter.
pub const MAX_LINE: usize = 64 << 10;

/// How much of the log is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The bytes of one file.
    pub file_bytes: u64,
    /// How many renamed files are kept.
    pub kept_files: u32,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            file_bytes: 64 << 20,
            kept_files: 15,
        }
    }
}

/// Why the log can't be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A system call failed.
    #[error("{what} {path}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Another gate writes it.
    #[error("{path} is being written by another gate")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// What is there is not a sound log, and nothing is added to it.
    #[error(
        "{path} is damaged: {fault}; look into it with `secmon gate verify-log`, move it away, then start again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The first thing wrong with it.
        fault: Fault,
    },
    /// An earlier record was written in part and could not be taken back.
    #[error("{path}: an earlier record was written in part only; the gate must be started again")]
    Broken {
        /// The file.
        path: PathBuf,
    },
    /// A record that is too long.
    #[error("a record of {length} bytes is too long for the log")]
    TooLong {
        /// Its length.
        length: usize,
    },
}

/// A log that is open for writing; nobody else writes it meanwhile.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
    bounds: Bounds,
    target: String,
    head: LogHead,
    length: u64,
    broken: bool,
}

impl Log {
    /// Opens a log, or begins one, and says in it that the gate has started.
    ///
    /// # Errors
    /// [`LogError::Damaged`] if what is there has been tampered with.
    pub fn open(path: &Path, bounds: Bounds, target: &str) -> Result<Self, LogError> {
        let host = |what| {
            move |source: io::Error| LogError::Host {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let mut file = open_file(path).map_err(host("opening the log"))?;
        lock(&file, path)?;
        let report = verify::verify_file(&mut file).map_err(host("reading the log"))?;
        if let Some(fault) = report.faults.into_iter().next() {
            return Err(LogError::Damaged {
                path: path.to_owned(),
                fault,
            });
        }
        let length = file
            .seek(io::SeekFrom::End(0))
            .map_err(host("reading the log"))?;
        let mut log = Self {
            file,
            path: path.to_owned(),
            bounds,
            target: target.to_owned(),
            head: report.head.unwrap_or_else(genesis),
            length,
            broken: false,
        };
        if log.length == 0 {
            // A rotation that was cut short leaves the last hash one file back.
            if let Ok(mut file) = File::open(numbered(path, 1))
                && let Ok(earlier) = verify::verify_file(&mut file)
                && let Some(head) = earlier.head
            {
                log.head = head;
            }
            log.append(&log.beginning())?;
        }
        // A last record may be whole but for the end of its line.
        if length > 0 && !ends_a_line(&mut log.file).map_err(host("reading the log"))? {
            log.write(b"\n")?;
        }
        if let Some(torn) = report.torn_tail {
            log.append(&Entry::Torn {
                bytes: torn.bytes,
                sha256: torn.sha256,
            })?;
        }
        log.append(&Entry::Started {
            program: env!("CARGO_PKG_VERSION").to_owned(),
        })?;
        Ok(log)
    }

    /// Writes a record.
    ///
    /// # Errors
    /// [`LogError`]; the log is then as before, and what the record was about
    /// must not be done.
    pub fn append(&mut self, entry: &Entry) -> Result<(), LogError> {
        if self.broken {
            return Err(LogError::Broken {
                path: self.path.clone(),
            });
        }
        if self.length >= self.bounds.file_bytes {
            self.rotate()?;
        }
        self.append_here(entry)
    }

    fn append_here(&mut self, entry: &Entry) -> Result<(), LogError> {
        let sequence = self.head.sequence.saturating_add(1);
        let (line, hash) = record::line(sequence, &self.head.hash, entry);
        if line.len() > MAX_LINE {
            return Err(LogError::TooLong { length: line.len() });
        }
        self.write(&line)?;
        self.head = LogHead { sequence, hash };
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), LogError> {
        match self.file.write_all(bytes) {
            Ok(()) => {
                self.length = self.length.saturating_add(bytes.len() as u64);
                Ok(())
            }
            Err(source) => {
                // Of a record that did not fit nothing may stay.
                self.broken = self.file.set_len(self.length).is_err();
                Err(self.host("writing the log", source))
            }
        }
    }

    /// Waits until what was written is on the disk.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&mut self) -> Result<(), LogError> {
        self.file
            .sync_data()
            .map_err(|source| self.host("writing the log", source))
    }

    /// The last record.
    pub fn head(&self) -> &LogHead {
        &self.head
    }

    fn beginning(&self) -> Entry {
        Entry::Began {
            version: record::VERSION,
            target: self.target.clone(),
        }
    }

    /// Moves the files on by one number and goes on in a new one.
    fn rotate(&mut self) -> Result<(), LogError> {
        let numbers = (1..self.bounds.kept_files.max(1)).rev();
        for number in numbers {
            let from = numbered(&self.path, number);
            match fs::rename(&from, numbered(&self.path, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(self.host("renaming the log", error));
                }
                _ => {}
            }
        }
        fs::rename(&self.path, numbered(&self.path, 1))
            .map_err(|error| self.host("renaming the log", error))?;
        let file =
            open_file(&self.path).map_err(|error| self.host("beginning a new log", error))?;
        lock(&file, &self.path)?;
        self.file = file;
        self.length = 0;
        self.append_here(&self.beginning())
    }

    fn host(&self, what: &'static str, source: io::Error) -> LogError {
        LogError::Host {
            what,
            path: self.path.clone(),
            source,
        }
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

fn ends_a_line(file: &mut File) -> io::Result<bool> {
    let mut last = [0];
    file.seek(io::SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

fn lock(file: &File, path: &Path) -> Result<(), LogError> {
    flock(file, FlockOperation::NonBlockingLockExclusive).map_err(|_| LogError::InUse {
        path: path.to_owned(),
    })
}

fn genesis() -> LogHead {
    LogHead {
        sequence: 0,
        hash: GENESIS.to_owned(),
    }
}

/// `FILE.NUMBER`.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

fn sha256(bytes: &[u8]) -> String {
    crate::hex::encode(&Sha256::digest(bytes))
}

#[cfg(test)]
mod tests;

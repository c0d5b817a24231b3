//! The monitoring VM's console and QEMU's own messages, in a log that does not
//! grow without end, whatever the VM writes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The log's size at which it becomes the old one.
const MAX_LOG: u64 = 1 << 20;

/// The most bytes taken at a time, so that a flood keeps nobody busy.
const MAX_DRAIN: usize = 256 << 10;

/// The reading end.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    log: PathBuf,
    file: File,
    written: u64,
}

impl Console {
    /// Takes what comes over `stream` into the file `log`.
    ///
    /// # Errors
    /// The system's.
    pub fn new(stream: UnixStream, log: PathBuf) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let file = open(&log)?;
        let written = file.metadata()?.len();
        Ok(Self {
            stream,
            log,
            file,
            written,
        })
    }

    /// Writes what has come to the log.
    ///
    /// # Errors
    /// The system's, if the log can't be written.
    pub fn drain(&mut self) -> io::Result<()> {
        let mut chunk = [0; 16 << 10];
        for _ in 0..MAX_DRAIN / chunk.len() {
            let count = match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // Nothing more, or QEMU has ended.
                Err(_) => return Ok(()),
            };
            if self.written > MAX_LOG {
                let old = self.log.with_extension("log.old");
                fs::rename(&self.log, old)?;
                self.file = open(&self.log)?;
                self.written = 0;
            }
            self.file
                .write_all(chunk.get(..count).unwrap_or_default())?;
            self.written += count as u64;
        }
        Ok(())
    }
}

fn open(log: &PathBuf) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_leaves_two_bounded_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("console.log");
        let (mut vm, host) = UnixStream::pair().expect("a pair");
        let mut console = Console::new(host, log.clone()).expect("a log");
        let line = [b'x'; 8192];
        for _ in 0..512 {
            vm.write_all(&line).expect("written");
            console.drain().expect("drained");
        }
        vm.write_all(b"last").expect("written");
        console.drain().expect("drained");
        let size = |path: &PathBuf| fs::metadata(path).expect("a file").len();
        assert!(size(&log) <= MAX_LOG + 16384);
        assert!(size(&folder.path().join("console.log.old")) <= MAX_LOG + 16384);
        assert!(fs::read(&log).expect("a log").ends_with(b"last"));
        assert_eq!(fs::read_dir(folder.path()).expect("files").count(), 2);
    }
}

//! The way to the reader in a guest: the UNIX socket behind its virtio-serial
//! port.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use secmon_detect::lies::{LONGEST, Question, Reader};

/// How long an answer may take: the guest starts some programs for it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one read waits.
const STEP: Duration = Duration::from_millis(200);

/// A connection to a reader.
pub struct SocketReader {
    stream: Mutex<UnixStream>,
}

impl SocketReader {
    /// Connects, before the sandbox closes.
    ///
    /// # Errors
    /// If there is no such socket, or somebody else is connected.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connecting to the reader at {}", socket.display()))?;
        stream.set_read_timeout(Some(STEP))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream: Mutex::new(stream),
        })
    }
}

impl Reader for SocketReader {
    fn ask(&self, question: &Question) -> Result<Vec<u8>, String> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream
            .write_all(question.line().as_bytes())
            .map_err(|error| format!("asking the reader: {error}"))?;
        let started = Instant::now();
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 1 << 16];
        while !question.is_answered(&bytes) {
            if started.elapsed() > PATIENCE {
                return Err(format!(
                    "{} bytes in {} s: does secmon-reader run in the guest?",
                    bytes.len(),
                    PATIENCE.as_secs()
                ));
            }
            match stream.read(&mut chunk) {
                Ok(0) => return Err("the reader's port was closed".to_owned()),
                Ok(count) => bytes.extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(format!("hearing the reader: {error}")),
            }
            if bytes.len() > LONGEST {
                return Err(format!("more than {LONGEST} bytes"));
            }
            // What an answer to an earlier question left.
            if let Some(start) = question.start(&bytes) {
                bytes.drain(..start);
            }
        }
        Ok(bytes)
    }
}

//! Bytes both ways, with deadlines, for a reader and a writer at once.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// A stream of bytes in both directions that two threads use at once, one to
/// read and one to write.
pub trait Stream: Send + Sync {
    /// Reads at least one byte, or gives 0 if the other side ended.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] at the deadline, or the system's.
    fn read(&self, buffer: &mut [u8], deadline: Option<Instant>) -> io::Result<usize>;

    /// Writes at least one byte of `bytes`, which is not empty.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] at the deadline, or the system's.
    fn write(&self, bytes: &[u8], deadline: Option<Instant>) -> io::Result<usize>;
}

/// A stream over a file descriptor that can be polled: a socket, a
/// virtio-serial port, a pipe's two ends in one.
#[derive(Debug)]
pub struct Descriptor(OwnedFd);

impl Descriptor {
    /// Takes the descriptor and makes its description non-blocking.
    ///
    /// # Errors
    /// The system's.
    pub fn new(descriptor: impl Into<OwnedFd>) -> io::Result<Self> {
        let descriptor = descriptor.into();
        let flags = fcntl_getfl(&descriptor)?;
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        Ok(Self(descriptor))
    }

    /// Waits for one of `wanted`; says whether the other side hung up without
    /// it.
    fn wait(&self, wanted: PollFlags, deadline: Option<Instant>) -> io::Result<bool> {
        loop {
            let timeout = match deadline {
                None => None,
                Some(deadline) => Some(
                    deadline
                        .checked_duration_since(Instant::now())
                        .filter(|left| !left.is_zero())
                        .ok_or(io::ErrorKind::TimedOut)?,
                ),
            };
            let timeout = timeout.and_then(timespec);
            let mut polled = [PollFd::new(&self.0, wanted)];
            match poll(&mut polled, timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => {
                    let [polled] = polled;
                    return Ok(!polled.revents().intersects(wanted));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Rounded up to a millisecond, so that a deadline is over when a poll ends.
fn timespec(left: Duration) -> Option<Timespec> {
    let left = left.saturating_add(Duration::from_millis(1));
    Timespec::try_from(left).ok()
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Stream for Descriptor {
    fn read(&self, buffer: &mut [u8], deadline: Option<Instant>) -> io::Result<usize> {
        loop {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(length) => return Ok(length),
                Err(Errno::INTR) => {}
                // A hang-up shows itself at the next read.
                Err(Errno::AGAIN) => drop(self.wait(PollFlags::IN, deadline)?),
                // A peer that vanished with unread bytes has ended, too.
                Err(Errno::CONNRESET) => return Ok(0),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn write(&self, bytes: &[u8], deadline: Option<Instant>) -> io::Result<usize> {
        loop {
            match rustix::io::write(&self.0, bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => return Ok(length),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    // A virtio-serial port without a host refuses for ever
                    // and says so only here.
                    if self.wait(PollFlags::OUT, deadline)? {
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Fills `buffer` from `*filled` on; gives `false` if the stream ended before.
/// What came before an error is counted in `*filled`.
pub(crate) fn fill(
    stream: &dyn Stream,
    buffer: &mut [u8],
    filled: &mut usize,
    deadline: Option<Instant>,
) -> io::Result<bool> {
    while let Some(rest) = buffer.get_mut(*filled..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest, deadline)? {
            0 => return Ok(false),
            length => *filled = filled.saturating_add(length),
        }
    }
    Ok(true)
}

/// Writes all of `bytes`.
pub(crate) fn write_all(
    stream: &dyn Stream,
    bytes: &[u8],
    deadline: Option<Instant>,
) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let length = stream.write(rest, deadline)?;
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(20))
    }

    #[test]
    fn a_deadline_ends_a_read_and_a_write() {
        let (left, _right) = UnixStream::pair().expect("a pair");
        let stream = Descriptor::new(left).expect("a stream");
        let error = stream.read(&mut [0; 8], soon()).expect_err("nothing there");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let error = write_all(&stream, &vec![0; 8 << 20], soon()).expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn a_closed_stream_is_told_from_a_silent_one() {
        let (left, right) = UnixStream::pair().expect("a pair");
        let stream = Descriptor::new(left).expect("a stream");
        rustix::io::write(&right, b"abc").expect("a write");
        drop(right);
        let (mut buffer, mut filled) = ([0; 8], 0);
        assert!(!fill(&stream, &mut buffer, &mut filled, None).expect("a read"));
        assert_eq!((&buffer[..3], filled), (&b"abc"[..], 3));
        assert!(write_all(&stream, b"x", None).is_err());
    }
}

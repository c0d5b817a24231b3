//! Work of known kinds, to see from outside how fast the guest gets on.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use secmon_truth::Work;

/// Repetitions between two looks at the clock.
const BATCH: u64 = 1000;
/// Bytes that are copied at once.
const PIECE: usize = 64 << 10;

/// Repeats the work for that long; tells how often.
pub fn repeat(work: Work, milliseconds: u32) -> u64 {
    let end = Instant::now() + Duration::from_millis(milliseconds.into());
    let mut count = 0;
    let mut state = 1_u64;
    while Instant::now() < end {
        for _ in 0..BATCH {
            match work {
                Work::Compute => {
                    state = black_box(state ^ (state << 13));
                    state ^= state >> 7;
                    state ^= state << 17;
                }
                Work::SystemCalls => {
                    // SAFETY: it has no arguments and changes nothing.
                    black_box(unsafe { libc::syscall(libc::SYS_getppid) });
                }
            }
        }
        count += BATCH;
    }
    black_box(state);
    count
}

/// A mapping of some file, or of memory that has all its pages.
struct Mapped {
    start: *mut libc::c_void,
    length: usize,
}

impl Mapped {
    fn new(path: Option<&str>, length: usize) -> io::Result<Self> {
        let file = path.map(File::open).transpose()?;
        let (flags, descriptor) = match &file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
            ),
        };
        let rights = match file {
            Some(_) => libc::PROT_READ,
            // A page that was never written is the one page of zeros.
            None => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: a new mapping wherever the kernel likes.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, rights, flags, descriptor, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, length })
    }

    /// Copies all of it, piece by piece, into one buffer.
    fn read(&self, buffer: &mut [u8]) {
        for offset in (0..self.length).step_by(buffer.len()) {
            let count = buffer.len().min(self.length - offset);
            // SAFETY: the mapping has `length` readable bytes; the buffer is
            // another piece of memory. What others write meanwhile only makes
            // other bytes arrive, which nobody looks at.
            unsafe {
                let source = self.start.cast::<u8>().add(offset);
                std::ptr::copy_nonoverlapping(source, buffer.as_mut_ptr(), count);
            }
            black_box(&buffer);
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nothing points into it any more.
        let _ = unsafe { libc::munmap(self.start, self.length) };
    }
}

/// Reads a mapping from one end to the other; the nanoseconds of the fastest
/// round. The first one, which has the page faults, does not count.
pub fn read_through(path: Option<&str>, mebibytes: u32, rounds: u32) -> io::Result<u64> {
    let mapped = Mapped::new(path, (mebibytes as usize) << 20)?;
    let mut buffer = vec![0; PIECE];
    mapped.read(&mut buffer);
    let mut fastest = u64::MAX;
    for _ in 0..rounds {
        let started = Instant::now();
        mapped.read(&mut buffer);
        fastest = fastest.min(started.elapsed().as_nanos() as u64);
    }
    Ok(fastest)
}

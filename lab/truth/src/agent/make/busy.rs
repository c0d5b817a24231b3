//! Processes that, while the busy mode is on, keep making and ending
//! everything the tables list: one forks and waits, one keeps threads, files,
//! sockets and mappings coming and going.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::report::Reports;
use crate::agent::memory::{self, PAGE, Shared};
use crate::agent::sys;

/// How many processes are busy.
pub const PROCESSES: u32 = 2;

/// The longest that anything brief lives, in milliseconds.
const LONGEST: u64 = 120;

/// How much of each brief thing there is at most at a time.
const MOST: usize = 40;

/// Forks them, at rest.
pub fn processes(
    reports: &mut Reports,
    shared: &'static Shared,
    interval_ms: u32,
) -> io::Result<()> {
    let interval = Duration::from_millis(u64::from(interval_ms));
    reports.piece("busy-processes", |reporter| {
        reporter.done(&[]);
        let mut children = Vec::new();
        keep_busy(shared, interval, |round| match round {
            Some(round) => fork_some(round, &mut children),
            None => reap(&mut children, 0),
        });
    })?;
    reports.piece("busy-objects", |reporter| {
        reporter.done(&[]);
        let mut objects = VecDeque::new();
        keep_busy(shared, interval, |round| {
            let most = if round.is_some() { MOST } else { 0 };
            if let Some(round) = round {
                objects.push_back(Brief::make(round)?);
            }
            while objects.len() > most {
                objects.pop_front().map_or(Ok(()), Brief::end)?;
            }
            Ok(())
        });
    })?;
    Ok(())
}

/// Calls `work` with the round's number while the mode is on, and with none
/// when it ends.
fn keep_busy(
    shared: &Shared,
    interval: Duration,
    mut work: impl FnMut(Option<u64>) -> io::Result<()>,
) -> ! {
    shared.busy_resting.fetch_add(1, Ordering::SeqCst);
    let mut round = 0;
    loop {
        if shared.busy.load(Ordering::SeqCst) == 0 {
            // Not by looking now and then: who rests has to be seen asleep.
            sys::wait_while(&shared.busy, 0);
            continue;
        }
        shared.busy_resting.fetch_sub(1, Ordering::SeqCst);
        while shared.busy.load(Ordering::SeqCst) == 1 {
            // What fails for want of something is left out of this round.
            let _ = work(Some(round));
            round += 1;
            shared.busy_rounds.fetch_add(1, Ordering::SeqCst);
            thread::sleep(interval);
        }
        let _ = work(None);
        shared.busy_resting.fetch_add(1, Ordering::SeqCst);
    }
}

/// Forks three processes of different lives, one of which executes a
/// program, and reaps those that have ended.
fn fork_some(round: u64, children: &mut Vec<i32>) -> io::Result<()> {
    for number in 0..3 {
        let life = Duration::from_millis((round * 7 + number * 31) % LONGEST);
        children.push(sys::fork(|| {
            sys::set_name(format!("brief-{}", round % 10_000).as_bytes());
            if number == 2
                && let Ok(program) = sys::c_string("/bin/busybox")
            {
                let arguments = [c"sleep".to_owned(), c"0.05".to_owned()];
                let _ = sys::execute(&program, &arguments, &[]);
            }
            thread::sleep(life);
            std::process::exit(0);
        })?);
    }
    reap(children, MOST)
}

/// Reaps the oldest children until at most `most` are left.
fn reap(children: &mut Vec<i32>, most: usize) -> io::Result<()> {
    let surplus = children.len().saturating_sub(most);
    for child in children.drain(..surplus) {
        sys::wait_for(child, 0)?;
    }
    Ok(())
}

/// Things of one round.
struct Brief {
    path: String,
    address: usize,
    length: usize,
    thread: JoinHandle<()>,
    _file: File,
    _sockets: (TcpListener, UdpSocket),
}

impl Brief {
    fn make(round: u64) -> io::Result<Self> {
        let path = format!("/tmp/brief-{round}");
        let length = (1 + round as usize % 16) * PAGE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let address = memory::map(length, protection, flags, None::<&File>, 0)?;
        memory::fill(address, length, round as u8);
        Ok(Self {
            _file: File::create(&path)?,
            path,
            address,
            length,
            thread: thread::Builder::new()
                .stack_size(64 * 1024)
                .spawn(move || {
                    sys::set_name(format!("brief-{}", round % 10_000).as_bytes());
                    thread::sleep(Duration::from_millis(round % LONGEST));
                })?,
            _sockets: (
                TcpListener::bind("127.0.0.1:0")?,
                UdpSocket::bind("127.0.0.1:0")?,
            ),
        })
    }

    fn end(self) -> io::Result<()> {
        let _ = self.thread.join();
        memory::unmap(self.address, self.length)?;
        fs::remove_file(self.path)
    }
}

//! Processes that, while the busy mode is on, keep making and ending
//! everything the tables list.

use std::fs::{self, File};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::report::Reports;
use crate::agent::memory::{self, PAGE, Shared};
use crate::agent::sys;

/// How many processes are busy.
pub const PROCESSES: u32 = 2;

/// Forks them, at rest.
pub fn processes(
    reports: &mut Reports,
    shared: &'static Shared,
    interval_ms: u32,
) -> io::Result<()> {
    for number in 0..PROCESSES {
        reports.piece(&format!("busy-{number}"), |reporter| {
            shared.busy_resting.fetch_add(1, Ordering::SeqCst);
            reporter.done(&[]);
            loop {
                if shared.busy.load(Ordering::SeqCst) == 0 {
                    thread::sleep(Duration::from_millis(20));
                    continue;
                }
                shared.busy_resting.fetch_sub(1, Ordering::SeqCst);
                let mut round: u64 = 0;
                while shared.busy.load(Ordering::SeqCst) == 1 {
                    // What fails for want of something is left out.
                    let _ = self::round(round, number);
                    round += 1;
                    shared.busy_rounds.fetch_add(1, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(u64::from(interval_ms)));
                }
                shared.busy_resting.fetch_add(1, Ordering::SeqCst);
            }
        })?;
    }
    Ok(())
}

/// Makes three processes (one of them executes a program), two threads, some
/// files, sockets and mappings, and ends them all.
fn round(round: u64, busy: u32) -> io::Result<()> {
    let mut children = Vec::new();
    for number in 0..3u32 {
        children.push(sys::fork(|| {
            sys::set_name(format!("brief-{busy}-{}", round % 1000).as_bytes());
            if number == 2
                && let Ok(program) = sys::c_string("/bin/busybox")
            {
                let arguments = [c"true".to_owned()];
                let _ = sys::execute(&program, &arguments, &[]);
            }
            let file = fs::write(format!("/tmp/brief-{busy}-{number}"), round.to_string());
            thread::sleep(Duration::from_millis(u64::from(number)));
            std::process::exit(i32::from(file.is_err()));
        })?);
    }
    let path = format!("/tmp/busy-{busy}");
    let file = File::create(&path)?;
    let threads: Vec<_> = (0..2)
        .map_while(|_| {
            thread::Builder::new()
                .stack_size(64 * 1024)
                .spawn(|| {
                    sys::set_name(b"brief-thread");
                    thread::sleep(Duration::from_millis(1));
                })
                .ok()
        })
        .collect();
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let length = (1 + round as usize % 16) * PAGE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let start = memory::map(length, protection, flags, None::<&File>, 0)?;
    memory::fill(start, length, round as u8);
    memory::unmap(start, length)?;
    for thread in threads {
        let _ = thread.join();
    }
    drop((file, listener, socket));
    fs::remove_file(&path)?;
    for child in children {
        let _ = sys::wait_for(child, 0);
    }
    Ok(())
}

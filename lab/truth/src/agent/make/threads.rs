//! Processes with several threads, named and not.

use std::io;
use std::sync::{Arc, Barrier};
use std::thread;

use super::report::Reports;
use crate::agent::sys;

/// What makes a thread differ.
type Body = fn() -> io::Result<()>;

/// Odd names for the threads of one process.
const NAMES: &[&[u8]] = &[b"", b"with space", b"\xff\xfe", b"new\nline", b"worker/0"];

/// Three processes with 3, 8 and 17 further threads, and one whose threads
/// differ in credentials and namespaces.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    for count in [3usize, 8, 17] {
        reports.simple(&format!("threads-{count}"), |_| {
            let barrier = Arc::new(Barrier::new(count + 1));
            for number in 0..count {
                let barrier = Arc::clone(&barrier);
                start(move || {
                    match NAMES.get(number) {
                        Some(name) if count > 3 => sys::set_name(name),
                        _ => sys::set_name(format!("thread-{number}").as_bytes()),
                    }
                    barrier.wait();
                    sys::rest();
                })?;
            }
            barrier.wait();
            Ok(())
        })?;
    }
    reports.simple("threads-differ", |failures| {
        let barrier = Arc::new(Barrier::new(5));
        let (sender, received) = std::sync::mpsc::channel();
        let bodies: [(&str, Body); 4] = [
            ("other-user", || sys::set_thread_user(4242)),
            ("other-uts", || {
                sys::unshare(libc::CLONE_NEWUTS)?;
                sys::set_host_name(b"thread-host")
            }),
            ("other-files", || {
                sys::unshare(libc::CLONE_FILES)?;
                std::fs::File::open("/etc/modules").map(std::mem::forget)
            }),
            ("other-cwd", || {
                sys::unshare(libc::CLONE_FS)?;
                std::env::set_current_dir("/tmp")
            }),
        ];
        for (name, body) in bodies {
            let barrier = Arc::clone(&barrier);
            let sender = sender.clone();
            start(move || {
                sys::set_name(name.as_bytes());
                if let Err(error) = body() {
                    let _ = sender.send(format!("{name}: {error}"));
                }
                barrier.wait();
                sys::rest();
            })?;
        }
        barrier.wait();
        failures.extend(received.try_iter());
        Ok(())
    })?;
    // A group whose first thread has ended: a zombie leader with a living
    // thread.
    reports.piece("threads-no-leader", |reporter| {
        let started = start(move || {
            // The leader ends within a moment of reporting.
            thread::sleep(std::time::Duration::from_millis(50));
            sys::set_name(b"survivor");
            sys::rest();
        });
        let failures: Vec<_> = started.err().iter().map(ToString::to_string).collect();
        reporter.done(&failures);
        if failures.is_empty() {
            sys::exit_thread();
        }
    })?;
    Ok(())
}

/// Starts a thread with a small stack.
pub fn start(body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new()
        .stack_size(64 * 1024)
        .spawn(body)
        .map(drop)
}

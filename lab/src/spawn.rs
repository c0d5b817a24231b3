//! Starts child processes that can't outlive this process.
//!
//! The kernel's parent-death signal is sent when the *thread* that started a
//! child ends, and a test's thread ends with the test while its guest may be
//! shared with others. So one thread that lives as long as the process
//! starts all of them.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

struct Job {
    command: Command,
    answer: Sender<io::Result<Child>>,
}

/// Starts `command` with `inherited` open in it under the same numbers; it is
/// killed when this process ends, however it ends.
pub fn start(mut command: Command, inherited: Vec<OwnedFd>) -> io::Result<Child> {
    let numbers: Vec<RawFd> = inherited
        .iter()
        .map(rustix::fd::AsRawFd::as_raw_fd)
        .collect();
    let parent = rustix::process::getpid();
    let prepare = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // If the parent died before that call, no signal will come.
        if getppid() != Some(parent) {
            return Err(io::Error::other("the parent has died"));
        }
        for number in &numbers {
            // SAFETY: `start` holds these descriptors open until the child
            // has been started, and the child is a copy.
            #[allow(unsafe_code)]
            let fd = unsafe { BorrowedFd::borrow_raw(*number) };
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the child between fork and exec; it makes
    // system calls only, and allocates only on its way to failing.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(prepare);
    }
    let (answer, result) = channel();
    spawner()
        .send(Job { command, answer })
        .map_err(io::Error::other)?;
    let child = result.recv().map_err(io::Error::other)?;
    drop(inherited);
    child
}

fn spawner() -> &'static Sender<Job> {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (jobs, queue) = channel::<Job>();
        let thread = std::thread::Builder::new().name("lab-spawner".to_owned());
        // Without the thread the queue's end is gone, and `start` says so.
        let _ = thread.spawn(move || {
            for mut job in queue {
                let _ = job.answer.send(job.command.spawn());
            }
        });
        jobs
    })
}

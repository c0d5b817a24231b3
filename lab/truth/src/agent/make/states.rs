//! Processes in states other than an interruptible sleep.

use std::io;

use super::report::{self, Reports};
use crate::agent::sys;

/// One process (or pair) for each.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    reports.simple("state-zombies", |_| {
        for name in [&b"zombie"[..], b"zombie two"] {
            let pid = report::child(|| {
                sys::set_name(name);
                std::process::exit(3);
            })?;
            sys::wait_until_dead(pid)?;
        }
        Ok(())
    })?;
    reports.simple("state-stopped", |_| {
        let pid = report::child_that_stands(|| {
            sys::set_name(b"stopped");
            Ok(())
        })?;
        sys::kill(pid, libc::SIGSTOP)?;
        sys::wait_for(pid, libc::WUNTRACED).map(drop)
    })?;
    reports.simple("state-traced", |_| {
        let pid = report::child_that_stands(|| {
            sys::set_name(b"traced");
            Ok(())
        })?;
        sys::trace_and_stop(pid)
    })?;
    // The parent of a vfork sleeps uninterruptibly until its child executes
    // or exits, which this child never does.
    reports.simple("state-vfork", |_| {
        report::child(|| {
            sys::set_name(b"vfork-parent");
            let _ = sys::clone(libc::CLONE_VFORK, || sys::set_name(b"vfork-child"));
        })
        .map(drop)
    })?;
    reports.simple("policy-fifo", |_| sys::set_policy(libc::SCHED_FIFO, 10))?;
    reports.simple("policy-batch", |_| sys::set_policy(libc::SCHED_BATCH, 0))?;
    reports.simple("policy-idle", |_| sys::set_policy(libc::SCHED_IDLE, 0))?;
    reports.simple("nice-15", |_| sys::set_nice(15))?;
    reports.simple("nice-minus-10", |_| sys::set_nice(-10))?;
    reports.simple("oom-score", |_| {
        std::fs::write("/proc/self/oom_score_adj", "-777")
    })?;
    // A child whose parent has ended, so that it is process 1's now.
    reports.simple("orphans", |_| {
        let parent = report::child(|| {
            let _ = report::child_that_stands(|| {
                sys::set_name(b"orphan");
                Ok(())
            });
            std::process::exit(0);
        })?;
        sys::wait_for(parent, 0).map(drop)
    })?;
    Ok(())
}

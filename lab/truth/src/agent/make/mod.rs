//! The workload: what PID 1 makes before it says it is ready.
//!
//! Each piece is a process of its own that sets something up, reports what
//! went well over a pipe, and then rests; so a piece that fails, or that this
//! kernel can't do, costs only itself and is told to the host.

mod bpf;
mod busy;
mod containers;
mod files;
mod identities;
mod injected;
mod loads;
mod mappings;
mod mounts;
mod names;
mod network;
mod plain;
mod programs;
mod report;
mod sockets;
mod specimens;
mod states;
mod swap;
mod threads;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use secmon_truth::Workload;

use super::memory::{self, Shared};
use super::sys;
use report::Reports;

pub use programs::{play, role};
pub use specimens::Specimens;

/// The program that roles execute: this one, under another name.
const WORKER: &str = "/bin/lab-worker";

/// How long the workload may take to stand, emulated on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// What was made.
pub struct Made {
    roles: BTreeMap<String, i32>,
    shared: &'static Shared,
}

impl Made {
    /// Role to pid.
    pub fn roles(&self) -> &BTreeMap<String, i32> {
        &self.roles
    }

    /// Starts the busy mode.
    pub fn resume_busy(&self) -> io::Result<()> {
        self.shared.busy.store(1, Ordering::SeqCst);
        sys::wake(&self.shared.busy);
        until("the busy mode to start", || {
            self.shared.busy_resting.load(Ordering::SeqCst) == 0
        })
    }

    /// Ends the busy mode.
    pub fn pause_busy(&self) -> io::Result<u64> {
        self.shared.busy.store(0, Ordering::SeqCst);
        until("the busy mode to end", || {
            self.shared.busy_resting.load(Ordering::SeqCst) == busy::PROCESSES
        })?;
        Ok(self.shared.busy_rounds.load(Ordering::SeqCst))
    }

    /// Makes the short-lived sockets anew.
    pub fn refresh_sockets(&self) -> io::Result<()> {
        if !self.roles.contains_key("sockets-short-lived") {
            return Err(io::Error::other("the small workload has no sockets"));
        }
        let asked = self.shared.sockets_asked.fetch_add(1, Ordering::SeqCst) + 1;
        until("new sockets", || {
            self.shared.sockets_made.load(Ordering::SeqCst) >= asked
        })
    }
}

/// Makes everything.
pub fn all(workload: &Workload, failures: &mut Vec<String>) -> io::Result<Made> {
    let shared = memory::shared()?;
    fs::hard_link("/init", WORKER)?;
    let mut reports = Reports::open()?;
    plain::processes(workload.processes, shared)?;
    busy::processes(&mut reports, shared, workload.busy_interval_ms)?;
    if workload.rich {
        network::interfaces(failures);
        mounts::mounts(failures);
        if workload.extra_modules {
            swap::on(failures);
        }
        let pieces: [fn(&mut Reports) -> io::Result<()>; 11] = [
            names::processes,
            threads::processes,
            identities::processes,
            states::processes,
            programs::processes,
            mappings::processes,
            files::processes,
            bpf::processes,
            containers::processes,
            swap::processes,
            network::namespaces,
        ];
        for piece in pieces {
            if let Err(error) = piece(&mut reports) {
                failures.push(error.to_string());
            }
        }
        sockets::processes(&mut reports, shared)?;
    }
    let roles = reports.collect(PATIENCE, failures)?;
    until("the plain processes", || {
        shared.standing.load(Ordering::SeqCst) >= workload.processes
    })?;
    Ok(Made { roles, shared })
}

fn until(what: &str, done: impl Fn() -> bool) -> io::Result<()> {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > PATIENCE {
            return Err(io::Error::other(format!("waited in vain for {what}")));
        }
        while sys::reap_one() {}
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

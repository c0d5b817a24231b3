//! What runs inside of the monitoring VM.
//!
//! Two processes of the one program. **Process 1** (`init`) mounts what is
//! needed, loads the modules, reads the configuration, and from then on only
//! watches the **worker** (`worker`): it starts it again if it dies or its
//! pulse stops, and parses nothing of what the worker or a guest wrote. The
//! worker opens the targets' memory and its ports, confines itself so that it
//! can open nothing more, and only then looks at the memory: a `watcher` per
//! target follows what the target does, another lets detectors look (`detect`), a `gate` thread speaks with its gate, a `session` serves the client, one
//! thread per request. What the watchers find goes to the `outbox`, which
//! outlives the worker.
//!
//! There is no shell, no network, and no way to load another module.

mod answer;
mod check;
mod credit;
mod detect;
mod follow;
mod gate;
mod health;
mod init;
mod kept;
mod outbox;
mod place;
mod port;
mod session;
mod watcher;
mod worker;

use std::process::ExitCode;

pub use follow::{FollowedGuest, Follower};

use secmon_guest::TrustLevel;

/// How well what is said from in here is protected.
const TRUST_LEVEL: TrustLevel = TrustLevel::L1;

/// The hidden argument that makes the program the worker.
const WORKER: &str = "__monitor-worker";

/// Runs the program as process 1 or the worker of a monitoring VM, if it is
/// one. To be asked before anything else is done.
#[must_use]
pub fn run_if_inside() -> Option<ExitCode> {
    if std::process::id() == 1 {
        return Some(init::main());
    }
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(WORKER) {
        return Some(worker::main(arguments));
    }
    None
}

/// Writes a line on the VM's console.
fn log(line: impl std::fmt::Display) {
    use std::io::Write as _;
    // Nobody is there to be told if the console fails.
    let _ = writeln!(std::io::stderr(), "secmon: {line}");
}

//! Signals that end programs, kept from those that end in another way.

use nix::sys::signal::{SigSet, Signal};

/// Blocks what terminals and service managers send. To be called before any
/// thread is started. Failing does no harm: it only keeps order at the end.
pub fn block_usual() {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        // A log that reaches a limit of its size is a failed write.
        Signal::SIGXFSZ,
    ] {
        signals.add(signal);
    }
    let _ = signals.thread_block();
}

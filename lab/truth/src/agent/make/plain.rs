//! Plain processes: sessions with a tree below each, named, of several users.

use std::io;
use std::sync::atomic::Ordering;

use super::report;
use crate::agent::memory::Shared;
use crate::agent::sys;

/// Processes of one session.
const SESSION: u32 = 25;

/// How deep the chain in a session goes.
const DEPTH: u32 = 8;

/// Forks `count` processes in all.
pub fn processes(count: u32, shared: &'static Shared) -> io::Result<()> {
    let mut made = 0;
    while made < count {
        let size = SESSION.min(count - made);
        let first = made;
        report::child(|| session(first, size, shared))?;
        made += size;
    }
    Ok(())
}

fn session(first: u32, size: u32, shared: &Shared) {
    // Every second session belongs to some user, and has its own session id.
    if first / SESSION % 2 == 1 {
        let user = 1000 + first / SESSION;
        let _ = sys::set_session();
        let _ = sys::set_ids([user; 3], [user; 3], &[user, 100]);
    }
    stand(first, shared);
    let chain = DEPTH.min(size - 1);
    for number in first + 1 + chain..first + size {
        let _ = sys::fork(|| stand(number, shared));
    }
    descend(first + 1, chain, shared);
}

/// A process whose child has a child, `depth` times.
fn descend(number: u32, depth: u32, shared: &Shared) {
    if depth > 0 {
        let _ = sys::fork(|| {
            stand(number, shared);
            descend(number + 1, depth - 1, shared);
        });
    }
}

fn stand(number: u32, shared: &Shared) {
    sys::set_name(format!("plain-{number}").as_bytes());
    shared.standing.fetch_add(1, Ordering::SeqCst);
}

//! Which requests run, and how many messages each may still send.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The most messages that a client may let be on their way.
const MOST: u32 = 1024;

/// The running requests of one session.
#[derive(Debug, Default)]
pub(super) struct Requests {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    running: BTreeMap<u32, Running>,
    over: bool,
}

#[derive(Debug)]
struct Running {
    credit: u32,
    cancelled: bool,
}

/// Whether a request may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Permit {
    /// One message may be sent.
    Send,
    /// Nobody wants more.
    Stop,
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a request, unless `limit` are running or this one is.
    ///
    /// # Errors
    /// How many are running.
    pub(super) fn begin(&self, id: u32, credit: u32, limit: usize) -> Result<(), u32> {
        let mut state = self.lock();
        let running = state.running.len();
        if running >= limit || state.running.contains_key(&id) {
            return Err(u32::try_from(running).unwrap_or(u32::MAX));
        }
        let credit = credit.min(MOST);
        state.running.insert(
            id,
            Running {
                credit,
                cancelled: false,
            },
        );
        Ok(())
    }

    /// Lets a request send more. One that is over needs none.
    pub(super) fn give(&self, id: u32, messages: u32) {
        if let Some(request) = self.lock().running.get_mut(&id) {
            request.credit = request.credit.saturating_add(messages).min(MOST);
        }
        self.changed.notify_all();
    }

    /// Stops a request.
    pub(super) fn cancel(&self, id: u32) {
        if let Some(request) = self.lock().running.get_mut(&id) {
            request.cancelled = true;
        }
        self.changed.notify_all();
    }

    /// Takes the right to send one message, when there is one.
    pub(super) fn take(&self, id: u32) -> Permit {
        let mut state = self.lock();
        loop {
            if state.over {
                return Permit::Stop;
            }
            match state.running.get_mut(&id) {
                None => return Permit::Stop,
                Some(request) if request.cancelled => return Permit::Stop,
                Some(request) if request.credit > 0 => {
                    request.credit -= 1;
                    return Permit::Send;
                }
                Some(_) => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Ends a request.
    pub(super) fn end(&self, id: u32) {
        self.lock().running.remove(&id);
    }

    /// Stops all of them: the session is over.
    pub(super) fn stop(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Whether the session is over.
    pub(super) fn is_over(&self) -> bool {
        self.lock().over
    }

    /// How many are running.
    pub(super) fn running(&self) -> u32 {
        u32::try_from(self.lock().running.len()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn nothing_is_sent_without_credit() {
        let requests = Arc::new(Requests::default());
        assert_eq!(requests.begin(7, 2, 2), Ok(()));
        assert_eq!(requests.begin(7, 2, 2), Err(1), "it runs already");
        assert_eq!(requests.begin(8, 0, 2), Ok(()));
        assert_eq!(requests.begin(9, 0, 2), Err(2), "too many");
        assert_eq!(
            (requests.take(7), requests.take(7)),
            (Permit::Send, Permit::Send)
        );
        let waiter = {
            let requests = Arc::clone(&requests);
            std::thread::spawn(move || (requests.take(8), requests.take(8)))
        };
        requests.give(8, 1);
        requests.cancel(8);
        // Given before it is cancelled, the credit may or may not be used.
        let (_, second) = waiter.join().expect("no panic");
        assert_eq!(second, Permit::Stop);
        requests.end(8);
        assert_eq!((requests.take(8), requests.running()), (Permit::Stop, 1));
        requests.stop();
        assert_eq!(requests.take(7), Permit::Stop);
        assert!(requests.is_over());
    }
}

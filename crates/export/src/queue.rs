//! The queue between a watch and the thread that sends, and that thread.

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use secmon_watch::{Event, Sink, SinkError};

/// The first and the longest wait after a failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The longest wait that a receiver can ask for.
const LONGEST_ASKED: Duration = Duration::from_secs(600);

/// How long an exporter that is dropped still tries to send what waits.
const LAST: Duration = Duration::from_secs(5);

/// How much may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Events.
    pub events: usize,
    /// Their bytes, as they are sent.
    pub bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            events: 10_000,
            bytes: 16 << 20,
        }
    }
}

/// Writes events as they are sent.
pub(crate) trait Encode: Send {
    fn encode(&self, event: &Event) -> Vec<u8>;
}

/// Sends what was encoded. It may wait, but for a bounded time.
pub(crate) trait Transport: Send {
    /// How many messages it takes at once.
    fn batch(&self) -> usize;

    /// Sends messages in their order; gives how many were sent, at least one.
    fn send(&mut self, messages: &[Vec<u8>]) -> Result<Sent, Failure>;
}

/// What became of messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    /// How many are dealt with.
    pub(crate) messages: usize,
    /// How many of these the receiver did not want, and why.
    pub(crate) rejected: u64,
    pub(crate) reason: String,
}

impl Sent {
    pub(crate) fn all(messages: usize) -> Self {
        Self {
            messages,
            rejected: 0,
            reason: String::new(),
        }
    }
}

/// Why messages were not sent; they are sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) reason: String,
    /// How long the receiver wants to be left alone.
    pub(crate) wait: Option<Duration>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Messages that the thread has in its hands.
    sending: usize,
    /// Events lost since that was last told, and why.
    lost: u64,
    lost_reason: String,
    /// Why nothing can be sent at this moment.
    trouble: Option<String>,
    /// Whether that was told.
    trouble_told: bool,
    /// When to give up what waits.
    end: Option<Instant>,
}

impl State {
    fn lose(&mut self, events: u64, reason: &str) {
        self.lost = self.lost.saturating_add(events);
        reason.clone_into(&mut self.lost_reason);
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, for so long at most.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, most: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A [`Sink`] that sends events elsewhere. Taking an event never waits.
///
/// Dropping it still sends what waits, for five seconds at most; use
/// [`close`](Self::close) to learn what was lost by then.
pub struct Exporter {
    name: String,
    encoder: Box<dyn Encode>,
    bounds: Bounds,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Exporter {
    /// Starts the thread that sends. `name` is the sink's, and where it leads.
    pub(crate) fn start(
        name: String,
        bounds: Bounds,
        encoder: Box<dyn Encode>,
        transport: impl Transport + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("export".to_owned())
            .spawn(move || work(&worker, transport))?;
        Ok(Self {
            name,
            encoder,
            bounds,
            shared,
            thread: Some(thread),
        })
    }

    /// Ends it: sends what waits, for so long at most.
    ///
    /// # Errors
    /// [`SinkError::Lost`] with all that was lost and not told yet.
    pub fn close(mut self, patience: Duration) -> Result<(), SinkError> {
        self.end(patience);
        self.told()
    }

    fn end(&mut self, patience: Duration) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let end = Instant::now() + patience;
        self.shared.state().end = Some(end);
        self.shared.changed.notify_all();
        // The thread may be in the middle of a connection attempt, which takes
        // longer than anybody wants to wait: it is then left to end by itself.
        while !thread.is_finished() && Instant::now() < end {
            let state = self.shared.state();
            drop(self.shared.wait(state, Duration::from_millis(20)));
        }
        let mut state = self.shared.state();
        let left = state.waiting.len() + state.sending;
        if left > 0 {
            let trouble = state.trouble.clone();
            let reason = trouble.unwrap_or_else(|| "the time for sending was over".to_owned());
            state.lose(left as u64, &reason);
            state.waiting.clear();
        }
    }

    /// What is to be told: loss each time, trouble once.
    fn told(&self) -> Result<(), SinkError> {
        let mut state = self.shared.state();
        let sink = self.name.clone();
        let lost = std::mem::take(&mut state.lost);
        if lost > 0 {
            let reason = state.lost_reason.clone();
            return Err(SinkError::Lost { sink, reason, lost });
        }
        if let Some(reason) = &state.trouble
            && !state.trouble_told
        {
            let error = SinkError::Delayed {
                sink,
                reason: reason.clone(),
                waiting: state.waiting.len() + state.sending,
            };
            state.trouble_told = true;
            return Err(error);
        }
        Ok(())
    }
}

impl Sink for Exporter {
    fn take(&mut self, event: &Event) -> Result<(), SinkError> {
        let message = self.encoder.encode(event);
        {
            let mut state = self.shared.state();
            let events = state.waiting.len() + state.sending;
            let bytes = state.bytes.saturating_add(message.len());
            if events >= self.bounds.events || bytes > self.bounds.bytes {
                let why = state.trouble.clone();
                let why = why.unwrap_or_else(|| "events come faster than they are taken".into());
                state.lose(1, &format!("the queue is full: {why}"));
            } else {
                state.bytes = bytes;
                state.waiting.push_back(message);
            }
        }
        self.shared.changed.notify_all();
        self.told()
    }

    fn idle(&mut self) -> Result<(), SinkError> {
        self.told()
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.end(LAST);
    }
}

/// Sends until the exporter has ended.
fn work(shared: &Shared, mut transport: impl Transport) {
    let mut back_off = BACK_OFF.0;
    let mut batch: Vec<Vec<u8>> = Vec::new();
    loop {
        {
            let mut state = shared.state();
            while batch.is_empty() && state.waiting.is_empty() && state.end.is_none() {
                state = shared.wait(state, LONGEST_ASKED);
            }
            let over = state.end.is_some_and(|end| Instant::now() >= end);
            if over || (batch.is_empty() && state.waiting.is_empty()) {
                return;
            }
            while batch.len() < transport.batch()
                && let Some(message) = state.waiting.pop_front()
            {
                batch.push(message);
            }
            state.sending = batch.len();
        }
        let outcome = transport.send(&batch);
        let mut state = shared.state();
        match outcome {
            Ok(sent) => {
                back_off = BACK_OFF.0;
                let done = sent.messages.clamp(1, batch.len());
                let bytes: usize = batch.drain(..done).map(|message| message.len()).sum();
                state.bytes = state.bytes.saturating_sub(bytes);
                state.sending = batch.len();
                state.trouble = None;
                state.trouble_told = false;
                if sent.rejected > 0 {
                    state.lose(sent.rejected, &sent.reason);
                }
            }
            Err(failure) => {
                // Of many that failed at once, not all try again at once.
                let jitter = RandomState::new().build_hasher().finish() % 250;
                let wait = failure
                    .wait
                    .map_or(back_off, |wait| wait.min(LONGEST_ASKED));
                back_off = (back_off * 2).min(BACK_OFF.1);
                state.trouble = Some(failure.reason);
                let next = Instant::now() + wait + Duration::from_millis(jitter);
                while let Some(left) = next.checked_duration_since(Instant::now())
                    && !left.is_zero()
                    && state.end.is_none_or(|end| Instant::now() < end)
                {
                    // A last attempt is made at once when the end is near.
                    let ending = state.end.is_some();
                    state = shared.wait(state, left.min(Duration::from_millis(200)));
                    if state.end.is_some() && !ending {
                        break;
                    }
                }
            }
        }
    }
}

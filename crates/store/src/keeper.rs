//! Keeps events in a store, also while the store can't be written to.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use secmon_watch::Event;

use crate::{Store, StoreError};

/// The most events that wait for room.
const MOST_WAITING: usize = 10_000;
/// Between two attempts to write what waits.
const RETRY: Duration = Duration::from_secs(1);
/// How many events are written at once.
const BATCH: usize = 256;

/// A store, and what waits for it.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    run: String,
    waiting: VecDeque<Event>,
    /// How many were lost since that was last told.
    lost: u64,
    tried: Option<Instant>,
    /// Whether it was told that events wait.
    told: bool,
}

/// What became of an event.
#[derive(Debug)]
pub enum Kept {
    /// It is on the disk, and so are all before it.
    Stored,
    /// It is on the disk, and so are all before it that were not lost, again
    /// after events had to wait.
    StoredAgain {
        /// How many were lost meanwhile.
        lost: u64,
    },
    /// It waits for the disk, for the first time or again.
    Waits {
        /// Why, if that was not told yet.
        reason: Option<StoreError>,
    },
}

impl Keeper {
    /// Keeps events of a run of the watch in a store.
    #[must_use]
    pub fn new(store: Store, run: impl Into<String>) -> Self {
        Self {
            store,
            run: run.into(),
            waiting: VecDeque::new(),
            lost: 0,
            tried: None,
            told: false,
        }
    }

    /// Names the run whose events come from here on. What waits is of the one
    /// before, so it has to be empty for that.
    pub fn set_run(&mut self, run: impl Into<String>) {
        self.run = run.into();
    }

    /// How many events wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Keeps an event.
    pub fn take(&mut self, event: Event) -> Kept {
        if self.waiting.len() >= MOST_WAITING {
            self.waiting.pop_front();
            self.lost = self.lost.saturating_add(1);
        }
        let first = self.waiting.is_empty();
        self.waiting.push_back(event);
        if first { self.write() } else { self.retry() }
    }

    /// Writes what waits, if it is time to try again.
    pub fn retry(&mut self) -> Kept {
        let early = self.tried.is_some_and(|tried| tried.elapsed() < RETRY);
        if self.waiting.is_empty() {
            Kept::Stored
        } else if early {
            Kept::Waits { reason: None }
        } else {
            self.write()
        }
    }

    fn write(&mut self) -> Kept {
        while !self.waiting.is_empty() {
            let batch = self.waiting.len().min(BATCH);
            let written = self.store.put(&self.run, self.waiting.iter().take(batch));
            if let Err(error) = written {
                self.tried = Some(Instant::now());
                let reason = (!std::mem::replace(&mut self.told, true)).then_some(error);
                return Kept::Waits { reason };
            }
            self.waiting.drain(..batch);
        }
        self.tried = None;
        if std::mem::take(&mut self.told) {
            let lost = std::mem::take(&mut self.lost);
            return Kept::StoredAgain { lost };
        }
        Kept::Stored
    }
}

//! What could not be read, and why: kept beside the rows, never instead of
//! them.

use std::sync::Mutex;

use secmon_memory::VirtualAddress;

/// How many diagnostics are kept; a hostile guest can cause any number.
const LIMIT: usize = 10_000;

/// Something that could not be read, or that did not agree with itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Diagnostic {
    /// The table that was being made.
    pub table: &'static str,
    /// What was being read, by kernel names: `task_struct.tasks`, `pid 12 mm`.
    pub subject: String,
    /// The address in question, where there is one.
    pub address: Option<VirtualAddress>,
    /// What happened and what it means for the table.
    pub reason: String,
}

/// The diagnostics of one guest, bounded.
#[derive(Debug, Default)]
pub struct Diagnostics {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    list: Vec<Diagnostic>,
    dropped: u64,
    torn_reads: u64,
}

impl Diagnostics {
    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        // A poisoned lock still holds a valid list: nothing panics inside.
        self.kept
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Adds one; past the bound only the count grows.
    pub fn record(&self, diagnostic: Diagnostic) {
        let mut kept = self.lock();
        if kept.list.len() < LIMIT {
            kept.list.push(diagnostic);
        } else {
            kept.dropped += 1;
        }
    }

    /// Counts a read that changed while it was made and was made again.
    pub fn count_torn_read(&self) {
        self.lock().torn_reads += 1;
    }

    /// How many reads were torn and repeated.
    pub fn torn_reads(&self) -> u64 {
        self.lock().torn_reads
    }

    /// How many diagnostics came after the bound was reached.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// How many were recorded, kept or not.
    pub fn recorded(&self) -> u64 {
        let kept = self.lock();
        kept.dropped.saturating_add(kept.list.len() as u64)
    }

    /// A copy of those kept, oldest first.
    pub fn list(&self) -> Vec<Diagnostic> {
        self.lock().list.clone()
    }
}

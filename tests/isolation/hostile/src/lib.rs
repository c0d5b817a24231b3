//! What a test and the hostile program in a monitoring VM say to each other:
//! one JSON document a line, each way, over the port that a monitor's client
//! would use.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What the program is told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Command {
    /// Comes back in the report.
    pub number: u64,
    /// The attempt's name.
    pub attempt: String,
    /// What the attempt needs to know.
    pub argument: Value,
}

/// What came of an attempt, as its maker sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// How often it was tried, in this or that variant.
    pub tries: u64,
    /// What was seen in the VM; empty if nothing speaks for success.
    pub successes: Vec<String>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

impl Report {
    /// Nothing tried yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tries: 0,
            successes: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Counts a try, and remembers what it reached if it was not denied.
    pub fn tried(&mut self, denied: bool, what: impl FnOnce() -> String) {
        self.tries += 1;
        if !denied && self.successes.len() < 20 {
            self.successes.push(what());
        }
    }

    /// Adds a note.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

/// The program's line about an attempt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// That of the command.
    pub number: u64,
    /// How far it is.
    pub progress: Progress,
}

/// How far an attempt is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Progress {
    /// It is about to begin: nothing else is said until it is done.
    Begins,
    /// What came of it.
    Done(Report),
    /// Why it could not be made. That is no denial: it fails the test.
    Failed(String),
}

/// What ends an attempt that goes on until it is told to stop: bytes that the
/// program looks for in all that it hears.
pub const STOP: &[u8; 25] = b"\nhostile program, stop!!\n";

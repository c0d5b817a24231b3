//! What walks over the kernel's trees have in common: what can be wrong with
//! one, and how a walk is repeated until a running guest has let it be.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use secmon_memory::{AddressSpace, ReadError, VirtualAddress, Volatility};

use crate::{Diagnostic, Diagnostics, Guest};

/// How often a tree is walked before its walk is taken as it is.
const ATTEMPTS: u32 = 12;
/// From this attempt on the processor is yielded: the virtual CPU that is
/// half-way through an update may be waiting for it.
const YIELD_FROM: u32 = 3;
/// How many errors of one walk are kept; a hostile tree can hold any number.
const ERROR_LIMIT: usize = 64;

/// Something wrong in a tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A node could not be read.
    #[error("the node at {node} can't be read: {source}")]
    Read {
        /// The node.
        node: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
    /// A link leads where no node can be.
    #[error("a link of the node at {node} holds {found}, which is no address of a node")]
    Wild {
        /// The node whose link it is.
        node: VirtualAddress,
        /// What it holds.
        found: VirtualAddress,
    },
    /// A child that names another parent.
    #[error("{node} leads to {child}, whose parent is {found}")]
    Parent {
        /// The node that was left.
        node: VirtualAddress,
        /// Its child.
        child: VirtualAddress,
        /// The child's parent by its own account.
        found: VirtualAddress,
    },
    /// A node that no tree has.
    #[error("the node at {node} is damaged: {reason}")]
    Shape {
        /// The node.
        node: VirtualAddress,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A node that is in the tree twice.
    #[error("the tree leads to the node at {node} twice")]
    Twice {
        /// The node.
        node: VirtualAddress,
    },
    /// More levels than such a tree can have.
    #[error("the tree has more than {limit} levels at {node}")]
    TooDeep {
        /// Where the walk turned back.
        node: VirtualAddress,
        /// The bound.
        limit: usize,
    },
    /// More entries than are read.
    #[error("the tree has more than {limit} entries")]
    TooLong {
        /// The bound.
        limit: usize,
    },
    /// Two walks in a row never gave the same.
    #[error("the tree changed during each of {attempts} walks")]
    Changing {
        /// How often it was walked.
        attempts: u32,
    },
}

impl TreeError {
    /// The address that a diagnostic should name.
    pub fn address(&self) -> Option<VirtualAddress> {
        match self {
            Self::Read { node, .. }
            | Self::Wild { node, .. }
            | Self::Parent { node, .. }
            | Self::Shape { node, .. }
            | Self::Twice { node }
            | Self::TooDeep { node, .. } => Some(*node),
            Self::TooLong { .. } | Self::Changing { .. } => None,
        }
    }
}

/// How long a listing waits, altogether, for a guest to finish what it is
/// changing. A virtual CPU that was stopped half-way takes as long as its host
/// likes; a guest that never finishes must not hold the reader up.
const PATIENCE: Duration = Duration::from_millis(400);

/// The waiting of one listing between two reads of something that changes.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    waited_microseconds: AtomicU64,
}

impl Patience {
    /// Waits before the `attempt`-th repetition of a read: not at all at
    /// first, then longer and longer, until the listing has waited enough.
    pub(crate) fn wait(&self, attempt: usize) {
        let steps = attempt.saturating_sub(2).min(7) as u32;
        let pause = Duration::from_micros(100) * 2_u32.pow(steps);
        let waited = Duration::from_micros(self.waited_microseconds.load(Relaxed));
        if attempt < 2 || waited + pause > PATIENCE {
            std::thread::yield_now();
            return;
        }
        let microseconds = pause.as_micros() as u64;
        self.waited_microseconds.fetch_add(microseconds, Relaxed);
        std::thread::sleep(pause);
    }
}

/// What a walk over a tree found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk<T> {
    /// The entries, in the tree's order.
    pub items: Vec<T>,
    /// What could not be followed: each may hide entries. Bounded; the rest
    /// is dropped.
    pub errors: Vec<TreeError>,
}

impl<T> Default for Walk<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            errors: Vec::new(),
        }
    }
}

impl<T> Walk<T> {
    /// Keeps an error.
    pub(crate) fn fail(&mut self, error: TreeError) {
        if self.errors.len() < ERROR_LIMIT {
            self.errors.push(error);
        }
    }

    /// The same walk over other entries.
    pub(crate) fn map<U>(self, entry: impl FnMut(T) -> U) -> Walk<U> {
        Walk {
            items: self.items.into_iter().map(entry).collect(),
            errors: self.errors,
        }
    }

    /// The entries, after all errors became diagnostics of `table` about
    /// `subject`.
    pub fn report(self, guest: &Guest, table: &'static str, subject: &str) -> Vec<T> {
        for error in &self.errors {
            guest.diagnostics().record(Diagnostic {
                table,
                subject: subject.to_owned(),
                address: error.address(),
                reason: format!("entries may be missing: {error}"),
            });
        }
        self.items
    }
}

/// Repeats a walk over memory that changes until two in a row agree and found
/// nothing wrong. An image is walked once.
///
/// Agreement is what a lockless reader can have: a rotation or a node split
/// behind the walk's back can hide entries without leaving a trace in what
/// was read.
pub(crate) fn settle<T: PartialEq>(
    space: &AddressSpace,
    diagnostics: &Diagnostics,
    mut walk: impl FnMut() -> Walk<T>,
) -> Walk<T> {
    let mut last = walk();
    if space.memory().volatility() == Volatility::Static {
        return last;
    }
    let mut agreed = false;
    for attempt in 1..ATTEMPTS {
        let again = walk();
        agreed = again == last;
        last = again;
        if agreed && last.errors.is_empty() {
            return last;
        }
        diagnostics.count_torn_read();
        if attempt >= YIELD_FROM {
            std::thread::yield_now();
        }
    }
    if !agreed {
        last.fail(TreeError::Changing { attempts: ATTEMPTS });
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends() {
        let patience = Patience::default();
        for attempt in 0..10_000 {
            patience.wait(attempt);
        }
        let waited = Duration::from_micros(patience.waited_microseconds.load(Relaxed));
        assert!(waited <= PATIENCE);
        assert!(waited > PATIENCE / 2);
    }
}

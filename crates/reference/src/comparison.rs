//! What comes out of a comparison, and what was compared.

use std::ops::Range;

/// Bytes that nothing explains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where they start.
    pub address: u64,
    /// The section that they lie in.
    pub section: String,
    /// What should be there.
    pub expected: Vec<u8>,
    /// What is there.
    pub found: Vec<u8>,
    /// What kind of difference it is.
    pub kind: DifferenceKind,
}

/// What is wrong with bytes that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// The kernel has no reason to change them.
    Unexplained,
    /// A jump label that says something else than its key.
    JumpLabel,
    /// A static call that leads elsewhere than its key.
    StaticCall,
    /// A call at a place for tracing that is none for tracing.
    Trace,
}

/// What came out of a comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// What nothing explains.
    pub differences: Vec<Difference>,
    /// How many more there are than are told.
    pub dropped: usize,
    /// How many bytes were compared.
    pub compared: u64,
    /// Addresses that could not be read.
    pub unread: Vec<Range<u64>>,
}

/// Where what is expected is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The kernel's own file.
    File,
    /// The kernel itself, when it was first looked at.
    FirstState {
        /// When that was, in seconds since 1970-01-01T00:00:00Z.
        taken: u64,
    },
}

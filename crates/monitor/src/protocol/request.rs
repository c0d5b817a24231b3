//! What a client says.

use serde::{Deserialize, Serialize};

use super::Check;

/// A message to the monitor. `id` is the client's number for the request;
/// replies carry it, and it may be used again once the request has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Rows of a table. Ends with [`Reply::End`](super::Reply::End) or
    /// [`Reply::Refused`](super::Reply::Refused).
    Query {
        /// The request's number.
        id: u32,
        /// Which rows.
        query: Query,
    },
    /// This many more messages of rows or bytes may be sent for a request.
    Credit {
        /// The request's number.
        id: u32,
        /// How many.
        messages: u32,
    },
    /// Nothing more is wanted of a request. It still ends with
    /// [`Reply::End`](super::Reply::End).
    Cancel {
        /// The request's number.
        id: u32,
    },
    /// Bytes of a target's memory, as [`Reply::Bytes`](super::Reply::Bytes).
    Read {
        /// The request's number.
        id: u32,
        /// The target's name.
        target: String,
        /// Where they begin.
        place: Place,
        /// How many; at most [`READ_LIMIT`](super::READ_LIMIT).
        length: u64,
        /// Messages of bytes that may be sent at once.
        credit: u32,
    },
    /// How addresses are translated, each as a
    /// [`Reply::Walk`](super::Reply::Walk).
    Translate {
        /// The request's number.
        id: u32,
        /// The target's name.
        target: String,
        /// The addresses.
        places: Vec<Place>,
    },
    /// The targets, as [`Reply::Targets`](super::Reply::Targets).
    Targets {
        /// The request's number.
        id: u32,
    },
    /// The tables that the monitor knows, as
    /// [`Reply::Tables`](super::Reply::Tables).
    Tables {
        /// The request's number.
        id: u32,
    },
    /// How the monitor is, as [`Reply::Status`](super::Reply::Status).
    Status {
        /// The request's number.
        id: u32,
    },
    /// Findings up to this sequence number have been taken: the monitor
    /// forgets them. Until then they are sent again on each connection.
    Acknowledge {
        /// The sequence number of the last finding taken.
        through: u64,
    },
    /// What detectors find in a target: [`Reply::Looked`](super::Reply::Looked),
    /// then each finding as [`Reply::Found`](super::Reply::Found).
    Check {
        /// The request's number.
        id: u32,
        /// Which of them, where.
        check: Check,
    },
}

/// Which rows and columns of which table of which target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// The target's name.
    pub target: String,
    /// The table's name or alias.
    pub table: String,
    /// The names of the columns wanted, in their order; `None`: all.
    pub columns: Option<Vec<String>>,
    /// Only rows of these processes, where rows have one.
    pub pids: Option<Vec<u64>>,
    /// Rows of all namespaces, where the table shows the initial one else.
    pub all_namespaces: bool,
    /// Stop after this many rows.
    pub limit: Option<u64>,
    /// Messages of rows that may be sent at once.
    pub credit: u32,
    /// Whether the target stands still while it is read.
    pub pause: Pause,
}

/// Whether a target stands still while it is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pause {
    /// It goes on, and rows are sent as they are read.
    #[default]
    None,
    /// It is held still, through its gate, until all rows are read; then they
    /// are sent.
    WhileRead,
}

/// A place in a target's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// A kernel symbol and a distance from it.
    Symbol {
        /// The symbol's name.
        name: String,
        /// Bytes from it on.
        offset: i64,
    },
    /// A virtual address of the kernel.
    Kernel(u64),
    /// A virtual address of a process.
    Process {
        /// Its id in the initial namespace.
        pid: u64,
        /// The address.
        address: u64,
    },
    /// A guest physical address.
    Physical(u64),
}

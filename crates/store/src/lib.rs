//! Findings and events in an SQLite database, so that they outlive the watch:
//! its end, a `kill -9`, and a disk that is full for a while.
//!
//! Each event is a transaction of its own, on the disk before [`Keeper::take`]
//! says that it is kept. What can't be written waits in memory, a bounded
//! number, until there is room again; what is more is lost, and counted.
//!
//! It is no part of the monitoring VM: there findings wait in an outbox until
//! somebody who has a store takes them.
#![forbid(unsafe_code)]

mod database;
mod keeper;

pub use database::{Query, StateFilter, Store, StoreError, StoredEvent, StoredFinding};
pub use keeper::{Keeper, Kept};

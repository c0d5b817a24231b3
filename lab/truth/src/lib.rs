//! What a lab guest says about itself: the requests, the replies and the
//! rows, shared by the agent inside the guest (this crate's binary) and the
//! lab library on the host, so that neither can misread the other.
//!
//! This library holds data types only. It opens nothing and runs nowhere in
//! production: no crate of the product depends on it.

#![forbid(unsafe_code)]

mod byte_string;
mod protocol;
mod rows;
mod workload;

pub use byte_string::ByteString;
pub use protocol::{PORT_NAME, READY_MARK, Reply, Request, Section, Work};
pub use rows::*;
pub use workload::Workload;

//! What the tables say, compared with what real guests say of themselves.
//!
//! [`compare`] has a file for each table: what its rows should be, made from
//! the guest's own truth. [`rows`] holds the comparison itself.
#![forbid(unsafe_code)]

pub mod btf;
pub mod compare;
pub mod detection;
pub mod detector_flips;
pub mod document;
pub mod edits;
pub mod flips;
pub mod images;
pub mod memory_edits;
pub mod monitored;
pub mod open;
pub mod rows;

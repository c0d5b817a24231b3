//! Starting a monitoring VM on a host, watching over it, and ending it.

pub mod account;
pub mod command_line;
mod name;
pub mod process;
pub mod read_access;
pub mod starter;

pub use name::{MonitorName, NameError};

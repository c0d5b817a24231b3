//! Starting a monitoring VM on a host, watching over it, and ending it.

pub mod account;
pub mod command_line;
pub mod console;
pub mod emulator;
pub mod hotplug;
mod name;
pub mod process;
pub mod read_access;
pub mod run_directory;
pub mod starter;
pub mod state;
pub mod target;

pub use name::{MonitorName, NameError};

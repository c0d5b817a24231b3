//! Starting a monitoring VM on a host, watching over it, and ending it.

mod name;

pub use name::{MonitorName, NameError};

//! Monitors and targets under libvirt: a target's domain definition changed so
//! that its RAM is shared, and a definition for the monitoring VM itself.

mod convert;
mod domain;

pub use convert::{Conversion, ConvertError, convert};
pub use domain::{MonitorDomain, TargetRam};

//! Where a target's physical memory comes from: running QEMU processes, shared
//! RAM files, memory images, devices of the monitoring VM.
//!
//! It knows hypervisors and file formats, and nothing of guests.

#![forbid(unsafe_code)]

pub mod image;
pub mod ivshmem;
pub mod layout;
pub mod qemu;
mod shared;
pub mod target;

pub use shared::SharedRam;

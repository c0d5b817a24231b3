//! Boots real Linux kernels in a real hypervisor, for tests, the demo and
//! benchmarks, and asks the guest for its own truth.
//!
//! ```no_run
//! use secmon_lab::{Guest, Suite};
//!
//! let guest = Guest::builder(Suite::Trixie).memory_mib(512).boot()?;
//! let processes = guest.truth().processes()?;
//! assert!(processes.iter().any(|process| process.pid == 1));
//! # Ok::<(), anyhow::Error>(())
//! ```
//!
//! A guest is a kernel from Debian's archive (fetched once, kept in the
//! user's cache folder), an initramfs whose process 1 is `secmon-truth`, and
//! a QEMU that dies with this process however this process ends. KVM is used
//! only when a guest really boots with it, which is tried once.
//!
//! Nothing here belongs to the product: no crate under `crates/` depends on
//! it, except for tests.

#![deny(unsafe_code)]

mod acceleration;
mod agent;
mod builder;
mod cache;
mod debug_image;
mod emulator;
mod guest;
mod image;
mod initramfs;
mod kernel;
mod monitor;
pub mod qmp;
mod spawn;
pub mod specimens;
mod suite;
mod tools;
mod truth_channel;

/// The rows of a guest's truth and the requests it answers.
pub use secmon_truth as truth;

pub use acceleration::Acceleration;
pub use agent::{static_binary, static_secmon};
pub use builder::{Backing, GuestBuilder, Machine, Paging, Prepared, QmpAccess};
pub use debug_image::debug_image;
pub use emulator::Emulator;
pub use guest::Guest;
pub use image::{Truth, write_image};
pub use kernel::Kernel;
pub use monitor::{MONITOR_MEMORY_MIB, MonitorVm, WatchedRam, appliance_image, build_appliance};
pub use secmon_truth::{ByteString, Work, Workload};
pub use suite::Suite;
pub use truth_channel::TruthChannel;

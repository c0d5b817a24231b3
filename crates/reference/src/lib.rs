//! A kernel's own file (`vmlinuz`, `vmlinux`), and what its text and constants
//! have to look like once it runs.
//!
//! A kernel changes its text: it is moved (KASLR), fits itself to its processor
//! and hypervisor while it starts, and writes jump labels, static calls and
//! places for tracing anew while it runs. The file says where all these places
//! are; [`Expected`] works out what each has to hold, and compares. No byte is
//! passed over because it lies in such a place: it has to hold one of the
//! forms that the kernel gives it.
//!
//! Nothing here knows how a guest is read: see [`Running`] and [`Patches`].
#![forbid(unsafe_code)]

mod boot;
mod boot_image;
mod error;
mod expected;
mod image;
mod instructions;
mod kernel_file;
mod records;
mod running;

pub use error::ReferenceError;
pub use expected::{Comparison, Difference, DifferenceKind, Expected};
pub use image::Part;
pub use kernel_file::{KernelFile, Relocations, Section};
pub use running::{Patches, Running};

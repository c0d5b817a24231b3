//! Executable memory of the kernel and who owns it.
//!
//! The kernel's page tables say what can be executed; the kernel's own records
//! say what each piece is for: its image, its modules' parts, compiled BPF
//! programs, trampolines of ftrace, slots of kprobes. [`CodeMap`] holds both
//! against each other. It knows no verdict: that a piece has no owner is a
//! fact here, and a finding elsewhere.

pub mod generated;
pub mod image;
mod map;
mod owner;
mod running;
mod sightings;
pub mod vmalloc;

pub use map::{CodeMap, Incomplete, UnownedCode};
pub use owner::{Claims, CodeOwner};
pub use running::RunningKernel;
pub(crate) use sightings::Sightings;

//! A kernel's own file (`vmlinuz`, `vmlinux`), or the state in which it was
//! first seen, and what its text and constants have to look like as it runs.
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
mod comparison;
mod error;
mod expected;
mod first_state;
mod image;
mod instructions;
mod kernel_file;
mod package;
mod records;
mod rules;
mod running;
mod stored;

pub use comparison::{Comparison, Difference, DifferenceKind, Origin};
pub use error::ReferenceError;
pub use expected::Expected;
pub use first_state::{FirstState, Piece};
pub use image::Part;
pub use kernel_file::{KernelFile, Relocations, Section};
pub use running::{Kernel, Patches, Running};
pub use stored::{BootId, StoredError};

/// Parsers that a digest guards, for fuzzing.
#[doc(hidden)]
pub mod fuzzing {
    /// The body of a kept first state.
    pub fn first_state(body: &[u8]) {
        crate::stored::parse_any(body);
    }
}

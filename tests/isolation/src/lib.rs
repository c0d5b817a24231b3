//! Trying to break out of a monitoring VM, and to break one from inside a
//! target.
//!
//! [`attempts`] lists what is tried and what denies it; `SECURITY.md` shows the
//! same list, and the tests make sure that it does and that each entry was
//! tried. [`HostileVm`] is a monitoring VM that the launcher started, with the
//! program of `hostile/` in secmon's place.

#![forbid(unsafe_code)]

pub mod attempts;
mod hostile_vm;
pub mod lies;

pub use hostile_vm::HostileVm;

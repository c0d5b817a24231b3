//! Attacks on a monitoring VM during its life.
//!
//! [`attacks`] lists them: who makes them, how, and what notices them.
//! [`Suite`] makes them on a real monitor and measures how long that takes;
//! `SECURITY.md` shows the list, and a test makes sure that it does.
#![forbid(unsafe_code)]

pub mod attacks;
mod suite;
mod victim;

pub use suite::{Measured, Suite};
pub use victim::Victim;

//! The gate: the small host process that hands a monitor exactly the rights
//! over one target that it was granted, and logs every use.
//!
//! A gate is three processes of one user:
//!
//! - the [supervisor], which somebody starts and which hears nobody;
//! - the [gate], which holds the target's QMP and gdbstub connections, listens
//!   to monitors over authenticated channels, and is sandboxed;
//! - the [keeper], which lets the target run again when the gate dies.
//!
//! Any of them may be killed at any moment: the target goes on running within
//! a second, and the others are started again or end.
//!
//! What a monitor may is in a [grant file](grants); what it can ask is in
//! [`protocol`]; each use is in the [log]. The crate knows QEMU's control
//! channels and nothing of what is in a guest.

#![forbid(unsafe_code)]

pub mod client;
pub mod configuration;
mod descriptors;
pub mod gate;
pub mod gdb;
pub mod grants;
mod hex;
pub mod keeper;
pub mod log;
pub mod network;
pub mod protocol;
mod rate;
pub mod sandbox;
mod service;
mod signals;
mod steward;
pub mod supervisor;
mod target;

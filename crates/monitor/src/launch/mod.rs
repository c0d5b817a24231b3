//! Starting a monitoring VM on a host, watching over it, and ending it.
//!
//! [`up`](up::up) checks the targets, makes the monitor's
//! [folder](run_directory) with its keys and starts the
//! [supervisor](supervisor::supervise), a process of its own. The supervisor
//! starts QEMU through the [starter], which gives up every right but
//! reading the targets' RAM files, and [plugs](hotplug) that RAM in. Beside it
//! it keeps a [gate](gates) for each target that has a QMP socket.
//! [`connect()`](connect::connect) talks to the monitor inside.

pub mod account;
mod acl;
pub mod command_line;
pub mod connect;
pub mod console;
pub mod emulator;
mod files;
pub mod gate_starter;
pub mod gates;
pub mod guarded;
pub mod hotplug;
pub mod libvirt;
mod name;
pub mod process;
pub mod read_access;
pub mod run_directory;
pub mod starter;
pub mod state;
pub mod status;
pub mod supervisor;
pub mod target;
pub mod up;

pub use name::{MonitorName, NameError};

/// The hidden command by which `secmon` becomes a monitor's QEMU, with the
/// plan's file as its argument.
pub const START_COMMAND: &str = "__monitor-start";

/// The hidden command by which `secmon` becomes a monitor's supervisor, with
/// the monitor's name as its argument.
pub const SUPERVISE_COMMAND: &str = "__monitor-supervise";

/// The hidden command by which `secmon` becomes the supervisor of a target's
/// gate, with the plan's file as its argument.
pub const GATE_COMMAND: &str = "__monitor-gate";

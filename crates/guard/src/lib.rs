//! The guard: looks at a monitoring VM's memory from outside, again and again,
//! and says whether it is what its image makes of it.
//!
//! What is known beforehand is the [`Reference`]: the kernel's file, the
//! program, the modules and the configuration. [`Guard::round`] compares with
//! it, by bytes, what the VM's processor can run: the kernel's text and
//! constants, the interrupt table, every executable page of every address
//! space, the program's pages; and which processes there are. Beside that each
//! round lets one of the detectors of `secmon-detect` look.
//!
//! How the memory is reached, whether the monitor answers, and what is done
//! about a finding is not known here.
#![forbid(unsafe_code)]

mod changes;
mod configuration;
mod finding;
mod guard;
mod kernel;
mod ledger;
mod pages;
mod processes;
mod program;
mod reference;
mod settings;

pub use finding::{Finding, Kind};
pub use guard::{Guard, GuardError, Round};
pub use ledger::{Change, Ledger};
pub use program::{Program, ProgramError};
pub use reference::{ImageError, Reference};

/// The name under which the guest's walks tell what they could not read.
const TABLE: &str = "guard";

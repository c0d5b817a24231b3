//! Running QEMU processes as targets: found, told apart, their guest's RAM
//! located and read, without any option that they would have to be started
//! with, and without their help where there is no QMP.
//!
//! What lies between 0xa0000 and 0xfffff needs a word: the guest sees video
//! memory, option ROMs and firmware there; RAM lies beneath. Reads return the
//! RAM. On QEMU's machines the firmware's "shadow" copy is in that RAM too, so
//! that with SeaBIOS both are the same from 0xc0000 on once it has run; video
//! memory is never returned. The SMRAM at 0xa0000 (only visible in system
//! management mode) is the RAM beneath.

mod command_line;
mod discovery;
mod locate;
mod memory;
mod open;
pub mod pause;
mod process;
mod qmp;
mod ram_file;

pub use command_line::{CommandLine, MemoryBackend, MonitorSocket};
pub use discovery::{Discovery, Monitor, QemuProcess, Reach, SkipReason, Skipped, discover};
pub use memory::{HostRegion, ProcessMemory, ReadRequest};
pub use open::{
    Access, LayoutSource, QemuError, QemuOptions, QemuTarget, QmpUse, Selector, find, open,
    open_process,
};
pub use pause::{Pause, PauseError, PauseMethod};
pub use process::ProcessId;
pub use qmp::{DEFAULT_TIMEOUT, QemuDescriptor, QmpClient, QmpError, RamBlock, RunState};
pub use ram_file::{RamFile, RamFileError, RamFileKind};

#[cfg(test)]
#[path = "../../tests/machine/mod.rs"]
mod machine;

//! x
pub mod gdb;
pub mod grants;
pub mod hex;
pub mod log;
pub mod protocol;

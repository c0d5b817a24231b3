//! x
pub mod grants;
pub mod hex;
pub mod log;
pub mod protocol;

//! What the measurements share: the image that they are made on.
#![forbid(unsafe_code)]

pub mod image;
pub mod process;
pub mod watch;

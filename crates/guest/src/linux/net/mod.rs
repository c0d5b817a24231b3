//! The network: namespaces, interfaces and sockets.

pub mod address;
pub mod detail;
pub mod device;
mod interfaces;
pub mod namespace;
pub mod sock;
pub mod socket;
mod sockets;
pub mod tables;
pub mod vsock;

pub use interfaces::INTERFACES;
pub use sockets::SOCKETS;

//! The monitoring VM: what it is built of, what runs inside of it, and what
//! starts it beside a target.
//!
//! The crate knows how a monitor is made, placed and asked. What a guest's
//! memory means is known by `secmon-guest`; which operation a monitor may do
//! to a target is known by `secmon-gate`.
#![forbid(unsafe_code)]

pub mod appliance;
pub mod inside;
pub mod launch;
pub mod protocol;

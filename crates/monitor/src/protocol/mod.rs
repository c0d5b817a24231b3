//! What a client on the host and the monitor inside of its VM say to each
//! other, over a channel ([`secmon_channel`]) on the port [`CHANNEL_PORT`];
//! and the configuration that the monitor starts with.
//!
//! The client says [`Request`]s, each with a number that it chooses, and gets
//! [`Reply`]s that name that number. Heartbeats and findings come unasked.
//! Types only, and the client's side of the conversation ([`Client`]).
//!
//! **Back-pressure**: the monitor sends no more messages of rows for a query
//! than the client has given credit for ([`Query::credit`],
//! [`Request::Credit`]), so that a client that stops reading stops its own
//! queries, and neither heartbeats nor findings.
//!
//! **No type here contains itself**: a message nests no deeper than its type,
//! whoever wrote it.

mod cell;
mod check;
mod client;
mod configuration;
mod reply;
mod request;

use secmon_channel::Role;

pub use cell::{Cell, Scalar};
pub use check::{Check, CheckEvidence, CheckFinding, DetectorResult, results};
pub use client::{Answer, Client, ClientError, Notice};
pub use configuration::{
    Configuration, ConfigurationError, GateConfiguration, Limits, TargetConfiguration,
};
pub use reply::{
    ColumnDescription, DiagnosticEntry, End, Finding, FindingKind, GateReport, Heartbeat, Refusal,
    Reply, Severity, StatusReport, TableDescription, TargetReport, TargetState, WalkEnd, WalkEntry,
};
pub use request::{Pause, Place, Query, Request};

/// What is spoken between a client and a monitor.
pub const ROLE: Role = Role {
    name: "monitor",
    version: 2,
};

/// The virtio-serial port by which clients reach the monitor; QEMU connects
/// one client at a time to a port.
pub const CHANNEL_PORT: &str = "org.secmon.channel";

/// The ports of a monitor that the launcher starts: as many clients can ask it
/// at once.
pub const CHANNELS: u32 = 4;

/// The name of the port of a channel, of which the first has the number 0.
#[must_use]
pub fn channel_port(number: u32) -> String {
    match number {
        0 => CHANNEL_PORT.to_owned(),
        number => format!("{CHANNEL_PORT}.{number}"),
    }
}

/// The name in QEMU's fw_cfg under which the monitor finds its configuration.
pub const CONFIGURATION_NAME: &str = "opt/secmon/configuration";

/// The bound of a message to the monitor.
pub const REQUEST_LIMIT: usize = 64 << 10;

/// The bound of a message from the monitor.
pub const REPLY_LIMIT: usize = 1 << 20;

/// The most bytes that one [`Request::Read`] may ask for.
pub const READ_LIMIT: u64 = 1 << 30;

//! Sends events of a watch to others: [`syslog`] (RFC 5424) and [`otlp`]
//! (OpenTelemetry logs over HTTP).
//!
//! Each is an [`Exporter`]: [`take`](secmon_watch::Sink::take) puts an event
//! into a bounded queue and never waits; a thread sends, connects again with
//! growing waits, and counts what it can't keep. A process that confines itself
//! makes its exporters before: their threads keep the right to connect.
//!
//! Nothing is received here but answers, and nothing of a guest is parsed.

#![forbid(unsafe_code)]

mod level;
pub mod otlp;
mod queue;
pub mod syslog;
mod text;

pub use queue::{Bounds, Exporter};

//! Watching a guest all the time: which detectors look when, what of their
//! findings is new, and what is to be done about it.
//!
//! A [`Policy`] is the user's word: detectors, thresholds, exceptions,
//! responses. What comes out is a stream of [`Event`]s, each of which goes to
//! every [`Sink`]; what the policy wants done goes to a [`Responder`]. Nothing
//! here opens a file, speaks to a network or knows a hypervisor: sinks and
//! responders do.
#![forbid(unsafe_code)]

mod action;
mod changes;
mod coverage;
mod engine;
mod event;
pub mod policy;
mod reaction;
mod record;
mod schedule;
mod sink;

pub use action::{Action, Done, Refused, Responder};
pub use engine::{Stop, Watched, watch};
pub use event::{Event, Incident, Tally, TargetChange};
pub use policy::{Policy, PolicyError};
pub use reaction::{Reactions, Tell};
pub use record::{EvidenceRecord, FindingRecord, ProcessSubject};
pub use sink::{Sink, SinkError};

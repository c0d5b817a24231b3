//! OpenTelemetry logs: OTLP 1 over HTTP, as JSON (the protocol's specification,
//! "OTLP/HTTP"; `opentelemetry/proto/logs/v1/logs.proto`).
//!
//! A collector confirms each request. What it refuses for good is counted and
//! told; what it can't take now is sent again, after as long as it says. A
//! request whose answer got lost is sent again, so a collector may see an event
//! twice: `secmon.sequence` tells them.

mod http;
mod record;

use std::path::PathBuf;

use crate::{Bounds, Exporter};
use http::{Http, Setup};
use record::Recorder;

/// The port of OTLP/HTTP.
pub const PORT: u16 = 4318;

/// Where a collector is.
#[derive(Clone, Debug, Default)]
pub struct Collector {
    /// Its address, `http://HOST:4318` or `https://…`; `/v1/logs` is added to
    /// it where it does not end so.
    pub endpoint: String,
    /// Headers that it wants, for instance to know who asks.
    pub headers: Vec<(String, String)>,
    /// PEM certificates of the authorities that may vouch for it; else the
    /// public ones of the Web.
    pub authorities: Option<PathBuf>,
}

/// Why a collector can't be sent to, whether it is there or not.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    /// Its address is none.
    #[error("{0:?} is no collector's address: write http://HOST:4318 or https://HOST:4318")]
    Endpoint(String),
    /// A header can't be sent.
    #[error("{0:?} can't be the name or value of an HTTP header")]
    Header(String),
    /// The certificates can't be read.
    #[error("the certificates in {path}: {reason}")]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// No thread can be started.
    #[error("starting a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// Starts a sink that sends to a collector. The collector need not be there
/// yet. No proxy is used.
///
/// # Errors
/// [`CollectorError`].
pub fn start(collector: &Collector, bounds: Bounds) -> Result<Exporter, CollectorError> {
    let setup = Setup::new(collector)?;
    let name = format!("collector {}", collector.endpoint);
    let transport = Http::new(setup);
    let exporter = Exporter::start(name, bounds, Box::new(Recorder), transport)?;
    Ok(exporter)
}

//! Where events go.

use crate::Event;

/// Takes events: a terminal, a file, a database, a collector.
pub trait Sink: Send {
    /// Takes one event.
    ///
    /// # Errors
    /// [`SinkError`] if it could not be kept or sent. The sink says itself
    /// whether it keeps the event to try again.
    fn take(&mut self, event: &Event) -> Result<(), SinkError>;

    /// Called now and then when there is no event: what waits can be sent.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    fn idle(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
}

/// Why a sink could not take an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SinkError {
    /// It keeps the event and tries again.
    #[error("{sink}: {reason}; {waiting} events wait")]
    Delayed {
        /// The sink, and where it leads.
        sink: String,
        /// Why.
        reason: String,
        /// How many events wait with it.
        waiting: usize,
    },
    /// Events are lost to it.
    #[error("{sink}: {reason}; {lost} events were lost")]
    Lost {
        /// The sink, and where it leads.
        sink: String,
        /// Why.
        reason: String,
        /// How many, since it last said so.
        lost: u64,
    },
}

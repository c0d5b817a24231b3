//! The monitor's end of a session with a gate.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_channel::{ChannelError, KeyPair, PublicKey, Session, Stream};

use crate::protocol::{Answer, Event, Message, Query, ROLE, Refusal, Request};

/// Events kept until somebody asks for them.
const MAX_EVENTS: usize = 1024;

/// A session with a gate.
///
/// A monitor that holds something (a pause, a breakpoint) has to be heard of
/// more often than its grant's `silence_milliseconds` say, by any request, for
/// instance [`Request::Heartbeat`]; any other one every ten seconds.
#[derive(Debug)]
pub struct GateClient {
    session: Session,
    next: u64,
    events: VecDeque<Event>,
    lost: u64,
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The gate refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The session is over, or did not begin.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

impl GateClient {
    /// Begins a session with the gate that holds `gate`.
    ///
    /// # Errors
    /// [`ClientError::Channel`].
    pub fn connect(
        stream: &Arc<dyn Stream>,
        own: &KeyPair,
        gate: &PublicKey,
        patience: Duration,
    ) -> Result<Self, ClientError> {
        let deadline = Some(Instant::now() + patience);
        let session = Session::initiate(stream, own, gate, ROLE, deadline)?;
        Ok(Self {
            session,
            next: 0,
            events: VecDeque::new(),
            lost: 0,
        })
    }

    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    /// [`ClientError`]; after a channel's error the session is over.
    pub fn ask(&mut self, request: Request, patience: Duration) -> Result<Answer, ClientError> {
        let deadline = Some(Instant::now() + patience);
        self.next += 1;
        let id = self.next;
        self.session.send(&Query { id, request }, deadline)?;
        loop {
            match self.session.receive(deadline)? {
                Message::Answer { id: other, result } if other == id => return Ok(result?),
                // Of a request whose answer was not waited for.
                Message::Answer { .. } => {}
                Message::Event(event) => self.keep(event),
            }
        }
    }

    /// The next event; `None` if none comes in time.
    ///
    /// # Errors
    /// [`ClientError::Channel`] if the session is over.
    pub fn event(&mut self, patience: Duration) -> Result<Option<Event>, ClientError> {
        let deadline = Some(Instant::now() + patience);
        loop {
            if self.lost > 0 && self.events.is_empty() {
                return Ok(Some(Event::Lost(std::mem::take(&mut self.lost))));
            }
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.session.receive(deadline) {
                Ok(Message::Event(event)) => self.keep(event),
                Ok(Message::Answer { .. }) => {}
                Err(ChannelError::Deadline { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.events.len() < MAX_EVENTS {
            self.events.push_back(event);
        } else {
            self.lost += 1;
        }
    }
}

//! A conversation between two parties that have shown who they are.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::CONFIRM;
use crate::handshake::{self, Established};
use crate::{ChannelError, DEFAULT_LIMIT, KeyPair, Peer, PublicKey, Reader, Stream, Writer};

/// What a conversation is about. Both sides must mean the same: a handshake
/// for one role does not decrypt in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Role {
    /// The word for it.
    pub name: &'static str,
    /// The version of its messages.
    pub version: u16,
}

/// An authenticated, encrypted conversation over a [`Stream`].
pub struct Session {
    reader: Reader,
    writer: Writer,
    discarded: u64,
}

impl fmt::Debug for Session {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    /// Begins a conversation with the party that holds `peer`.
    ///
    /// # Errors
    /// If it is refused, does not come about before the deadline, or the
    /// stream fails.
    pub fn initiate(
        stream: &Arc<dyn Stream>,
        own: &KeyPair,
        peer: &PublicKey,
        role: Role,
        deadline: Option<Instant>,
    ) -> Result<Self, ChannelError> {
        let established = handshake::initiate(&**stream, own, peer, role, deadline)?;
        let mut session = Self::new(stream, established);
        session.writer.frame(CONFIRM, &[], deadline)?;
        Ok(session)
    }

    /// Waits for one of `peers` to begin a conversation, and says which.
    ///
    /// After an error other than the stream's own, the next call finds the
    /// next hello on the same stream.
    ///
    /// # Errors
    /// If the hello is not one of `peers`', not for this role or version, not
    /// followed by the proof of its key, or does not come before the deadline.
    pub fn accept(
        stream: &Arc<dyn Stream>,
        own: &KeyPair,
        peers: &[Peer],
        role: Role,
        deadline: Option<Instant>,
    ) -> Result<(Self, Peer), ChannelError> {
        let (established, peer, deadline) =
            handshake::accept(&**stream, own, peers, role, deadline)?;
        let mut session = Self::new(stream, established);
        session.reader.confirm(deadline)?;
        Ok((session, peer))
    }

    fn new(stream: &Arc<dyn Stream>, established: Established) -> Self {
        let Established { cipher, discarded } = established;
        Self {
            reader: Reader::new(Arc::clone(stream), Arc::clone(&cipher), DEFAULT_LIMIT),
            writer: Writer::new(Arc::clone(stream), cipher, DEFAULT_LIMIT),
            discarded,
        }
    }

    /// Bounds messages to `received` and `sent` bytes.
    #[must_use]
    pub fn with_limits(mut self, received: usize, sent: usize) -> Self {
        self.reader.set_limit(received);
        self.writer.set_limit(sent);
        self
    }

    /// How many bytes of earlier connections were thrown away before this one.
    #[must_use]
    pub fn discarded(&self) -> u64 {
        self.discarded
    }

    /// Sends a message: [`Writer::send`].
    ///
    /// # Errors
    /// Those of [`Writer::send`].
    pub fn send<T: Serialize + ?Sized>(
        &mut self,
        message: &T,
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        self.writer.send(message, deadline)
    }

    /// The next message: [`Reader::receive`].
    ///
    /// # Errors
    /// Those of [`Reader::receive`].
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<T, ChannelError> {
        self.reader.receive(deadline)
    }

    /// The two halves, for two threads.
    #[must_use]
    pub fn split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }
}

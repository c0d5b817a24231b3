//! Why a session did not begin, or ended.

use std::io;

use crate::PublicKey;

/// What went wrong on a channel. After any but [`ChannelError::Deadline`] of
/// a receive and [`ChannelError::Encode`] the session is over.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The stream can't be read or written.
    #[error("the channel: {what}: {source}")]
    Stream {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// Time was up. A receive can be tried again and loses nothing.
    #[error("the channel: {what} was not over in time")]
    Deadline {
        /// What was waited for.
        what: &'static str,
    },
    /// The other side closed the stream.
    #[error("the channel: the other side ended it {place}")]
    Ended {
        /// Where in the conversation.
        place: &'static str,
    },
    /// More bytes that belong to no hello than any earlier connection can
    /// have left.
    #[error("the channel: {discarded} bytes and no beginning of a conversation among them")]
    NoHello {
        /// How many bytes were read and thrown away.
        discarded: u64,
    },
    /// The other side speaks another version.
    #[error(
        "the channel: the other side speaks version {theirs}, this program {ours}: \
         use the same release of secmon on both"
    )]
    Version {
        /// Of this program, `WIRE.ROLE`.
        ours: Versions,
        /// Of the other side.
        theirs: Versions,
    },
    /// The responder does not know the initiator's key, or is not the one
    /// whose key was expected.
    #[error(
        "the channel: the other side refused the handshake: \
         either its key is not the one expected here, or ours is not among those it allows"
    )]
    Refused,
    /// An initiator whose key is not allowed.
    #[error("the channel: a client with the unknown key {key} was refused")]
    UnknownPeer {
        /// The key.
        key: PublicKey,
    },
    /// A handshake message does not decrypt: another key, another role, or
    /// bytes that were changed on their way.
    #[error("the channel: {what} does not decrypt: wrong key, wrong role or changed bytes")]
    Handshake {
        /// Which message.
        what: &'static str,
    },
    /// A frame of a length that no frame has.
    #[error(
        "the channel: a frame of {length} bytes; one has {} to {}",
        crate::frame::MIN_FRAME,
        crate::MAX_FRAME
    )]
    FrameLength {
        /// The length it claims.
        length: u32,
    },
    /// A frame does not decrypt: changed, repeated, dropped or reordered.
    #[error("the channel: frame {number} does not decrypt: bytes were changed, lost or repeated")]
    Frame {
        /// Its number in this direction, from 0.
        number: u64,
    },
    /// A frame decrypts but begins with a byte that has no meaning.
    #[error("the channel: frame {number} is of the unknown kind {kind}")]
    Kind {
        /// Its number in this direction, from 0.
        number: u64,
        /// The byte.
        kind: u8,
    },
    /// A message is longer than agreed.
    #[error("the channel: a message of more than {limit} bytes")]
    TooLong {
        /// The bound.
        limit: usize,
    },
    /// A message is not of the type expected.
    #[error("the channel: a message of {length} bytes is not of the expected type: {reason}")]
    Decode {
        /// Its length.
        length: usize,
        /// The decoder's reason.
        reason: String,
    },
    /// A message of this program can't be written down.
    #[error("the channel: a message can't be encoded: {reason}")]
    Encode {
        /// The encoder's reason.
        reason: String,
    },
    /// The session ended earlier.
    #[error("the channel: the session is over since an earlier error")]
    Over,
    /// The random numbers or the cipher failed on this side.
    #[error("the channel: the cipher failed: {reason}")]
    Cipher {
        /// What it says.
        reason: String,
    },
}

/// The version of the wire format and of the protocol that is spoken over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// Of hello, frames and encoding.
    pub wire: u16,
    /// Of the messages of a role.
    pub role: u16,
}

impl std::fmt::Display for Versions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { wire, role } = self;
        write!(formatter, "{wire}.{role}")
    }
}

impl ChannelError {
    /// Whether only time was up.
    #[must_use]
    pub fn is_deadline(&self) -> bool {
        matches!(self, Self::Deadline { .. })
    }

    /// The error of a stream operation.
    pub(crate) fn of_stream(what: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::TimedOut => Self::Deadline { what },
            _ => Self::Stream { what, source },
        }
    }

    pub(crate) fn of_cipher(error: &snow::Error) -> Self {
        Self::Cipher {
            reason: error.to_string(),
        }
    }
}

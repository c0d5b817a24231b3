//! Frames after the handshake: each one Noise transport message, a part of a
//! message of the layer above.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;
use snow::StatelessTransportState;

use crate::stream::{fill, write_all};
use crate::{ChannelError, Stream, decode, encode};

/// The longest frame without its length: what Noise allows.
pub const MAX_FRAME: usize = 65_535;
/// Bytes that the cipher adds.
const TAG: usize = 16;
/// The shortest frame: the byte that tells its kind.
pub(crate) const MIN_FRAME: usize = TAG + 1;
/// The most of a message that a frame carries.
const MAX_PART: usize = MAX_FRAME - MIN_FRAME;

/// The message ends with this frame.
const LAST: u8 = 0;
/// More of the message follows.
const MORE: u8 = 1;
/// The initiator's first frame: it has shown that it holds its key.
pub(crate) const CONFIRM: u8 = 2;

/// The half of a session that receives.
pub struct Reader {
    stream: Arc<dyn Stream>,
    cipher: Arc<StatelessTransportState>,
    /// The number of the next frame.
    number: u64,
    limit: usize,
    /// What has come of the next frame's length and of the frame: a receive
    /// that a deadline ended goes on there.
    header: [u8; 4],
    header_filled: usize,
    frame: Vec<u8>,
    frame_filled: usize,
    /// A frame's plaintext.
    plain: Vec<u8>,
    /// The parts of the message so far.
    message: Vec<u8>,
    started: bool,
    over: bool,
}

/// The half of a session that sends.
pub struct Writer {
    stream: Arc<dyn Stream>,
    cipher: Arc<StatelessTransportState>,
    number: u64,
    limit: usize,
    over: bool,
}

/// What a frame said.
enum Part {
    More,
    Last,
}

impl Reader {
    pub(crate) fn new(
        stream: Arc<dyn Stream>,
        cipher: Arc<StatelessTransportState>,
        limit: usize,
    ) -> Self {
        Self {
            stream,
            cipher,
            number: 0,
            limit,
            header: [0; 4],
            header_filled: 0,
            frame: Vec::new(),
            frame_filled: 0,
            plain: vec![0; MAX_FRAME],
            message: Vec::new(),
            started: false,
            over: false,
        }
    }

    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// The next message.
    ///
    /// # Errors
    /// At the deadline, after which a receive can be tried again and nothing
    /// is lost; if the other side ended or sent anything but a bounded message
    /// of this type, after which the session is over.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<T, ChannelError> {
        let bytes = self.receive_bytes(deadline)?;
        decode(&bytes).inspect_err(|_| self.over = true)
    }

    /// The next message's bytes.
    ///
    /// # Errors
    /// As [`receive`](Self::receive), but for the type.
    pub fn receive_bytes(&mut self, deadline: Option<Instant>) -> Result<Vec<u8>, ChannelError> {
        loop {
            match self.part(deadline)? {
                Part::More => {}
                Part::Last => {
                    self.started = false;
                    return Ok(std::mem::take(&mut self.message));
                }
            }
        }
    }

    /// Takes the initiator's confirmation, the first frame.
    pub(crate) fn confirm(&mut self, deadline: Option<Instant>) -> Result<(), ChannelError> {
        let number = self.number;
        let length = self.decrypted(deadline)?;
        match self.plain.get(..length) {
            Some([CONFIRM]) => Ok(()),
            other => Err(ChannelError::Kind {
                number,
                kind: other.and_then(<[u8]>::first).copied().unwrap_or_default(),
            }),
        }
    }

    /// Takes one frame into the message.
    fn part(&mut self, deadline: Option<Instant>) -> Result<Part, ChannelError> {
        if self.over {
            return Err(ChannelError::Over);
        }
        let part = self.try_part(deadline);
        self.over = part.as_ref().is_err_and(|error| !error.is_deadline());
        part
    }

    fn try_part(&mut self, deadline: Option<Instant>) -> Result<Part, ChannelError> {
        let number = self.number;
        let length = self.decrypted(deadline)?;
        let plain = self.plain.get(..length).unwrap_or_default();
        let Some((kind, part)) = plain.split_first() else {
            return Err(ChannelError::Frame { number });
        };
        let kind = match *kind {
            MORE => Part::More,
            LAST => Part::Last,
            kind => return Err(ChannelError::Kind { number, kind }),
        };
        if self.message.len().saturating_add(part.len()) > self.limit {
            return Err(ChannelError::TooLong { limit: self.limit });
        }
        self.message.extend_from_slice(part);
        self.started = true;
        Ok(kind)
    }

    /// Reads and decrypts one frame; gives the length of its plaintext.
    fn decrypted(&mut self, deadline: Option<Instant>) -> Result<usize, ChannelError> {
        let lost = |error: io::Error| ChannelError::of_stream("receiving", error);
        if self.header_filled < self.header.len() {
            let whole = fill(
                &*self.stream,
                &mut self.header,
                &mut self.header_filled,
                deadline,
            );
            if !whole.map_err(lost)? {
                let place = match (self.header_filled, self.started) {
                    (0, false) => "between two messages",
                    _ => "within a message",
                };
                return Err(ChannelError::Ended { place });
            }
            let claimed = u32::from_le_bytes(self.header);
            let length = usize::try_from(claimed)
                .ok()
                .filter(|length| (MIN_FRAME..=MAX_FRAME).contains(length))
                .ok_or(ChannelError::FrameLength { length: claimed })?;
            self.frame.clear();
            self.frame.resize(length, 0);
            self.frame_filled = 0;
        }
        let whole = fill(
            &*self.stream,
            &mut self.frame,
            &mut self.frame_filled,
            deadline,
        );
        if !whole.map_err(lost)? {
            let place = "within a message";
            return Err(ChannelError::Ended { place });
        }
        let number = self.number;
        let length = self
            .cipher
            .read_message(number, &self.frame, &mut self.plain)
            .map_err(|_| ChannelError::Frame { number })?;
        self.header_filled = 0;
        self.number = number.checked_add(1).ok_or(ChannelError::Over)?;
        Ok(length)
    }
}

impl Writer {
    pub(crate) fn new(
        stream: Arc<dyn Stream>,
        cipher: Arc<StatelessTransportState>,
        limit: usize,
    ) -> Self {
        Self {
            stream,
            cipher,
            number: 0,
            limit,
            over: false,
        }
    }

    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Sends a message.
    ///
    /// # Errors
    /// If it can't be encoded within the limit, after which the session goes
    /// on; at the deadline or if the other side ended, after which it is over.
    pub fn send<T: Serialize + ?Sized>(
        &mut self,
        message: &T,
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        let bytes = encode(message, self.limit)?;
        self.send_bytes(&bytes, deadline)
    }

    /// Sends a message's bytes.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_bytes(
        &mut self,
        bytes: &[u8],
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        if bytes.len() > self.limit {
            return Err(ChannelError::TooLong { limit: self.limit });
        }
        let mut rest = bytes;
        loop {
            let (part, after) = rest.split_at(rest.len().min(MAX_PART));
            rest = after;
            let kind = if rest.is_empty() { LAST } else { MORE };
            self.frame(kind, part, deadline)?;
            if rest.is_empty() {
                return Ok(());
            }
        }
    }

    /// Sends one frame.
    pub(crate) fn frame(
        &mut self,
        kind: u8,
        part: &[u8],
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        if self.over {
            return Err(ChannelError::Over);
        }
        // A frame of which some bytes are out can't be taken back: over,
        // unless it ends well.
        self.over = true;
        let mut plain = Vec::with_capacity(part.len().saturating_add(1));
        plain.push(kind);
        plain.extend_from_slice(part);
        let mut sealed = vec![0; plain.len().saturating_add(TAG)];
        let length = self
            .cipher
            .write_message(self.number, &plain, &mut sealed)
            .map_err(|error| ChannelError::of_cipher(&error))?;
        self.number = self.number.checked_add(1).ok_or(ChannelError::Over)?;
        sealed.truncate(length);
        let mut bytes = Vec::with_capacity(sealed.len().saturating_add(4));
        let claimed = u32::try_from(sealed.len()).map_err(|_| ChannelError::Over)?;
        bytes.extend_from_slice(&claimed.to_le_bytes());
        bytes.extend_from_slice(&sealed);
        write_all(&*self.stream, &bytes, deadline)
            .map_err(|error| ChannelError::of_stream("sending", error))?;
        self.over = false;
        Ok(())
    }
}

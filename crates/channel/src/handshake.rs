//! How a conversation begins: a hello, its answer, and a first frame that
//! shows the initiator to hold its key.
//!
//! The hello:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `ff ff ff ff`: a length that no frame has, so that a session which is still open on the other side ends here |
//! | 16 | [`HELLO`] |
//! | 2, 2 | version of the wire format and of the role's messages |
//! | 16 | a random token |
//! | 96 | the first Noise message |
//!
//! The answer:
//!
//! | bytes | what |
//! |---|---|
//! | 16 | [`ANSWER`] |
//! | 16 | the hello's token, so that an answer to an earlier hello is told apart |
//! | 2, 2 | the versions of the responder |
//! | 1 | 1 if it accepts, 0 if it refuses and nothing follows |
//! | 48 | the second Noise message |
//!
//! The prologue of both Noise messages is `secmon`, the role's name (each
//! ended by a zero byte), the versions and the token: one recorded for another
//! role, version or hello does not decrypt. A recorded hello that is sent
//! again does get an answer, as always with this pattern, but whoever sent it
//! can't write the first frame, and only that lets [`Session::accept`] return.
//!
//! [`Session::accept`]: crate::Session::accept

use std::sync::Arc;
use std::time::{Duration, Instant};

use snow::params::NoiseParams;
use snow::{HandshakeState, StatelessTransportState};

use crate::error::Versions;
use crate::stream::{fill, write_all};
use crate::{ChannelError, KeyPair, Peer, PublicKey, Role, Stream};

/// The marker of a hello.
pub const HELLO: [u8; 16] = *b"\x8fsecmon\x00hello\x0d\x0a\x1a";
/// The marker of an answer.
pub const ANSWER: [u8; 16] = *b"\x8fsecmon\x00reply\x0d\x0a\x1a";

/// What no frame begins with.
const NO_FRAME: [u8; 4] = [0xff; 4];
/// The version of hello, frames and encoding.
const WIRE: u16 = 1;
const TOKEN: usize = 16;
/// Bytes of the first Noise message: a key, a key in the cipher, nothing.
const FIRST: usize = 96;
/// Bytes of the second: a key, nothing.
const SECOND: usize = 48;
const REFUSED: u8 = 0;
const ACCEPTED: u8 = 1;

/// The most that is thrown away in search of a marker: more than any buffer
/// between two parties holds.
const MAX_DISCARDED: u64 = 16 << 20;
/// How long the rest of a hello, or the first frame, may take once the marker
/// has come.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long an initiator waits for an answer before it says hello again; then
/// twice as long, and so on.
const FIRST_WAIT: Duration = Duration::from_secs(3);

pub(crate) fn parameters() -> Result<NoiseParams, snow::Error> {
    "Noise_IK_25519_ChaChaPoly_BLAKE2s".parse()
}

/// What a handshake ends with.
pub(crate) struct Established {
    pub(crate) cipher: Arc<StatelessTransportState>,
    /// Bytes thrown away before the marker.
    pub(crate) discarded: u64,
}

/// Says hello until it is answered or time is up.
pub(crate) fn initiate(
    stream: &dyn Stream,
    own: &KeyPair,
    peer: &PublicKey,
    role: Role,
    deadline: Option<Instant>,
) -> Result<Established, ChannelError> {
    let mut wait = FIRST_WAIT;
    let mut discarded = 0;
    loop {
        // A hello can be lost behind half a frame of an earlier connection.
        let until = earlier(deadline, wait);
        match initiate_once(stream, own, peer, role, until, &mut discarded) {
            Err(error) if error.is_deadline() && !passed(deadline) => {
                wait = wait.saturating_mul(2);
            }
            other => return other.map(|cipher| Established { cipher, discarded }),
        }
    }
}

fn initiate_once(
    stream: &dyn Stream,
    own: &KeyPair,
    peer: &PublicKey,
    role: Role,
    deadline: Option<Instant>,
    discarded: &mut u64,
) -> Result<Arc<StatelessTransportState>, ChannelError> {
    let token = random_token()?;
    let parameters = parameters().map_err(|error| ChannelError::of_cipher(&error))?;
    let prologue = prologue(role, &token);
    let mut noise = snow::Builder::new(parameters)
        .local_private_key(own.secret_bytes())
        .and_then(|builder| builder.remote_public_key(peer.as_bytes()))
        .and_then(|builder| builder.prologue(&prologue))
        .and_then(snow::Builder::build_initiator)
        .map_err(|error| ChannelError::of_cipher(&error))?;
    let mut first = [0; FIRST];
    write_exactly(&mut noise, &mut first)?;
    let mut hello = Vec::with_capacity(160);
    hello.extend_from_slice(&NO_FRAME);
    hello.extend_from_slice(&HELLO);
    hello.extend_from_slice(&versions(role));
    hello.extend_from_slice(&token);
    hello.extend_from_slice(&first);
    write_all(stream, &hello, deadline)
        .map_err(|error| ChannelError::of_stream("sending a hello", error))?;

    let what = "the answer to a hello";
    loop {
        find(stream, &ANSWER, what, deadline, discarded)?;
        let mut echoed = [0; TOKEN];
        read(stream, &mut echoed, what, deadline)?;
        if echoed == token {
            break;
        }
        *discarded = discarded.saturating_add((ANSWER.len() + TOKEN) as u64);
    }
    same_versions(read_versions(stream, what, deadline)?, role)?;
    let mut outcome = [0; 1];
    read(stream, &mut outcome, what, deadline)?;
    if outcome != [ACCEPTED] {
        return Err(ChannelError::Refused);
    }
    let mut second = [0; SECOND];
    read(stream, &mut second, what, deadline)?;
    noise
        .read_message(&second, &mut [])
        .map_err(|_| ChannelError::Handshake { what })?;
    established(noise)
}

/// Waits for a hello, answers it, and gives the cipher and who it was, who
/// has yet to confirm.
pub(crate) fn accept(
    stream: &dyn Stream,
    own: &KeyPair,
    peers: &[Peer],
    role: Role,
    deadline: Option<Instant>,
) -> Result<(Established, Peer, Option<Instant>), ChannelError> {
    let what = "a hello";
    let mut discarded = 0;
    find(stream, &HELLO, what, deadline, &mut discarded)?;
    // The hello's first bytes precede its marker.
    let discarded = discarded.saturating_sub(NO_FRAME.len() as u64);
    let deadline = earlier(deadline, PATIENCE);
    let theirs = read_versions(stream, what, deadline)?;
    let mut token = [0; TOKEN];
    read(stream, &mut token, what, deadline)?;
    if let Err(error) = same_versions(theirs, role) {
        refuse(stream, role, &token, deadline);
        return Err(error);
    }
    let mut first = [0; FIRST];
    read(stream, &mut first, what, deadline)?;
    let (mut noise, peer) = match open_hello(&first, own, peers, role, &token) {
        Ok(opened) => opened,
        Err(error) => {
            refuse(stream, role, &token, deadline);
            return Err(error);
        }
    };
    let mut second = [0; SECOND];
    write_exactly(&mut noise, &mut second)?;
    let answer = answer(role, &token, ACCEPTED, &second);
    write_all(stream, &answer, deadline)
        .map_err(|error| ChannelError::of_stream("answering a hello", error))?;
    let cipher = established(noise)?;
    Ok((Established { cipher, discarded }, peer, deadline))
}

/// Decrypts a hello's Noise message and looks up whose it is.
fn open_hello(
    first: &[u8; FIRST],
    own: &KeyPair,
    peers: &[Peer],
    role: Role,
    token: &[u8; TOKEN],
) -> Result<(HandshakeState, Peer), ChannelError> {
    let parameters = parameters().map_err(|error| ChannelError::of_cipher(&error))?;
    let prologue = prologue(role, token);
    let mut noise = snow::Builder::new(parameters)
        .local_private_key(own.secret_bytes())
        .and_then(|builder| builder.prologue(&prologue))
        .and_then(snow::Builder::build_responder)
        .map_err(|error| ChannelError::of_cipher(&error))?;
    noise
        .read_message(first, &mut [])
        .map_err(|_| ChannelError::Handshake { what: "a hello" })?;
    let key = noise
        .get_remote_static()
        .and_then(PublicKey::from_slice)
        .ok_or(ChannelError::Handshake { what: "a hello" })?;
    let peer = peers
        .iter()
        .find(|peer| peer.key == key)
        .ok_or(ChannelError::UnknownPeer { key })?;
    Ok((noise, peer.clone()))
}

/// Tells the initiator that it is refused. If that can't be told, it finds
/// out by its deadline.
fn refuse(stream: &dyn Stream, role: Role, token: &[u8; TOKEN], deadline: Option<Instant>) {
    let _ = write_all(stream, &answer(role, token, REFUSED, &[]), deadline);
}

fn answer(role: Role, token: &[u8; TOKEN], outcome: u8, second: &[u8]) -> Vec<u8> {
    let mut answer = Vec::with_capacity(96);
    answer.extend_from_slice(&ANSWER);
    answer.extend_from_slice(token);
    answer.extend_from_slice(&versions(role));
    answer.push(outcome);
    answer.extend_from_slice(second);
    answer
}

fn versions(role: Role) -> [u8; 4] {
    let [a, b] = WIRE.to_le_bytes();
    let [c, d] = role.version.to_le_bytes();
    [a, b, c, d]
}

fn read_versions(
    stream: &dyn Stream,
    what: &'static str,
    deadline: Option<Instant>,
) -> Result<Versions, ChannelError> {
    let mut bytes = [0; 4];
    read(stream, &mut bytes, what, deadline)?;
    let [a, b, c, d] = bytes;
    Ok(Versions {
        wire: u16::from_le_bytes([a, b]),
        role: u16::from_le_bytes([c, d]),
    })
}

fn same_versions(theirs: Versions, role: Role) -> Result<(), ChannelError> {
    let ours = Versions {
        wire: WIRE,
        role: role.version,
    };
    if theirs != ours {
        return Err(ChannelError::Version { ours, theirs });
    }
    Ok(())
}

fn prologue(role: Role, token: &[u8; TOKEN]) -> Vec<u8> {
    let mut prologue = b"secmon\0".to_vec();
    prologue.extend_from_slice(role.name.as_bytes());
    prologue.push(0);
    prologue.extend_from_slice(&versions(role));
    prologue.extend_from_slice(token);
    prologue
}

/// Random bytes, by way of a fresh key: the cipher's crate has no other door
/// to its random numbers.
fn random_token() -> Result<[u8; TOKEN], ChannelError> {
    let pair = KeyPair::generate().map_err(|error| ChannelError::Cipher {
        reason: error.to_string(),
    })?;
    let mut token = [0; TOKEN];
    for (byte, random) in token.iter_mut().zip(pair.public().as_bytes()) {
        *byte = *random;
    }
    Ok(token)
}

/// Writes a Noise message that must be as long as `buffer`.
fn write_exactly(noise: &mut HandshakeState, buffer: &mut [u8]) -> Result<(), ChannelError> {
    let length = noise
        .write_message(&[], buffer)
        .map_err(|error| ChannelError::of_cipher(&error))?;
    if length != buffer.len() {
        return Err(ChannelError::Cipher {
            reason: format!("a handshake message of {length} bytes"),
        });
    }
    Ok(())
}

fn established(noise: HandshakeState) -> Result<Arc<StatelessTransportState>, ChannelError> {
    noise
        .into_stateless_transport_mode()
        .map(Arc::new)
        .map_err(|error| ChannelError::of_cipher(&error))
}

/// The deadline, or `wait` from now if that is earlier.
fn earlier(deadline: Option<Instant>, wait: Duration) -> Option<Instant> {
    let own = Instant::now().checked_add(wait);
    match (deadline, own) {
        (Some(deadline), Some(own)) => Some(deadline.min(own)),
        (deadline, own) => deadline.or(own),
    }
}

fn passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

fn read(
    stream: &dyn Stream,
    buffer: &mut [u8],
    what: &'static str,
    deadline: Option<Instant>,
) -> Result<(), ChannelError> {
    let whole = fill(stream, buffer, &mut 0, deadline)
        .map_err(|error| ChannelError::of_stream(what, error))?;
    if !whole {
        let place = "within the handshake";
        return Err(ChannelError::Ended { place });
    }
    Ok(())
}

/// Reads up to and with `marker`, never beyond, and counts what came before.
fn find(
    stream: &dyn Stream,
    marker: &[u8; 16],
    what: &'static str,
    deadline: Option<Instant>,
    discarded: &mut u64,
) -> Result<(), ChannelError> {
    let mut matched = 0_usize;
    let mut buffer = [0; 16];
    while matched < marker.len() {
        let missing = marker.len() - matched;
        let length = stream
            .read(buffer.get_mut(..missing).unwrap_or_default(), deadline)
            .map_err(|error| ChannelError::of_stream(what, error))?;
        if length == 0 {
            let place = "before the handshake";
            return Err(ChannelError::Ended { place });
        }
        for byte in buffer.iter().take(length) {
            let before = matched;
            matched = advance(marker, matched, *byte);
            let dropped = (before + 1).saturating_sub(matched) as u64;
            *discarded = discarded.saturating_add(dropped);
        }
        if *discarded > MAX_DISCARDED {
            return Err(ChannelError::NoHello {
                discarded: *discarded,
            });
        }
    }
    Ok(())
}

/// How much of the marker's beginning stands at the end of what was read,
/// after `matched` bytes of it and `byte`.
fn advance(marker: &[u8; 16], matched: usize, byte: u8) -> usize {
    let mut seen = [0; 17];
    for (to, from) in seen.iter_mut().zip(marker.iter().take(matched)) {
        *to = *from;
    }
    if let Some(last) = seen.get_mut(matched) {
        *last = byte;
    }
    let seen = seen.get(..=matched).unwrap_or_default();
    (0..=seen.len().min(marker.len()))
        .rev()
        .find(|length| seen.ends_with(marker.get(..*length).unwrap_or_default()))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_marker_is_found_behind_anything(
            noise in proptest::collection::vec(prop_oneof![Just(HELLO[0]), Just(HELLO[1]), any::<u8>()], 0..200),
            part in 0_usize..16,
        ) {
            let mut bytes = noise;
            bytes.extend_from_slice(&HELLO[..part]);
            let precede = bytes.len();
            bytes.extend_from_slice(&HELLO);
            let mut matched = 0;
            let mut end = None;
            for (index, byte) in bytes.iter().enumerate() {
                matched = advance(&HELLO, matched, *byte);
                if matched == HELLO.len() {
                    end = Some(index + 1);
                    break;
                }
            }
            prop_assert_eq!(end, Some(precede + HELLO.len()));
        }
    }
}

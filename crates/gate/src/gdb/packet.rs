//! Packets of the gdb remote serial protocol: `$payload#checksum`.
//!
//! Source: GDB manual, appendix E "Remote Serial Protocol", sections
//! "Overview" (framing, escapes, run lengths) and "Packet Acknowledgment".

/// The longest payload taken. QEMU announces packets of 4,096 bytes.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// Something that came from the stub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// It has our last packet.
    Acknowledged,
    /// It wants our last packet again.
    Repeat,
    /// A packet, its checksum right, escapes and run lengths undone.
    Packet(Vec<u8>),
    /// A packet that is damaged or too long: it has to be asked for again.
    Damaged,
}

/// A packet's bytes.
pub fn encode(payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(payload.len() + 4);
    packet.push(b'$');
    for byte in payload {
        if matches!(byte, b'$' | b'#' | b'}' | b'*') {
            packet.extend_from_slice(&[b'}', byte ^ 0x20]);
        } else {
            packet.push(*byte);
        }
    }
    let sum = checksum(packet.get(1..).unwrap_or_default());
    packet.push(b'#');
    packet.extend_from_slice(crate::hex::encode(&[sum]).as_bytes());
    packet
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// Takes a stream of bytes apart.
#[derive(Debug, Default)]
pub struct Decoder {
    state: State,
    /// The payload as it was sent.
    raw: Vec<u8>,
    too_long: bool,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Between,
    Payload,
    /// Within the checksum, with its first digit if that has come.
    Checksum(Option<u8>),
}

impl Decoder {
    /// Takes one byte; gives what it completes.
    pub fn push(&mut self, byte: u8) -> Option<Item> {
        match self.state {
            State::Between => match byte {
                b'+' => Some(Item::Acknowledged),
                b'-' => Some(Item::Repeat),
                b'$' => {
                    self.begin();
                    None
                }
                _ => None,
            },
            // A `$` is escaped within a packet: this is a new one, and the
            // rest of the old one was lost.
            State::Payload if byte == b'$' => {
                self.begin();
                Some(Item::Damaged)
            }
            State::Payload if byte == b'#' => {
                self.state = State::Checksum(None);
                None
            }
            State::Payload => {
                if self.raw.len() < MAX_PAYLOAD {
                    self.raw.push(byte);
                } else {
                    self.too_long = true;
                }
                None
            }
            State::Checksum(None) => {
                self.state = State::Checksum(Some(byte));
                None
            }
            State::Checksum(Some(first)) => {
                self.state = State::Between;
                Some(self.end([first, byte]))
            }
        }
    }

    fn begin(&mut self) {
        self.state = State::Payload;
        self.raw.clear();
        self.too_long = false;
    }

    fn end(&mut self, digits: [u8; 2]) -> Item {
        let sum = crate::hex::decode(&digits);
        if self.too_long || sum.as_deref() != Some(&[checksum(&self.raw)]) {
            return Item::Damaged;
        }
        expand(&self.raw).map_or(Item::Damaged, Item::Packet)
    }
}

/// Undoes escapes and run lengths; `None` if they make no sense or the result
/// is too long.
fn expand(raw: &[u8]) -> Option<Vec<u8>> {
    let mut payload = Vec::with_capacity(raw.len());
    let mut bytes = raw.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'}' => payload.push(bytes.next()? ^ 0x20),
            b'*' => {
                let count = bytes.next()?.checked_sub(29)?;
                let last = *payload.last()?;
                payload.extend(std::iter::repeat_n(last, usize::from(count)));
            }
            byte => payload.push(*byte),
        }
        if payload.len() > MAX_PAYLOAD {
            return None;
        }
    }
    Some(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> Vec<Item> {
        let mut decoder = Decoder::default();
        bytes
            .iter()
            .filter_map(|byte| decoder.push(*byte))
            .collect()
    }

    #[test]
    fn packets_are_framed() {
        assert_eq!(encode(b"D"), b"$D#44");
        assert_eq!(encode(b"X#"), b"$X}\x03#d8");
        let items = decode(b"+$OK#9a-$0* #7a$bad#00$cut$OK#9a");
        let packet = |payload: &[u8]| Item::Packet(payload.to_vec());
        assert_eq!(
            items,
            [
                Item::Acknowledged,
                packet(b"OK"),
                Item::Repeat,
                packet(b"0000"),
                Item::Damaged,
                Item::Damaged,
                packet(b"OK")
            ]
        );
    }

    #[test]
    fn what_would_expand_without_bound_is_damaged() {
        let mut long = vec![b'0'];
        long.extend_from_slice(&b"*~".repeat(MAX_PAYLOAD / 4));
        let mut packet = vec![b'$'];
        packet.extend_from_slice(&long);
        packet.extend_from_slice(format!("#{:02x}", checksum(&long)).as_bytes());
        assert_eq!(decode(&packet), [Item::Damaged]);
        let mut endless = Decoder::default();
        endless.push(b'$');
        for _ in 0..3 * MAX_PAYLOAD {
            assert_eq!(endless.push(b'0'), None);
        }
        assert!(endless.raw.len() <= MAX_PAYLOAD);
        for bytes in [&b"$*!#4b"[..], b"$}#7d", b"$a*#8b"] {
            assert_eq!(decode(bytes), [Item::Damaged], "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn payloads_come_back(payload in proptest::collection::vec(any::<u8>(), 0..500)) {
            prop_assert_eq!(decode(&encode(&payload)), [Item::Packet(payload)]);
        }

        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            decode(&bytes);
        }
    }
}

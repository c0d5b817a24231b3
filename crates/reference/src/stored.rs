//! A first state as a file.
//!
//! A magic line, the BLAKE3 digest of all that follows, the body's length (8
//! bytes, little-endian), and the body, compressed as one block of lz4. The body holds
//! the boot, the build id, the time, the pieces, the places for tracing and what
//! was not seen; all numbers have 8 bytes, all lists stand behind their length.

use std::ops::Range;

use secmon_profile::BuildId;

use crate::boot_image::LONGEST;
use crate::{FirstState, KernelFile, Relocations, Section};

const MAGIC: &[u8; 22] = b"secmon first state, 1\n";
const DIGEST: usize = 32;
/// Beside the pieces: a million places for tracing at most.
const MOST_BESIDE: usize = 16 << 20;
/// No kernel has so many pieces.
const MOST_PIECES: u64 = 64;
/// Build ids and names are not longer.
const LONGEST_NAME: u64 = 255;

/// Which boot of a kernel a state is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootId([u8; DIGEST]);

impl BootId {
    /// The boot of a kernel that has these numbers, which no other boot has.
    #[must_use]
    pub fn of(numbers: &[u64]) -> Self {
        let bytes: Vec<u8> = numbers
            .iter()
            .flat_map(|number| number.to_le_bytes())
            .collect();
        Self(blake3::hash(&bytes).into())
    }

    /// The first 16 digits, in hexadecimal.
    #[must_use]
    pub fn short(&self) -> String {
        let digits = self.0.iter().take(8);
        digits.map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Why a file holds no first state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoredError {
    /// It starts with something else.
    #[error("it is no first state that this version of secmon wrote")]
    Magic,
    /// Its end is missing, or something stands behind it.
    #[error("it is damaged: its body of {length} bytes can't be unpacked")]
    Length {
        /// What the file says.
        length: u64,
    },
    /// It was changed.
    #[error("it is damaged: its digest is another one")]
    Digest,
    /// A list contradicts its length.
    #[error("it is damaged: {what} ends early or is too long")]
    Content {
        /// The list.
        what: &'static str,
    },
    /// It is of another boot.
    #[error("it is of another boot")]
    Boot,
}

impl FirstState {
    /// The state as a file, for this boot.
    #[must_use]
    pub fn encode(&self, boot: BootId) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&boot.0);
        let build_id = self.build_id().map_or(&[][..], BuildId::as_bytes);
        put(&mut body, build_id);
        number(&mut body, self.taken);
        number(&mut body, self.file.sections.len() as u64);
        for section in &self.file.sections {
            put(&mut body, section.name.as_bytes());
            number(&mut body, section.address);
            put(&mut body, &section.bytes);
        }
        number(&mut body, self.traced.len() as u64);
        for site in &self.traced {
            number(&mut body, *site);
        }
        number(&mut body, self.unknown.len() as u64 * 2);
        for range in &self.unknown {
            number(&mut body, range.start);
            number(&mut body, range.end);
        }
        let mut file = MAGIC.to_vec();
        let mut packed = Vec::new();
        number(&mut packed, body.len() as u64);
        packed.extend_from_slice(&lz4_flex::block::compress(&body));
        file.extend_from_slice(blake3::hash(&packed).as_bytes());
        file.extend_from_slice(&packed);
        file
    }

    /// Reads a file that [`FirstState::encode`] made for this boot.
    ///
    /// # Errors
    /// [`StoredError`] says what is wrong with it.
    pub fn decode(file: &[u8], boot: BootId) -> Result<Self, StoredError> {
        let rest = file.strip_prefix(MAGIC).ok_or(StoredError::Magic)?;
        let damaged = StoredError::Length { length: 0 };
        let (digest, rest) = rest.split_first_chunk::<DIGEST>().ok_or(damaged)?;
        if blake3::hash(rest).as_bytes() != digest {
            return Err(StoredError::Digest);
        }
        let (length, packed) = rest.split_first_chunk::<8>().ok_or(damaged)?;
        let length = u64::from_le_bytes(*length);
        let damaged = StoredError::Length { length };
        let size = usize::try_from(length).map_err(|_| damaged)?;
        // No block of lz4 unpacks to more than 255 times its length.
        if size > LONGEST + MOST_BESIDE || size / 255 > packed.len() {
            return Err(damaged);
        }
        let body = lz4_flex::block::decompress(packed, size).map_err(|_| damaged)?;
        if body.len() != size {
            return Err(damaged);
        }
        Self::parse(&body, boot)
    }

    fn parse(body: &[u8], boot: BootId) -> Result<Self, StoredError> {
        let mut body = Body(body);
        if body.take(DIGEST as u64, "the boot")? != boot.0 {
            return Err(StoredError::Boot);
        }
        let build_id = body.list("the build id", LONGEST_NAME)?;
        let build_id = (!build_id.is_empty()).then(|| BuildId::new(build_id));
        let build_id = build_id.flatten();
        let taken = body.number("the time")?;
        let mut sections = Vec::new();
        let count = body.number("the pieces")?;
        if count > MOST_PIECES {
            return Err(StoredError::Content { what: "the pieces" });
        }
        for _ in 0..count {
            let name = body.list("a piece's name", LONGEST_NAME)?;
            let name = String::from_utf8_lossy(name).into_owned();
            let address = body.number("a piece's address")?;
            let bytes = body.list("a piece", LONGEST as u64)?.to_vec();
            sections.push(Section {
                name,
                address,
                bytes,
                writable: false,
            });
        }
        let traced = body.numbers("places for tracing")?;
        let unknown = body.numbers("what was not seen")?;
        let unknown: Vec<Range<u64>> = unknown
            .as_chunks::<2>()
            .0
            .iter()
            .map(|[start, end]| *start..*end)
            .collect();
        if !body.0.is_empty() {
            return Err(StoredError::Content { what: "the file" });
        }
        Ok(Self {
            file: KernelFile {
                build_id,
                sections,
                relocations: Relocations::default(),
            },
            taken,
            traced,
            unknown,
        })
    }
}

/// Reads a body whoever wrote it, of whichever boot.
pub(crate) fn parse_any(body: &[u8]) {
    let boot = body.first_chunk().copied().unwrap_or_default();
    let _ = FirstState::parse(body, BootId(boot));
}

/// What is left of a body.
struct Body<'b>(&'b [u8]);

impl<'b> Body<'b> {
    fn take(&mut self, length: u64, what: &'static str) -> Result<&'b [u8], StoredError> {
        let length = usize::try_from(length).ok();
        let split = length.and_then(|length| self.0.split_at_checked(length));
        let (taken, rest) = split.ok_or(StoredError::Content { what })?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self, what: &'static str) -> Result<u64, StoredError> {
        let bytes = self.take(8, what)?;
        let bytes = bytes.first_chunk().ok_or(StoredError::Content { what })?;
        Ok(u64::from_le_bytes(*bytes))
    }

    fn list(&mut self, what: &'static str, longest: u64) -> Result<&'b [u8], StoredError> {
        let length = self.number(what)?;
        if length > longest {
            return Err(StoredError::Content { what });
        }
        self.take(length, what)
    }

    fn numbers(&mut self, what: &'static str) -> Result<Vec<u64>, StoredError> {
        let count = self.number(what)?;
        let length = count.checked_mul(8).ok_or(StoredError::Content { what })?;
        let words = self.take(length, what)?.as_chunks::<8>().0.iter();
        Ok(words.map(|word| u64::from_le_bytes(*word)).collect())
    }
}

fn number(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(&number.to_le_bytes());
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state(bytes: Vec<u8>, traced: Vec<u64>) -> FirstState {
        let section = |name: &str, address, bytes| Section {
            name: name.to_owned(),
            address,
            bytes,
            writable: false,
        };
        FirstState {
            file: KernelFile {
                build_id: BuildId::from_hex("0123456789abcdef0123456789abcdef01234567"),
                sections: vec![
                    section(".text", 0xffff_ffff_8100_0000, bytes.clone()),
                    section(".rodata", 0xffff_ffff_8200_0000, bytes),
                ],
                relocations: Relocations::default(),
            },
            taken: 1_763_000_000,
            traced,
            unknown: vec![1..5, 9..13],
        }
    }

    #[test]
    fn refuses_what_is_not_whole_or_of_another_boot() {
        let boot = BootId::of(&[1, 2]);
        let file = state(vec![7; 100], vec![1, 2, 3]).encode(boot);
        assert!(FirstState::decode(&file, boot).is_ok());
        for length in 0..file.len() {
            let cut = file.get(..length).unwrap_or_default();
            assert!(FirstState::decode(cut, boot).is_err(), "{length}");
        }
        for at in 0..file.len() {
            let mut changed = file.clone();
            changed[at] ^= 1;
            assert!(FirstState::decode(&changed, boot).is_err(), "{at}");
        }
        let other = FirstState::decode(&file, BootId::of(&[1, 3]));
        assert_eq!(other, Err(StoredError::Boot));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            bytes in prop::collection::vec(any::<u8>(), 0..500),
            traced in prop::collection::vec(any::<u64>(), 0..50),
            numbers in prop::collection::vec(any::<u64>(), 0..5),
        ) {
            let (boot, state) = (BootId::of(&numbers), state(bytes, traced));
            prop_assert_eq!(FirstState::decode(&state.encode(boot), boot), Ok(state));
        }

        #[test]
        fn any_body_is_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let boot = BootId::of(&[]);
            let _ = FirstState::parse(&[&boot.0[..], &body].concat(), boot);
            let _ = FirstState::decode(&[&MAGIC[..], &body].concat(), boot);
        }
    }
}

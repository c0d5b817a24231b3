//! The kernel's own symbol table, `kallsyms`: compressed names and encoded
//! addresses.
//!
//! Source of the format: the kernel's `scripts/kallsyms.c` (which writes it)
//! and `kernel/kallsyms.c` (which reads it). A name is a length (one byte, or
//! two from 6.1 on if the first has its high bit set) and that many token
//! numbers; each of the 256 tokens is a short text; the first character of the
//! whole is the symbol's kind. Addresses are encoded in one of four ways, see
//! [`Offsets`].
//!
//! Where the tables lie is `locate.rs`'s business.

use std::ops::Range;

use crate::part::{Part, Words};

/// More symbols than any kernel has (a distribution's 7.2: 200,000).
pub(crate) const MAXIMUM_SYMBOLS: usize = 1 << 21;
/// The longest name, kind included (`KSYM_NAME_LEN`: 128, from 6.1 on 512).
const MAXIMUM_NAME: usize = 512;
/// All names unpacked. A distribution's 7.2 has 6 MiB.
const MAXIMUM_TEXT: usize = 64 << 20;
/// More symbols of one name than any kernel has (`__func__.0` in a
/// distribution's 6.12: 458), and of slots in a row that are full.
pub(crate) const MAXIMUM_NAMESAKES: usize = 4096;
/// The number of symbols between two markers.
pub(crate) const MARKER_DISTANCE: usize = 256;

/// Why bytes are not a usable symbol table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KallsymsError {
    /// More symbols than any kernel has.
    #[error("{count} symbols are more than the {MAXIMUM_SYMBOLS} accepted")]
    TooMany {
        /// The number claimed.
        count: usize,
    },
    /// The name of a symbol runs over the end of the names, or is empty.
    #[error("the name of symbol {number} at offset {offset:#x} is cut off or empty")]
    Name {
        /// The symbol's number in the table.
        number: usize,
        /// Where its name starts among the names.
        offset: usize,
    },
    /// A marker does not say where its symbol's name starts.
    #[error("marker {index} says {marker:#x}, the name starts at {offset:#x}")]
    Marker {
        /// The marker's index; it belongs to symbol 256 times that.
        index: usize,
        /// What it says.
        marker: u32,
        /// Where the name really starts.
        offset: usize,
    },
    /// A token that does not lie in the token table.
    #[error("token {token} at {offset:#x} does not end inside the token table")]
    Token {
        /// The token's number.
        token: u8,
        /// Where the token index puts it.
        offset: u16,
    },
    /// The names unpack to more text than any kernel's.
    #[error("the names unpack to more than {MAXIMUM_TEXT} bytes")]
    TooLong,
    /// More symbols of one name, or of names with one hash, than any kernel
    /// has.
    #[error("more symbols share one name or its hash than the {MAXIMUM_NAMESAKES} accepted")]
    Namesakes,
}

/// How the address of a symbol is encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Offsets {
    /// 8 bytes each, relocated by the kernel itself (without
    /// `CONFIG_KALLSYMS_BASE_RELATIVE`; also lists from other sources).
    Absolute(Vec<u64>),
    /// 4 unsigned bytes, from a base.
    BaseRelative {
        /// `kallsyms_relative_base` as the kernel has relocated it.
        base: u64,
        /// The table as it was read.
        offsets: Words,
    },
    /// 4 signed bytes: a per-CPU symbol's offset if not negative, else the
    /// complement of the distance from a base
    /// (`CONFIG_KALLSYMS_ABSOLUTE_PERCPU`, to 6.14).
    AbsolutePerCpu {
        /// `kallsyms_relative_base` as the kernel has relocated it.
        base: u64,
        /// The table as it was read.
        offsets: Words,
    },
    /// 4 signed bytes: the distance from the place of the entry itself (from
    /// 7.0 on).
    PlaceRelative {
        /// The run-time address of the first entry.
        place: u64,
        /// The table as it was read.
        offsets: Words,
    },
}

impl Offsets {
    /// The table as it was read, but for a list from another source.
    fn words(&mut self) -> Option<&mut Words> {
        match self {
            Self::Absolute(_) => None,
            Self::BaseRelative { offsets, .. }
            | Self::AbsolutePerCpu { offsets, .. }
            | Self::PlaceRelative { offsets, .. } => Some(offsets),
        }
    }

    /// Takes the other's memory in place of its own where the bytes are the
    /// same.
    pub(crate) fn share(&mut self, other: &Self) {
        if let (
            Some(own),
            Self::BaseRelative { offsets, .. }
            | Self::AbsolutePerCpu { offsets, .. }
            | Self::PlaceRelative { offsets, .. },
        ) = (self.words(), other)
        {
            own.share(offsets);
        }
    }

    /// How many addresses there are.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Absolute(addresses) => addresses.len(),
            Self::BaseRelative { offsets, .. }
            | Self::AbsolutePerCpu { offsets, .. }
            | Self::PlaceRelative { offsets, .. } => offsets.len(),
        }
    }

    /// Whether addresses never go down from one symbol to the next.
    pub(crate) fn are_sorted(&self) -> bool {
        (1..self.len()).all(|number| self.get(number - 1) <= self.get(number))
    }

    /// The address of symbol `number`.
    #[inline]
    pub(crate) fn get(&self, number: usize) -> Option<u64> {
        Some(match self {
            Self::Absolute(addresses) => *addresses.get(number)?,
            Self::BaseRelative { base, offsets } => {
                base.wrapping_add(u64::from(offsets.get(number)?))
            }
            Self::AbsolutePerCpu { base, offsets } => {
                let offset = i64::from(offsets.get(number)?.cast_signed());
                match offset {
                    0.. => offset as u64,
                    _ => base.wrapping_sub(1).wrapping_sub(offset as u64),
                }
            }
            Self::PlaceRelative { place, offsets } => {
                let offset = i64::from(offsets.get(number)?.cast_signed());
                place
                    .wrapping_add(number as u64 * 4)
                    .wrapping_add(offset as u64)
            }
        })
    }
}

/// The 256 texts that names are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tokens {
    text: Vec<u8>,
    /// Where each token lies in `text`, without its zero byte.
    places: Box<[(u16, u16); 256]>,
}

impl Tokens {
    /// Takes the token table and its index apart.
    pub(crate) fn parse(text: Vec<u8>, index: &[u16; 256]) -> Result<Self, KallsymsError> {
        let mut places = Box::new([(0, 0); 256]);
        for (token, (place, start)) in places.iter_mut().zip(index).enumerate() {
            let error = KallsymsError::Token {
                token: token as u8,
                offset: *start,
            };
            let rest = text.get(usize::from(*start)..).ok_or(error.clone())?;
            let length = memchr::memchr(0, rest).ok_or(error.clone())?;
            let end = usize::from(*start) + length;
            *place = (*start, u16::try_from(end).map_err(|_| error)?);
        }
        Ok(Self { text, places })
    }

    /// Each byte stands for itself.
    fn identity() -> Self {
        let mut places = Box::new([(0, 0); 256]);
        for (token, place) in places.iter_mut().enumerate() {
            *place = (token as u16, token as u16 + 1);
        }
        Self {
            text: (0..=255).collect(),
            places,
        }
    }

    #[inline]
    fn get(&self, token: u8) -> &[u8] {
        let (start, end) = self.places[usize::from(token)];
        // In bounds by construction.
        self.text
            .get(usize::from(start)..usize::from(end))
            .unwrap_or_default()
    }
}

/// The names of a symbol table, walked once.
#[derive(Debug)]
pub(crate) struct Names {
    bytes: Part,
    /// Where the name of each 256th symbol starts.
    markers: Vec<u32>,
    tokens: Tokens,
    count: usize,
}

impl Names {
    /// As [`Offsets::share`].
    pub(crate) fn share(&mut self, other: &Self) {
        self.bytes.share(&other.bytes);
    }

    /// Checks `count` names against their markers.
    pub(crate) fn parse(
        bytes: impl Into<Part>,
        count: usize,
        markers: Vec<u32>,
        tokens: Tokens,
    ) -> Result<Self, KallsymsError> {
        if count > MAXIMUM_SYMBOLS {
            return Err(KallsymsError::TooMany { count });
        }
        let mut bytes = bytes.into();
        bytes.truncate(walk_names(&bytes, count, &markers)?);
        Ok(Self::parsed_before(bytes, count, markers, tokens))
    }

    /// Names that [`parse`](Self::parse) has accepted before, to a byte. Of
    /// others some are not found or wrong, and nothing worse: every length is
    /// checked again where a name is unpacked.
    pub(crate) fn parsed_before(
        bytes: Part,
        count: usize,
        markers: Vec<u32>,
        tokens: Tokens,
    ) -> Self {
        Self {
            bytes,
            markers,
            tokens,
            count,
        }
    }

    /// Names from elsewhere, uncompressed, each with its kind.
    pub(crate) fn from_list<'a>(
        list: impl IntoIterator<Item = (&'a str, char)>,
    ) -> Result<Self, KallsymsError> {
        let mut bytes = Vec::new();
        let mut markers = Vec::new();
        let mut count = 0;
        for (name, kind) in list {
            if count % MARKER_DISTANCE == 0 {
                markers.push(bytes.len() as u32);
            }
            if count >= MAXIMUM_SYMBOLS || bytes.len() > MAXIMUM_TEXT {
                return Err(KallsymsError::TooMany { count });
            }
            count += 1;
            let name = &name.as_bytes()[..name.len().min(MAXIMUM_NAME - 1)];
            let length = name.len() + 1;
            match length {
                0..0x80 => bytes.push(length as u8),
                _ => bytes.extend_from_slice(&[length as u8 & 0x7f | 0x80, (length >> 7) as u8]),
            }
            bytes.push(u8::try_from(kind).unwrap_or(b'?'));
            bytes.extend_from_slice(name);
        }
        Self::parse(bytes, count, markers, Tokens::identity())
    }

    /// How many names there are.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Unpacks the name of symbol `number` into `name` and gives its kind.
    pub(crate) fn get(&self, number: usize, name: &mut Vec<u8>) -> Option<u8> {
        if number >= self.count {
            return None;
        }
        let mut offset = *self.markers.get(number / MARKER_DISTANCE)? as usize;
        for _ in 0..number % MARKER_DISTANCE {
            offset = name_tokens(&self.bytes, offset)?.end;
        }
        let tokens = self.bytes.get(name_tokens(&self.bytes, offset)?)?;
        Some(self.unpack(tokens, name))
    }

    /// Calls `each` with the kind and name of every symbol, in order.
    pub(crate) fn for_each(&self, mut each: impl FnMut(u8, &[u8])) {
        let mut offset = 0;
        let mut name = Vec::with_capacity(MAXIMUM_NAME);
        for _ in 0..self.count {
            let Some(place) = name_tokens(&self.bytes, offset) else {
                return;
            };
            offset = place.end;
            let kind = self.unpack(&self.bytes[place], &mut name);
            each(kind, &name);
        }
    }

    #[inline]
    fn unpack(&self, tokens: &[u8], name: &mut Vec<u8>) -> u8 {
        name.clear();
        let mut kind = None;
        for token in tokens {
            let mut text = self.tokens.get(*token);
            if kind.is_none()
                && let Some((first, rest)) = text.split_first()
            {
                kind = Some(*first);
                text = rest;
            }
            let room = (MAXIMUM_NAME - 1).saturating_sub(name.len());
            name.extend_from_slice(&text[..text.len().min(room)]);
        }
        kind.unwrap_or(b'?')
    }

    /// The hash of every name, in order, without unpacking it: FNV-1a over
    /// the bytes that [`get`](Self::get) gives.
    ///
    /// # Errors
    /// [`KallsymsError::TooLong`] if all names together are longer than any
    /// kernel's: then nobody should unpack them.
    pub(crate) fn hashes(&self, mut each: impl FnMut(u64)) -> Result<(), KallsymsError> {
        let mut offset = 0;
        let mut total = 0;
        for _ in 0..self.count {
            let Some(place) = name_tokens(&self.bytes, offset) else {
                break;
            };
            offset = place.end;
            let mut hash = NameHash::new();
            // Every name has a kind, which is no part of it.
            let mut skip = 1;
            let mut room = MAXIMUM_NAME - 1;
            for token in &self.bytes[place] {
                let mut text = self.tokens.get(*token);
                if skip != 0 && !text.is_empty() {
                    text = &text[skip..];
                    skip = 0;
                }
                let text = &text[..text.len().min(room)];
                room -= text.len();
                hash.add(text);
            }
            total += MAXIMUM_NAME - 1 - room;
            if total > MAXIMUM_TEXT {
                return Err(KallsymsError::TooLong);
            }
            each(hash.finish());
        }
        Ok(())
    }
}

/// FNV-1a. A guest can choose names of equal hashes; their number is bounded
/// by the table's, and what they slow down is its own reading.
pub(crate) struct NameHash(u64);

impl NameHash {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    #[inline]
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub(crate) fn finish(&self) -> u64 {
        // The low bits of FNV are its weakest.
        self.0 ^ self.0 >> 32
    }
}

/// Where the tokens of the name at `offset` lie; it ends where the next name
/// starts.
#[inline]
pub(crate) fn name_tokens(names: &[u8], offset: usize) -> Option<Range<usize>> {
    let first = *names.get(offset)?;
    let (start, length) = match first {
        0..0x80 => (offset + 1, usize::from(first)),
        _ => {
            let second = *names.get(offset + 1)?;
            let length = usize::from(first & 0x7f) | usize::from(second) << 7;
            (offset + 2, length)
        }
    };
    let end = start + length;
    (length != 0 && end <= names.len()).then_some(start..end)
}

/// Walks `count` names and checks each 256th against its marker; gives where
/// the last one ends.
pub(crate) fn walk_names(
    names: &[u8],
    count: usize,
    markers: &[u32],
) -> Result<usize, KallsymsError> {
    let mut offset = 0;
    for number in 0..count {
        if number % MARKER_DISTANCE == 0 {
            let index = number / MARKER_DISTANCE;
            let marker = markers.get(index).copied().unwrap_or(u32::MAX);
            if marker as usize != offset {
                return Err(KallsymsError::Marker {
                    index,
                    marker,
                    offset,
                });
            }
        }
        match name_tokens(names, offset) {
            Some(place) => offset = place.end,
            None => return Err(KallsymsError::Name { number, offset }),
        }
    }
    Ok(offset)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Tokens 0 to 9: "Tdo", "_", "t", "ext", ...
    fn tokens() -> Tokens {
        let mut text = Vec::new();
        let mut index = [0; 256];
        let words = ["Tdo", "_", "t", "ext", "w", "ork"];
        for (token, start) in index.iter_mut().enumerate() {
            *start = text.len() as u16;
            if let Some(word) = words.get(token) {
                text.extend_from_slice(word.as_bytes());
            }
            text.push(0);
        }
        Tokens::parse(text, &index).expect("well formed")
    }

    #[test]
    fn unpacks_names() {
        let names = vec![3, 0, 1, 4, 2, 2, 3, 0x81, 0x00, 5];
        let tables = Names::parse(names, 3, vec![0], tokens()).expect("well formed");
        let mut all = Vec::new();
        tables.for_each(|kind, name| {
            all.push((kind, String::from_utf8_lossy(name).into_owned()));
        });
        let expected = [(b'T', "do_w"), (b't', "ext"), (b'o', "rk")];
        assert_eq!(all, expected.map(|(kind, name)| (kind, name.to_owned())));
        let mut name = Vec::new();
        assert_eq!(tables.get(1, &mut name), Some(b't'));
        assert_eq!(name, b"ext");
        assert_eq!(tables.get(3, &mut name), None);
    }

    #[test]
    fn decodes_addresses() {
        let base = 0xffff_ffff_8100_0000_u64;
        let per_cpu = Offsets::AbsolutePerCpu {
            base,
            offsets: vec![0, 0x1_f000, u32::MAX, u32::MAX - 0x40].into(),
        };
        assert_eq!(per_cpu.get(1), Some(0x1_f000));
        assert_eq!(per_cpu.get(2), Some(base));
        assert_eq!(per_cpu.get(3), Some(base + 0x40));
        let relative = Offsets::BaseRelative {
            base,
            offsets: vec![0, 0xf000_0000].into(),
        };
        assert_eq!(relative.get(1), Some(base.wrapping_add(0xf000_0000)));
        let place = Offsets::PlaceRelative {
            place: base + 0x100,
            offsets: vec![0, 0_u32.wrapping_sub(0x104)].into(),
        };
        assert_eq!(place.get(0), Some(base + 0x100));
        assert_eq!(place.get(1), Some(base));
        assert_eq!(place.get(2), None);
    }

    #[test]
    fn refuses_what_contradicts_itself() {
        let parse = |names: &[u8], markers: &[u32], count| {
            Names::parse(names.to_vec(), count, markers.to_vec(), tokens()).map(|_| ())
        };
        assert_eq!(parse(&[1, 2], &[0], 1), Ok(()));
        assert!(matches!(
            parse(&[1, 2], &[0], 2),
            Err(KallsymsError::Name { number: 1, .. })
        ));
        assert!(matches!(
            parse(&[0, 2], &[0], 1),
            Err(KallsymsError::Name { number: 0, .. })
        ));
        assert!(matches!(
            parse(&[0x80], &[0], 1),
            Err(KallsymsError::Name { .. })
        ));
        assert!(matches!(
            parse(&[1, 2], &[1], 1),
            Err(KallsymsError::Marker { .. })
        ));
        assert!(matches!(
            parse(&[1, 2], &[], 1),
            Err(KallsymsError::Marker { .. })
        ));
    }

    #[test]
    fn lists_keep_long_names() {
        let long = "x".repeat(400);
        let tables = Names::from_list([("a", 'T'), (&long, 'd')]).expect("a short list");
        let mut name = Vec::new();
        assert_eq!(tables.get(1, &mut name), Some(b'd'));
        assert_eq!(name, long.as_bytes());
    }

    proptest! {
        #[test]
        fn any_tables_are_parsed_or_refused(
            names in proptest::collection::vec(any::<u8>(), 0..2000),
            count in 0_usize..600,
            markers in proptest::collection::vec(0_u32..2000, 0..4),
            text in proptest::collection::vec(0_u8..4, 0..600),
        ) {
            let index = [0; 256];
            let tokens = Tokens::parse(text, &index).unwrap_or_else(|_| tokens());
            let mut markers = markers;
            if let Some(first) = markers.first_mut() {
                *first = 0;
            }
            if let Ok(tables) = Names::parse(names, count, markers, tokens) {
                let mut expected = Vec::new();
                tables.for_each(|_, name| {
                    let mut hash = NameHash::new();
                    hash.add(name);
                    expected.push(hash.finish());
                });
                prop_assert_eq!(expected.len(), count);
                let mut hashes = Vec::new();
                tables.hashes(|hash| hashes.push(hash)).expect("short names");
                prop_assert_eq!(hashes, expected);
            }
        }
    }
}

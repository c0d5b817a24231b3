//! Where the parts of the symbol table lie in a kernel image, found by their
//! shape.
//!
//! The token table is the anchor: its entries for the digits are the digits
//! themselves, one after the other, and the token index behind it must repeat
//! the positions of all 256 entries. Markers are ascending numbers that start
//! at zero; the names before them must end where the next part begins and obey
//! every marker. What remains, the addresses, stands either before the names
//! (to 6.3) or behind the token index (from 6.4 on), in one of four encodings:
//! the one that puts `_text` at the start of the image, and the banner where
//! a banner is, is right.
//!
//! Source of the layouts: `write_src` in the kernel's `scripts/kallsyms.c`.

use std::ops::Range;

use secmon_memory::VirtualAddress;

use crate::image::Image;
use crate::kallsyms::{
    KallsymsError, MARKER_DISTANCE, MAXIMUM_SYMBOLS, Names, Offsets, Tokens, walk_names,
};
use crate::part::{Part, Words};
use crate::symbols::{Symbols, index, numbers_of};

/// The tokens of the digits, which no kernel does without.
pub(crate) const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
/// How each `linux_banner` starts.
pub(crate) const BANNER_START: &[u8] = b"Linux version ";
/// The token table: 256 texts, most of them of a few characters.
const MAXIMUM_TOKEN_TABLE: u64 = 32 << 10;
/// From the first marker to the token table: 4 bytes for 256 symbols, and in
/// 6.2 and 6.3 a permutation of 3 bytes a symbol.
const MAXIMUM_BEFORE_TOKENS: u64 = (MAXIMUM_SYMBOLS as u64 / 256) * 4 + (1 << 20);
/// A run of ascending numbers this long is taken for markers.
const MINIMUM_MARKERS: usize = 16;
/// Runs that are tried: a kernel has one or two.
const MAXIMUM_RUNS: usize = 8;
/// The names between two markers: each at least 2 bytes, none over 514.
const MARKER_STEP: Range<u32> = 2 * 256..514 * 256;

/// How addresses are encoded, without the addresses: see [`Offsets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    Absolute,
    /// The offset of `kallsyms_relative_base`.
    BaseRelative(u64),
    /// The offset of `kallsyms_relative_base`.
    AbsolutePerCpu(u64),
    PlaceRelative,
}

/// Where the parts of a symbol table lie, as offsets from the image's start.
/// It is the same for every boot of one build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub count: u32,
    pub names: Range<u64>,
    pub markers: u64,
    pub token_table: Range<u64>,
    pub token_index: u64,
    pub offsets: u64,
    pub encoding: Encoding,
}

/// The bytes of a symbol table as the guest holds them, without what differs
/// from one boot to the next.
pub(crate) struct Raw {
    pub names: Part,
    pub markers: Part,
    pub token_table: Part,
    pub token_index: Part,
    /// Empty if addresses are absolute: then the kernel relocates them.
    pub offsets: Part,
}

/// Why a location can't be read as a symbol table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LocationError {
    #[error("a part of the symbol table lies outside of the image or can't be read")]
    Unreadable,
    #[error(transparent)]
    Kallsyms(#[from] KallsymsError),
}

impl Raw {
    /// A digest of what names are made of. What it does not cover is used for
    /// nothing that is kept.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for part in [
            &self.names,
            &self.markers,
            &self.token_table,
            &self.token_index,
        ] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize().into()
    }
}

impl Location {
    /// Copies the parts out of the image.
    pub(crate) fn read(&self, image: &Image<'_>) -> Option<Raw> {
        if self.count as usize > MAXIMUM_SYMBOLS
            || self.names.end.checked_sub(self.names.start)? > 64 << 20
            || self.token_table.end.checked_sub(self.token_table.start)? > MAXIMUM_TOKEN_TABLE
        {
            return None;
        }
        let part = |start: u64, length: u64| Some(start..start.checked_add(length)?);
        let markers = u64::from(self.count).div_ceil(MARKER_DISTANCE as u64);
        let ranges = [
            self.names.clone(),
            part(self.markers, markers * 4)?,
            self.token_table.clone(),
            part(self.token_index, 512)?,
            self.offsets_range()?,
        ];
        let [names, markers, token_table, token_index, offsets] = image.parts(&ranges)?;
        Some(Raw {
            names,
            markers,
            token_table,
            token_index,
            offsets,
        })
    }

    /// Where the addresses are, if they are not absolute.
    fn offsets_range(&self) -> Option<Range<u64>> {
        if self.encoding == Encoding::Absolute {
            return Some(0..0);
        }
        let end = self.offsets.checked_add(u64::from(self.count) * 4)?;
        Some(self.offsets..end)
    }

    /// The address of one symbol, without copying all.
    fn address(&self, image: &Image<'_>, number: usize) -> Option<u64> {
        let number = u64::try_from(number).ok()?;
        let base = |offset| image.read_u64(image.address(offset));
        if self.encoding == Encoding::Absolute {
            let place = self.offsets.checked_add(number.checked_mul(8)?)?;
            return base(place);
        }
        let place = self.offsets.checked_add(number.checked_mul(4)?)?;
        let mut bytes = [0; 4];
        image.read(place, &mut bytes).ok()?;
        let offsets = vec![u32::from_le_bytes(bytes)].into();
        let one = match self.encoding {
            Encoding::Absolute => return None,
            Encoding::BaseRelative(base_at) => Offsets::BaseRelative {
                base: base(base_at)?,
                offsets,
            },
            Encoding::AbsolutePerCpu(base_at) => Offsets::AbsolutePerCpu {
                base: base(base_at)?,
                offsets,
            },
            Encoding::PlaceRelative => Offsets::PlaceRelative {
                place: image.address(place).as_u64(),
                offsets,
            },
        };
        one.get(0)
    }

    /// The addresses, for the boot that the image is of.
    fn addresses(&self, image: &Image<'_>, offsets: Part) -> Option<Offsets> {
        let base = |offset| image.read_u64(image.address(offset));
        let offsets = offsets.into();
        Some(match self.encoding {
            Encoding::Absolute => {
                let end = self.offsets.checked_add(u64::from(self.count) * 8)?;
                let bytes = image.bytes(self.offsets..end)?;
                let addresses = bytes.as_chunks::<8>().0.iter();
                Offsets::Absolute(addresses.map(|bytes| u64::from_le_bytes(*bytes)).collect())
            }
            Encoding::BaseRelative(place) => Offsets::BaseRelative {
                base: base(place)?,
                offsets,
            },
            Encoding::AbsolutePerCpu(place) => Offsets::AbsolutePerCpu {
                base: base(place)?,
                offsets,
            },
            Encoding::PlaceRelative => Offsets::PlaceRelative {
                place: image.address(self.offsets).as_u64(),
                offsets,
            },
        })
    }

    /// Makes symbols of the parts that [`read`](Self::read) copied and whose
    /// digest is that of names which were parsed before, with the index of
    /// these names.
    pub(crate) fn symbols(
        &self,
        image: &Image<'_>,
        raw: Raw,
        slots: Words,
    ) -> Result<Symbols, LocationError> {
        let offsets = self
            .addresses(image, raw.offsets)
            .ok_or(LocationError::Unreadable)?;
        let tokens = tokens(&raw.token_table, &raw.token_index)?;
        let markers = words(&raw.markers);
        let names = Names::parsed_before(raw.names, offsets.len(), markers, tokens);
        Ok(Symbols::with_index(names, offsets, slots))
    }
}

fn tokens(text: &[u8], index: &[u8]) -> Result<Tokens, LocationError> {
    let mut places = [0; 256];
    for (place, bytes) in places.iter_mut().zip(index.as_chunks::<2>().0) {
        *place = u16::from_le_bytes(*bytes);
    }
    Ok(Tokens::parse(text.to_vec(), &places)?)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

/// Whether a token table with its index is around `digits`.
pub(crate) fn has_tokens(image: &Image<'_>, digits: u64) -> bool {
    locate_tokens(image, digits).is_some()
}

/// Where a symbol table starts whose token table has its digits at `digits`,
/// and how many symbols it has, whatever their addresses.
pub(crate) fn table_like(image: &Image<'_>, digits: u64) -> Option<(u64, u32)> {
    let (token_table, _) = locate_tokens(image, digits)?;
    locate_markers(image, token_table.start)?
        .into_iter()
        .find_map(|(start, markers)| locate_names(image, start, &markers))
        .map(|(start, names, _)| (start, names.count))
}

/// The symbol table whose token table has its digits at `digits`, if there
/// is one.
pub(crate) fn locate(image: &Image<'_>, digits: u64) -> Option<(Location, Symbols)> {
    let (token_table, token_index) = locate_tokens(image, digits)?;
    for (markers_start, markers) in locate_markers(image, token_table.start)? {
        let Some((start, names, markers)) = locate_names(image, markers_start, &markers) else {
            continue;
        };
        let text = image.bytes(token_table.clone())?;
        let index_bytes = image.bytes(token_index..token_index + 512)?;
        let tokens = tokens(&text, &index_bytes).ok()?;
        let count = names.count;
        let names_end = start + names.bytes.len() as u64;
        let parsed = Names::parse(names.bytes, count as usize, markers, tokens).ok()?;
        let slots = index(&parsed).ok()?;
        let location = Location {
            count,
            names: start..names_end,
            markers: markers_start,
            token_table: token_table.clone(),
            token_index,
            offsets: 0,
            encoding: Encoding::Absolute,
        };
        let anchors = Anchors::new(&parsed, &slots);
        let best = address_locations(&location, names.count_at)
            .into_iter()
            .filter_map(|location| {
                let score = anchors.score(image, |number| location.address(image, number));
                Some((score?, location))
            })
            .max_by_key(|(score, _)| *score);
        if let Some((_, location)) = best {
            let [bytes] = image.parts(&[location.offsets_range()?])?;
            let offsets = location.addresses(image, bytes)?;
            return Some((location, Symbols::with_index(parsed, offsets, slots)));
        }
    }
    None
}

/// The token table around `digits`, and where its index starts.
fn locate_tokens(image: &Image<'_>, digits: u64) -> Option<(Range<u64>, u64)> {
    // From the digit 0 on there are 208 tokens, then the index.
    let end = digits.saturating_add(MAXIMUM_TOKEN_TABLE).min(image.size());
    let bytes = image.bytes(digits..end)?;
    let mut length = 0;
    for _ in 0x30..=0xff {
        length += memchr::memchr(0, bytes.get(length..)?)? + 1;
    }
    // Labels are aligned to 8 bytes, from 6.19 or so on to 4.
    for alignment in [8, 4] {
        let index_start = (digits + length as u64).next_multiple_of(alignment);
        let Some(index) = image.bytes(index_start..index_start + 512) else {
            continue;
        };
        let index: Vec<u64> = index
            .as_chunks::<2>()
            .0
            .iter()
            .map(|bytes| u16::from_le_bytes(*bytes).into())
            .collect();
        let Some(start) = index
            .get(0x30)
            .and_then(|offset| digits.checked_sub(*offset))
        else {
            continue;
        };
        let range = start..digits + length as u64;
        let Some(table) = image.bytes(range.clone()) else {
            continue;
        };
        let mut position = 0;
        let agrees = index.iter().all(|offset| {
            let here = *offset == position as u64;
            let rest = table.get(position..).unwrap_or_default();
            position += memchr::memchr(0, rest).map_or(table.len(), |length| length + 1);
            here
        });
        if agrees && position == table.len() {
            return Some((range, index_start));
        }
    }
    None
}

/// Runs of numbers before the token table that may be markers, with where
/// they start.
fn locate_markers(image: &Image<'_>, token_table: u64) -> Option<Vec<(u64, Vec<u32>)>> {
    let start = token_table.saturating_sub(MAXIMUM_BEFORE_TOKENS);
    let start = start.next_multiple_of(4);
    let words = words(&image.bytes(start..token_table & !3)?);
    let mut runs = Vec::new();
    let mut position = 0;
    while position < words.len() {
        let run = &words[position..];
        let ascending = match run {
            [0, ..] => run
                .windows(2)
                .take_while(|pair| {
                    pair[1]
                        .checked_sub(pair[0])
                        .is_some_and(|step| MARKER_STEP.contains(&step))
                })
                .count(),
            _ => 0,
        };
        if ascending + 1 >= MINIMUM_MARKERS {
            let markers = run[..=ascending].to_vec();
            runs.push((start + position as u64 * 4, markers));
        }
        position += ascending + 1;
    }
    // The nearest to the token table first.
    runs.reverse();
    runs.truncate(MAXIMUM_RUNS);
    Some(runs)
}

/// Names that were found.
struct FoundNames {
    bytes: Vec<u8>,
    count: u32,
    /// Where `kallsyms_num_syms` stands.
    count_at: u64,
}

/// The names that end where the markers start.
fn locate_names(
    image: &Image<'_>,
    markers_start: u64,
    markers: &[u32],
) -> Option<(u64, FoundNames, Vec<u32>)> {
    // In 6.2 and 6.3 what follows the markers can look like one more.
    for length in [markers.len(), markers.len() - 1] {
        let markers = markers.get(..length)?;
        let last = u64::from(*markers.last()?);
        let latest = markers_start.checked_sub(last)?;
        let earliest = latest.saturating_sub(u64::from(MARKER_STEP.end)).max(8);
        let bytes = image.bytes(earliest - 8..markers_start)?;
        let counts = (length - 1) * MARKER_DISTANCE + 1..=length * MARKER_DISTANCE;
        for start in (earliest.next_multiple_of(4)..latest).step_by(4) {
            for before in [8, 4] {
                let place = (start - before - (earliest - 8)) as usize;
                let count = bytes
                    .get(place..place + 4)
                    .map(|bytes| words(bytes)[0])
                    .unwrap_or_default();
                if !counts.contains(&(count as usize)) {
                    continue;
                }
                let names = &bytes[(start - (earliest - 8)) as usize..];
                let Ok(end) = walk_names(names, count as usize, markers) else {
                    continue;
                };
                // Only padding lies between the names and the markers.
                if names.len() - end < 8 && names[end..].iter().all(|byte| *byte == 0) {
                    let found = FoundNames {
                        bytes: names[..end].to_vec(),
                        count,
                        count_at: start - before,
                    };
                    return Some((start, found, markers.to_vec()));
                }
            }
        }
    }
    None
}

/// Every place and encoding in which the addresses may stand.
fn address_locations(location: &Location, count_at: u64) -> Vec<Location> {
    let count = u64::from(location.count);
    let mut all = Vec::new();
    let mut add = |offsets: Option<u64>, encoding| {
        if let Some(offsets) = offsets {
            all.push(Location {
                offsets,
                encoding,
                ..location.clone()
            });
        }
    };
    // To 6.3: addresses, base, number of symbols, names.
    if let Some(base) = count_at.checked_sub(8) {
        let start = base.checked_sub((count * 4).next_multiple_of(8));
        add(start, Encoding::AbsolutePerCpu(base));
        add(start, Encoding::BaseRelative(base));
    }
    add(count_at.checked_sub(count * 8), Encoding::Absolute);
    // From 6.4 on: token index, addresses, base.
    for alignment in [8, 4] {
        let start = (location.token_index + 512).next_multiple_of(alignment);
        add(Some(start), Encoding::PlaceRelative);
        let base = (start + count * 4).next_multiple_of(alignment);
        add(Some(start), Encoding::AbsolutePerCpu(base));
        add(Some(start), Encoding::BaseRelative(base));
        add(Some(start), Encoding::Absolute);
    }
    all
}

/// Symbols whose place is known without the table.
struct Anchors {
    starts: Vec<usize>,
    banners: Vec<usize>,
}

impl Anchors {
    fn new(names: &Names, slots: &Words) -> Self {
        let starts = ["_text", "_stext", "startup_64"];
        Self {
            starts: starts
                .iter()
                .flat_map(|name| numbers_of(names, slots, name))
                .collect(),
            banners: numbers_of(names, slots, "linux_banner"),
        }
    }

    /// How many symbols these addresses put where they must be; `None` if it
    /// is none.
    fn score(&self, image: &Image<'_>, address: impl Fn(usize) -> Option<u64>) -> Option<usize> {
        let start = image.address(0).as_u64();
        let starts = self
            .starts
            .iter()
            .filter(|number| address(**number) == Some(start))
            .count();
        let banners = self
            .banners
            .iter()
            .filter(|number| {
                address(**number)
                    .is_some_and(|address| is_banner(image, VirtualAddress::new(address)))
            })
            .count();
        let score = starts + 4 * banners;
        (score != 0).then_some(score)
    }
}

/// Whether the addresses of `symbols` fit the image: see [`Anchors`].
pub(crate) fn fits(image: &Image<'_>, symbols: &Symbols) -> bool {
    let start = image.address(0);
    let starts = ["_text", "_stext", "startup_64"];
    let mut banners = symbols.addresses("linux_banner").peekable();
    starts
        .iter()
        .any(|name| symbols.address(name) == Some(start))
        && (banners.peek().is_none() || banners.any(|address| is_banner(image, address)))
}

/// Whether a banner stands at `address`.
pub(crate) fn is_banner(image: &Image<'_>, address: VirtualAddress) -> bool {
    let Some(offset) = image.offset(address) else {
        return false;
    };
    let text = image.string(offset, BANNER_START.len());
    text.as_deref() == Some(BANNER_START)
}

//! The kernel's records of places in its text, as its file has them.

use crate::{KernelFile, Section};

/// `struct jump_entry` (`include/linux/jump_label.h`) without the key's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JumpEntry {
    pub(crate) code: u64,
    pub(crate) target: u64,
    pub(crate) key: u64,
    /// Whether the jump is there while the key is off.
    pub(crate) inverted: bool,
}

/// `struct static_call_site` (`include/linux/static_call_types.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallSite {
    pub(crate) code: u64,
    pub(crate) key: u64,
    /// Whether it is a jump at a function's end.
    pub(crate) tail: bool,
}

/// `struct alt_instr` (`arch/x86/include/asm/alternative.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alternative {
    pub(crate) code: u64,
    pub(crate) replacement: u64,
    pub(crate) feature: u16,
    /// Whether it replaces where the feature is missing.
    pub(crate) without: bool,
    /// Whether the call is to lead where the pointer leads that the original
    /// calls through.
    pub(crate) direct_call: bool,
    pub(crate) length: usize,
    pub(crate) replacement_length: usize,
}

/// A file and how far its kernel was moved.
#[derive(Clone, Copy)]
pub(crate) struct Records<'f> {
    pub(crate) file: &'f KernelFile,
    pub(crate) slide: u64,
}

impl<'f> Records<'f> {
    /// Places that a section lists by their distance from the entry.
    pub(crate) fn relative(self, section: &str) -> Vec<u64> {
        let Some(section) = self.file.section(section) else {
            return Vec::new();
        };
        self.relative_of(section)
    }

    fn relative_of(self, section: &Section) -> Vec<u64> {
        let start = section.address.wrapping_add(self.slide);
        let words = section.bytes.as_chunks::<4>().0.iter().enumerate();
        words
            // .smp_locks is filled up with zeros.
            .filter(|(_, word)| **word != [0; 4])
            .map(|(index, word)| relative(start.wrapping_add(index as u64 * 4), *word))
            .collect()
    }

    /// Sections that list places of one constant, with the constant's name.
    pub(crate) fn constants(self, prefix: &'f str) -> impl Iterator<Item = (&'f str, Vec<u64>)> {
        let sections = self.file.sections.iter();
        sections.filter_map(move |section| {
            let name = section.name.strip_prefix(prefix)?;
            Some((name, self.relative_of(section)))
        })
    }

    /// The bytes between two run-time addresses, and where they start.
    fn between(self, range: Option<(u64, u64)>) -> (u64, &'f [u8]) {
        let found = range.and_then(|(start, end)| {
            let linked = start.wrapping_sub(self.slide);
            let length = usize::try_from(end.checked_sub(start)?).ok()?;
            let section = self
                .file
                .sections
                .iter()
                .find(|section| (section.address..section.end()).contains(&linked))?;
            let offset = usize::try_from(linked - section.address).ok()?;
            let bytes = section.bytes.get(offset..)?.get(..length)?;
            Some((start, bytes))
        });
        found.unwrap_or_default()
    }

    /// The table of jump labels between two run-time addresses.
    pub(crate) fn jumps(self, range: Option<(u64, u64)>) -> Vec<JumpEntry> {
        let (start, bytes) = self.between(range);
        let entries = bytes.as_chunks::<16>().0.iter().enumerate();
        entries
            .map(|(index, entry)| {
                let at = start.wrapping_add(index as u64 * 16);
                let [a, b, c, d, e, f, g, h, key @ ..] = *entry;
                let key = u64::from_le_bytes(key);
                JumpEntry {
                    code: relative(at, [a, b, c, d]),
                    target: relative(at.wrapping_add(4), [e, f, g, h]),
                    key: at.wrapping_add(8).wrapping_add(key & !3),
                    inverted: key & 1 != 0,
                }
            })
            .collect()
    }

    /// The table of static calls between two run-time addresses.
    pub(crate) fn calls(self, range: Option<(u64, u64)>) -> Vec<CallSite> {
        let (start, bytes) = self.between(range);
        let entries = bytes.as_chunks::<8>().0.iter().enumerate();
        entries
            .map(|(index, entry)| {
                let at = start.wrapping_add(index as u64 * 8);
                let [a, b, c, d, e, f, g, h] = *entry;
                let key = relative(at.wrapping_add(4), [e, f, g, h]);
                CallSite {
                    code: relative(at, [a, b, c, d]),
                    key: key & !3,
                    tail: key & 1 != 0,
                }
            })
            .collect()
    }

    /// The list of ftrace's sites between two run-time addresses.
    pub(crate) fn traced(self, range: Option<(u64, u64)>) -> Vec<u64> {
        let (_, bytes) = self.between(range);
        let words = bytes.as_chunks::<8>().0.iter();
        words
            .map(|word| u64::from_le_bytes(*word))
            .filter(|address| *address != 0)
            .map(|address| address.wrapping_add(self.slide))
            .collect()
    }

    /// Alternative instructions, each record of `size` bytes: 14 of them have
    /// flags of their own, 12 keep one in the number's highest bit.
    pub(crate) fn alternatives(self, size: usize) -> Vec<Alternative> {
        const INVERTED: u16 = 1 << 15;
        const NOT: u16 = 1;
        const DIRECT_CALL: u16 = 2;
        let Some(section) = self.file.section(".altinstructions") else {
            return Vec::new();
        };
        let start = section.address.wrapping_add(self.slide);
        let mut found = Vec::new();
        for (index, entry) in section.bytes.chunks_exact(size.max(1)).enumerate() {
            let at = start.wrapping_add((index * size) as u64);
            let [a, b, c, d, e, f, g, h, low, high, rest @ ..] = entry else {
                break;
            };
            let number = u16::from_le_bytes([*low, *high]);
            let (feature, flags, rest) = match rest {
                [low, high, rest @ ..] if size == 14 => {
                    (number, u16::from_le_bytes([*low, *high]), rest)
                }
                rest => (number & !INVERTED, u16::from(number & INVERTED != 0), rest),
            };
            let [length, replacement_length, ..] = rest else {
                break;
            };
            found.push(Alternative {
                code: relative(at, [*a, *b, *c, *d]),
                replacement: relative(at.wrapping_add(4), [*e, *f, *g, *h]),
                feature,
                without: flags & NOT != 0,
                direct_call: flags & DIRECT_CALL != 0,
                length: usize::from(*length),
                replacement_length: usize::from(*replacement_length),
            });
        }
        found
    }
}

fn relative(at: u64, distance: [u8; 4]) -> u64 {
    at.wrapping_add_signed(i32::from_le_bytes(distance).into())
}

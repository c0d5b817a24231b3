//! The program's file, and what its pages look like once it runs.
//!
//! The kernel maps the file's pages; the program's own start relocates what
//! lies in `PT_GNU_RELRO` and then takes the right to write away. What a
//! relocation makes of a word follows from the file and the address that the
//! program was loaded at. Words that the C library computes as it starts (the
//! functions that it chooses by the processor, its own read-only variables)
//! do not: [`Relocated::free`] names those of the former kind.

use std::ops::Range;

use object::Endianness;
use object::elf::{
    DT_RELA, DT_RELASZ, DT_RELR, DT_RELRSZ, DynamicTag, FileHeader64, PF_W, PF_X, PT_DYNAMIC,
    PT_GNU_RELRO, PT_LOAD, R_X86_64_IRELATIVE, R_X86_64_RELATIVE, RelocationType,
};
use object::read::elf::{FileHeader as _, ProgramHeader as _};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// A program has some ten.
const MOST_SEGMENTS: usize = 64;
/// The size of an entry of `DT_RELA`.
const RELA_BYTES: usize = 24;

/// Why a file is no program that can be compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProgramError {
    /// It is no ELF file for this machine.
    #[error("the program is no 64-bit ELF file: {0}")]
    Format(String),
    /// A part lies outside of the file.
    #[error("the program's {what} at {at:#x} lies outside of its file")]
    Outside {
        /// What.
        what: &'static str,
        /// Its place in the file, or its address.
        at: u64,
    },
    /// There is nothing to compare.
    #[error("the program has no {0}")]
    Missing(&'static str),
}

/// A part of the file that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    address: u64,
    offset: u64,
    length: u64,
    writable: bool,
    executable: bool,
}

/// The program's file.
#[derive(Debug)]
pub struct Program {
    file: Vec<u8>,
    segments: Vec<Segment>,
    relro: Range<u64>,
    /// Places and what is added to the base there.
    relative: Vec<(u64, u64)>,
    /// Places that hold functions which the program chooses as it starts.
    chosen: Vec<u64>,
}

/// The relocated pages of a program at some base.
#[derive(Debug)]
pub struct Relocated {
    /// The address, before the base is added, of the first byte.
    pub start: u64,
    /// What has to be there.
    pub bytes: Vec<u8>,
    /// Offsets of words that the file does not tell; they lead into the text.
    pub free: Vec<usize>,
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*word))
}

impl Program {
    /// Takes a program's file apart.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn parse(file: Vec<u8>) -> Result<Self, ProgramError> {
        let format = |error: object::Error| ProgramError::Format(error.to_string());
        let header = FileHeader64::<Endianness>::parse(&*file).map_err(format)?;
        let endian = header.endian().map_err(format)?;
        let headers = header.program_headers(endian, &*file).map_err(format)?;
        let (mut segments, mut relro, mut dynamic) = (Vec::new(), None, None);
        for header in headers.iter().take(MOST_SEGMENTS) {
            let address = header.p_vaddr(endian);
            let (offset, length) = (header.p_offset(endian), header.p_filesz(endian));
            let outside = ProgramError::Outside {
                what: "segment",
                at: offset,
            };
            let end = offset.checked_add(length).ok_or(outside.clone())?;
            if end > file.len() as u64 || address.checked_add(length).is_none() {
                return Err(outside);
            }
            match header.p_type(endian) {
                PT_LOAD => segments.push(Segment {
                    address,
                    offset,
                    length,
                    writable: header.p_flags(endian).0 & PF_W.0 != 0,
                    executable: header.p_flags(endian).0 & PF_X.0 != 0,
                }),
                PT_GNU_RELRO => relro = Some(address..address.saturating_add(length)),
                PT_DYNAMIC => dynamic = file.get(offset as usize..end as usize),
                _ => {}
            }
        }
        if !segments.iter().any(|segment| segment.executable) {
            return Err(ProgramError::Missing("text"));
        }
        let dynamic: Vec<(u64, u64)> = dynamic
            .unwrap_or_default()
            .as_chunks::<16>()
            .0
            .iter()
            .filter_map(|entry| Some((u64_at(entry, 0)?, u64_at(entry, 8)?)))
            .take_while(|(tag, _)| *tag != 0)
            .collect();
        let mut program = Self {
            file,
            segments,
            relro: relro.unwrap_or(0..0),
            relative: Vec::new(),
            chosen: Vec::new(),
        };
        let of = |tag: DynamicTag| {
            let mut entries = dynamic.iter();
            entries.find_map(|(of, value)| (*of as i64 == tag.0).then_some(*value))
        };
        program.read_rela(of(DT_RELA), of(DT_RELASZ))?;
        program.read_relr(of(DT_RELR), of(DT_RELRSZ))?;
        Ok(program)
    }

    fn slice(
        &self,
        what: &'static str,
        address: Option<u64>,
        length: Option<u64>,
    ) -> Result<Vec<u8>, ProgramError> {
        let (Some(address), Some(length)) = (address, length) else {
            return Ok(Vec::new());
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let bytes = self.at(address, length);
        bytes
            .map(<[u8]>::to_vec)
            .ok_or(ProgramError::Outside { what, at: address })
    }

    fn read_rela(&mut self, at: Option<u64>, length: Option<u64>) -> Result<(), ProgramError> {
        let table = self.slice("relocations", at, length)?;
        for entry in table.as_chunks::<RELA_BYTES>().0 {
            let [Some(place), Some(info), Some(addend)] = [0, 8, 16].map(|at| u64_at(entry, at))
            else {
                continue;
            };
            match RelocationType(info as u32) {
                R_X86_64_RELATIVE => self.relative.push((place, addend)),
                R_X86_64_IRELATIVE => self.chosen.push(place),
                _ => {}
            }
        }
        Ok(())
    }

    /// Packed relative relocations: an even word is a place; an odd one is a
    /// map of which of the 63 words after the last place are places, too.
    fn read_relr(&mut self, at: Option<u64>, length: Option<u64>) -> Result<(), ProgramError> {
        let table = self.slice("packed relocations", at, length)?;
        let mut next = 0_u64;
        let mut places = Vec::new();
        for word in table.as_chunks::<8>().0 {
            let word = u64::from_le_bytes(*word);
            if word & 1 == 0 {
                places.push(word);
                next = word.wrapping_add(8);
                continue;
            }
            let marked = (1..64).filter(|bit| word >> bit & 1 == 1);
            places.extend(marked.map(|bit: u64| next.wrapping_add((bit - 1) * 8)));
            next = next.wrapping_add(63 * 8);
        }
        for place in places {
            let value = self.at(place, 8).and_then(|bytes| u64_at(bytes, 0));
            if let Some(value) = value {
                self.relative.push((place, value));
            }
        }
        Ok(())
    }

    /// The file's bytes at an address, before the base is added.
    fn at(&self, address: u64, length: usize) -> Option<&[u8]> {
        let segment = self.segments.iter().find(|segment| {
            (segment.address..segment.address + segment.length).contains(&address)
        })?;
        let offset = usize::try_from(segment.offset + (address - segment.address)).ok()?;
        self.file.get(offset..offset.checked_add(length)?)
    }

    /// How many pages the file has.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.file.len().div_ceil(PAGE)
    }

    /// A page of the file as it is in memory: what is behind its end is zero.
    #[must_use]
    pub fn page(&self, index: usize) -> Option<[u8; PAGE]> {
        let start = index.checked_mul(PAGE)?;
        let rest = self.file.get(start..)?;
        let mut page = [0; PAGE];
        let length = rest.len().min(PAGE);
        page.get_mut(..length)?.copy_from_slice(rest.get(..length)?);
        Some(page)
    }

    /// The address of the segment, whole pages, that starts at this page of the
    /// file and can('t) be executed: from it follows the base.
    #[must_use]
    pub fn first_text_page(&self) -> Option<(u64, u64)> {
        let text = self.segments.iter().find(|segment| segment.executable)?;
        let page = PAGE as u64 - 1;
        Some((text.address & !page, (text.offset & !page) / PAGE as u64))
    }

    /// The addresses of the text.
    pub fn text(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let text = self.segments.iter().filter(|segment| segment.executable);
        text.map(|segment| segment.address..segment.address + segment.length)
    }

    /// The page of the file that is mapped at an address, before the base is
    /// added, and never written to.
    #[must_use]
    pub fn constant_page(&self, address: u64) -> Option<usize> {
        let page = PAGE as u64 - 1;
        let segment = self.segments.iter().find(|segment| {
            let end = (segment.address + segment.length).saturating_add(page) & !page;
            !segment.writable && (segment.address & !page..end).contains(&address)
        })?;
        let into = (address & !page) - (segment.address & !page);
        usize::try_from(((segment.offset & !page) + into) / PAGE as u64).ok()
    }

    /// What is relocated and then read-only, for a program at this base.
    #[must_use]
    pub fn relocated(&self, base: u64) -> Option<Relocated> {
        let length = usize::try_from(self.relro.end.checked_sub(self.relro.start)?).ok()?;
        let start = self.relro.start;
        let mut bytes = self.at(start, length)?.to_vec();
        let offset = |place: u64| {
            let offset = usize::try_from(place.checked_sub(start)?).ok()?;
            (offset.checked_add(8)? <= length).then_some(offset)
        };
        for (place, addend) in &self.relative {
            if let Some(word) = offset(*place).and_then(|at| bytes.get_mut(at..at + 8)) {
                word.copy_from_slice(&base.wrapping_add(*addend).to_le_bytes());
            }
        }
        let free = self.chosen.iter().filter_map(|place| offset(*place));
        Some(Relocated {
            start,
            free: free.collect(),
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn this_program_is_taken_apart() {
        let path = std::env::current_exe().expect("a path");
        let program = Program::parse(std::fs::read(path).expect("a program")).expect("ELF");
        assert!(program.text().any(|text| !text.is_empty()));
        let (address, page) = program.first_text_page().expect("text");
        assert_eq!(program.constant_page(address), Some(page as usize));
        let base = 0x5555_0000_0000;
        let (one, other) = (program.relocated(0), program.relocated(base));
        let (one, other) = (one.expect("read-only"), other.expect("read-only"));
        let moved = |at: usize| {
            let word = |bytes: &[u8]| u64_at(bytes, at).expect("a word");
            word(&other.bytes).wrapping_sub(word(&one.bytes))
        };
        let words = (0..one.bytes.len() - 8).step_by(8).map(moved);
        let count = words.filter(|distance| *distance == base).count();
        assert!(count > 100, "{count} words were moved");
        assert_eq!(program.page(program.pages()), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart_or_refused(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..600),
            elf in any::<bool>(),
        ) {
            if elf && bytes.len() >= 64 {
                bytes[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0");
                bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
                bytes[52..60].copy_from_slice(&[64, 0, 56, 0, 4, 0, 0, 0]);
            }
            if let Ok(program) = Program::parse(bytes) {
                let _ = program.relocated(1 << 40);
                let _ = program.constant_page(0x1000);
            }
        }
    }
}

//! A kernel's file: its sections at the addresses that it was linked for, and
//! the places that change when it runs elsewhere.
//!
//! Behind the ELF file in a boot image stand the relocations
//! (`arch/x86/tools/relocs.c`): lists of 32-bit addresses, each behind a zero.
//! The first holds 64-bit values, the last 32-bit ones; between them, where
//! per-CPU variables are linked at zero, one of values that are made smaller.

use object::Endianness;
use object::elf::{FileHeader64, SHF_ALLOC, SHF_WRITE, SHT_NOBITS};
use object::read::elf::{FileHeader as _, SectionHeader as _};
use secmon_profile::{BuildId, build_ids};

use crate::{ReferenceError, boot_image, package};

/// A kernel has some fifty.
const MOST_SECTIONS: usize = 4096;
/// What only serves the start, and is long.
const LEFT_OUT: [&str; 5] = [
    ".init.scratch",
    ".data..percpu",
    ".init.text",
    ".bss",
    ".brk",
];

/// A section of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// Where it was linked for.
    pub address: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Whether the file says that it is written to.
    pub writable: bool,
}

impl Section {
    /// The address behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.bytes.len() as u64)
    }
}

/// Addresses, as linked, of values that depend on where the kernel runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relocations {
    /// 64-bit values that grow with the distance.
    pub wide: Vec<u64>,
    /// 32-bit values that grow with the distance.
    pub narrow: Vec<u64>,
    /// 32-bit values that shrink with the distance.
    pub inverse: Vec<u64>,
}

impl Relocations {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wide.is_empty() && self.narrow.is_empty() && self.inverse.is_empty()
    }

    /// Reads what stands behind the ELF file.
    fn parse(bytes: &[u8]) -> Self {
        let mut lists: Vec<Vec<u64>> = Vec::new();
        for word in bytes.as_chunks::<4>().0 {
            let count = lists.len();
            match (i32::from_le_bytes(*word), lists.last_mut()) {
                // Not more than there are: anything else is something else.
                (0, _) if count < 3 => lists.push(Vec::new()),
                (0, _) | (_, None) => break,
                (address, Some(list)) => list.push(i64::from(address) as u64),
            }
        }
        let mut lists = lists.into_iter();
        let (first, second, third) = (lists.next(), lists.next(), lists.next());
        let (narrow, inverse) = match (second, third) {
            (Some(inverse), Some(narrow)) => (narrow, inverse),
            (narrow, _) => (narrow.unwrap_or_default(), Vec::new()),
        };
        Self {
            wide: first.unwrap_or_default(),
            narrow,
            inverse,
        }
    }
}

/// A kernel's file, unpacked and taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFile {
    /// Its build id, where it has one.
    pub build_id: Option<BuildId>,
    /// Its sections with content, by address.
    pub sections: Vec<Section>,
    /// What changes with the place where it runs.
    pub relocations: Relocations,
}

impl KernelFile {
    /// Takes a boot image (`vmlinuz`), an ELF file (`vmlinux`) or a Debian
    /// package with one of these apart.
    ///
    /// # Errors
    /// [`ReferenceError`] says what the file is not.
    pub fn parse(file: &[u8]) -> Result<Self, ReferenceError> {
        if package::is_package(file) {
            return Self::parse_kernel(&package::kernel(file)?);
        }
        Self::parse_kernel(file)
    }

    fn parse_kernel(file: &[u8]) -> Result<Self, ReferenceError> {
        match boot_image::payload(file)? {
            Some(payload) => Self::parse_elf(&boot_image::unpack(payload)?),
            None if file.starts_with(b"\x7fELF") => Self::parse_elf(file),
            None => Err(ReferenceError::NotKernel),
        }
    }

    fn parse_elf(file: &[u8]) -> Result<Self, ReferenceError> {
        let damaged = |error: object::read::Error| ReferenceError::Elf {
            reason: error.to_string(),
        };
        let header = FileHeader64::<Endianness>::parse(file).map_err(damaged)?;
        let endian = header.endian().map_err(damaged)?;
        if endian != Endianness::Little || header.e_machine(endian) != object::elf::EM_X86_64 {
            return Err(ReferenceError::NotKernel);
        }
        let table = header.sections(endian, file).map_err(damaged)?;
        let mut sections = Vec::new();
        let mut length = 0_usize;
        for section in table.iter().take(MOST_SECTIONS) {
            let flags = section.sh_flags(endian);
            let kind = section.sh_type(endian);
            let name = table.section_name(endian, section).map_err(damaged)?;
            let name = String::from_utf8_lossy(name).into_owned();
            if flags.0 & SHF_ALLOC.0 == 0 || kind == SHT_NOBITS || LEFT_OUT.contains(&name.as_str())
            {
                continue;
            }
            let bytes = section.data(endian, file).map_err(damaged)?;
            // Sections may overlap in a hostile file.
            length = length.saturating_add(bytes.len());
            if length > boot_image::LONGEST {
                return Err(ReferenceError::TooLong {
                    limit: boot_image::LONGEST,
                });
            }
            sections.push(Section {
                name,
                address: section.sh_addr(endian),
                bytes: bytes.to_vec(),
                writable: flags.0 & SHF_WRITE.0 != 0,
            });
        }
        sections.sort_by_key(|section| section.address);
        let end = header
            .e_shoff(endian)
            .checked_add(u64::from(header.e_shnum(endian)) * u64::from(header.e_shentsize(endian)));
        let behind = end
            .and_then(|end| usize::try_from(end).ok())
            .and_then(|end| file.get(end..))
            .unwrap_or_default();
        let mut found = Self {
            build_id: None,
            sections,
            relocations: Relocations::parse(behind),
        };
        let notes = found.section(".notes").map(|notes| build_ids(&notes.bytes));
        found.build_id = notes.and_then(|ids| ids.into_iter().next());
        for section in [".text", ".rodata"] {
            if found.section(section).is_none() {
                return Err(ReferenceError::NoSection { section });
            }
        }
        Ok(found)
    }

    /// The section of this name.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }
}

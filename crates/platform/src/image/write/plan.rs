//! What a dump's file will hold, before a byte of it is written: which bytes
//! of headers and which memory at which offset.

use secmon_memory::{MemoryRegion, PAGE_SIZE, PhysicalMemory};
use sha2::{Digest, Sha256};

use super::{WriteError, WriteFormat};

/// Offsets in files are signed.
const MAX_LENGTH: u64 = i64::MAX as u64;

/// Something at an offset of the file; between two of them are zeros.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) content: Content,
}

#[derive(Debug)]
pub(crate) enum Content {
    Bytes(Vec<u8>),
    Memory(MemoryRegion),
}

impl Extent {
    pub(crate) fn length(&self) -> u64 {
        match &self.content {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Memory(region) => region.length,
        }
    }
}

/// A whole file.
#[derive(Debug)]
pub(crate) struct Plan {
    /// By offset, disjoint.
    pub(crate) extents: Vec<Extent>,
    /// The file's length.
    pub(crate) length: u64,
}

impl Plan {
    pub(crate) fn new(
        memory: &dyn PhysicalMemory,
        format: WriteFormat,
        vmcoreinfo: Option<&[u8]>,
    ) -> Result<Self, WriteError> {
        let regions = memory.regions();
        if regions.is_empty() {
            return Err(WriteError::NoMemory);
        }
        let extents = match format {
            WriteFormat::Raw => raw(regions),
            WriteFormat::Lime => lime(regions),
            WriteFormat::ElfCore => elf(regions, vmcoreinfo.unwrap_or_default()),
        };
        let length = extents
            .last()
            .and_then(|last| last.offset.checked_add(last.length()))
            .filter(|length| *length <= MAX_LENGTH)
            .ok_or(WriteError::TooLarge)?;
        Ok(Self { extents, length })
    }

    /// Tells this plan from any other; a resumed dump must have the same.
    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for extent in &self.extents {
            hash.update(extent.offset.to_le_bytes());
            hash.update(extent.length().to_le_bytes());
            match &extent.content {
                Content::Bytes(bytes) => hash.update(bytes),
                Content::Memory(region) => hash.update(region.start.as_u64().to_le_bytes()),
            }
        }
        hash.finalize().into()
    }
}

/// The file offset is the physical address.
fn raw(regions: &[MemoryRegion]) -> Vec<Extent> {
    let extents = regions.iter().map(|region| Extent {
        offset: region.start.as_u64(),
        content: Content::Memory(*region),
    });
    extents.collect()
}

/// LiME version 1: see the reader.
fn lime(regions: &[MemoryRegion]) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut offset = 0u64;
    for region in regions {
        let mut header = Vec::with_capacity(32);
        header.extend_from_slice(b"EMiL");
        header.extend_from_slice(&1u32.to_le_bytes());
        let first = region.start.as_u64();
        // Regions are never empty.
        let last = first.saturating_add(region.length).saturating_sub(1);
        for field in [first, last, 0] {
            header.extend_from_slice(&field.to_le_bytes());
        }
        let data = offset.saturating_add(header.len() as u64);
        extents.push(Extent {
            offset,
            content: Content::Bytes(header),
        });
        extents.push(Extent {
            offset: data,
            content: Content::Memory(*region),
        });
        offset = data.saturating_add(region.length);
    }
    extents
}

/// An ELF core as QEMU's `dump-guest-memory` writes it without paging: a
/// segment a region, its virtual address its physical one. Memory starts at a
/// multiple of the page size, so that readers can map it page by page.
fn elf(regions: &[MemoryRegion], vmcoreinfo: &[u8]) -> Vec<Extent> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    const SECTION_HEADER: u64 = 64;
    const MANY: u64 = 0xffff; // PN_XNUM
    let note = if vmcoreinfo.is_empty() {
        Vec::new()
    } else {
        note(b"VMCOREINFO\0", vmcoreinfo)
    };
    let count = regions.len() as u64 + u64::from(!note.is_empty());
    let many = count >= MANY;
    let section = HEADER + count * PROGRAM_HEADER;
    let note_offset = section + if many { SECTION_HEADER } else { 0 };
    let memory = (note_offset + note.len() as u64).next_multiple_of(PAGE_SIZE);

    let mut head = Vec::new();
    // ELFCLASS64, ELFDATA2LSB, EV_CURRENT.
    head.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put16(&mut head, 4); // ET_CORE
    put16(&mut head, 62); // EM_X86_64
    put32(&mut head, 1); // EV_CURRENT
    put64(&mut head, 0); // e_entry
    put64(&mut head, HEADER); // e_phoff
    put64(&mut head, if many { section } else { 0 }); // e_shoff
    put32(&mut head, 0); // e_flags
    put16(&mut head, HEADER as u16);
    put16(&mut head, PROGRAM_HEADER as u16);
    put16(&mut head, count.min(MANY) as u16);
    put16(&mut head, if many { SECTION_HEADER as u16 } else { 0 });
    put16(&mut head, u16::from(many)); // e_shnum
    put16(&mut head, 0); // e_shstrndx
    if !note.is_empty() {
        let size = note.len() as u64;
        program_header(&mut head, 4, note_offset, 0, size); // PT_NOTE
    }
    let mut offset = memory;
    let mut extents = Vec::new();
    for region in regions {
        program_header(&mut head, 1, offset, region.start.as_u64(), region.length); // PT_LOAD
        extents.push(Extent {
            offset,
            content: Content::Memory(*region),
        });
        offset = offset.saturating_add(region.length);
    }
    if many {
        // The first section header is empty but for the number of segments.
        head.extend_from_slice(&[0; 44]);
        put32(&mut head, count.min(u64::from(u32::MAX)) as u32); // sh_info
        head.extend_from_slice(&[0; 16]);
    }
    head.extend_from_slice(&note);
    extents.insert(
        0,
        Extent {
            offset: 0,
            content: Content::Bytes(head),
        },
    );
    extents
}

fn put16(bytes: &mut Vec<u8>, value: u16) {
    bytes.extend_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut Vec<u8>, value: u32) {
    bytes.extend_from_slice(&value.to_le_bytes());
}

fn put64(bytes: &mut Vec<u8>, value: u64) {
    bytes.extend_from_slice(&value.to_le_bytes());
}

/// `Elf64_Phdr` of a segment whose sizes in file and memory are the same.
fn program_header(bytes: &mut Vec<u8>, kind: u32, offset: u64, address: u64, size: u64) {
    put32(bytes, kind);
    put32(bytes, 0); // p_flags
    for field in [offset, address, address, size, size, 0] {
        put64(bytes, field);
    }
}

/// An ELF note of type 0; name and content padded to 4 bytes each.
fn note(name: &[u8], content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put32(&mut bytes, name.len() as u32);
    put32(&mut bytes, content.len() as u32);
    put32(&mut bytes, 0);
    for part in [name, content] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

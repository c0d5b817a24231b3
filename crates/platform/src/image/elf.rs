//! ELF core files: QEMU's `dump-guest-memory`, with and without paging, which
//! `virsh dump --memory-only` writes too; `/proc/vmcore`, `makedumpfile -E`.
//!
//! Only what says where memory lies is used: program headers (their *physical*
//! addresses) and notes. Source: System V ABI, chapter 5; QEMU
//! `dump/dump.c`; Linux `include/uapi/linux/elf.h` for `PN_XNUM`.

use std::sync::Arc;

use object::LittleEndian;
use object::elf;
use object::pod;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use secmon_memory::{MemoryRegion, PhysicalAddress};

use super::bytes::ImageBytes;
use super::notes::Notes;
use super::pieces::{PHYSICAL_END, Piece, Pieces, memory_of};
use super::{Image, ImageError, ImageFormat, ImageNote, ImageOptions};

/// The most program headers that are read: QEMU's paging dump of a large guest
/// has tens of thousands.
const MAX_SEGMENTS: u64 = 1 << 22;
/// The most bytes of notes that are read: QEMU writes less than 1 KiB a vCPU
/// and at most 1 MiB for the guest.
const MAX_NOTES_SIZE: u64 = 16 << 20;
/// Program headers read at once.
const BATCH: u64 = 1024;

const FORMAT: ImageFormat = ImageFormat::ElfCore;

pub(crate) fn open(
    file: &Arc<dyn ImageBytes>,
    options: &ImageOptions<'_>,
    notes: Vec<ImageNote>,
) -> Result<Image, ImageError> {
    let mut ident = [0; 16];
    file.read(0, &mut ident, "ELF identification")?;
    if ident[5] != elf::ELFDATA2LSB.0 {
        return Err(ImageError::Unsupported {
            what: format!("an ELF file of data encoding {}", ident[5]),
            advice: "only little-endian x86-64 guests are read",
        });
    }
    match elf::FileClass(ident[4]) {
        elf::ELFCLASS32 => read_core::<elf::FileHeader32<LittleEndian>>(file, options, notes),
        elf::ELFCLASS64 => read_core::<elf::FileHeader64<LittleEndian>>(file, options, notes),
        other => Err(damaged(4, format!("ELF class {}", other.0))),
    }
}

fn damaged(offset: u64, what: String) -> ImageError {
    ImageError::Damaged {
        format: FORMAT,
        offset,
        what,
    }
}

/// One structure of the file; its size is known and small.
fn read_structure<T: pod::Pod + Copy>(
    file: &dyn ImageBytes,
    offset: u64,
    what: &'static str,
) -> Result<T, ImageError> {
    let bytes = file.read_vec(offset, size_of::<T>(), what)?;
    match pod::from_bytes::<T>(&bytes) {
        Ok((value, _)) => Ok(*value),
        Err(()) => Err(damaged(offset, format!("{what} can't be read"))),
    }
}

fn read_core<Elf>(
    file: &Arc<dyn ImageBytes>,
    options: &ImageOptions<'_>,
    mut image_notes: Vec<ImageNote>,
) -> Result<Image, ImageError>
where
    Elf: FileHeader<Endian = LittleEndian>,
{
    let endian = LittleEndian;
    let header: Elf = read_structure(file.as_ref(), 0, "ELF header")?;
    let kind = header.e_type(endian);
    if kind != elf::ET_CORE {
        return Err(ImageError::Unsupported {
            what: format!("an ELF file of type {}", kind.0),
            advice: "a memory image is a core file (type 4), this is a program or library",
        });
    }
    let machine = header.e_machine(endian);
    if machine != elf::EM_X86_64 && machine != elf::EM_386 {
        return Err(ImageError::Unsupported {
            what: format!("a core file of ELF machine {}", machine.0),
            advice: "only x86-64 guests are read",
        });
    }
    let (table, count) = program_headers(file.as_ref(), &header)?;
    let entry = size_of::<Elf::ProgramHeader>() as u64;

    let mut pieces = Pieces::default();
    let mut notes = Notes::default();
    let mut notes_left = MAX_NOTES_SIZE;
    let (mut loads, mut at_zero, mut not_physical, mut no_bytes) = (0u64, 0u64, 0u64, 0u64);
    let mut index = 0;
    while index < count {
        let batch = BATCH.min(count - index);
        let offset = table + index * entry;
        let bytes = file.read_vec(offset, (batch * entry) as usize, "ELF program headers")?;
        let Ok((headers, _)) = pod::slice_from_bytes::<Elf::ProgramHeader>(&bytes, batch as usize)
        else {
            return Err(damaged(offset, "program headers can't be read".to_owned()));
        };
        for header in headers {
            let start: u64 = header.p_offset(endian).into();
            let file_size: u64 = header.p_filesz(endian).into();
            match header.p_type(endian) {
                elf::PT_NOTE => {
                    if file_size > notes_left {
                        return Err(ImageError::TooMany {
                            what: "bytes of ELF notes",
                            limit: MAX_NOTES_SIZE,
                        });
                    }
                    notes_left -= file_size;
                    match file.read_vec(start, file_size as usize, "ELF notes") {
                        Ok(bytes) => notes.parse(&bytes),
                        Err(ImageError::Truncated { offset, .. }) => {
                            image_notes.push(ImageNote::Damaged {
                                offset,
                                what: "the notes lie past the end of the file".to_owned(),
                            });
                        }
                        Err(error) => return Err(error),
                    }
                }
                elf::PT_LOAD => {
                    loads += 1;
                    let physical: u64 = header.p_paddr(endian).into();
                    let memory_size: u64 = header.p_memsz(endian).into();
                    at_zero += u64::from(physical == 0);
                    let size = memory_size.max(file_size);
                    if size == 0 {
                        continue;
                    }
                    if physical
                        .checked_add(size)
                        .is_none_or(|end| end > PHYSICAL_END)
                        || start.checked_add(file_size).is_none() && file_size > 0
                    {
                        not_physical += 1;
                        continue;
                    }
                    // A segment wholly without bytes: QEMU's paging dump names
                    // so what is mapped and not RAM (a device, a ROM).
                    if file_size == 0 {
                        no_bytes += 1;
                        continue;
                    }
                    if file_size < memory_size {
                        pieces.push_missing(
                            MemoryRegion::new(
                                PhysicalAddress::new(physical + file_size),
                                memory_size - file_size,
                            ),
                            "its writer left it out of the ELF segment",
                        )?;
                    }
                    pieces.push(
                        Piece {
                            start: physical,
                            length: file_size,
                            offset: start,
                        },
                        file.len(),
                    )?;
                }
                _ => {}
            }
        }
        index += batch;
    }
    if loads > 1 && at_zero == loads {
        return Err(ImageError::Unsupported {
            what: "a core file whose segments have no physical addresses".to_owned(),
            advice: "it is the core of one process; write the guest's memory with \
                     `dump-guest-memory` or `virsh dump --memory-only`",
        });
    }
    if not_physical > 0 {
        image_notes.push(ImageNote::Skipped {
            count: not_physical,
            what: "ELF segments that name no physical memory",
        });
    }
    if no_bytes > 0 {
        image_notes.push(ImageNote::Skipped {
            count: no_bytes,
            what: "ELF segments without bytes (mapped devices)",
        });
    }
    if pieces.is_empty() {
        return Err(damaged(
            table,
            format!("none of {count} program headers leads to memory inside of the file"),
        ));
    }
    let (pieces, missing, piece_notes) = pieces.finish();
    image_notes.extend(piece_notes);
    let hints = notes.finish(&mut image_notes);
    Ok(Image {
        memory: memory_of(file, &pieces, missing, options.volatility)?,
        format: FORMAT,
        notes: image_notes,
        hints,
    })
}

/// Where the program headers are and how many.
fn program_headers<Elf>(file: &dyn ImageBytes, header: &Elf) -> Result<(u64, u64), ImageError>
where
    Elf: FileHeader<Endian = LittleEndian>,
{
    let endian = LittleEndian;
    let table: u64 = header.e_phoff(endian).into();
    let entry = size_of::<Elf::ProgramHeader>() as u64;
    let stated = u64::from(header.e_phentsize(endian));
    if stated != entry {
        return Err(damaged(
            if header.is_class_64() { 54 } else { 42 },
            format!("program headers of {stated} bytes each, {entry} expected"),
        ));
    }
    let mut count = u64::from(header.e_phnum(endian));
    if count == u64::from(elf::PN_XNUM) {
        // The true number is in the first section header.
        let sections: u64 = header.e_shoff(endian).into();
        if sections == 0 {
            return Err(damaged(
                0,
                "the number of program headers should be in a section header, there is none"
                    .to_owned(),
            ));
        }
        let section: Elf::SectionHeader =
            read_structure(file, sections, "first ELF section header")?;
        count = u64::from(section.sh_info(endian));
    }
    if count > MAX_SEGMENTS {
        return Err(ImageError::TooMany {
            what: "ELF segments",
            limit: MAX_SEGMENTS,
        });
    }
    if count == 0 {
        return Err(damaged(0, "no program headers".to_owned()));
    }
    let needed = table.saturating_add(count * entry);
    if needed > file.len() {
        return Err(ImageError::Truncated {
            what: "ELF program headers",
            offset: table,
            needed,
            available: file.len(),
        });
    }
    Ok((table, count))
}

//! kdump-compressed files: QEMU's `dump-guest-memory -z`, `-l`, `-s`, and what
//! `makedumpfile` writes, flattened or not.
//!
//! A header block, a sub-header, two bitmaps (which page frames are RAM, which
//! of them are in the file), a descriptor for each page in the file, then the
//! pages. Sources: makedumpfile `diskdump_mod.h` and `IMPLEMENTATION`; QEMU
//! `include/sysemu/dump.h`, where the same structures are declared without
//! padding.

use std::sync::Arc;

use secmon_memory::PAGE_SIZE;

use super::bytes::ImageBytes;
use super::kdump_pages::{KdumpMemory, PageIndex};
use super::notes::Notes;
use super::{Image, ImageError, ImageFormat, ImageNote, ImageOptions};

/// The first bytes of the file.
pub(crate) const SIGNATURE: &[u8; 8] = b"KDUMP   ";
/// Bytes that hold the header and the sub-header.
pub const HEADER_SIZE: usize = 2 * PAGE_SIZE as usize;
/// The most page frames: 8 TiB of guest physical addresses.
const MAX_FRAMES: u64 = 1 << 31;
/// The most bytes of notes, and of VMCOREINFO, that are read.
const MAX_NOTES_SIZE: u64 = 16 << 20;
const MAX_VMCOREINFO_SIZE: u64 = 1 << 20;
/// `status` of a dump that could not be finished (`DUMP_DH_COMPRESSED_INCOMPLETE`).
const STATUS_INCOMPLETE: u32 = 0x8;
/// The `dump_level` that leaves out pages of zeros and nothing else; QEMU
/// states it as well, and leaves out none.
const LEVEL_ZERO_PAGES: u32 = 1;

/// Where a writer of one word size puts the fields it aligns differently.
struct FieldOffsets {
    status: usize,
    block_size: usize,
    sub_header_blocks: usize,
    bitmap_blocks: usize,
    max_frame: usize,
    // In the sub-header, from its start; each with its bytes.
    dump_level: usize,
    split: usize,
    start_frame: (usize, usize),
    end_frame: (usize, usize),
    vmcoreinfo_offset: usize,
    vmcoreinfo_size: (usize, usize),
    notes_offset: usize,
    notes_size: (usize, usize),
    start_frame_64: usize,
    end_frame_64: usize,
    max_frame_64: usize,
}

const OFFSETS_64: FieldOffsets = FieldOffsets {
    status: 424,
    block_size: 428,
    sub_header_blocks: 432,
    bitmap_blocks: 436,
    max_frame: 440,
    dump_level: 8,
    split: 12,
    start_frame: (16, 8),
    end_frame: (24, 8),
    vmcoreinfo_offset: 32,
    vmcoreinfo_size: (40, 8),
    notes_offset: 48,
    notes_size: (56, 8),
    start_frame_64: 80,
    end_frame_64: 88,
    max_frame_64: 96,
};

const OFFSETS_32: FieldOffsets = FieldOffsets {
    status: 412,
    block_size: 416,
    sub_header_blocks: 420,
    bitmap_blocks: 424,
    max_frame: 428,
    dump_level: 4,
    split: 8,
    start_frame: (12, 4),
    end_frame: (16, 4),
    vmcoreinfo_offset: 20,
    vmcoreinfo_size: (28, 4),
    notes_offset: 32,
    notes_size: (40, 4),
    start_frame_64: 56,
    end_frame_64: 64,
    max_frame_64: 72,
};

/// What the header and the sub-header say, checked against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KdumpHeader {
    /// `header_version`.
    pub version: u32,
    /// `status`: flags of compression, and whether the dump was finished.
    pub status: u32,
    /// Blocks of the sub-header.
    pub sub_header_blocks: u32,
    /// Blocks of the bitmaps.
    pub bitmap_blocks: u32,
    /// The number of page frames that the bitmaps describe.
    pub frames: u64,
    /// `dump_level`: the kinds of pages that were left out.
    pub dump_level: u32,
    /// The frames that this file holds, if the dump was split into several.
    pub split: Option<(u64, u64)>,
    /// File offset and size of the VMCOREINFO text, if any.
    pub vmcoreinfo: Option<(u64, u64)>,
    /// File offset and size of the ELF notes, if any.
    pub notes: Option<(u64, u64)>,
}

fn number(bytes: &[u8], offset: usize, width: usize) -> Option<u64> {
    let mut value = [0; 8];
    value
        .get_mut(..width)?
        .copy_from_slice(bytes.get(offset..offset.checked_add(width)?)?);
    Some(u64::from_le_bytes(value))
}

impl KdumpHeader {
    /// Reads both headers from the first [`HEADER_SIZE`] bytes of a file.
    ///
    /// # Errors
    /// The file offset of the field that makes no sense, and what it is.
    pub fn parse(bytes: &[u8]) -> Result<Self, (u64, String)> {
        if !bytes.starts_with(SIGNATURE) {
            return Err((0, "no kdump signature".to_owned()));
        }
        // Nothing in the file says which word size its writer had: QEMU calls
        // the machine x86_64 in both. The block size is in one place or in the
        // other; where chance makes both plausible, the bitmaps' size decides.
        let mut attempts = [&OFFSETS_64, &OFFSETS_32].map(|offsets| Self::parse_as(bytes, offsets));
        let fits = |attempt: &Result<Self, _>| {
            attempt.as_ref().is_ok_and(|header| {
                let bitmap = header.frames.div_ceil(8 * PAGE_SIZE);
                let blocks = u64::from(header.bitmap_blocks);
                blocks == bitmap || blocks == 2 * bitmap
            })
        };
        if !fits(&attempts[0]) && (fits(&attempts[1]) || attempts[0].is_err()) {
            attempts.swap(0, 1);
        }
        let [first, second] = attempts;
        // Of two errors the one of the usual layout is worth telling.
        match (first, second) {
            (Ok(header), _) => Ok(header),
            (Err(_), Err(error)) => Err(error),
            (Err(error), Ok(_)) => Err(error),
        }
    }

    fn parse_as(bytes: &[u8], at: &FieldOffsets) -> Result<Self, (u64, String)> {
        let short = || (bytes.len() as u64, "the header is cut".to_owned());
        let field = |offset| {
            number(bytes, offset, 4)
                .map(|value| value as u32)
                .ok_or_else(short)
        };
        let block_size = field(at.block_size)?;
        if u64::from(block_size) != PAGE_SIZE {
            return Err((
                at.block_size as u64,
                format!("blocks of {block_size} bytes (a dump of x86-64 has 4096)"),
            ));
        }
        let version = field(8)?;
        let sub_header_blocks = field(at.sub_header_blocks)?;
        if version > 64 {
            return Err((8, format!("header version {version}")));
        }
        let sub = bytes
            .get(PAGE_SIZE as usize..HEADER_SIZE)
            .ok_or_else(short)?;
        let sub_field = |offset, width| number(sub, offset, width).ok_or_else(short);
        let has_sub = sub_header_blocks > 0;
        let part =
            |(offset, size): (u64, u64)| (offset != 0 && size != 0).then_some((offset, size));
        let mut frames = u64::from(field(at.max_frame)?);
        let mut split_range = (
            sub_field(at.start_frame.0, at.start_frame.1)?,
            sub_field(at.end_frame.0, at.end_frame.1)?,
        );
        if has_sub && version >= 6 {
            split_range = (
                sub_field(at.start_frame_64, 8)?,
                sub_field(at.end_frame_64, 8)?,
            );
            // makedumpfile before 1.5.4 leaves it zero.
            let frames_64 = sub_field(at.max_frame_64, 8)?;
            if frames_64 != 0 {
                frames = frames_64;
            }
        }
        if frames == 0 || frames > MAX_FRAMES {
            return Err((at.max_frame as u64, format!("{frames} page frames")));
        }
        let split = has_sub && version >= 2 && sub_field(at.split, 4)? != 0;
        if split && split_range.0 > split_range.1 {
            let (start, end) = split_range;
            return Err((
                PAGE_SIZE + at.start_frame.0 as u64,
                format!("split at frames {start} to {end}"),
            ));
        }
        Ok(Self {
            version,
            status: field(at.status)?,
            sub_header_blocks,
            bitmap_blocks: field(at.bitmap_blocks)?,
            frames,
            dump_level: if has_sub && version >= 1 {
                sub_field(at.dump_level, 4)? as u32
            } else {
                0
            },
            split: split.then_some(split_range),
            vmcoreinfo: if has_sub && version >= 3 {
                part((
                    sub_field(at.vmcoreinfo_offset, 8)?,
                    sub_field(at.vmcoreinfo_size.0, at.vmcoreinfo_size.1)?,
                ))
            } else {
                None
            },
            notes: if has_sub && version >= 4 {
                part((
                    sub_field(at.notes_offset, 8)?,
                    sub_field(at.notes_size.0, at.notes_size.1)?,
                ))
            } else {
                None
            },
        })
    }

    /// The file offset of the first bitmap.
    pub(crate) fn bitmap_offset(&self) -> u64 {
        (1 + u64::from(self.sub_header_blocks)) * PAGE_SIZE
    }

    /// The file offset of the page descriptors.
    pub(crate) fn descriptors_offset(&self) -> u64 {
        self.bitmap_offset() + u64::from(self.bitmap_blocks) * PAGE_SIZE
    }

    /// Whether every page that is left out held zeros.
    pub(crate) fn excludes_zero_pages_only(&self) -> bool {
        self.dump_level == LEVEL_ZERO_PAGES
    }
}

pub(crate) fn open(
    bytes: &Arc<dyn ImageBytes>,
    options: &ImageOptions<'_>,
    mut notes: Vec<ImageNote>,
) -> Result<Image, ImageError> {
    let damaged = |(offset, what)| ImageError::Damaged {
        format: ImageFormat::Kdump,
        offset,
        what,
    };
    let mut first = [0; HEADER_SIZE];
    bytes.read_padded(0, &mut first, "kdump header")?;
    let header = KdumpHeader::parse(&first).map_err(damaged)?;
    let (index, regions) = PageIndex::read(bytes.as_ref(), &header)?;
    if regions.is_empty() {
        return Err(damaged((
            header.bitmap_offset(),
            "no page frame is marked in the bitmaps".to_owned(),
        )));
    }
    if let Some((start, end)) = header.split {
        notes.push(ImageNote::Partial {
            what: format!(
                "it was split, and this file has the page frames {start:#x} to {end:#x}; \
                 join the parts with `makedumpfile --reassemble`"
            ),
        });
    }
    if header.status & STATUS_INCOMPLETE != 0 {
        notes.push(ImageNote::Partial {
            what: "its writer ran out of space".to_owned(),
        });
    }
    let ram: u64 = regions.iter().map(|region| region.length / PAGE_SIZE).sum();
    let excluded = ram.saturating_sub(index.pages());
    if excluded > 0 {
        notes.push(ImageNote::ExcludedPages {
            count: excluded,
            reason: if header.excludes_zero_pages_only() {
                "they hold zeros, and read so"
            } else {
                "its writer left them out (free, cache, user or zero pages)"
            },
        });
    }
    let mut found = Notes::default();
    for (part, limit, is_notes) in [
        (header.notes, MAX_NOTES_SIZE, true),
        (header.vmcoreinfo, MAX_VMCOREINFO_SIZE, false),
    ] {
        let Some((offset, size)) = part else { continue };
        if size > limit {
            return Err(ImageError::TooMany {
                what: "bytes of notes",
                limit,
            });
        }
        match bytes.read_vec(offset, size as usize, "kdump notes") {
            Ok(bytes) if is_notes => found.parse(&bytes),
            Ok(bytes) => found.set_vmcoreinfo(bytes),
            Err(ImageError::Truncated { offset, .. }) => notes.push(ImageNote::Damaged {
                offset,
                what: "the notes lie past the end of the file".to_owned(),
            }),
            Err(error) => return Err(error),
        }
    }
    let hints = found.finish(&mut notes);
    let memory = KdumpMemory::new(
        Arc::clone(bytes),
        header,
        index,
        regions,
        options.cache_size,
    );
    if let Some(note) = memory.check_end() {
        notes.push(note);
    }
    Ok(Image {
        memory: Arc::new(memory),
        format: ImageFormat::Kdump,
        notes,
        hints,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A header as a 64-bit writer lays it out.
    fn header_64(frames: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE];
        bytes[..8].copy_from_slice(SIGNATURE);
        bytes[8] = 6;
        let mut put = |offset: usize, value: u32| {
            bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(OFFSETS_64.block_size, 4096);
        put(OFFSETS_64.sub_header_blocks, 1);
        put(
            OFFSETS_64.bitmap_blocks,
            2 * u64::from(frames).div_ceil(8 * 4096) as u32,
        );
        put(OFFSETS_64.max_frame, frames);
        bytes
    }

    #[test]
    fn tells_word_sizes_apart_even_for_a_block_size_of_frames() {
        // 4096 frames: the 32-bit layout's block size could be read from the
        // 64-bit timestamp, the 64-bit layout's from the 32-bit frame count.
        for frames in [1u32, 4096, 0x20000, 0x8000_0000] {
            let mut bytes = header_64(frames);
            let parsed = KdumpHeader::parse(&bytes).expect("64-bit");
            assert_eq!(parsed.frames, u64::from(frames));
            // Microseconds that look like a block size.
            bytes[416..420].copy_from_slice(&4096u32.to_le_bytes());
            let parsed = KdumpHeader::parse(&bytes).expect("64-bit");
            assert_eq!(parsed.frames, u64::from(frames));

            let mut bytes = vec![0; HEADER_SIZE];
            bytes[..8].copy_from_slice(SIGNATURE);
            bytes[8] = 6;
            let blocks = 2 * u64::from(frames).div_ceil(8 * 4096) as u32;
            for (offset, value) in [(416, 4096), (420, 1), (424, blocks), (428, frames)] {
                bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
            }
            let parsed = KdumpHeader::parse(&bytes).expect("32-bit");
            assert_eq!(parsed.frames, u64::from(frames));
            assert_eq!(parsed.bitmap_blocks, blocks);
        }
    }

    #[test]
    fn says_which_field_is_wrong() {
        let mut bytes = header_64(100);
        bytes[OFFSETS_64.block_size] = 1;
        let (offset, what) = KdumpHeader::parse(&bytes).expect_err("no such block size");
        assert_eq!(offset, OFFSETS_64.block_size as u64);
        assert!(what.contains("4097"), "{what}");
    }

    proptest! {
        #[test]
        fn survives_anything(mut bytes in prop::collection::vec(any::<u8>(), 0..HEADER_SIZE + 1)) {
            let count = bytes.len().min(8);
            bytes[..count].copy_from_slice(&SIGNATURE[..count]);
            if let Ok(header) = KdumpHeader::parse(&bytes) {
                prop_assert!(header.frames <= MAX_FRAMES);
            }
        }

        #[test]
        fn survives_changed_fields(
            changes in prop::collection::vec((0usize..HEADER_SIZE, any::<u8>()), 0..32),
        ) {
            let mut bytes = header_64(0x20000);
            for (offset, value) in changes {
                bytes[offset] = value;
            }
            let _ = KdumpHeader::parse(&bytes);
        }
    }
}

//! LiME, version 1: runs of memory, each behind a header of 32 bytes.
//!
//! Source: LiME `src/lime.h`, `lime_mem_range_header`. AVML writes the same
//! when it does not compress, and then leaves out blocks that hold only zeros.

use std::sync::Arc;

use super::bytes::ImageBytes;
use super::pieces::{MAX_PIECES, PHYSICAL_END, Piece, Pieces, memory_of};
use super::{Image, ImageError, ImageFormat, ImageHints, ImageNote, ImageOptions};

/// Bytes of a header.
pub(crate) const HEADER_SIZE: u64 = 32;
/// "EMiL" in the file.
pub(crate) const MAGIC: u32 = 0x4c69_4d45;

/// A header of LiME or AVML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeHeader {
    /// [`MAGIC`] of LiME or AVML.
    pub magic: u32,
    /// 1 for LiME, 2 for AVML.
    pub version: u32,
    /// The first physical address.
    pub start: u64,
    /// The last physical address, inclusive.
    pub last: u64,
}

impl RangeHeader {
    /// Reads the fields; nothing is checked.
    pub fn parse(bytes: &[u8; HEADER_SIZE as usize]) -> Self {
        let field = |offset: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[offset..offset + 8]);
            u64::from_le_bytes(field)
        };
        let magic_and_version = field(0);
        Self {
            magic: magic_and_version as u32,
            version: (magic_and_version >> 32) as u32,
            start: field(8),
            last: field(16),
        }
    }

    /// The bytes of memory it announces, if it is a header with `magic` and
    /// `version` over memory that can exist; else what is wrong.
    pub fn length(&self, magic: u32, version: u32) -> Result<u64, String> {
        if self.magic != magic {
            return Err(format!(
                "range magic {:#x}, {magic:#x} expected",
                self.magic
            ));
        }
        if self.version != version {
            return Err(format!(
                "range version {}, {version} expected",
                self.version
            ));
        }
        if self.last < self.start || self.last >= PHYSICAL_END {
            return Err(format!("range {:#x}-{:#x}", self.start, self.last));
        }
        Ok(self.last - self.start + 1)
    }

    /// The header in the file at `offset`.
    pub(crate) fn read(file: &dyn ImageBytes, offset: u64) -> Result<Self, ImageError> {
        let mut bytes = [0; HEADER_SIZE as usize];
        file.read(offset, &mut bytes, "range header")?;
        Ok(Self::parse(&bytes))
    }
}

pub(crate) fn open(
    file: &Arc<dyn ImageBytes>,
    options: &ImageOptions<'_>,
    mut notes: Vec<ImageNote>,
) -> Result<Image, ImageError> {
    let mut pieces = Pieces::default();
    let mut offset = 0;
    let mut count = 0;
    while offset < file.len() {
        let length = match RangeHeader::read(file.as_ref(), offset) {
            Ok(header) => header.length(MAGIC, 1).map(|length| (header.start, length)),
            Err(ImageError::Truncated { .. }) if count > 0 => {
                Err("the file ends inside of a range header".to_owned())
            }
            Err(error) => return Err(error),
        };
        let (start, length) = match length {
            Ok(range) => range,
            Err(what) if count > 0 => {
                notes.push(ImageNote::Damaged { offset, what });
                break;
            }
            Err(what) => {
                return Err(ImageError::Damaged {
                    format: ImageFormat::Lime,
                    offset,
                    what,
                });
            }
        };
        let data = offset + HEADER_SIZE;
        pieces.push(
            Piece {
                start,
                length,
                offset: data,
            },
            file.len(),
        )?;
        count += 1;
        if count > MAX_PIECES {
            return Err(ImageError::TooMany {
                what: "LiME ranges",
                limit: MAX_PIECES as u64,
            });
        }
        // At most 2^52 past a file offset: no overflow.
        offset = data + length;
    }
    if pieces.is_empty() {
        return Err(ImageError::Truncated {
            what: "memory of the first LiME range",
            offset: HEADER_SIZE,
            needed: HEADER_SIZE + 1,
            available: file.len(),
        });
    }
    let (pieces, missing, piece_notes) = pieces.finish();
    notes.extend(piece_notes);
    Ok(Image {
        memory: memory_of(file, &pieces, missing, options.volatility)?,
        format: ImageFormat::Lime,
        notes,
        hints: ImageHints::default(),
    })
}

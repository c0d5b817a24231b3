//! Random access to the bytes of an image, with errors that say where.
//!
//! Headers and compressed pages are read with `pread`, not through a mapping:
//! a file that shrinks or a disk that fails is then an error and not a signal.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use super::ImageError;

/// The bytes of an image: a file, or what a flattened stream unfolds to.
pub(crate) trait ImageBytes: Send + Sync + fmt::Debug {
    /// How many there are.
    fn len(&self) -> u64;

    /// Fills `buffer` from `offset` on; `what` names the part for the error.
    fn read(&self, offset: u64, buffer: &mut [u8], what: &'static str) -> Result<(), ImageError>;

    /// As [`read`](Self::read), but bytes that nobody wrote before the end are
    /// zeros even where they may have been cut off: for structures that have
    /// unwritten padding.
    fn read_padded(
        &self,
        offset: u64,
        buffer: &mut [u8],
        what: &'static str,
    ) -> Result<(), ImageError> {
        self.read(offset, buffer, what)
    }

    /// The file, if offsets in it are the offsets here.
    fn as_file(&self) -> Option<&File>;

    /// `length` bytes from `offset` on, none allocated that aren't there.
    /// Callers have bounded `length`.
    fn read_vec(
        &self,
        offset: u64,
        length: usize,
        what: &'static str,
    ) -> Result<Vec<u8>, ImageError> {
        self.check(offset, length, what)?;
        let mut bytes = vec![0; length];
        self.read(offset, &mut bytes, what)?;
        Ok(bytes)
    }

    /// Whether `length` bytes from `offset` on are there.
    fn check(&self, offset: u64, length: usize, what: &'static str) -> Result<(), ImageError> {
        let needed = offset.saturating_add(length as u64);
        if needed > self.len() {
            return Err(ImageError::Truncated {
                what,
                offset,
                needed,
                available: self.len(),
            });
        }
        Ok(())
    }
}

/// An image file that is open for reading, and its length at that moment.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: File,
    length: u64,
}

impl ImageFile {
    /// Opens a regular file or block device.
    pub(crate) fn open(path: &Path) -> Result<Self, ImageError> {
        let open = |source| ImageError::Open {
            path: path.to_owned(),
            source,
        };
        // Asked before opening: to open a FIFO would wait for its writer.
        let kind = std::fs::metadata(path).map_err(open)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::NotAFile {
                path: path.to_owned(),
            });
        }
        let file = File::open(path).map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        let length = if metadata.is_file() {
            metadata.len()
        } else {
            use std::io::{Seek, SeekFrom};
            (&file).seek(SeekFrom::End(0)).map_err(open)?
        };
        if length == 0 {
            return Err(ImageError::Empty {
                path: path.to_owned(),
            });
        }
        Ok(Self { file, length })
    }
}

impl ImageBytes for ImageFile {
    fn len(&self) -> u64 {
        self.length
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn read(&self, offset: u64, buffer: &mut [u8], what: &'static str) -> Result<(), ImageError> {
        self.check(offset, buffer.len(), what)?;
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| ImageError::Read {
                what,
                offset,
                source,
            })
    }
}

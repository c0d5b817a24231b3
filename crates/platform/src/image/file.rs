//! Random access to the bytes of an image file, with errors that say where.
//!
//! Headers and compressed pages are read with `pread`, not through a mapping:
//! a file that shrinks or a disk that fails is then an error and not a signal.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::ImageError;

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
        let file = File::open(path).map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        if metadata.is_dir() {
            return Err(ImageError::NotAFile {
                path: path.to_owned(),
            });
        }
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

    /// The bytes of the file.
    pub(crate) fn len(&self) -> u64 {
        self.length
    }

    /// The file itself, to be mapped.
    pub(crate) fn as_file(&self) -> &File {
        &self.file
    }

    /// Fills `buffer` from `offset` on; `what` names the part for the error.
    pub(crate) fn read(
        &self,
        offset: u64,
        buffer: &mut [u8],
        what: &'static str,
    ) -> Result<(), ImageError> {
        let needed = offset.saturating_add(buffer.len() as u64);
        if needed > self.length {
            return Err(ImageError::Truncated {
                what,
                offset,
                needed,
                available: self.length,
            });
        }
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| ImageError::Read {
                what,
                offset,
                source,
            })
    }

    /// `length` bytes from `offset` on. Callers have bounded `length`.
    pub(crate) fn read_vec(
        &self,
        offset: u64,
        length: usize,
        what: &'static str,
    ) -> Result<Vec<u8>, ImageError> {
        if offset.saturating_add(length as u64) > self.length {
            return Err(ImageError::Truncated {
                what,
                offset,
                needed: offset.saturating_add(length as u64),
                available: self.length,
            });
        }
        let mut bytes = vec![0; length];
        self.read(offset, &mut bytes, what)?;
        Ok(bytes)
    }
}

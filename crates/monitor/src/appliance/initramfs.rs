//! An initial file system as the kernel unpacks it: a cpio archive of the
//! `newc` format, the same bytes for the same content (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::io::Write as _;

use cpio::newc;

use super::ApplianceError;

/// What an entry is.
#[derive(Debug, Clone, Copy)]
pub enum Entry<'a> {
    /// A folder.
    Folder,
    /// A file that can be read.
    File(&'a [u8]),
    /// A file that can be run.
    Program(&'a [u8]),
    /// A character device, by its major and minor number.
    CharacterDevice(u32, u32),
}

/// An archive that grows. Owner, times and device numbers are zero; inodes
/// are counted.
#[derive(Debug, Default)]
pub struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an entry. A folder must come before what is in it.
    ///
    /// # Errors
    /// If the file is larger than the format can say.
    pub fn add(&mut self, name: &str, entry: Entry<'_>) -> Result<(), ApplianceError> {
        let (mode, content, device): (_, &[u8], _) = match entry {
            Entry::Folder => (0o040_755, &[], None),
            Entry::File(content) => (0o100_644, content, None),
            Entry::Program(content) => (0o100_755, content, None),
            Entry::CharacterDevice(major, minor) => (0o020_600, &[], Some((major, minor))),
        };
        let too_large = || ApplianceError::TooLarge {
            what: name.to_owned(),
            bytes: content.len() as u64,
            limit: u64::from(u32::MAX),
        };
        let length = u32::try_from(content.len()).map_err(|_| too_large())?;
        let (major, minor) = device.unwrap_or((0, 0));
        self.entries = self.entries.saturating_add(1);
        let builder = newc::Builder::new(name)
            .ino(self.entries)
            .nlink(1)
            .mode(mode)
            .rdev_major(major)
            .rdev_minor(minor);
        let mut writer = builder.write(&mut self.bytes, length);
        writer
            .write_all(content)
            .and_then(|()| writer.finish().map(drop))
            .map_err(|_| too_large())
    }

    /// The whole archive.
    ///
    /// # Errors
    /// If it is larger than the format can say.
    pub fn finish(self) -> Result<Vec<u8>, ApplianceError> {
        let bytes = self.bytes.len() as u64;
        newc::trailer(self.bytes).map_err(|_| ApplianceError::TooLarge {
            what: "the initramfs".to_owned(),
            bytes,
            limit: u64::from(u32::MAX),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_comes_out() {
        let mut archive = Initramfs::new();
        archive.add("dev", Entry::Folder).expect("a folder");
        let console = Entry::CharacterDevice(5, 1);
        archive.add("dev/console", console).expect("a device");
        archive
            .add("init", Entry::Program(b"program"))
            .expect("a file");
        let bytes = archive.finish().expect("an archive");
        let mut rest = &bytes[..];
        let mut seen = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).expect("an entry");
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut reader, &mut content).expect("content");
            let device = (entry.rdev_major(), entry.rdev_minor());
            seen.push((
                entry.name().to_owned(),
                entry.mode(),
                device,
                entry.mtime(),
                content,
            ));
            rest = reader.finish().expect("the rest");
        }
        let expected = [
            ("dev", 0o040_755, (0, 0), &b""[..]),
            ("dev/console", 0o020_600, (5, 1), b""),
            ("init", 0o100_755, (0, 0), b"program"),
        ]
        .map(|(name, mode, device, content)| (name.to_owned(), mode, device, 0, content.to_vec()));
        assert_eq!(seen, expected);
    }
}

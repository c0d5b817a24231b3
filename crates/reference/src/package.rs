//! The kernel in a Debian package (`linux-image-….deb`): an `ar` archive, in it
//! a compressed `tar` archive of the files (deb(5)).

use std::io::{Read, Take};

use ar::Archive;
use flate2::read::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;

use crate::ReferenceError;
use crate::boot_image::LONGEST;

/// What an `ar` archive starts with.
const MAGIC: &[u8] = b"!<arch>\n";
/// No package of a kernel unpacks to more.
const MOST: u64 = 1 << 31;
/// More files than this are not looked at.
const MOST_FILES: usize = 1 << 16;
/// A package has three.
const MOST_MEMBERS: usize = 16;

/// Whether a file is a package.
pub(crate) fn is_package(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// The kernel's file in a package.
pub(crate) fn kernel(file: &[u8]) -> Result<Vec<u8>, ReferenceError> {
    let damaged = |error: std::io::Error| ReferenceError::Package {
        reason: error.to_string(),
    };
    let mut archive = Archive::new(file);
    for _ in 0..MOST_MEMBERS {
        let Some(member) = archive.next_entry() else {
            break;
        };
        let member = member.map_err(damaged)?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let unpacked: Box<dyn Read> = match name.trim_end_matches('/') {
            "data.tar" => Box::new(member),
            "data.tar.gz" => Box::new(GzDecoder::new(member)),
            "data.tar.xz" => Box::new(XzReader::new(member, true)),
            "data.tar.zst" => {
                let reader = StreamingDecoder::new(member);
                Box::new(reader.map_err(|error| ReferenceError::Package {
                    reason: error.to_string(),
                })?)
            }
            _ => continue,
        };
        return find(unpacked.take(MOST));
    }
    Err(ReferenceError::NoKernelInPackage)
}

/// The kernel among a package's files.
fn find(files: Take<Box<dyn Read + '_>>) -> Result<Vec<u8>, ReferenceError> {
    let damaged = |error: std::io::Error| ReferenceError::Package {
        reason: error.to_string(),
    };
    let mut archive = tar::Archive::new(files);
    for entry in archive.entries().map_err(damaged)?.take(MOST_FILES) {
        let entry = entry.map_err(damaged)?;
        let path = entry.path_bytes();
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let is_kernel = name.starts_with(b"vmlinuz") || name.starts_with(b"vmlinux");
        if !is_kernel || !entry.header().entry_type().is_file() {
            continue;
        }
        let mut kernel = Vec::new();
        entry
            .take(LONGEST as u64 + 1)
            .read_to_end(&mut kernel)
            .map_err(damaged)?;
        if kernel.len() > LONGEST {
            return Err(ReferenceError::TooLong { limit: LONGEST });
        }
        return Ok(kernel);
    }
    Err(ReferenceError::NoKernelInPackage)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;

    fn package(path: &str, content: &[u8]) -> Vec<u8> {
        let mut files = tar::Builder::new(Vec::new());
        for (path, content) in [("./boot/config-6.1", &b"CONFIG_X=y"[..]), (path, content)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_entry_type(tar::EntryType::Regular);
            files
                .append_data(&mut header, path, content)
                .expect("a file");
        }
        let files = files.into_inner().expect("an archive");
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(&files).expect("packed");
        let packed = packed.finish().expect("packed");
        let mut archive = ar::Builder::new(Vec::new());
        for (name, content) in [("debian-binary", &b"2.0\n"[..]), ("data.tar.gz", &packed)] {
            let header = ar::Header::new(name.as_bytes().to_vec(), content.len() as u64);
            archive.append(&header, content).expect("a member");
        }
        archive.into_inner().expect("a package")
    }

    #[test]
    fn finds_the_kernel() {
        let file = package("./boot/vmlinuz-6.1", b"a kernel");
        assert!(is_package(&file));
        assert_eq!(kernel(&file).ok().as_deref(), Some(&b"a kernel"[..]));
        let other = kernel(&package("./usr/share/doc/vmlinuz/copyright", b""));
        assert!(matches!(other, Err(ReferenceError::NoKernelInPackage)));
    }

    proptest! {
        #[test]
        fn any_package_is_answered(
            cut in any::<prop::sample::Index>(),
            changed in any::<prop::sample::Index>(),
            to in any::<u8>(),
        ) {
            let mut file = package("./boot/vmlinuz-6.1", b"a kernel");
            let at = changed.index(file.len());
            file[at] = to;
            let _ = kernel(&file);
            let _ = kernel(&file[..cut.index(file.len())]);
        }
    }
}

//! The boot image (bzImage, `vmlinuz`): a header, code that unpacks, and the
//! compressed kernel.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst`, `payload_offset`,
//! `payload_length`.

use std::io::Read;

use flate2::read::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;

use crate::ReferenceError;

/// No kernel is longer, unpacked.
pub(crate) const LONGEST: usize = 1 << 28;
/// The uncompressed length of a block of `lz4 -l`; only the last is shorter.
const LZ4_BLOCK: usize = 8 << 20;
/// What an lz4 file of the old format starts with.
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// The compressed kernel in a boot image; `None` if the file is none.
pub(crate) fn payload(file: &[u8]) -> Result<Option<&[u8]>, ReferenceError> {
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Ok(None);
    }
    let word = |at: usize| {
        let bytes = file.get(at..).and_then(|rest| rest.first_chunk::<4>());
        u64::from(bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes)))
    };
    // 0 stands for 4.
    let sectors = match file.get(0x1f1) {
        Some(0) | None => 4,
        Some(sectors) => u64::from(*sectors),
    };
    let start = (sectors + 1) * 512 + word(0x248);
    let end = start + word(0x24c);
    usize::try_from(start)
        .ok()
        .zip(usize::try_from(end).ok())
        .and_then(|(start, end)| file.get(start..end))
        .filter(|payload| !payload.is_empty())
        .map(Some)
        .ok_or(ReferenceError::CutOff {
            end,
            length: file.len(),
        })
}

/// Unpacks a payload. Behind most methods' data stands the unpacked length.
pub(crate) fn unpack(payload: &[u8]) -> Result<Vec<u8>, ReferenceError> {
    let start = payload.get(..payload.len().min(6)).unwrap_or_default();
    match start {
        [0x1f, 0x8b, ..] => drain("gzip", &mut GzDecoder::new(payload)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => drain("xz", &mut XzReader::new(payload, false)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut reader =
                StreamingDecoder::new(payload).map_err(|error| unpacking("zstd", &error))?;
            drain("zstd", &mut reader)
        }
        _ if start.starts_with(&LZ4_MAGIC) => unpack_lz4(payload),
        [0x7f, b'E', b'L', b'F', ..] => Ok(payload.to_vec()),
        start => Err(ReferenceError::Compression {
            start: start.to_vec(),
        }),
    }
}

fn unpacking(method: &'static str, error: &impl ToString) -> ReferenceError {
    ReferenceError::Unpack {
        method,
        reason: error.to_string(),
    }
}

fn drain(method: &'static str, reader: &mut dyn Read) -> Result<Vec<u8>, ReferenceError> {
    let mut unpacked = Vec::new();
    reader
        .take(LONGEST as u64 + 1)
        .read_to_end(&mut unpacked)
        .map_err(|error| unpacking(method, &error))?;
    if unpacked.len() > LONGEST {
        return Err(ReferenceError::TooLong { limit: LONGEST });
    }
    Ok(unpacked)
}

/// The old format of lz4: blocks, each behind its length, without an end mark.
/// The last four bytes are the unpacked length.
fn unpack_lz4(payload: &[u8]) -> Result<Vec<u8>, ReferenceError> {
    let mut rest = payload.get(LZ4_MAGIC.len()..).unwrap_or_default();
    let mut unpacked = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        if after.is_empty() {
            break;
        }
        if *length == LZ4_MAGIC {
            rest = after;
            continue;
        }
        let length = u32::from_le_bytes(*length) as usize;
        let Some((packed, after)) = after.split_at_checked(length) else {
            return Err(unpacking(
                "lz4",
                &format_args!("a block of {length} bytes is cut off"),
            ));
        };
        let written = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|error| unpacking("lz4", &error))?;
        unpacked.extend_from_slice(block.get(..written).unwrap_or_default());
        if unpacked.len() > LONGEST {
            return Err(ReferenceError::TooLong { limit: LONGEST });
        }
        rest = after;
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A boot image around a payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 0x400];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend_from_slice(payload);
        file
    }

    #[test]
    fn finds_the_payload() {
        let file = image(b"packed");
        assert_eq!(payload(&file).ok().flatten(), Some(&b"packed"[..]));
        assert!(matches!(payload(b"#!/bin/sh"), Ok(None)));
        let error = payload(&file[..file.len() - 1]);
        assert!(matches!(error, Err(ReferenceError::CutOff { .. })));
    }

    #[test]
    fn unpacks_what_kernels_are_packed_with() {
        let kernel = b"\x7fELF and so on ".repeat(1000);
        let zstd = ruzstd::encoding::compress_to_vec(
            kernel.as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        // One literal run: the plainest block there is.
        let block = [&[0xf0, 1][..], b"\x7fELF or a few mo"].concat();
        let lz4 = [
            &LZ4_MAGIC[..],
            &(block.len() as u32).to_le_bytes(),
            &block,
            &16_u32.to_le_bytes(),
        ]
        .concat();
        assert_eq!(unpack(&zstd).ok(), Some(kernel));
        assert_eq!(
            unpack(&lz4).ok().as_deref(),
            Some(&b"\x7fELF or a few mo"[..])
        );
        let error = unpack(b"LZO?").err().map(|error| error.to_string());
        assert!(error.is_some_and(|error| error.contains("no compression")));
    }

    proptest! {
        #[test]
        fn any_file_is_answered(
            magic in prop::sample::select(vec![
                &[0x1f, 0x8b][..], &[0xfd, 0x37, 0x7a, 0x58, 0x5a, 0], &[0x28, 0xb5, 0x2f, 0xfd],
                &LZ4_MAGIC, &[],
            ]),
            rest in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let packed = [magic, &rest].concat();
            let _ = unpack(&packed);
            let file = image(&packed);
            prop_assert_eq!(payload(&file).ok().flatten(), Some(packed.as_slice()).filter(|packed| !packed.is_empty()));
        }
    }
}

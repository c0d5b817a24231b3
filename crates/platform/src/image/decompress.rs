//! Decompression of single pages, each into exactly the bytes of a page: the
//! output is bounded before anything is decoded.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use ruzstd::decoding::FrameDecoder;

/// The largest window that a zstd frame of one page may ask for; makedumpfile's
/// ask for the page itself.
const MAX_ZSTD_WINDOW: u64 = 1 << 20;

/// How a page is compressed; the values are `page_desc`'s flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Zlib,
    Lzo,
    Snappy,
    Zstd,
}

impl Compression {
    /// From the flags of a page descriptor (makedumpfile `diskdump_mod.h`,
    /// `DUMP_DH_COMPRESSED_*`).
    pub(crate) fn from_flags(flags: u32) -> Option<Self> {
        match flags {
            0 => Some(Self::None),
            1 => Some(Self::Zlib),
            2 => Some(Self::Lzo),
            4 => Some(Self::Snappy),
            0x20 => Some(Self::Zstd),
            _ => None,
        }
    }
}

thread_local! {
    // The decoders' tables are larger than what they decode: each thread
    // keeps one.
    static ZLIB: RefCell<Decompress> = RefCell::new(Decompress::new(true));
    static ZSTD: RefCell<FrameDecoder> = RefCell::new({
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_ZSTD_WINDOW);
        decoder
    });
}

/// Decodes `compressed` into `page`, which it must fill exactly.
pub(crate) fn decompress(
    compression: Compression,
    compressed: &[u8],
    page: &mut [u8],
) -> Result<(), String> {
    let written = match compression {
        Compression::None => {
            if compressed.len() == page.len() {
                page.copy_from_slice(compressed);
            }
            compressed.len()
        }
        Compression::Zlib => ZLIB.with_borrow_mut(|zlib| {
            zlib.reset(true);
            match zlib.decompress(compressed, page, FlushDecompress::Finish) {
                Ok(Status::StreamEnd) => Ok(zlib.total_out() as usize),
                Ok(_) => Err("zlib: the stream does not end with the page".to_owned()),
                Err(error) => Err(format!("zlib: {error}")),
            }
        })?,
        Compression::Lzo => {
            lzo::decompress_into(compressed, page).map_err(|error| error.to_string())?
        }
        Compression::Snappy => {
            let stated = snap::raw::decompress_len(compressed)
                .map_err(|error| format!("snappy: {error}"))?;
            if stated > page.len() {
                stated
            } else {
                snap::raw::Decoder::new()
                    .decompress(compressed, page)
                    .map_err(|error| format!("snappy: {error}"))?
            }
        }
        Compression::Zstd => ZSTD
            .with_borrow_mut(|zstd| zstd.decode_all(compressed, page))
            .map_err(|error| format!("zstd: {error}"))?,
    };
    if written == page.len() {
        Ok(())
    } else {
        Err(format!("{written} bytes, not {}", page.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn compress(compression: Compression, page: &[u8]) -> Vec<u8> {
        match compression {
            Compression::None => page.to_vec(),
            Compression::Zlib => {
                let level = flate2::Compression::fast();
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), level);
                encoder.write_all(page).expect("into memory");
                encoder.finish().expect("into memory")
            }
            Compression::Snappy => snap::raw::Encoder::new()
                .compress_vec(page)
                .expect("a page is small"),
            Compression::Zstd => {
                ruzstd::encoding::compress_to_vec(page, ruzstd::encoding::CompressionLevel::Fastest)
            }
            // One literal run and the end mark; real streams come from
            // makedumpfile in the tests of whole files.
            Compression::Lzo => {
                let mut stream = vec![0];
                let mut length = page.len() - 18;
                while length > 255 {
                    stream.push(0);
                    length -= 255;
                }
                stream.push(length as u8);
                stream.extend_from_slice(page);
                stream.extend_from_slice(&[0x11, 0, 0]);
                stream
            }
        }
    }

    const ALL: [Compression; 5] = [
        Compression::None,
        Compression::Zlib,
        Compression::Lzo,
        Compression::Snappy,
        Compression::Zstd,
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn gives_back_what_was_compressed(
            pattern in prop::collection::vec(any::<u8>(), 1..64),
            noise in prop::collection::vec(any::<u8>(), 0..1024),
        ) {
            let mut page: Vec<u8> = pattern.iter().copied().cycle().take(4096).collect();
            page[..noise.len()].copy_from_slice(&noise);
            for compression in ALL {
                let compressed = compress(compression, &page);
                let mut buffer = vec![0; 4096];
                prop_assert_eq!(decompress(compression, &compressed, &mut buffer), Ok(()));
                prop_assert_eq!(&buffer, &page);
                // Neither more nor less than a page is a page.
                prop_assert!(decompress(compression, &compressed, &mut vec![0; 4095]).is_err());
                prop_assert!(decompress(compression, &compressed, &mut vec![0; 4097]).is_err());
            }
        }

        #[test]
        fn survives_anything(
            bytes in prop::collection::vec(any::<u8>(), 0..4097),
            changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..8),
        ) {
            let page: Vec<u8> = (0..4096u32).map(|index| (index / 7) as u8).collect();
            for compression in ALL {
                let mut buffer = vec![0; 4096];
                let _ = decompress(compression, &bytes, &mut buffer);
                let mut damaged = compress(compression, &page);
                for (offset, value) in &changes {
                    let offset = offset % damaged.len();
                    damaged[offset] = *value;
                }
                let _ = decompress(compression, &damaged, &mut buffer);
            }
        }
    }
}

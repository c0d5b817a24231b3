//! Writes one small image of each format into a folder, as a start for
//! fuzzing: `cargo run --example fuzz_seeds fuzz/corpus/image`.

use std::error::Error;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use secmon_memory::{MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility};
use secmon_platform::image::write::{Start, WriteFormat, WriteOptions, write};
use secmon_platform::image::{self, ImageOptions};

const PAGE: usize = 4096;

/// Two pages, one of them above 4 GiB.
struct TwoPages([MemoryRegion; 2]);

impl PhysicalMemory for TwoPages {
    fn regions(&self) -> &[MemoryRegion] {
        &self.0
    }

    fn volatility(&self) -> Volatility {
        Volatility::Static
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        buffer.fill(address.as_u64() as u8 | 1);
        Ok(())
    }
}

/// QEMU's note of a vCPU, and a VMCOREINFO note.
fn notes() -> Vec<u8> {
    let mut state = vec![0; 440];
    state[0] = 1;
    state[4..8].copy_from_slice(&440u32.to_le_bytes());
    let mut notes = Vec::new();
    for (name, content) in [
        (&b"QEMU\0\0\0\0"[..], &state[..]),
        (b"VMCOREINFO\0\0", b"A=1\n"),
    ] {
        let name_size = name.iter().position(|byte| *byte == 0).unwrap_or(0) as u32 + 1;
        for field in [name_size, content.len() as u32, 0] {
            notes.extend_from_slice(&field.to_le_bytes());
        }
        notes.extend_from_slice(name);
        notes.extend_from_slice(content);
    }
    notes
}

/// A kdump of one page for each compression.
fn kdump() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut page = vec![0; PAGE];
    page[..13].copy_from_slice(b"Linux version");
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    zlib.write_all(&page)?;
    // The text and one zero as literals, the rest as a match of distance 1.
    let mut lzo = vec![17 + 14];
    lzo.extend_from_slice(&page[..14]);
    lzo.push(32);
    let mut rest = PAGE - 14 - 33;
    while rest > 255 {
        lzo.push(0);
        rest -= 255;
    }
    lzo.extend_from_slice(&[rest as u8, 0, 0, 17, 0, 0]);
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let pages = [
        (1u32, zlib.finish()?),
        (2, lzo),
        (4, snap::raw::Encoder::new().compress_vec(&page)?),
        (0x20, ruzstd::encoding::compress_to_vec(&page[..], level)),
        (0, page),
    ];
    let mut file = vec![0; 4 * PAGE];
    let notes = notes();
    let descriptors = file.len();
    let mut data = descriptors + pages.len() * 24;
    file[..8].copy_from_slice(b"KDUMP   ");
    let mut put = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    for (offset, value) in [(8, 6u32), (428, 4096), (432, 1), (436, 2), (440, 16)] {
        put(offset, &value.to_le_bytes());
    }
    let notes_offset = PAGE + 200;
    put(notes_offset, &notes);
    put(PAGE + 48, &(notes_offset as u64).to_le_bytes());
    put(PAGE + 56, &(notes.len() as u64).to_le_bytes());
    put(PAGE + 96, &16u64.to_le_bytes());
    put(2 * PAGE, &[0xff, 0xff]);
    put(3 * PAGE, &[0b1010_0011, 0b1000_0000]);
    for (flags, bytes) in &pages {
        file.extend_from_slice(&(data as u64).to_le_bytes());
        file.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        file.extend_from_slice(&flags.to_le_bytes());
        file.extend_from_slice(&[0; 8]);
        data += bytes.len();
    }
    for (_, bytes) in &pages {
        file.extend_from_slice(bytes);
    }
    Ok(file)
}

/// The flattened form: only what is not zero, and an end mark.
fn flatten(file: &[u8]) -> Vec<u8> {
    let mut flattened = b"makedumpfile\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01".to_vec();
    flattened.resize(PAGE, 0);
    let last = file.len().div_ceil(512) - 1;
    for (index, part) in file.chunks(512).enumerate() {
        // The last part gives the file its length.
        if index == last || part.iter().any(|byte| *byte != 0) {
            flattened.extend_from_slice(&(index as u64 * 512).to_be_bytes());
            flattened.extend_from_slice(&(part.len() as u64).to_be_bytes());
            flattened.extend_from_slice(part);
        }
    }
    flattened.extend_from_slice(&[0xff; 16]);
    flattened
}

fn avml() -> Result<Vec<u8>, Box<dyn Error>> {
    let mut file = Vec::new();
    for start in [0u64, 16 << 20, 48 << 20] {
        let mut encoder = snap::write::FrameEncoder::new(Vec::new());
        encoder.write_all(&[start as u8 | 7; PAGE])?;
        let stream = encoder.into_inner().map_err(|error| error.to_string())?;
        file.extend_from_slice(b"AVML\x02\0\0\0");
        for field in [start, start + PAGE as u64 - 1, 0] {
            file.extend_from_slice(&field.to_le_bytes());
        }
        file.extend_from_slice(&stream);
        file.extend_from_slice(&(stream.len() as u64).to_le_bytes());
    }
    Ok(file)
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(
        std::env::args_os()
            .nth(1)
            .ok_or("usage: fuzz_seeds FOLDER")?,
    );
    std::fs::create_dir_all(&folder)?;
    let region = |start| MemoryRegion::new(PhysicalAddress::new(start), PAGE as u64);
    let memory = TwoPages([region(0x1000), region(1 << 32)]);
    let paths = |name: &str| folder.join(name);
    for (name, format) in [("elf", WriteFormat::ElfCore), ("lime", WriteFormat::Lime)] {
        let path = paths(name);
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        write(
            &memory,
            &path,
            &mut WriteOptions {
                format,
                start: Start::New,
                vmcoreinfo: Some(b"OSRELEASE=6.1\n"),
                progress: &mut |_| ControlFlow::Continue(()),
            },
        )?;
    }
    let kdump = kdump()?;
    std::fs::write(paths("flattened"), flatten(&kdump))?;
    std::fs::write(paths("kdump"), kdump)?;
    std::fs::write(paths("avml"), avml()?)?;
    std::fs::write(paths("raw"), [0x5a; PAGE])?;
    for name in ["elf", "lime", "flattened", "kdump", "avml", "raw"] {
        check(&paths(name))?;
    }
    Ok(())
}

/// A seed that can't be read in full would start the fuzzer in a corner.
fn check(path: &Path) -> Result<(), Box<dyn Error>> {
    let image = image::open(path, &ImageOptions::default())?;
    let mut pages = 0;
    for region in image.memory.populated() {
        for inside in (0..region.length).step_by(PAGE) {
            image
                .memory
                .read(region.start.wrapping_add(inside), &mut [0; PAGE])?;
            pages += 1;
        }
    }
    println!(
        "{}: {}, {pages} pages, {} vCPUs, notes {:?}",
        path.display(),
        image.format,
        image.hints.vcpus.len(),
        image.notes
    );
    Ok(())
}

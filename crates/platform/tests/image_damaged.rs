//! Real dumps with damaged headers: an error or notes, never a panic, never
//! more memory or time than stated here.

mod firmware_guest;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use firmware_guest::{FirmwareGuest, MIB, Noise, write_avml, write_lime};
use secmon_memory::PhysicalMemory;
use secmon_platform::image::{self, ImageError, ImageFormat, ImageOptions};
use secmon_platform::layout::Machine;

/// Bytes that opening and reading an image may have allocated at any moment.
const MEMORY_BOUND: usize = 48 << 20;
/// The longest that opening and reading some pages may take.
const TIME_BOUND: Duration = Duration::from_secs(5);

/// Counts what is allocated.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// The tests share the counters.
static ALONE: Mutex<()> = Mutex::new(());

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What has been tried.
#[derive(Debug, Default)]
struct Tally {
    opened: u32,
    refused: u32,
    slowest: Duration,
    most_memory: usize,
}

impl Tally {
    /// Opens the file, whatever it holds now, and reads all over it.
    fn attempt(&mut self, path: &Path, noise: &mut Noise) {
        let before = ALLOCATED.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let start = Instant::now();
        match image::open(path, &ImageOptions::default()) {
            Ok(image) => {
                self.opened += 1;
                read_all_over(image.memory.as_ref(), noise);
                for note in &image.notes {
                    assert!(!note.to_string().is_empty());
                }
            }
            Err(error) => {
                self.refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
        let time = start.elapsed();
        let memory = PEAK.load(Ordering::Relaxed) - before;
        assert!(time < TIME_BOUND, "{time:?}");
        assert!(memory < MEMORY_BOUND, "{memory} bytes");
        self.slowest = self.slowest.max(time);
        self.most_memory = self.most_memory.max(memory);
    }
}

fn read_all_over(memory: &dyn PhysicalMemory, noise: &mut Noise) {
    let mut buffer = vec![0; 5000];
    let regions = memory.regions();
    for pair in regions.windows(2) {
        assert!(pair[0].end() <= pair[1].start, "regions in order");
    }
    for _ in 0..8 {
        let region = regions[noise.next() as usize % regions.len()];
        assert!(region.length > 0);
        let address = region.start.wrapping_add(noise.next() % region.length);
        let length = 1 + noise.next() as usize % buffer.len();
        // Whether it can be read is all the same here.
        let _ = memory.read(address, &mut buffer[..length]);
    }
    if let (Some(first), Some(last)) = (regions.first(), regions.last()) {
        let _ = memory.read(first.start, &mut buffer);
        let _ = memory.read(last.end().wrapping_sub(8), &mut buffer);
    }
}

/// A dump in each format, with where its structures are.
fn dumps(guest: &mut FirmwareGuest) -> [(PathBuf, &'static [Range<u64>]); 6] {
    let elf = guest.dump("elf", false, "");
    let paging = guest.dump("paging", true, "");
    let flattened = guest.dump("flattened", false, ",\"format\":\"kdump-zlib\"");
    let path = |name: &str| guest.directory.path().join(name);
    let unfolded = path("unfolded");
    let status = Command::new("makedumpfile")
        .arg("-R")
        .arg(&unfolded)
        .stdin(File::open(&flattened).expect("the dump"))
        .stdout(Stdio::null())
        .status()
        .expect("makedumpfile runs (install makedumpfile)");
    assert!(status.success());
    let (avml, lime) = (path("avml"), path("lime"));
    write_avml(guest, &avml);
    write_lime(guest, &lime);
    [
        // Headers, notes.
        (elf, &[0..0x1c0, 0x300..0x340]),
        (paging, &[0..0x40, 0x40..0x400]),
        // Behind the flattened header: the header's end, the sub-header's part,
        // the start of the notes, of the bitmap.
        (
            flattened,
            &[0..0x20, 0x1000..0x1018, 0x1198..0x1260, 0x1260..0x1300],
        ),
        // Header, sub-header, first descriptors.
        (
            unfolded,
            &[0..0x10, 0x190..0x1d0, 0x1000..0x1070, 0x5000..0x5040],
        ),
        (avml, &[0..0x20, 0x20..0x60]),
        (lime, &[0..0x20, 0x20..0x40]),
    ]
}

#[test]
fn damaged_headers_are_survived() {
    let _alone = ALONE.lock();
    let mut guest = FirmwareGuest::start(Machine::Q35, 16 * MIB, 2);
    let mut noise = Noise(0xbad);
    for (path, structures) in dumps(&mut guest) {
        let mut tally = Tally::default();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .expect("the dump");
        let length = file.metadata().expect("the dump").len();
        let mut with = |offset: u64, bytes: &[u8]| {
            let mut original = vec![0; bytes.len()];
            file.read_exact_at(&mut original, offset).expect("the dump");
            if original != bytes {
                file.write_all_at(bytes, offset).expect("the dump");
                tally.attempt(&path, &mut noise);
                file.write_all_at(&original, offset).expect("the dump");
            }
        };
        // Each field of the structures in turn, with what breaks arithmetic.
        let values = [
            0,
            1,
            length,
            length - 1,
            u64::MAX,
            u64::MAX / 2,
            1 << 52,
            1 << 40,
        ];
        let fields = structures.iter().flat_map(|range| range.clone().step_by(4));
        for offset in fields.filter(|offset| offset + 8 <= length) {
            for value in values {
                with(offset, &value.to_le_bytes());
                with(offset, &(value as u32).to_le_bytes());
                with(offset, &value.to_be_bytes());
            }
        }
        // Single bits, in the structures and anywhere.
        let mut places = Noise(0xb17);
        for round in 0..2000 {
            let end = if round % 2 == 0 { 0x4000 } else { length };
            let offset = places.next() % end;
            let mut byte = [0];
            file.read_exact_at(&mut byte, offset).expect("the dump");
            with(offset, &[byte[0] ^ 1 << (places.next() % 8)]);
        }
        println!("{}: {tally:?}", path.display());
        assert!(tally.opened > 100 && tally.refused > 10, "{tally:?}");
    }
}

/// A file of holes: as large as it is stated to be, at no cost to its author.
#[test]
fn huge_claims_are_bounded() {
    let _alone = ALONE.lock();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("image");
    let mut noise = Noise(7);
    let mut tally = Tally::default();

    // A kdump of 8 TiB whose bitmaps are all zeros but for one page.
    let file = File::create(&path).expect("a file");
    file.set_len(1 << 41).expect("a sparse file");
    file.write_all_at(b"KDUMP   \x06\0\0\0", 0).expect("a file");
    let blocks: u32 = 2 * ((1 << 28) / 4096);
    for (offset, value) in [(428, 4096), (432, 1), (436, blocks), (440, 1 << 31)] {
        file.write_all_at(&u32::to_le_bytes(value), offset)
            .expect("a file");
    }
    tally.attempt(&path, &mut noise);
    file.write_all_at(&[1], 0x2000 + (1 << 28)).expect("a file");
    tally.attempt(&path, &mut noise);

    // An ELF core with as many program headers as fit.
    let file = File::create(&path).expect("a file");
    file.set_len(1 << 40).expect("a sparse file");
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
    for field in [0u64, 0x1000, 64] {
        header.extend_from_slice(&field.to_le_bytes());
    }
    header.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 0xff, 0xff, 64, 0, 1, 0, 0, 0]);
    file.write_all_at(&header, 0).expect("a file");
    for count in [u32::MAX, 1 << 22, 70_000] {
        file.write_all_at(&count.to_le_bytes(), 64 + 44)
            .expect("a file");
        tally.attempt(&path, &mut noise);
        // Every one a segment of its own.
        let mut segments = Vec::new();
        for index in 0..u64::from(count).min(400_000) {
            segments.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
            for field in [index * 7, 0, index * 0x2000, 0x1000, 0x1000, 0] {
                segments.extend_from_slice(&u64::to_le_bytes(field));
            }
        }
        file.write_all_at(&segments, 0x1000).expect("a file");
        drop(segments);
        tally.attempt(&path, &mut noise);
    }

    // LiME ranges and flattened parts of one byte each.
    let mut bytes = Vec::new();
    for index in 0..300_000u64 {
        bytes.extend_from_slice(b"EMiL\x01\0\0\0");
        for field in [index * 2, index * 2, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.push(1);
    }
    std::fs::write(&path, &bytes).expect("a file");
    drop(bytes);
    tally.attempt(&path, &mut noise);
    let mut bytes = b"makedumpfile\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01".to_vec();
    bytes.resize(4096, 0);
    for index in 0..600_000u64 {
        // Each over the half of the one before.
        for field in [600_000 - index, 2] {
            bytes.extend_from_slice(&field.to_be_bytes());
        }
        bytes.extend_from_slice(b"KD");
    }
    std::fs::write(&path, &bytes).expect("a file");
    drop(bytes);
    tally.attempt(&path, &mut noise);
    println!("{tally:?}");
}

#[test]
fn what_is_not_read_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("image");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("a file");
        image::open(&path, &ImageOptions::default())
    };
    for (bytes, word) in [
        (&b"PAGEDU64"[..], "Windows"),
        (b"PAGEDUMP", "Windows"),
        (b"QEVM", "migration"),
        (b"LibvirtQemudSave", "virsh dump"),
        (b"\x1f\x8b\x08", "decompress"),
        (b"\xfd7zXZ\0", "decompress"),
    ] {
        let mut bytes = bytes.to_vec();
        bytes.resize(8192, 0);
        match open(&bytes) {
            Err(error @ ImageError::Unsupported { .. }) => {
                assert!(error.to_string().contains(word), "{error}");
            }
            other => panic!("{other:?}"),
        }
        // The same bytes can be a guest's first page.
        let raw = ImageOptions {
            format: Some(ImageFormat::Raw),
            ..ImageOptions::default()
        };
        let image = image::open(&path, &raw).expect("it is RAM if the user says so");
        assert_eq!(image.format, ImageFormat::Raw);
    }
    assert!(matches!(open(b""), Err(ImageError::Empty { .. })));
    assert!(matches!(open(b"short"), Err(ImageError::Truncated { .. })));
    let folder = image::open(directory.path(), &ImageOptions::default());
    assert!(matches!(folder, Err(ImageError::NotAFile { .. })));
    let nothing = image::open(&directory.path().join("none"), &ImageOptions::default());
    assert!(matches!(nothing, Err(ImageError::Open { .. })));
    let lime = ImageOptions {
        format: Some(ImageFormat::Lime),
        ..ImageOptions::default()
    };
    std::fs::write(&path, vec![0; 8192]).expect("a file");
    let other = image::open(&path, &lime);
    assert!(matches!(other, Err(ImageError::OtherFormat { .. })));
}

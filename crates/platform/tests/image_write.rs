//! Dumps written, read back, stopped, resumed and refused.

use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use secmon_memory::{MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility};
use secmon_platform::image::write::{Start, WriteError, WriteFormat, WriteOptions, Written, write};
use secmon_platform::image::{self, ImageFormat, ImageOptions};
use secmon_platform::layout::RamLayout;

const FORMATS: [(WriteFormat, ImageFormat); 3] = [
    (WriteFormat::Raw, ImageFormat::Raw),
    (WriteFormat::Lime, ImageFormat::Lime),
    (WriteFormat::ElfCore, ImageFormat::ElfCore),
];

/// Memory that is computed: a page's bytes follow from its address and `seed`;
/// every third page is zero, pages in `absent` can't be read.
struct Computed {
    regions: Vec<MemoryRegion>,
    volatility: Volatility,
    seed: u64,
    absent: Option<MemoryRegion>,
}

impl Computed {
    fn new(regions: &[(u64, u64)]) -> Self {
        Self {
            regions: regions
                .iter()
                .map(|(start, length)| MemoryRegion::new(PhysicalAddress::new(*start), *length))
                .collect(),
            volatility: Volatility::Static,
            seed: 1,
            absent: None,
        }
    }
}

impl PhysicalMemory for Computed {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        self.volatility
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let end = address.wrapping_add(buffer.len() as u64);
        let after = self
            .regions
            .partition_point(|region| region.start <= address);
        let region = after.checked_sub(1).map(|index| self.regions[index]);
        if !region.is_some_and(|region| region.contains(address) && end <= region.end()) {
            return Err(PhysicalReadError::Hole { address });
        }
        if let Some(absent) = self.absent
            && address < absent.end()
            && end > absent.start
        {
            return Err(PhysicalReadError::Excluded {
                address: address.max(absent.start),
                reason: "left out for the test",
            });
        }
        for (index, byte) in buffer.iter_mut().enumerate() {
            let address = address.as_u64() + index as u64;
            let page = address / 4096;
            *byte = if page.is_multiple_of(3) {
                0
            } else {
                (page.wrapping_mul(self.seed) ^ address) as u8 | 1
            };
        }
        Ok(())
    }
}

fn dump_with(
    memory: &dyn PhysicalMemory,
    path: &Path,
    format: WriteFormat,
    start: Start,
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<Written, WriteError> {
    write(
        memory,
        path,
        &mut WriteOptions {
            format,
            start,
            vmcoreinfo: Some(b"OSRELEASE=test\n"),
            progress: &mut |now| {
                assert!(now.done <= now.total);
                progress(now.done)
            },
        },
    )
}

/// Never stops.
fn go_on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn dump(memory: &dyn PhysicalMemory, path: &Path, format: WriteFormat) -> Written {
    dump_with(memory, path, format, Start::New, |_| {
        ControlFlow::Continue(())
    })
    .expect("it is written")
}

/// What coreutils say of the file.
fn sha256sum(path: &Path) -> String {
    let output = Command::new("sha256sum")
        .arg(path)
        .output()
        .expect("sha256sum runs (coreutils)");
    let text = String::from_utf8(output.stdout).expect("text");
    text.split_whitespace()
        .next()
        .expect("a checksum")
        .to_owned()
}

/// Opens what was written and compares it byte by byte.
fn check(memory: &dyn PhysicalMemory, path: &Path, expected: ImageFormat) {
    let length = std::fs::metadata(path).expect("the dump").len();
    let linear = RamLayout::contiguous(length).expect("a layout");
    let options = ImageOptions {
        layout: Some(&linear),
        ..ImageOptions::default()
    };
    let image = image::open(path, &options).expect("it opens");
    assert_eq!(image.format, expected);
    assert_eq!(image.notes, []);
    if expected == ImageFormat::ElfCore {
        assert_eq!(
            image.hints.vmcoreinfo.as_deref(),
            Some(&b"OSRELEASE=test\n"[..])
        );
    }
    if expected != ImageFormat::Raw {
        assert_eq!(image.memory.regions(), memory.regions());
    }
    let (mut written, mut original) = (vec![0; 4096], vec![0; 4096]);
    for region in memory.regions() {
        for inside in (0..region.length).step_by(4096) {
            let count = (region.length - inside).min(4096) as usize;
            let address = region.start.wrapping_add(inside);
            memory
                .read(address, &mut original[..count])
                .expect("memory");
            image
                .memory
                .read(address, &mut written[..count])
                .expect("the dump");
            assert!(written[..count] == original[..count], "{address} differs");
        }
    }
}

#[test]
fn what_is_written_reads_back() {
    let memory = Computed::new(&[
        (0, 0x9_f000),
        (0x10_0000, 5 << 20),
        (0x100_0000, 1),
        (0x1000_0000, 3 << 20),
    ]);
    for (format, read_as) in FORMATS {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("dump");
        let written = dump(&memory, &path, format);
        check(&memory, &path, read_as);
        assert_eq!(written.sha256_hexadecimal(), sha256sum(&path));
        assert_eq!(written.unreadable, []);
        let metadata = std::fs::metadata(&path).expect("the dump");
        assert_eq!(metadata.len(), written.length);
        assert_eq!(
            metadata.permissions().mode() & 0o777,
            0o600,
            "for its owner alone"
        );
        // Neither the hole below 256 MiB nor pages of zeros take space.
        assert!(
            metadata.blocks() * 512 < memory.size(),
            "{format:?} is not sparse"
        );
        assert!(written.stored < memory.size());
        let left: Vec<_> = std::fs::read_dir(directory.path())
            .expect("a directory")
            .collect();
        assert_eq!(left.len(), 1, "the state file is gone");
    }
}

#[test]
fn more_segments_than_an_elf_header_counts() {
    let regions: Vec<(u64, u64)> = (0..70_000).map(|index| (index * 0x2000, 0x10)).collect();
    let memory = Computed::new(&regions);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("dump");
    dump(&memory, &path, WriteFormat::ElfCore);
    check(&memory, &path, ImageFormat::ElfCore);
}

#[test]
fn a_stopped_dump_is_usable_and_goes_on() {
    let memory = Computed::new(&[(0, 6 << 20), (0x1000_0000, 6 << 20)]);
    for (format, read_as) in FORMATS {
        let directory = tempfile::tempdir().expect("a directory");
        let whole = directory.path().join("whole");
        let expected = dump(&memory, &whole, format);
        let path = directory.path().join("dump");
        let mut start = Start::New;
        for _ in 0..4 {
            // Each run gets 3 MiB further.
            let mut calls = 0;
            let stopped = dump_with(&memory, &path, format, start, |_| {
                calls += 1;
                if calls == 3 || start == Start::Resume && calls % 10 == 9 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
            let Err(WriteError::Stopped { done, total }) = stopped else {
                panic!("{stopped:?}");
            };
            assert!(done < total);
            if format != WriteFormat::Raw {
                let image = image::open(&path, &ImageOptions::default()).expect("usable");
                assert!(!image.notes.is_empty(), "it says that it is cut");
            }
            // What is not to be resumed is not overwritten either.
            let again = dump_with(&memory, &path, format, Start::New, go_on);
            assert!(matches!(again, Err(WriteError::Exists { .. })), "{again:?}");
            start = Start::Resume;
        }
        let written = dump_with(&memory, &path, format, start, go_on).expect("it goes on");
        assert!(written.resumed_at.is_some());
        check(&memory, &path, read_as);
        assert_eq!(written.sha256, expected.sha256);
        assert_eq!(written.stored, expected.stored);
        assert_eq!(written.sha256_hexadecimal(), sha256sum(&path));
    }
}

#[test]
fn only_the_same_dump_is_resumed() {
    let mut memory = Computed::new(&[(0, 6 << 20)]);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("dump");
    let resume = |memory: &Computed, format| {
        dump_with(memory, &path, format, Start::Resume, |_| {
            ControlFlow::Continue(())
        })
    };
    let none = resume(&memory, WriteFormat::Lime);
    assert!(
        matches!(none, Err(WriteError::NotResumable { .. })),
        "{none:?}"
    );
    let stopped = dump_with(&memory, &path, WriteFormat::Lime, Start::New, |done| {
        if done > 3 << 20 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert!(
        matches!(stopped, Err(WriteError::Stopped { .. })),
        "{stopped:?}"
    );
    let other_format = resume(&memory, WriteFormat::ElfCore);
    assert!(
        matches!(other_format, Err(WriteError::NotResumable { .. })),
        "{other_format:?}"
    );
    let other_regions = resume(&Computed::new(&[(0, 7 << 20)]), WriteFormat::Lime);
    assert!(
        matches!(other_regions, Err(WriteError::NotResumable { .. })),
        "{other_regions:?}"
    );
    // Memory that can't change and did is not the same memory.
    memory.seed = 77;
    let other_bytes = resume(&memory, WriteFormat::Lime);
    assert!(
        matches!(other_bytes, Err(WriteError::Differs { .. })),
        "{other_bytes:?}"
    );
    // Memory that can is.
    memory.volatility = Volatility::Live;
    let live = resume(&memory, WriteFormat::Lime).expect("it goes on");
    assert_eq!(live.sha256_hexadecimal(), sha256sum(&path));
}

#[test]
fn unreadable_memory_is_listed_and_zero() {
    let mut memory = Computed::new(&[(0x1000, 4 << 20)]);
    let absent = MemoryRegion::new(PhysicalAddress::new(0x20_1000), 0x5000);
    memory.absent = Some(absent);
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("dump");
    let written = dump(&memory, &path, WriteFormat::Lime);
    assert!(
        matches!(&written.unreadable[..], [(region, PhysicalReadError::Excluded { .. })]
            if *region == absent),
        "{:?}",
        written.unreadable
    );
    let image = image::open(&path, &ImageOptions::default()).expect("it opens");
    let mut bytes = vec![1; 0x5000];
    image
        .memory
        .read(absent.start, &mut bytes)
        .expect("in the dump");
    assert!(bytes.iter().all(|byte| *byte == 0));
}

/// Runs the next test where it can mount a small disk and nobody else sees it.
#[test]
fn a_full_disk_is_said_and_the_dump_goes_on_later() {
    let root = std::fs::metadata("/proc/self").expect("procfs").uid() == 0;
    let status = Command::new("unshare")
        .args(if root {
            &["--mount"][..]
        } else {
            &["--user", "--map-root-user", "--mount"]
        })
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", "on_a_small_disk", "--ignored", "--nocapture"])
        .status()
        .expect("unshare runs (util-linux)");
    assert!(status.success());
}

#[test]
#[ignore = "runs inside of the test before it"]
fn on_a_small_disk() {
    let memory = Computed::new(&[(0, 8 << 20)]);
    let directory = tempfile::tempdir().expect("a directory");
    let mount = |options: &str| {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(directory.path())
            .status()
            .expect("mount runs (util-linux)");
        assert!(status.success());
    };
    mount("size=4m");
    let path = directory.path().join("dump");
    let full = dump_with(&memory, &path, WriteFormat::Lime, Start::New, go_on);
    let Err(WriteError::Full { done, total, .. }) = full else {
        panic!("{full:?}");
    };
    assert!(done > 1 << 20 && done < total, "{done} of {total}");
    let usable = image::open(&path, &ImageOptions::default()).expect("usable");
    let mut page = [0; 4096];
    let address = PhysicalAddress::new(0x1000);
    usable
        .memory
        .read(address, &mut page)
        .expect("a page that is there");
    drop(usable);
    mount("remount,size=64m");
    let resumed = dump_with(&memory, &path, WriteFormat::Lime, Start::Resume, go_on);
    let resumed = resumed.expect("it goes on");
    assert_eq!(resumed.resumed_at, Some(done));
    check(&memory, &path, ImageFormat::Lime);
    assert_eq!(resumed.sha256_hexadecimal(), sha256sum(&path));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 8,
        failure_persistence: None,
        max_shrink_iters: 64,
        ..ProptestConfig::default()
    })]

    /// Any regions, of any size and alignment, survive each format.
    #[test]
    fn any_regions_survive(
        parts in prop::collection::vec((1u64..200_000, 1u64..60_000), 1..12),
    ) {
        let mut regions = Vec::new();
        let mut end = 0;
        for (gap, length) in parts {
            regions.push((end + gap, length));
            end += gap + length;
        }
        let memory = Computed::new(&regions);
        for (format, read_as) in FORMATS {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("dump");
            let written = dump(&memory, &path, format);
            check(&memory, &path, read_as);
            prop_assert_eq!(written.sha256_hexadecimal(), sha256sum(&path));
        }
    }
}

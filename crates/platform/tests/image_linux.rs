//! Dumps of a real Linux guest: what QEMU writes of it and what makedumpfile
//! makes of that, compared page by page with its RAM.

mod firmware_guest;

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use firmware_guest::{PAGE, Ram, none_missing};
use secmon_lab::qmp::DumpFormat;
use secmon_lab::{Guest, Suite};
use secmon_memory::{AddressSpace, PagingMode, PhysicalReadError, VirtualAddress};
use secmon_platform::image::write::{Start, WriteFormat, WriteOptions, write};
use secmon_platform::image::{self, Image, ImageFormat, ImageNote, ImageOptions};
use secmon_platform::layout::{Machine, RamLayout};

const MEMORY_MIB: u32 = 256;
const PAGES: u64 = MEMORY_MIB as u64 * 256;

/// Dumps of one stopped guest, and its RAM then.
struct Dumps {
    guest: Guest,
    ram: Ram,
    elf: PathBuf,
    paging: PathBuf,
    kdump: PathBuf,
}

impl Dumps {
    fn take() -> Self {
        let guest = Guest::builder(Suite::Bookworm)
            .memory_mib(MEMORY_MIB)
            .vcpus(2)
            .boot()
            .expect("the guest boots");
        let path = |name: &str| guest.folder().join(name);
        let (elf, paging, kdump) = (path("elf"), path("paging"), path("kdump"));
        let copy = path("ram-copy");
        let ram_file = guest.ram_file().expect("RAM is a file");
        guest
            .while_stopped(|qmp| {
                qmp.dump(&elf, DumpFormat::Elf)?;
                qmp.dump(&paging, DumpFormat::ElfPaging)?;
                qmp.dump(&kdump, DumpFormat::KdumpZlib)?;
                std::fs::copy(&ram_file, &copy)?;
                Ok(())
            })
            .expect("QEMU writes dumps");
        let size = u64::from(MEMORY_MIB) << 20;
        let ram = Ram {
            file: File::open(copy).expect("the copy"),
            layout: RamLayout::for_machine(Machine::Q35, size).expect("a layout"),
        };
        Self {
            guest,
            ram,
            elf,
            paging,
            kdump,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.guest.folder().join(name)
    }

    /// The kernel's VMCOREINFO, found in RAM.
    fn vmcoreinfo(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        (&self.ram.file).read_to_end(&mut bytes).expect("the RAM");
        let start = "OSRELEASE=";
        let texts = memchr::memmem::find_iter(&bytes, start).map(|at| {
            let text = &bytes[at..bytes.len().min(at + PAGE)];
            let end = text
                .iter()
                .position(|byte| *byte == 0)
                .unwrap_or(text.len());
            &text[..end]
        });
        let longest = texts
            .max_by_key(|text| text.len())
            .expect("VMCOREINFO is in RAM");
        assert!(longest.len() > 1000, "the whole text");
        longest.to_vec()
    }

    /// What makedumpfile writes with these options.
    fn makedumpfile(&self, core: &Path, name: &str, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        let mut command = Command::new("makedumpfile");
        command.args(options).arg(core).stderr(Stdio::null());
        if options.contains(&"-F") {
            command.stdout(File::create(&path).expect("a file"));
        } else {
            command.arg(&path).stdout(Stdio::null());
        }
        let status = command
            .status()
            .expect("makedumpfile runs (install makedumpfile)");
        assert!(status.success(), "makedumpfile {options:?}");
        path
    }
}

fn open(path: &Path) -> Image {
    image::open(path, &ImageOptions::default()).expect("the image opens")
}

fn excluded(_: u64, error: &PhysicalReadError) -> bool {
    matches!(error, PhysicalReadError::Excluded { .. })
}

/// The banner at `linux_banner`, whose address the guest's own kallsyms say.
fn check_space(image: &Image, dumps: &Dumps) {
    let symbols = dumps.guest.truth().kallsyms().expect("kallsyms");
    let banner = symbols
        .iter()
        .find(|symbol| symbol.name == "linux_banner")
        .expect("a banner");
    assert_eq!(image.hints.vcpus.len(), 2);
    let space = AddressSpace::new(
        image.memory.clone(),
        image.hints.page_table_roots()[0],
        PagingMode::FourLevel,
    );
    let text = space
        .read_c_string(VirtualAddress::new(banner.address), 256)
        .expect("the banner");
    assert!(text.starts_with(b"Linux version "), "{text:?}");
}

/// Rewrites a kdump of zlib pages with another compression, as builds of
/// makedumpfile with those libraries would.
fn recompress(from: &Path, to: &Path, flag: u32, compress: impl Fn(&[u8]) -> Vec<u8>) {
    let bytes = std::fs::read(from).expect("the dump");
    let field = |offset: usize| {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes")) as usize
    };
    let bitmaps = (1 + field(432)) * PAGE;
    let descriptors = bitmaps + field(436) * PAGE;
    let second = &bytes[bitmaps + field(436) * PAGE / 2..descriptors];
    let count: usize = second.iter().map(|byte| byte.count_ones() as usize).sum();
    let mut table = Vec::new();
    let mut data = Vec::new();
    let compressed_zeros = compress(&[0; PAGE]);
    for index in 0..count {
        let at = descriptors + index * 24;
        let offset = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize;
        let stored = &bytes[offset..offset + field(at + 8)];
        let mut page = Vec::new();
        match field(at + 12) {
            0 => page.extend_from_slice(stored),
            1 => drop(flate2::read::ZlibDecoder::new(stored).read_to_end(&mut page)),
            other => panic!("flags {other}"),
        }
        assert_eq!(page.len(), PAGE);
        let compressed = if page.iter().all(|byte| *byte == 0) {
            compressed_zeros.clone()
        } else {
            compress(&page)
        };
        let (stored, flag) = if compressed.len() < PAGE {
            (compressed, flag)
        } else {
            (page, 0)
        };
        let offset = descriptors + count * 24 + data.len();
        table.extend_from_slice(&(offset as u64).to_le_bytes());
        table.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        table.extend_from_slice(&flag.to_le_bytes());
        table.extend_from_slice(&[0; 8]);
        data.extend_from_slice(&stored);
    }
    let mut file = File::create(to).expect("a file");
    for part in [&bytes[..descriptors], &table, &data] {
        file.write_all(part).expect("a file");
    }
}

#[test]
fn all_dumps_of_a_linux_guest_equal_its_ram() {
    let dumps = Dumps::take();

    for (path, format) in [
        (&dumps.elf, ImageFormat::ElfCore),
        (&dumps.kdump, ImageFormat::Kdump),
    ] {
        let image = open(path);
        assert_eq!((image.format, &image.notes[..]), (format, &[][..]));
        assert_eq!(
            dumps.ram.compare(image.memory.as_ref(), none_missing),
            PAGES
        );
        check_space(&image, &dumps);
    }

    // The kernel's direct map has all of RAM but what it gave back or guards.
    let image = open(&dumps.paging);
    let equal = dumps.ram.compare(image.memory.as_ref(), |_, error| {
        matches!(
            error,
            PhysicalReadError::Hole { .. } | PhysicalReadError::Excluded { .. }
        )
    });
    assert!(equal > PAGES * 9 / 10, "{equal} of {PAGES} pages");
    check_space(&image, &dumps);

    // makedumpfile needs the kernel's VMCOREINFO, which QEMU has only if the
    // guest gives it; the core written here has it.
    let core = dumps.path("core");
    let text = dumps.vmcoreinfo();
    write(
        open(&dumps.elf).memory.as_ref(),
        &core,
        &mut WriteOptions {
            format: WriteFormat::ElfCore,
            start: Start::New,
            vmcoreinfo: Some(&text),
            progress: &mut |_| ControlFlow::Continue(()),
        },
    )
    .expect("a core");
    for options in [
        &["-c", "-d", "0"][..],
        &["-l", "-d", "0"],
        &["-l", "-d", "1"],
        &["-F", "-c", "-d", "0"],
    ] {
        let path = dumps.makedumpfile(&core, &options.concat(), options);
        let image = open(&path);
        assert_eq!(image.format, ImageFormat::Kdump);
        assert_eq!(image.hints.vmcoreinfo.as_deref(), Some(&text[..]));
        assert_eq!(
            dumps.ram.compare(image.memory.as_ref(), none_missing),
            PAGES,
            "{options:?}"
        );
    }

    // Pages of free memory, cache and user programs left out.
    for options in [
        &["-l", "-d", "31"][..],
        &["-E", "-d", "31"],
        &["-F", "-E", "-d", "31"],
    ] {
        let path = dumps.makedumpfile(&core, &options.concat(), options);
        let image = open(&path);
        assert!(!image.notes.is_empty(), "{options:?} leaves pages out");
        let equal = dumps.ram.compare(image.memory.as_ref(), excluded);
        assert!(
            (1000..PAGES / 2).contains(&equal),
            "{options:?}: {equal} of {PAGES} pages"
        );
    }

    // A dump in two files: each knows what the other has.
    let (first, second) = (dumps.path("split-1"), dumps.path("split-2"));
    let status = Command::new("makedumpfile")
        .args(["--split", "-c", "-d", "0"])
        .args([&core, &first, &second])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("makedumpfile runs");
    assert!(status.success());
    let parts = [first, second].map(|path| {
        let image = open(&path);
        assert!(
            image
                .notes
                .iter()
                .any(|note| matches!(note, ImageNote::Partial { .. }))
        );
        dumps.ram.compare(image.memory.as_ref(), excluded)
    });
    assert_eq!(parts[0] + parts[1], PAGES);

    let zlib = dumps.path("-c-d0");
    for (name, flag) in [("snappy", 4), ("zstd", 0x20)] {
        let path = dumps.path(name);
        recompress(&zlib, &path, flag, |page| match flag {
            4 => snap::raw::Encoder::new()
                .compress_vec(page)
                .expect("a page is small"),
            _ => {
                ruzstd::encoding::compress_to_vec(page, ruzstd::encoding::CompressionLevel::Fastest)
            }
        });
        let image = open(&path);
        assert_eq!(
            dumps.ram.compare(image.memory.as_ref(), none_missing),
            PAGES,
            "{name}"
        );
    }

    // One page damaged in the file: that one can't be read, the rest can.
    let path = dumps.path("snappy");
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .expect("the dump");
    let length = file.metadata().expect("the dump").len();
    file.write_all_at(&[0xff; 64], length - 64)
        .expect("the dump");
    let image = open(&path);
    let damaged = Cell::new(0);
    let equal = dumps.ram.compare(image.memory.as_ref(), |_, error| {
        damaged.set(damaged.get() + 1);
        matches!(error, PhysicalReadError::Corrupt { .. })
    });
    // A small page before the last may lie in those bytes as well.
    assert!((1..=4).contains(&damaged.get()), "{damaged:?} pages");
    assert_eq!(equal + damaged.get(), PAGES);
}

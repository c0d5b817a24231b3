//! Dumps that QEMU writes, compared page by page with the RAM they were
//! written from.

mod firmware_guest;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use firmware_guest::{
    CR3, FirmwareGuest, KERNEL_GS_BASE, MIB, PAGE, none_missing, write_avml, write_lime,
};
use secmon_memory::{AddressSpace, PagingMode, PhysicalAddress, PhysicalReadError, VirtualAddress};
use secmon_platform::image::{self, Image, ImageFormat, ImageNote, ImageOptions};
use secmon_platform::layout::Machine;

fn open(path: &Path) -> Image {
    image::open(path, &ImageOptions::default()).expect("the image opens")
}

/// What QEMU's CPU notes say, and what can be read with them.
fn check_hints(image: &Image, vcpus: usize) {
    assert_eq!(image.hints.vcpus.len(), vcpus);
    let first = image.hints.vcpus[0];
    assert_eq!(first.cr3.as_u64(), CR3);
    assert_eq!(
        first.kernel_gs_base,
        Some(VirtualAddress::new(KERNEL_GS_BASE))
    );
    assert_eq!(image.hints.page_table_roots(), [PhysicalAddress::new(CR3)]);
    let space = AddressSpace::new(
        image.memory.clone(),
        image.hints.page_table_roots()[0],
        PagingMode::FourLevel,
    );
    let mut signal = [0; 8];
    for address in [0x7000, 0xffff_ffff_8000_7000] {
        space
            .read(VirtualAddress::new(address), &mut signal)
            .expect("a mapped address");
        assert_eq!(&signal, b"SECMON64");
    }
}

#[test]
fn elf_core_equals_ram() {
    let mut guest = FirmwareGuest::start(Machine::Q35, 64 * MIB, 2);
    let image = open(&guest.dump("core", false, ""));
    assert_eq!(image.format, ImageFormat::ElfCore);
    assert_eq!(image.notes, []);
    check_hints(&image, 2);
    assert_eq!(
        guest.ram.compare(image.memory.as_ref(), none_missing),
        64 * MIB / PAGE as u64
    );
}

#[test]
fn elf_core_with_paging_has_what_was_mapped() {
    let mut guest = FirmwareGuest::start(Machine::I440fx, 64 * MIB, 1);
    let image = open(&guest.dump("core", true, ""));
    assert_eq!(image.format, ImageFormat::ElfCore);
    check_hints(&image, 1);
    // The boot sector maps 4 MiB at 0, and nothing above.
    let equal = guest.ram.compare(image.memory.as_ref(), |address, error| {
        address >= 4 * MIB && matches!(error, PhysicalReadError::Hole { .. })
    });
    assert_eq!(equal, 4 * MIB / PAGE as u64);
    assert!(
        !image
            .notes
            .iter()
            .any(|note| matches!(note, ImageNote::Overlap { .. })),
        "the same bytes named twice are no contradiction: {:?}",
        image.notes
    );
}

#[test]
fn kdump_equals_ram_flattened_or_not() {
    let mut guest = FirmwareGuest::start(Machine::Q35, 64 * MIB, 2);
    let flattened = guest.dump("kdump", false, ",\"format\":\"kdump-zlib\"");
    let unfolded = guest.directory.path().join("unfolded");
    let status = Command::new("makedumpfile")
        .arg("-R")
        .arg(&unfolded)
        .stdin(File::open(&flattened).expect("the dump"))
        .stdout(Stdio::null())
        .status()
        .expect("makedumpfile runs (install makedumpfile)");
    assert!(status.success());
    for path in [flattened, unfolded] {
        let image = open(&path);
        assert_eq!(image.format, ImageFormat::Kdump);
        assert_eq!(image.notes, []);
        check_hints(&image, 2);
        assert_eq!(
            guest.ram.compare(image.memory.as_ref(), none_missing),
            64 * MIB / PAGE as u64
        );
    }
}

#[test]
fn lime_equals_ram() {
    let guest = FirmwareGuest::start(Machine::Q35, 64 * MIB, 1);
    let path = guest.directory.path().join("lime");
    write_lime(&guest, &path);
    let image = open(&path);
    assert_eq!(
        (image.format, &image.notes[..]),
        (ImageFormat::Lime, &[][..])
    );
    let equal = guest.ram.compare(image.memory.as_ref(), none_missing);
    assert_eq!(equal, 64 * MIB / PAGE as u64);
}

#[test]
fn avml_equals_ram() {
    let guest = FirmwareGuest::start(Machine::Q35, 128 * MIB, 1);
    let path = guest.directory.path().join("avml");
    write_avml(&guest, &path);
    let image = open(&path);
    assert_eq!(image.format, ImageFormat::Avml);
    assert_eq!(image.notes, []);
    let equal = guest.ram.compare(image.memory.as_ref(), |address, _| {
        // What AVML left out held only zeros.
        let entries = guest.ram.layout.entries().iter();
        let (region, offset) = entries
            .rev()
            .find(|(region, _)| region.start.as_u64() <= address)
            .expect("in RAM");
        let mut page = vec![1; PAGE];
        guest
            .ram
            .file
            .read_exact_at(&mut page, offset + address - region.start.as_u64())
            .expect("the RAM");
        page.iter().all(|byte| *byte == 0)
    });
    assert!(equal > 0 && equal < 128 * MIB / PAGE as u64);
    // Between two blocks it is said why.
    let gap = image
        .memory
        .read(PhysicalAddress::new(32 * MIB), &mut [0; 8]);
    assert!(
        matches!(gap, Err(PhysicalReadError::Excluded { .. })),
        "{gap:?}"
    );

    // A damaged chunk is told by its checksum, and no other suffers.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .expect("the image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 32 + 10 + 8 + 200)
        .expect("the image");
    file.write_all_at(&[!byte[0]], 32 + 10 + 8 + 200)
        .expect("the image");
    let image = open(&path);
    let damaged = image.memory.read(PhysicalAddress::new(0), &mut [0; 8]);
    assert!(
        matches!(damaged, Err(PhysicalReadError::Corrupt { .. })),
        "{damaged:?}"
    );
    image
        .memory
        .read(PhysicalAddress::new(0x1_0000), &mut [0; 8])
        .expect("the next chunk is whole");
}

#[test]
fn threads_read_a_compressed_image_together() {
    let mut guest = FirmwareGuest::start(Machine::Q35, 64 * MIB, 1);
    let path = guest.dump("kdump", false, ",\"format\":\"kdump-zlib\"");
    // A cache far smaller than the image.
    let options = ImageOptions {
        cache_size: 1 << 20,
        ..ImageOptions::default()
    };
    let image = image::open(&path, &options).expect("the image opens");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let equal = guest.ram.compare(image.memory.as_ref(), none_missing);
                assert_eq!(equal, 64 * MIB / PAGE as u64);
            });
        }
    });
}

#[test]
fn memory_above_4_gib_is_where_the_guest_sees_it() {
    const GIB: u64 = 1 << 30;
    for (machine, ram_size, low) in [
        (Machine::Q35, 3 * GIB, 2 * GIB),
        (Machine::I440fx, 0xe000_0000, 3 * GIB),
    ] {
        let mut guest = FirmwareGuest::start(machine, ram_size, 1);
        // QEMU itself says where RAM is.
        let tree = guest.command(
            "human-monitor-command",
            "{\"command-line\":\"info mtree -f\"}",
        );
        let above = format!(
            "0000000100000000-{:016x} (prio 0, ram): mem @{low:016x}",
            4 * GIB + ram_size - low - 1
        );
        assert!(tree.contains(&above), "{above} is not in {tree}");

        let image = open(&guest.dump("kdump", false, ",\"format\":\"kdump-zlib\""));
        assert_eq!(image.notes, []);
        assert_eq!(
            guest.ram.compare(image.memory.as_ref(), none_missing),
            ram_size / PAGE as u64
        );

        // A part of memory across the hole: from 1 MiB below to 1 MiB above.
        let begin = low - MIB;
        let length = 4 * GIB + MIB - begin;
        let image = open(&guest.dump(
            "core",
            false,
            &format!(",\"begin\":{begin},\"length\":{length}"),
        ));
        let equal = guest.ram.compare(image.memory.as_ref(), |address, error| {
            !(begin..begin + length).contains(&address)
                && matches!(error, PhysicalReadError::Hole { .. })
        });
        assert_eq!(equal, 2 * MIB / PAGE as u64);

        // The RAM file itself: which machine it was is found out.
        let image = open(&guest.directory.path().join("ram"));
        assert_eq!(image.format, ImageFormat::Raw);
        assert!(
            matches!(&image.notes[..], [ImageNote::LayoutInferred { evidence, .. }]
                if evidence.contains("ACPI")),
            "{:?}",
            image.notes
        );
        assert_eq!(
            guest.ram.compare(image.memory.as_ref(), none_missing),
            ram_size / PAGE as u64
        );
    }
}

/// A raw image can also hold the machine's hole: here the RAM at 0 and, at the
/// end of 4 GiB, the firmware.
#[test]
fn a_raw_image_with_the_hole_is_told_from_ram() {
    let mut guest = FirmwareGuest::start(Machine::Q35, 64 * MIB, 1);
    let core = open(&guest.dump("core", false, ""));
    let firmware = core.memory.regions()[1];
    assert_eq!(firmware.end().as_u64(), 1 << 32);
    let mut bytes = vec![0; firmware.length as usize];
    core.memory
        .read(firmware.start, &mut bytes)
        .expect("the firmware");
    let path = guest.directory.path().join("ram");
    guest
        .ram
        .file
        .write_all_at(&bytes, firmware.start.as_u64())
        .expect("a sparse file");
    let image = open(&path);
    assert_eq!(image.format, ImageFormat::Raw);
    assert_eq!(image.memory.regions().len(), 1, "{:?}", image.notes);
    assert_eq!(
        guest.ram.compare(image.memory.as_ref(), none_missing),
        64 * MIB / PAGE as u64
    );
    let mut found = vec![0; bytes.len()];
    image
        .memory
        .read(firmware.start, &mut found)
        .expect("the firmware");
    assert!(found == bytes);
}

#[test]
fn a_cut_dump_says_what_is_missing_and_reads_the_rest() {
    let mut guest = FirmwareGuest::start(Machine::Q35, 16 * MIB, 1);
    let core = guest.dump("core", false, "");
    let kdump = guest.dump("kdump", false, ",\"format\":\"kdump-zlib\"");
    let avml = guest.directory.path().join("avml");
    write_avml(&guest, &avml);
    let lime = guest.directory.path().join("lime");
    write_lime(&guest, &lime);
    for path in [core, kdump, avml, lime] {
        let file = OpenOptions::new()
            .write(true)
            .open(&path)
            .expect("the dump");
        let mut length = file.metadata().expect("the dump").len();
        let mut opened = 0;
        let mut pages = 16 * MIB / PAGE as u64;
        // From a byte to the whole file, in steps that hit every header.
        let mut step = 1;
        while length > step {
            length -= step;
            step = if length < 20_000 { 97 } else { length / 9 };
            file.set_len(length).expect("the dump");
            match image::open(&path, &ImageOptions::default()) {
                Ok(image) => {
                    opened += 1;
                    // LiME and AVML say what there is range by range: of the
                    // ranges behind the cut nothing is known.
                    let by_range = matches!(image.format, ImageFormat::Lime | ImageFormat::Avml);
                    let left = guest
                        .ram
                        .compare(image.memory.as_ref(), |_, error| match error {
                            PhysicalReadError::Hole { .. } => by_range,
                            other => matches!(other, PhysicalReadError::Excluded { .. }),
                        });
                    assert!(left <= pages, "a shorter file has no more pages");
                    // QEMU puts an empty section behind the memory: not missed.
                    assert!(
                        left == 16 * MIB / PAGE as u64 || !image.notes.is_empty(),
                        "cut to {length} and nothing said"
                    );
                    pages = left;
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
        assert!(opened > 5, "only {opened} of the cut files opened");
    }
}

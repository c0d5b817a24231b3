//! Guest RAM found in the address space of a QEMU that was started with no
//! special option.
//!
//! QEMU keeps a record of each block of RAM in its heap (`struct RAMBlock` of
//! `include/system/ramblock.h`):
//!
//! | offset | field |
//! |---|---|
//! | 24 | `host`: where the block lies in QEMU's address space |
//! | 48 | `used_length` |
//! | 56 | `max_length` |
//! | 76 | `idstr`: the name, up to 256 bytes |
//!
//! A record is believed only if its host address and length lie in writable
//! memory of the process. Where there is none (another allocator, another
//! layout of the structure) the mappings alone must do: anonymous RAM is made
//! by `qemu_ram_mmap()` as a run of exactly the block's size, aligned to 2 MiB,
//! with a guard page after it. A mapping made later right below it may merge
//! with it, and `madvise` may cut it in pieces; its end stays.
//!
//! Checked with QEMU 7.2, 10.0 and 11.1.

use std::os::unix::ffi::OsStrExt;

use super::command_line::CommandLine;
use super::memory::ForeignMemory;
use super::process::Mapping;

/// How much of QEMU's heap is looked through. RAM blocks are made at its
/// start, when the heap is small.
const MAX_HEAP: u64 = 256 << 20;

/// The alignment of anonymous RAM of at least this size
/// (`QEMU_VMALLOC_ALIGN`).
const ALIGNMENT: u64 = 2 << 20;

/// A block of RAM as QEMU's own record has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockRecord {
    pub name: String,
    pub host_address: u64,
    pub length: u64,
}

/// A run of neighbouring writable mappings of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: u64,
    end: u64,
    anonymous: bool,
    guarded: bool,
}

/// The records of RAM blocks in the process's heap.
pub(super) fn block_records(memory: &ForeignMemory, mappings: &[Mapping]) -> Vec<BlockRecord> {
    let runs = writable_runs(mappings);
    let mut records = Vec::new();
    let heaps = mappings.iter().filter(|mapping| mapping.path == b"[heap]");
    let mut left = MAX_HEAP;
    for heap in heaps {
        let length = heap.length().min(left);
        left -= length;
        // Chunks overlap by the length of a record.
        const CHUNK: usize = 1 << 20;
        const OVERLAP: u64 = 4096;
        let mut chunk = vec![0; CHUNK + OVERLAP as usize];
        let mut position = heap.start;
        while position < heap.start + length {
            let wanted = (heap.end - position).min(chunk.len() as u64) as usize;
            let buffer = chunk.get_mut(..wanted).unwrap_or_default();
            let count = memory.read(position, buffer);
            records_in(
                buffer.get(..count).unwrap_or_default(),
                CHUNK,
                &runs,
                &mut records,
            );
            position += CHUNK as u64;
        }
    }
    records
}

/// The records that start in the first `starts` bytes of a piece of heap.
fn records_in(bytes: &[u8], starts: usize, runs: &[Run], records: &mut Vec<BlockRecord>) {
    const HOST: usize = 24;
    const USED_LENGTH: usize = 48;
    const MAX_LENGTH: usize = 56;
    const IDSTR: usize = 76;
    const IDSTR_LENGTH: usize = 256;
    let word = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    // malloc gives addresses that are multiples of 16; the chunk starts at one.
    for at in (0..starts.min(bytes.len())).step_by(16) {
        let Some(host_address) = word(at + HOST).filter(|host| *host != 0 && host % 4096 == 0)
        else {
            continue;
        };
        let (Some(length), Some(max_length)) = (word(at + USED_LENGTH), word(at + MAX_LENGTH))
        else {
            continue;
        };
        if length == 0 || length % 4096 != 0 || length != max_length {
            continue;
        }
        let Some(end) = host_address.checked_add(length) else {
            continue;
        };
        if !runs
            .iter()
            .any(|run| run.start <= host_address && end <= run.end)
        {
            continue;
        }
        let name = bytes.get(at + IDSTR..).unwrap_or_default();
        let name = name.get(..IDSTR_LENGTH.min(name.len())).unwrap_or_default();
        let Some(name) = name
            .iter()
            .position(|byte| *byte == 0)
            .and_then(|end| name.get(..end))
            .filter(|name| !name.is_empty() && name.iter().all(|byte| (b' '..0x7f).contains(byte)))
        else {
            continue;
        };
        records.push(BlockRecord {
            name: String::from_utf8_lossy(name).into_owned(),
            host_address,
            length,
        });
    }
}

/// Neighbouring readable and writable mappings joined: anonymous ones with
/// anonymous ones, and parts of one file that continue each other.
fn writable_runs(mappings: &[Mapping]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut last: Option<&Mapping> = None;
    for mapping in mappings {
        let usable = mapping.readable && mapping.writable;
        let adjacent = last.filter(|last| last.end == mapping.start);
        if mapping.is_guard()
            && let (Some(run), Some(_)) = (runs.last_mut(), adjacent)
            && run.end == mapping.start
        {
            run.guarded = true;
        }
        if usable {
            let continues = adjacent.is_some_and(|last| {
                last.readable
                    && last.writable
                    && last.shared == mapping.shared
                    && (last.device, last.inode) == (mapping.device, mapping.inode)
                    && last.path == mapping.path
                    && (mapping.inode == 0
                        || last.offset.checked_add(last.length()) == Some(mapping.offset))
            });
            match runs.last_mut() {
                Some(run) if continues => run.end = mapping.end,
                _ => runs.push(Run {
                    start: mapping.start,
                    end: mapping.end,
                    anonymous: mapping.inode == 0 && mapping.path.is_empty(),
                    guarded: false,
                }),
            }
        }
        last = Some(mapping);
    }
    runs
}

/// The addresses where anonymous RAM of exactly this size can lie, by the
/// mappings alone.
pub(super) fn anonymous_candidates(mappings: &[Mapping], length: u64) -> Vec<u64> {
    // A block's length is rounded up to the host's pages.
    let Some(length) = length
        .checked_next_multiple_of(4096)
        .filter(|length| *length > 0)
    else {
        return Vec::new();
    };
    let alignment = if length >= ALIGNMENT { ALIGNMENT } else { 4096 };
    let runs = writable_runs(mappings);
    let candidates = runs.iter().filter_map(|run| {
        let start = run.end.checked_sub(length)?;
        let fits = run.anonymous && run.guarded && start >= run.start && start % alignment == 0;
        fits.then_some(start)
    });
    candidates.collect()
}

/// The mapping that holds all of `host_address..+length`, if it is one that
/// shares a file; and where in the file the address lies.
pub(super) fn shared_file(
    mappings: &[Mapping],
    host_address: u64,
    length: u64,
) -> Option<(&Mapping, u64)> {
    let index = mappings.partition_point(|mapping| mapping.start <= host_address);
    let mapping = mappings.get(index.checked_sub(1)?)?;
    let covers = host_address.checked_add(length)? <= mapping.end;
    let offset = mapping.offset.checked_add(host_address - mapping.start)?;
    (covers && mapping.shared && mapping.inode != 0 && mapping.readable)
        .then_some((mapping, offset))
}

/// The mapping of a file that is the guest's one block of RAM, and where in the
/// file RAM begins, by the mappings and the command line alone.
///
/// RAM is written by its guest: a file that is only read is a device's, as the
/// RAM of a target in the QEMU of its monitoring VM; so is one that the
/// command line gives to a device.
pub(super) fn shared_ram<'a>(
    mappings: &'a [Mapping],
    command_line: &CommandLine,
    ram_size: u64,
) -> Option<(&'a Mapping, u64)> {
    let ours = command_line.memory_backend.as_ref();
    let of_device = |mapping: &Mapping| {
        let mut others = command_line.backends.iter().filter(|backend| {
            Some(&backend.id) != ours && !command_line.numa_backends.contains(&backend.id)
        });
        others.any(|backend| {
            let path = backend
                .path
                .as_ref()
                .map(|path| path.as_os_str().as_bytes());
            path == Some(&mapping.path)
        })
    };
    mappings
        .iter()
        .filter(|mapping| mapping.writable && !of_device(mapping))
        .find_map(|mapping| shared_file(mappings, mapping.start, ram_size))
}

/// Whether all of `host_address..+length` is readable and writable memory of
/// the process, as guest RAM is.
pub(super) fn is_writable(mappings: &[Mapping], host_address: u64, length: u64) -> bool {
    let Some(end) = host_address.checked_add(length) else {
        return false;
    };
    let runs = writable_runs(mappings);
    runs.iter()
        .any(|run| run.start <= host_address && end <= run.end)
}

/// Where RAM of this length can lie in mappings of the file at `path`, or of a
/// file in the folder at `path`. A relative path may lie in any folder.
pub(super) fn file_candidates(mappings: &[Mapping], path: &[u8], length: u64) -> Vec<u64> {
    let named = |mapping: &&Mapping| {
        let file = mapping
            .path
            .strip_suffix(b" (deleted)")
            .unwrap_or(&mapping.path);
        let relative = !path.starts_with(b"/");
        let mut starts = memchr::memmem::find_iter(file, path);
        starts.any(|start| {
            let (before, rest) = file.split_at(start);
            let after = rest.get(path.len()..).unwrap_or_default();
            let from_here = start == 0 || (relative && before.ends_with(b"/"));
            let to_here = after.is_empty() || after.starts_with(b"/") || path.ends_with(b"/");
            from_here && to_here
        })
    };
    let fits =
        |mapping: &&Mapping| mapping.readable && mapping.writable && mapping.length() >= length;
    let candidates = mappings.iter().filter(named).filter(fits);
    candidates.map(|mapping| mapping.start).collect()
}

/// What firmware leaves in the first MiB of a PC's RAM: reasons to believe
/// that these bytes are it. Empty where nothing speaks for it, as before the
/// firmware has run.
pub(super) fn signs_of_low_ram(bytes: &[u8]) -> Vec<&'static str> {
    let mut signs = Vec::new();
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 2)?;
        Some(u16::from_le_bytes(bytes.try_into().ok()?))
    };
    // Vectors of the BIOS lie in its segment.
    let vectors = (0..64).filter(|vector| word(vector * 4 + 2) == Some(0xf000));
    if vectors.count() >= 16 {
        signs.push("interrupt vectors into the BIOS");
    }
    // The BIOS data area: segment of the extended BIOS data area and size of
    // base memory in KiB.
    if word(0x40e).is_some_and(|segment| (0x8000..=0x9fff).contains(&segment))
        && word(0x413).is_some_and(|size| (512..=640).contains(&size))
    {
        signs.push("a BIOS data area");
    }
    let bios = bytes.get(0xe_0000..).unwrap_or_default();
    for (mark, sign) in [
        (&b"RSD PTR "[..], "an ACPI root pointer"),
        (&b"SeaBIOS"[..], "SeaBIOS"),
        (&b"_SM_"[..], "an SMBIOS entry point"),
    ] {
        if memchr::memmem::find(bios, mark).is_some() {
            signs.push(sign);
        }
    }
    signs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mapping(start: u64, end: u64, permissions: &str) -> Mapping {
        Mapping {
            start,
            end,
            readable: permissions.contains('r'),
            writable: permissions.contains('w'),
            executable: permissions.contains('x'),
            shared: permissions.contains('s'),
            offset: 0,
            device: (0, 0),
            inode: 0,
            path: Vec::new(),
        }
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn ram_ends_at_its_guard_page() {
        let ram = 0x7f00_0000_0000_u64;
        let end = ram + 64 * MIB;
        let guard = mapping(end, end + 4096, "---");
        let exact = [mapping(ram, end, "rw"), guard.clone()];
        assert_eq!(anonymous_candidates(&exact, 64 * MIB), [ram]);
        assert_eq!(anonymous_candidates(&exact, 62 * MIB), [ram + 2 * MIB]);
        assert_eq!(
            anonymous_candidates(&exact, 63 * MIB),
            [0; 0],
            "not aligned"
        );
        assert_eq!(anonymous_candidates(&exact, 66 * MIB), [0; 0], "too large");
        let merged = [mapping(ram - 12288, end, "rw"), guard.clone()];
        assert_eq!(anonymous_candidates(&merged, 64 * MIB), [ram]);
        let split = [
            mapping(ram, ram + MIB, "rw"),
            mapping(ram + MIB, end, "rw"),
            guard.clone(),
        ];
        assert_eq!(anonymous_candidates(&split, 64 * MIB), [ram]);
        assert_eq!(
            anonymous_candidates(&[mapping(ram, end, "rw")], 64 * MIB),
            [0; 0],
            "no guard page"
        );
        let gap = [
            mapping(ram, end, "rw"),
            mapping(end + 4096, end + 8192, "---"),
        ];
        assert_eq!(anonymous_candidates(&gap, 64 * MIB), [0; 0]);
        assert_eq!(anonymous_candidates(&exact, 0), [0; 0]);
        assert_eq!(anonymous_candidates(&exact, u64::MAX), [0; 0]);
    }

    fn record(name: &str, host: u64, length: u64, max_length: u64) -> Vec<u8> {
        let mut bytes = vec![0; 352];
        bytes[24..32].copy_from_slice(&host.to_le_bytes());
        bytes[48..56].copy_from_slice(&length.to_le_bytes());
        bytes[56..64].copy_from_slice(&max_length.to_le_bytes());
        bytes[76..76 + name.len()].copy_from_slice(name.as_bytes());
        bytes
    }

    #[test]
    fn records_count_only_where_memory_is() {
        let ram = 0x7f00_0000_0000_u64;
        let runs = writable_runs(&[mapping(ram, ram + 64 * MIB, "rw")]);
        let mut heap = vec![0xff; 32];
        heap.extend(record("pc.ram", ram, 64 * MIB, 64 * MIB));
        heap.extend(record("resizable", ram, MIB, 2 * MIB));
        heap.extend(record("elsewhere", ram + 64 * MIB, MIB, MIB));
        heap.extend(record("too long", ram, 65 * MIB, 65 * MIB));
        heap.extend(record("", ram, MIB, MIB));
        heap.extend(record("vga.vram", ram + MIB, MIB, MIB));
        let mut records = Vec::new();
        records_in(&heap, heap.len(), &runs, &mut records);
        let block = |name: &str, host_address, length| BlockRecord {
            name: name.to_owned(),
            host_address,
            length,
        };
        assert_eq!(
            records,
            [
                block("pc.ram", ram, 64 * MIB),
                block("vga.vram", ram + MIB, MIB)
            ]
        );
    }

    #[test]
    fn a_shared_file_is_found_with_its_offset() {
        let file = Mapping {
            inode: 5,
            offset: 0x1000,
            ..mapping(0x10_0000, 0x20_0000, "rws")
        };
        let (found, offset) =
            shared_file(std::slice::from_ref(&file), 0x10_2000, 0x1000).expect("a file");
        assert_eq!((found, offset), (&file, 0x3000));
        assert!(shared_file(std::slice::from_ref(&file), 0x10_2000, 0x10_0000).is_none());
        let private = Mapping {
            shared: false,
            ..file
        };
        assert!(shared_file(&[private], 0x10_2000, 0x1000).is_none());
    }

    #[test]
    fn a_file_of_a_device_is_not_ram() {
        let line = |text: &str| {
            let words: Vec<_> = text
                .split(' ')
                .map(|word| word.as_bytes().to_vec())
                .collect();
            CommandLine::parse(&words)
        };
        let file = |path: &str, permissions| Mapping {
            inode: 5,
            path: path.into(),
            ..mapping(0x10_0000, 0x20_0000, permissions)
        };
        let plain = line("qemu-system-x86_64 -m 1M");
        let writable = [file("/ram", "rws")];
        assert!(shared_ram(&writable, &plain, MIB).is_some());
        assert_eq!(shared_ram(&[file("/ram", "rs")], &plain, MIB), None);
        let device = line(
            "qemu-system-x86_64 -m 1M -object memory-backend-file,id=t,size=1M,mem-path=/ram,share=on -device ivshmem-plain,memdev=t",
        );
        assert_eq!(shared_ram(&writable, &device, MIB), None);
    }

    #[test]
    fn files_are_told_by_their_path() {
        let candidates = |file: &[u8], path: &[u8]| {
            let mapping = Mapping {
                inode: 5,
                path: file.to_vec(),
                ..mapping(0x10_0000, 0x20_0000, "rw")
            };
            file_candidates(&[mapping], path, 0x10_0000).len()
        };
        assert_eq!(candidates(b"/tmp/ram", b"/tmp/ram"), 1);
        assert_eq!(candidates(b"/tmp/ram (deleted)", b"/tmp/ram"), 1);
        assert_eq!(candidates(b"/tmp/ram2", b"/tmp/ram"), 0);
        assert_eq!(candidates(b"/a/tmp/ram", b"/tmp/ram"), 0);
        assert_eq!(candidates(b"/a/ram", b"ram"), 1);
        assert_eq!(candidates(b"/a/ram/ram", b"ram"), 1);
        assert_eq!(candidates(b"/a/xram", b"ram"), 0);
        assert_eq!(candidates(b"/dev/hugepages/qemu.x", b"/dev/hugepages"), 1);
        assert_eq!(candidates(b"/dev/hugepages/qemu.x", b"/dev/hugepages/"), 1);
        assert_eq!(candidates(b"/dev/hugepages2/qemu.x", b"/dev/hugepages"), 0);
        assert_eq!(candidates(b"", b"ram"), 0);
    }

    #[test]
    fn zeroed_memory_has_no_signs() {
        assert_eq!(signs_of_low_ram(&vec![0; 1 << 20]), [""; 0]);
        assert_eq!(signs_of_low_ram(&[]), [""; 0]);
        let mut bytes = vec![0; 1 << 20];
        bytes[0xf_5a00..0xf_5a08].copy_from_slice(b"RSD PTR ");
        assert_eq!(signs_of_low_ram(&bytes), ["an ACPI root pointer"]);
    }

    proptest! {
        #[test]
        fn any_heap_is_searched_without_a_panic(
            heap in prop::collection::vec(prop_oneof![Just(0_u8), Just(0x10), any::<u8>()], 0..700),
            starts in 0_usize..800,
        ) {
            let runs = [Run { start: 0, end: u64::MAX, anonymous: true, guarded: true }];
            let mut records = Vec::new();
            records_in(&heap, starts, &runs, &mut records);
            for record in records {
                prop_assert!(record.length > 0 && !record.name.is_empty());
            }
        }
    }
}

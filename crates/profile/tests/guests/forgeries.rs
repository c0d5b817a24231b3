//! Forgeries planted in a copy of a real guest's memory: what is found must
//! stay the same, and the forgery be reported.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use secmon_memory::{PAGE_SIZE, PhysicalAddress, PhysicalMemory, VirtualAddress};
use secmon_profile::{
    Cache, CacheOutcome, FindError, FindOptions, IsfError, Kernel, ProfileError, ProfileFrom,
    Search, Subject, TablesFrom, TypeKind, find,
};

use crate::forged::Forged;

const PRESENT_TABLE: u64 = 0x63;
const PRESENT_LARGE: u64 = 0x1e3;
const LARGE_PAGE: u64 = 2 << 20;

/// Runs all of them on `memory`, in which `truth` is to be found.
pub fn check(memory: &Arc<dyn PhysicalMemory>, truth: &Kernel) {
    let start = Forged::new(memory);
    let plain = found(&start, &options());
    assert_same(&plain, truth);
    assert_eq!(plain.conflicts, [], "memory that is not mapped");

    second_banner(&start, truth);
    second_symbol_table(&start, truth);
    second_types(&start, truth);
    forged_vmcoreinfo(&start, truth);
    empty_tables(&start, truth);
    copied_kernel(&start, truth);
    without_trampoline(&start, truth);
    damaged_types(&start, truth);
    spoilt_cache(&start, truth);
}

fn options() -> FindOptions {
    FindOptions {
        cache: Cache::Off,
        ..FindOptions::default()
    }
}

fn found(memory: &Forged, options: &FindOptions) -> Kernel {
    let memory: Arc<dyn PhysicalMemory> = Arc::new(memory.clone());
    find(&memory, options).expect("a kernel")
}

fn assert_same(found: &Kernel, truth: &Kernel) {
    assert_eq!(found.image, truth.image);
    assert_eq!(found.space.root(), truth.space.root());
    assert_eq!(found.space.mode(), truth.space.mode());
    assert_eq!(found.direct_map, truth.direct_map);
    assert_eq!(found.vmalloc_base, truth.vmalloc_base);
    assert_eq!(found.profile.banner(), truth.profile.banner());
    assert_eq!(found.profile.build_id(), truth.profile.build_id());
    let (symbols, own) = (found.profile.symbols(), truth.profile.symbols());
    assert_eq!(symbols.len(), own.len());
    assert_eq!(symbols.address("init_task"), own.address("init_task"));
    if let (Ok(types), Ok(own)) = (found.profile.types(), truth.profile.types()) {
        assert_eq!(types.bytes(), own.bytes());
    }
}

/// Asserts that there is a conflict about `subject` whose rejected side
/// mentions `text`, and none about anything else.
fn assert_conflict(kernel: &Kernel, subject: Subject, text: &str) {
    let mut all = kernel.conflicts.iter();
    let named = |conflict: &&secmon_profile::Conflict| {
        conflict.what == subject && conflict.other.contains(text)
    };
    assert!(
        all.any(|conflict| named(&conflict)),
        "{:?}",
        kernel.conflicts
    );
    let others = kernel
        .conflicts
        .iter()
        .filter(|conflict| conflict.what != subject);
    assert_eq!(
        others.collect::<Vec<_>>(),
        Vec::<&secmon_profile::Conflict>::new()
    );
}

fn symbol(kernel: &Kernel, name: &str) -> VirtualAddress {
    kernel.profile.symbols().address(name).expect(name)
}

/// Where the image's byte at a virtual address lies.
fn physical(kernel: &Kernel, address: VirtualAddress) -> PhysicalAddress {
    let offset = address.as_u64() - kernel.image.virtual_base.as_u64();
    kernel.image.physical_base.wrapping_add(offset)
}

/// `length` bytes of zeroes in the image's variables.
fn free_space(memory: &Forged, kernel: &Kernel, length: usize) -> PhysicalAddress {
    let start = physical(kernel, symbol(kernel, "__bss_start"));
    let end = physical(kernel, symbol(kernel, "__bss_stop"));
    let start = start.as_u64().next_multiple_of(PAGE_SIZE);
    let size = (end.as_u64() - start) as usize;
    let bytes = memory.bytes(PhysicalAddress::new(start), size);
    let place = (0..size - length)
        .step_by(PAGE_SIZE as usize)
        .find(|place| bytes[*place..place + length].iter().all(|byte| *byte == 0))
        .expect("zeroes among the kernel's variables");
    PhysicalAddress::new(start + place as u64)
}

fn thorough() -> FindOptions {
    FindOptions {
        search: Search::Thorough,
        ..options()
    }
}

fn second_banner(start: &Forged, truth: &Kernel) {
    let banner = b"Linux version 4.4.0-other (root@elsewhere) (gcc 5.4) #1 SMP 2016\n";
    let mut memory = start.clone();
    memory.write(free_space(start, truth, 4096), banner);
    let kernel = found(&memory, &options());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::Banner, "4.4.0-other");

    let mut memory = start.clone();
    let elsewhere = memory.add_region(4096);
    memory.write(elsewhere.wrapping_add(100), banner);
    let kernel = found(&memory, &thorough());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::Banner, "4.4.0-other");
}

/// A symbol table of 5000 symbols as 6.4 to 6.19 write it, that is right
/// about `_text` and the banner and wrong about the rest.
fn forged_table(kernel: &Kernel) -> Vec<u8> {
    let base = kernel.image.virtual_base.as_u64();
    let banner = symbol(kernel, "linux_banner").as_u64() - base;
    let mut symbols = vec![("T_text".to_owned(), 0)];
    for number in 1..5000_u32 {
        symbols.push((format!("tfiller_{number}"), number));
    }
    symbols.push(("Dlinux_banner".to_owned(), banner as u32));
    symbols.push(("Dinit_task".to_owned(), banner as u32 + 0x1000));
    let mut names = Vec::new();
    let mut markers: Vec<u32> = Vec::new();
    for (number, (name, _)) in symbols.iter().enumerate() {
        if number % 256 == 0 {
            markers.push(names.len() as u32);
        }
        names.push(name.len() as u8);
        names.extend(name.bytes());
    }
    let mut tokens = Vec::new();
    let mut index = Vec::new();
    for token in 0..=255_u8 {
        index.extend((tokens.len() as u16).to_le_bytes());
        if token.is_ascii_graphic() {
            tokens.push(token);
        }
        tokens.push(0);
    }
    let mut table = (symbols.len() as u64).to_le_bytes().to_vec();
    for part in [
        names,
        markers.into_iter().flat_map(u32::to_le_bytes).collect(),
        tokens,
        index,
        symbols
            .iter()
            .flat_map(|(_, offset)| offset.to_le_bytes())
            .collect(),
        base.to_le_bytes().to_vec(),
    ] {
        table.resize(table.len().next_multiple_of(8), 0);
        table.extend(part);
    }
    table
}

fn second_symbol_table(start: &Forged, truth: &Kernel) {
    let table = forged_table(truth);
    let mut memory = start.clone();
    memory.write(free_space(start, truth, table.len()), &table);
    let kernel = found(&memory, &options());
    assert_same(&kernel, truth);
    assert_conflict(
        &kernel,
        Subject::Symbols,
        "the symbol table with its tokens at",
    );

    let mut memory = start.clone();
    let elsewhere = memory.add_region(1 << 20);
    memory.write(elsewhere.wrapping_add(0x40), &table);
    let kernel = found(&memory, &thorough());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::Symbols, "a table of 5002 symbols");
}

/// A blob with nothing but an empty `struct task_struct`.
fn forged_types() -> Vec<u8> {
    let strings = b"\0task_struct\0";
    let mut blob = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, 12, 12, strings.len() as u32, 1, 4 << 24, 8] {
        blob.extend(word.to_le_bytes());
    }
    blob.extend(strings);
    blob
}

fn second_types(start: &Forged, truth: &Kernel) {
    let mut memory = start.clone();
    memory.write(free_space(start, truth, 4096), &forged_types());
    let kernel = found(&memory, &options());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::Types, "types at");

    let mut memory = start.clone();
    let elsewhere = memory.add_region(1 << 20);
    memory.write(elsewhere, &forged_types());
    let kernel = found(&memory, &thorough());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::Types, "1 other types at physical");
}

fn forged_vmcoreinfo(start: &Forged, truth: &Kernel) {
    let info = truth.vmcoreinfo.as_ref().expect("VMCOREINFO");
    let pointer = symbol(truth, "vmcoreinfo_data");
    let address = truth.space.read_pointer(pointer).expect("a pointer");
    let place = truth.space.translate(address).expect("mapped").physical;
    let keys = ["KERNELOFFSET=", "NUMBER(phys_base)=", "SYMBOL(_stext)="];
    let mut text = info.text.clone();
    for key in keys {
        let value = text.find(key).expect(key) + key.len();
        let end = value + text[value..].find('\n').expect("its end");
        let digits: String = text[value..end]
            .chars()
            .map(|digit| if digit == '1' { '2' } else { '1' })
            .collect();
        text.replace_range(value..end, &digits);
    }
    assert_eq!(text.len(), info.text.len());
    let mut memory = start.clone();
    memory.write(place, text.as_bytes());
    let kernel = found(&memory, &options());
    assert_same(&kernel, truth);
    for key in keys {
        assert_conflict(&kernel, Subject::VmcoreInfo, key);
    }

    let mut memory = start.clone();
    let elsewhere = memory.add_region(1 << 20);
    memory.write(elsewhere.wrapping_add(24), text.as_bytes());
    let kernel = found(&memory, &thorough());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::VmcoreInfo, "KERNELOFFSET=");
}

/// An unused page of low memory below the trampoline.
fn low_page(memory: &Forged) -> PhysicalAddress {
    (1..0x90)
        .map(|number| PhysicalAddress::new(number * PAGE_SIZE))
        .find(|page| memory.bytes(*page, 4096).iter().all(|byte| *byte == 0))
        .expect("an unused page below 576 KiB")
}

/// Plants page tables of the kernel's shape in low memory that map the `size`
/// bytes at `image`.
fn plant_tables(memory: &mut Forged, tables: PhysicalAddress, image: PhysicalAddress, size: u64) {
    let root = low_page(memory);
    let (upper, directory) = (tables, tables.wrapping_add(PAGE_SIZE));
    memory.write_entry(root, 511, upper.as_u64() | PRESENT_TABLE);
    memory.write_entry(upper, 510, directory.as_u64() | PRESENT_TABLE);
    for step in 0..size / LARGE_PAGE {
        let page = image.as_u64() + step * LARGE_PAGE;
        memory.write_entry(directory, 8 + step, page | PRESENT_LARGE);
    }
}

fn empty_tables(start: &Forged, truth: &Kernel) {
    let mut memory = start.clone();
    let region = memory.add_region(32 << 20);
    let image = region.wrapping_add(LARGE_PAGE);
    plant_tables(&mut memory, region, image, 16 << 20);
    let kernel = found(&memory, &options());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::PageTables, "0xffffffff81000000");
}

/// A whole kernel image, with another banner, to which fewer roots lead.
fn copied_kernel(start: &Forged, truth: &Kernel) {
    let size = truth.image.size;
    let mut bytes = start.bytes(truth.image.physical_base, size as usize);
    let banner = symbol(truth, "linux_banner").as_u64() - truth.image.virtual_base.as_u64();
    bytes[banner as usize + b"Linux version ".len()] = b'3';
    let mut memory = start.clone();
    let region = memory.add_region(size + (4 << 20));
    let image = region.wrapping_add(LARGE_PAGE);
    memory.write(image, &bytes);
    let root = low_page(&memory);
    let (upper, directory) = (region, region.wrapping_add(PAGE_SIZE));
    memory.write_entry(root, 511, upper.as_u64() | PRESENT_TABLE);
    memory.write_entry(upper, 510, directory.as_u64() | PRESENT_TABLE);
    let first = (truth.image.virtual_base.as_u64() - 0xffff_ffff_8000_0000) / LARGE_PAGE;
    for step in 0..size / LARGE_PAGE {
        let page = image.as_u64() + step * LARGE_PAGE;
        memory.write_entry(directory, first + step, page | PRESENT_LARGE);
    }
    let kernel = found(&memory, &options());
    assert_same(&kernel, truth);
    assert_conflict(&kernel, Subject::PageTables, "a complete kernel's image at");

    // The kernel that most roots lead to may be one that a reset left behind.
    let reset = FindOptions {
        left_behind: vec![truth.image],
        ..options()
    };
    let kernel = found(&memory, &reset);
    assert!(kernel.profile.banner().starts_with("Linux version 3"));
    // Where it is the only one it is found all the same.
    assert_same(&found(start, &reset), truth);

    // A vCPU that runs on it decides otherwise.
    let hinted = FindOptions {
        root_hints: vec![root],
        ..options()
    };
    let kernel = found(&memory, &hinted);
    assert!(kernel.profile.banner().starts_with("Linux version 3"));
    assert!(
        kernel
            .conflicts
            .iter()
            .any(|conflict| conflict.what == Subject::PageTables)
    );
}

fn without_trampoline(start: &Forged, truth: &Kernel) {
    let mut memory = start.clone();
    for region in start.regions() {
        let low = (1 << 20_u64).min(region.end().as_u64());
        if region.start.as_u64() < low {
            memory.write(
                region.start,
                &vec![0; (low - region.start.as_u64()) as usize],
            );
        }
    }
    let kernel = found(&memory, &options());
    assert_eq!(kernel.evidence.tables, TablesFrom::Search);
    assert_same(&kernel, truth);
    assert_eq!(kernel.conflicts, []);

    // Nor any other table.
    memory.write(
        truth.image.physical_base,
        &vec![0; truth.image.size as usize],
    );
    let memory: Arc<dyn PhysicalMemory> = Arc::new(memory);
    match find(&memory, &options()) {
        Err(FindError::NoSymbols { .. } | FindError::NoPageTables { .. }) => {}
        Err(error) => panic!("{error}"),
        Ok(kernel) => panic!("found {}", kernel.profile.banner()),
    }
}

fn damaged_types(start: &Forged, truth: &Kernel) {
    let place = physical(truth, symbol(truth, "__start_BTF"));
    // The header; the kind of the first type.
    let damages: [(u64, &[u8]); 2] = [(0, &[0; 4]), (24 + 7, &[0x7e])];
    for (offset, bytes) in damages {
        let mut memory = start.clone();
        memory.write(place.wrapping_add(offset), bytes);
        let kernel = found(&memory, &options());
        assert_same(&kernel, truth);
        let error = kernel.profile.types().expect_err("damaged types");
        assert!(matches!(error, ProfileError::DamagedBtf { .. }), "{error}");
        assert!(error.to_string().contains("ISF"), "{error}");

        let folder = tempfile::tempdir().expect("a temporary folder");
        let with = |isf: PathBuf| FindOptions {
            isf: Some(isf),
            ..options()
        };
        let path = write_isf(truth, folder.path(), truth.profile.banner());
        let kernel = found(&memory, &with(path.clone()));
        assert_same_types(&kernel, truth);
        assert_eq!(kernel.evidence.profile, ProfileFrom::Isf);

        // The symbol table too: its digits are what it is found by.
        let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
        let image = memory.bytes(truth.image.physical_base, truth.image.size as usize);
        for place in memchr::memmem::find_iter(&image, digits) {
            let place = truth.image.physical_base.wrapping_add(place as u64);
            memory.write(place, &[0; 2]);
        }
        let kernel = found(&memory, &with(path));
        assert_same_types(&kernel, truth);
        for name in ["init_task", "__per_cpu_offset", "linux_banner"] {
            let own = truth.profile.symbols().address(name);
            assert_eq!(kernel.profile.symbols().address(name), own, "{name}");
        }
        assert_eq!(kernel.space.root(), truth.space.root());

        let other = write_isf(truth, folder.path(), "Linux version 1.0");
        let memory: Arc<dyn PhysicalMemory> = Arc::new(memory);
        match find(&memory, &with(other)).map(|_| ()) {
            Err(FindError::Isf(IsfError::OtherBanner {
                expected, found, ..
            })) => {
                assert_eq!(expected, "Linux version 1.0");
                assert_eq!(found, truth.profile.banner());
            }
            other => panic!("{other:?}"),
        }
    }
}

const STRUCTURES: [&str; 4] = ["task_struct", "module", "mm_struct", "list_head"];

fn assert_same_types(kernel: &Kernel, truth: &Kernel) {
    let types = kernel.profile.types().expect("types from the file");
    let own = truth.profile.types().expect("types");
    for structure in STRUCTURES {
        assert_eq!(types.size_of(structure), own.size_of(structure));
        let named = own
            .iter()
            .find(|named| named.name == structure && named.kind == TypeKind::Structure)
            .expect(structure);
        for member in own.members_of(named.id).expect("members") {
            let Some(name) = member.name else {
                continue;
            };
            let found = types.member(structure, &name).expect(&name);
            let place = |member: &secmon_profile::Member| {
                let bits = member.offset * 8 + u64::from(member.bit_offset);
                (bits, member.bit_size, member.pointer)
            };
            assert_eq!(place(&found), place(&member.member), "{structure}.{name}");
        }
    }
}

/// An ISF file with some structures of the kernel, its symbols as they were
/// linked, and `banner`.
fn write_isf(truth: &Kernel, folder: &Path, banner: &str) -> PathBuf {
    use serde_json::{Map, Value, json};
    let types = truth.profile.types().expect("types");
    let mut users = Map::new();
    let mut bases = Map::new();
    for size in [1, 2, 4, 8, 16] {
        let base = json!({"size": size, "signed": false, "kind": "int", "endian": "little"});
        bases.insert(format!("u{}", size * 8), base);
    }
    for structure in STRUCTURES {
        let named = types
            .iter()
            .find(|named| named.name == structure && named.kind == TypeKind::Structure)
            .expect(structure);
        let mut fields = Map::new();
        for member in types.members_of(named.id).expect("members") {
            let (Some(name), place) = (member.name, member.member) else {
                continue;
            };
            let base = |size: u64| json!({"kind": "base", "name": format!("u{}", size * 8)});
            let kind = if place.bit_size != 0 {
                json!({"kind": "bitfield", "bit_position": place.bit_offset,
                    "bit_length": place.bit_size, "type": base(place.size)})
            } else if place.pointer && place.count.is_none() {
                json!({"kind": "pointer", "subtype": {"kind": "base", "name": "void"}})
            } else if place.pointer {
                let pointer = json!({"kind": "pointer", "subtype": {"kind": "function"}});
                json!({"kind": "array", "count": place.size / 8, "subtype": pointer})
            } else {
                json!({"kind": "array", "count": place.size, "subtype": base(1)})
            };
            fields.insert(name, json!({"type": kind, "offset": place.offset}));
        }
        let user = json!({"size": named.size, "kind": "struct", "fields": fields});
        users.insert(structure.to_owned(), user);
    }
    let mut symbols: BTreeMap<&str, Value> = BTreeMap::new();
    for symbol in truth.profile.symbols().iter() {
        let address = match symbol.address.as_u64() {
            address @ 0xffff_ffff_8000_0000.. => address - truth.image.slide,
            address => address,
        };
        let kind = json!({"kind": "base", "name": "void"});
        let value = json!({"address": address, "type": kind});
        symbols.entry(symbol.name).or_insert(value);
    }
    symbols["linux_banner"].as_object().expect("an object");
    if let Some(Value::Object(symbol)) = symbols.get_mut("linux_banner") {
        let text = format!("{banner}\n\0");
        symbol.insert("constant_data".to_owned(), base64(text.as_bytes()).into());
    }
    let document = json!({"base_types": bases, "user_types": users, "enums": {},
        "symbols": symbols});
    let path = folder.join(format!("{}.json", banner.len()));
    std::fs::write(&path, document.to_string()).expect("writing");
    path
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut bits = 0_u32;
        for index in 0..3 {
            bits = bits << 8 | u32::from(chunk.get(index).copied().unwrap_or(0));
        }
        for index in 0..=chunk.len() {
            text.push(char::from(DIGITS[(bits >> (18 - 6 * index) & 63) as usize]));
        }
        text.extend(std::iter::repeat_n('=', 3 - chunk.len()));
    }
    text
}

/// Where the token table of the image lies, by its index.
fn token_table(image: &[u8]) -> std::ops::Range<usize> {
    let digits = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00";
    memchr::memmem::find_iter(image, digits)
        .find_map(|at| {
            let mut end = at;
            for _ in 0x30..=0xff {
                end += memchr::memchr(0, &image[end..])? + 1;
            }
            [8, 4].iter().find_map(|alignment| {
                let index = end.next_multiple_of(*alignment);
                let word = |token: usize| {
                    let bytes = image[index + token * 2..][..2].try_into().expect("2 bytes");
                    usize::from(u16::from_le_bytes(bytes))
                };
                let start = at.checked_sub(word(0x30))?;
                (word(0) == 0 && word(0x31) == word(0x30) + 2).then_some(start..end)
            })
        })
        .expect("the token table")
}

/// A guest with the build id of another, and other symbols.
fn spoilt_cache(start: &Forged, truth: &Kernel) {
    let image = start.bytes(truth.image.physical_base, truth.image.size as usize);
    let table = token_table(&image);
    let needed = [
        "_text",
        "_stext",
        "linux_banner",
        "init_top_pgt",
        "init_task",
        "page_offset_base",
        "vmalloc_base",
        "vmemmap_base",
        "__start_notes",
        "__stop_notes",
        "__start_BTF",
        "__stop_BTF",
        "vmcoreinfo_data",
        "vmcoreinfo_size",
        "vmlinux_build_id",
    ];
    let mut position = table.start;
    let token = image[table]
        .split(|byte| *byte == 0)
        .find_map(|token| {
            let here = position;
            position += token.len() + 1;
            let text = str::from_utf8(token).ok()?;
            let free = needed
                .iter()
                .all(|name| !format!("D{name}T{name}R{name}").contains(text));
            (text.len() >= 4 && text.is_ascii() && free).then_some(here)
        })
        .expect("a token that is in none of these names");
    let mut memory = start.clone();
    let place = truth.image.physical_base.wrapping_add(token as u64 + 3);
    memory.write(place, b"?");

    let folder = tempfile::tempdir().expect("a temporary folder");
    let cached = FindOptions {
        cache: Cache::Folder(folder.path().to_owned()),
        ..options()
    };
    let first = found(&memory, &cached);
    assert!(matches!(first.evidence.cache, CacheOutcome::Stored(_)));
    assert!(
        first
            .profile
            .symbols()
            .iter()
            .any(|symbol| symbol.name.contains('?'))
    );

    // The other's profile is seen, not used, and said.
    let second = found(start, &cached);
    assert_same(&second, truth);
    assert_eq!(second.evidence.profile, ProfileFrom::Memory);
    assert_conflict(&second, Subject::Cache, "seen before");
    assert!(
        second
            .profile
            .symbols()
            .iter()
            .all(|symbol| !symbol.name.contains('?'))
    );

    // Each has its own from now on.
    for (memory, odd) in [(&memory, true), (start, false)] {
        let again = found(memory, &cached);
        assert_eq!(again.evidence.profile, ProfileFrom::Cache);
        assert_conflict(&again, Subject::Cache, "seen before");
        let any = again
            .profile
            .symbols()
            .iter()
            .any(|symbol| symbol.name.contains('?'));
        assert_eq!(any, odd);
    }

    // Damage to the file is noticed, and repaired.
    let CacheOutcome::Hit(path) = found(start, &cached).evidence.cache else {
        panic!("no profile");
    };
    for entry in std::fs::read_dir(folder.path()).expect("the folder") {
        let other = entry.expect("an entry").path();
        if other != path {
            std::fs::remove_file(other).expect("removing");
        }
    }
    let mut bytes = std::fs::read(&path).expect("reading");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).expect("writing");
    let kernel = found(start, &cached);
    assert_same(&kernel, truth);
    assert!(matches!(
        kernel.evidence.cache,
        CacheOutcome::Rejected { .. }
    ));
    let kernel = found(start, &cached);
    assert_eq!(kernel.evidence.profile, ProfileFrom::Cache);
}

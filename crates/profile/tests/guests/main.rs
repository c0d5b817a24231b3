//! What is found in the memory of real guests, against what those guests, and
//! their hypervisor's own page-table walker, say; then the same guests with
//! forgeries in their memory.
//!
//! Every test boots one guest. It needs QEMU and a kernel from Debian's
//! archive; `cargo xtask setup` says how to get them.

mod forged;
mod forgeries;
mod modules;

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use secmon_lab::{Guest, Paging, Suite};
use secmon_memory::{MappedMemory, PagingMode, PhysicalMemory, VirtualAddress, Volatility};
use secmon_platform::layout::{Machine, RamLayout};
use secmon_profile::{
    Cache, CacheOutcome, FindOptions, Isf, Kernel, Member, ProfileFrom, Search, TablesFrom,
    TypeKind, find, write_isf,
};

/// A guest and a copy of its memory from one moment, when its vCPUs stood
/// still.
struct Subject {
    guest: Guest,
    live: Arc<dyn PhysicalMemory>,
    copy: Arc<dyn PhysicalMemory>,
    /// Virtual addresses of the kernel's half and where the hypervisor says
    /// they lead, at that moment.
    translations: Vec<(u64, u64)>,
    /// CR3 and CR4 at that moment.
    registers: (u64, u64),
}

fn map(path: &Path, memory_mib: u32, volatility: Volatility) -> Arc<dyn PhysicalMemory> {
    let file = File::open(path).expect("the memory file");
    let layout = RamLayout::for_machine(Machine::Q35, u64::from(memory_mib) << 20);
    let layout = layout.expect("a machine of that size");
    let memory = MappedMemory::map_file(&file, layout.entries(), volatility);
    Arc::new(memory.expect("a mapping of the memory file"))
}

impl Subject {
    fn boot(suite: Suite, paging: Paging, memory_mib: u32, arguments: &[&str]) -> Self {
        let mut builder = Guest::builder(suite).paging(paging).memory_mib(memory_mib);
        for argument in arguments {
            builder = builder.kernel_argument(*argument);
        }
        let guest = builder.boot().expect("a guest");
        let ram = guest.ram_file().expect("a RAM file");
        let live = map(&ram, memory_mib, Volatility::Live);
        let found = find(&live, &options(Cache::Off)).expect("a kernel");
        let wanted: Vec<u64> = addresses(&found).collect();
        let path = guest.folder().join("copy.raw");
        let (translations, registers) = guest
            .while_stopped(|control| {
                // A plain copy: sparse where the guest has written nothing.
                let status = std::process::Command::new("cp")
                    .arg("--sparse=always")
                    .args([&ram, &path])
                    .status()?;
                assert!(status.success(), "cp: {status}");
                let mut translations = Vec::new();
                for address in wanted {
                    if let Some(physical) = control.guest_physical(0, address)? {
                        translations.push((address, physical));
                    }
                }
                let text = control.human("info registers")?;
                let register = |name: &str| {
                    let rest = text.split_once(name).expect(name).1;
                    let digits = rest.split_whitespace().next().expect(name);
                    u64::from_str_radix(digits, 16).expect(name)
                };
                Ok((translations, (register("CR3="), register("CR4="))))
            })
            .expect("a copy of its memory");
        let copy = map(&path, memory_mib, Volatility::Static);
        Self {
            guest,
            live,
            copy,
            translations,
            registers,
        }
    }
}

/// Addresses all over the kernel's half: symbols, the direct map, `struct
/// page`s.
fn addresses(kernel: &Kernel) -> impl Iterator<Item = u64> {
    let symbols = kernel.profile.symbols();
    let image: Vec<u64> = symbols
        .iter()
        .filter(|symbol| symbol.address >= kernel.image.virtual_base)
        .map(|symbol| symbol.address.as_u64())
        .step_by(symbols.len() / 150)
        .collect();
    let direct_map = kernel.direct_map.as_u64();
    let size = kernel.space.memory().size();
    let step = size / 100 / 8 * 8;
    let vmemmap = kernel.vmemmap_base.as_u64();
    image
        .into_iter()
        .chain((0..100).map(move |index| direct_map + index * step))
        .chain((0..20).map(move |index| vmemmap + (index * (size >> 12) / 20) * 64))
}

fn options(cache: Cache) -> FindOptions {
    FindOptions {
        cache,
        ..FindOptions::default()
    }
}

/// Compares what was found with the guest's own words.
fn compare(subject: &Subject, kernel: &Kernel) {
    let profile = &kernel.profile;
    let info = subject.guest.truth().info().expect("the guest's truth");
    assert_eq!(profile.banner(), info.version.to_string().trim_end());

    let own = subject.guest.truth().kallsyms().expect("the guest's truth");
    let own: Vec<(u64, char, &str)> = own
        .iter()
        .filter(|symbol| symbol.module.is_none())
        .map(|symbol| (symbol.address, symbol.kind, symbol.name.as_str()))
        .collect();
    let found: Vec<(u64, char, &str)> = profile
        .symbols()
        .iter()
        .map(|symbol| (symbol.address.as_u64(), symbol.kind, symbol.name))
        .collect();
    assert_eq!(own.len(), found.len());
    for (own, found) in own.iter().zip(&found) {
        assert_eq!(own, found);
    }
    for (address, _, name) in own.iter().step_by(97) {
        let mut all = profile.symbols().addresses(name);
        assert!(all.any(|other| other.as_u64() == *address), "{name}");
        let (near, distance) = profile
            .symbols()
            .nearest(VirtualAddress::new(address + 1))
            .expect("a symbol below");
        if distance == 1 {
            assert_eq!(near.address.as_u64(), *address);
        } else {
            assert_eq!(distance, 0, "{name}");
        }
    }
    assert_eq!(profile.symbols().address("no_such_symbol"), None);

    let types = profile.types().expect("types");
    assert_eq!(types.size_of("struct list_head"), Ok(16));
    assert_eq!(types.member("task_struct", "comm").expect("comm").size, 16);
    assert_eq!(
        types.member("task_struct", "se.vruntime").expect("it").size,
        8
    );
    let nodes = types
        .member("task_struct", "children.prev")
        .expect("a list");
    let start = types.member("task_struct", "children").expect("a list");
    assert_eq!(nodes.offset, start.offset + 8);
    assert_eq!(types.any_enumerator("BPF_MAP_TYPE_HASH"), Some(1));

    let (_, cr4) = subject.registers;
    let levels = match cr4 & 1 << 12 {
        0 => PagingMode::FourLevel,
        _ => PagingMode::FiveLevel,
    };
    assert_eq!(kernel.space.mode(), levels);
    assert!(
        subject.translations.len() >= 150,
        "only {} addresses to compare",
        subject.translations.len()
    );
    for (address, physical) in &subject.translations {
        let translation = kernel.space.translate(VirtualAddress::new(*address));
        let found = translation.map(|translation| translation.physical.as_u64());
        assert_eq!(found, Ok(*physical), "{address:#x}");
    }
    let image = kernel.image;
    let text = kernel.space.translate(image.virtual_base).expect("mapped");
    assert_eq!(text.physical, image.physical_base);
    let vmcoreinfo = kernel.vmcoreinfo.as_ref().expect("VMCOREINFO");
    assert_eq!(vmcoreinfo.kernel_offset, Some(image.slide));
    assert_eq!(
        vmcoreinfo.build_id.as_ref().or(profile.build_id()),
        profile.build_id()
    );
    assert!(profile.build_id().is_some());
    assert_eq!(kernel.conflicts, []);
}

/// The guest live and copied, with and without cache, and by other ways.
fn check(suite: Suite, paging: Paging, arguments: &[&str]) {
    let subject = Subject::boot(suite, paging, 512, arguments);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cache = Cache::Folder(folder.path().to_owned());

    let live = find(&subject.live, &options(cache.clone())).expect("a kernel");
    assert!(matches!(live.evidence.tables, TablesFrom::Trampoline(_)));
    assert!(matches!(live.evidence.cache, CacheOutcome::Stored(_)));
    compare(&subject, &live);
    modules::compare(&subject.guest, &live);

    let again = find(&subject.live, &options(cache.clone())).expect("a kernel");
    assert!(matches!(again.evidence.cache, CacheOutcome::Hit(_)));
    assert_eq!(again.evidence.profile, ProfileFrom::Cache);
    compare(&subject, &again);

    let thorough = FindOptions {
        search: Search::Thorough,
        ..options(cache)
    };
    let thorough = find(&subject.copy, &thorough).expect("a kernel");
    compare(&subject, &thorough);

    let (cr3, _) = subject.registers;
    let hinted = FindOptions {
        root_hints: vec![secmon_memory::PhysicalAddress::new(cr3)],
        ..options(Cache::Off)
    };
    let hinted = find(&subject.copy, &hinted).expect("a kernel");
    assert!(matches!(hinted.evidence.tables, TablesFrom::Hint(_)));
    compare(&subject, &hinted);

    compare_export(&thorough);
    forgeries::check(&subject.copy, &thorough);
}

/// The kernel's ISF document, read again, says the same of every structure.
fn compare_export(kernel: &Kernel) {
    let mut document = Vec::new();
    write_isf(kernel, &mut document).expect("types");
    let isf = Isf::parse(Path::new("own"), &document).expect("a good document");
    assert_eq!(isf.banner(), Some(kernel.profile.banner()));
    let types = kernel.profile.types().expect("types");
    let mut seen = HashSet::new();
    let mut members = 0;
    for structure in types.iter() {
        if !matches!(structure.kind, TypeKind::Structure | TypeKind::Union)
            // Of types that share a name the document has the first.
            || !seen.insert(structure.name.clone())
        {
            continue;
        }
        let name = &structure.name;
        assert_eq!(isf.types().size_of(name).ok(), structure.size, "{name}");
        for own in types.members_of(structure.id).expect("members") {
            let Some(path) = own.name else {
                continue;
            };
            let found = isf.types().member(name, &path).expect(&path);
            let place = |member: &Member| (member.offset, member.bit_offset, member.bit_size);
            assert_eq!(place(&own.member), place(&found), "{name}.{path}");
            // Two structures of one name are one in the document.
            let name_alone = ["struct ", "union ", "_t"];
            let by_name = name_alone
                .iter()
                .any(|word| own.member.type_name.contains(word));
            if own.member.pointer || !by_name {
                assert_eq!(own.member.size, found.size, "{name}.{path}");
            }
            members += 1;
        }
    }
    assert!(members > 20_000, "only {members} members to compare");
}

#[test]
fn bullseye() {
    check(Suite::Bullseye, Paging::FourLevel, &[]);
}

#[test]
fn bookworm() {
    check(Suite::Bookworm, Paging::FourLevel, &[]);
}

#[test]
fn bookworm_with_five_levels() {
    check(Suite::Bookworm, Paging::FiveLevel, &[]);
}

#[test]
fn trixie() {
    check(Suite::Trixie, Paging::FourLevel, &["pti=on"]);
}

#[test]
fn trixie_with_five_levels() {
    check(Suite::Trixie, Paging::FiveLevel, &[]);
}

#[test]
fn sid() {
    check(Suite::Sid, Paging::FourLevel, &["nokaslr"]);
}

#[test]
fn sid_with_five_levels() {
    check(Suite::Sid, Paging::FiveLevel, &[]);
}

/// RAM on both sides of the hole under 4 GiB; KASLR may put the kernel on
/// either.
#[test]
fn trixie_with_much_memory() {
    let subject = Subject::boot(Suite::Trixie, Paging::FourLevel, 5120, &[]);
    let found = find(&subject.copy, &options(Cache::Off)).expect("a kernel");
    compare(&subject, &found);
}

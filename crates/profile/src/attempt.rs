//! What one set of page tables leads to: the image, its symbols, its types,
//! and whether they agree.

use std::ops::Range;
use std::sync::Arc;

use secmon_memory::{AddressSpace, PagingMode, PhysicalAddress, PhysicalMemory, VirtualAddress};

use crate::cache::{Folder, Stored};
use crate::crosscheck::{differences, is_of_another_kernel};
use crate::image::{Image, MAXIMUM_MATCHES};
use crate::kernel::note;
use crate::locate::{self, BANNER_START, DIGITS, Location, LocationError};
use crate::notes::{MAXIMUM_VMCOREINFO, build_ids};
use crate::tables::{self, Candidate};
use crate::types::{HEADER_LENGTH, Header};
use crate::{
    BtfError, BuildId, CacheOutcome, Conflict, Evidence, FindOptions, Isf, IsfError, Kernel,
    MAXIMUM_BTF_LENGTH, Profile, ProfileError, ProfileFrom, RootFrom, Search, Subject, Symbols,
    Types, VmcoreInfo,
};

/// The start of a BTF blob of a kernel, its header's length included.
pub(crate) const BTF_START: &[u8] = &[0x9f, 0xeb, 1, 0, HEADER_LENGTH as u8, 0, 0, 0];
/// More than any banner.
pub(crate) const MAXIMUM_BANNER: usize = 512;
/// Token tables in one image that are looked at. A kernel has one.
pub(crate) const MAXIMUM_TABLES: usize = 8;
/// More than the notes of any kernel.
const MAXIMUM_NOTES: u64 = 64 << 10;
/// Where the direct map, vmalloc memory and the array of `struct page` lie
/// without KASLR (`Documentation/arch/x86/x86_64/mm.rst`).
const FOUR_LEVEL_LAYOUT: [u64; 3] = [
    0xffff_8880_0000_0000,
    0xffff_c900_0000_0000,
    0xffff_ea00_0000_0000,
];
const FIVE_LEVEL_LAYOUT: [u64; 3] = [
    0xff11_0000_0000_0000,
    0xffa0_0000_0000_0000,
    0xffd4_0000_0000_0000,
];

/// The symbols around the types, by the names they have had.
const BTF_SYMBOLS: [(&str, &str); 2] = [
    ("__start_BTF", "__stop_BTF"),
    (
        "_binary__btf_vmlinux_bin_start",
        "_binary__btf_vmlinux_bin_end",
    ),
];

/// Page tables of a kernel's shape, being looked at.
pub(crate) struct Attempt<'a> {
    memory: &'a Arc<dyn PhysicalMemory>,
    candidate: &'a Candidate,
    image: Image<'a>,
    /// Through the candidate's root, whosever it is: it maps the image.
    space: AddressSpace,
    conflicts: Vec<Conflict>,
    cache: CacheOutcome,
    /// Types that were read early, where a profile of the cache says they are.
    early: Option<(Range<u64>, Result<Types, ProfileError>)>,
}

/// What a search of the image's data found, by offset.
#[derive(Default)]
struct Sightings {
    digits: Vec<u64>,
    btf: Vec<u64>,
    banners: Vec<u64>,
}

impl<'a> Attempt<'a> {
    pub(crate) fn new(memory: &'a Arc<dyn PhysicalMemory>, candidate: &'a Candidate) -> Self {
        Self {
            memory,
            candidate,
            image: Image::new(&**memory, candidate.image),
            space: AddressSpace::new(memory.clone(), candidate.root, candidate.mode),
            conflicts: Vec::new(),
            cache: CacheOutcome::default(),
            early: None,
        }
    }

    /// The kernel these tables lead to, or `None` if there are no symbols.
    pub(crate) fn kernel(
        mut self,
        options: &FindOptions,
        isf: Option<&Isf>,
    ) -> Result<Option<Kernel>, IsfError> {
        let folder = Folder::new(&options.cache).unwrap_or_else(|reason| {
            self.cache = CacheOutcome::Unavailable(reason);
            None
        });
        let cached = match options.search {
            Search::Quick => folder.as_ref().and_then(|folder| self.cached(folder)),
            // A profile would spare the very search that is asked for.
            Search::Thorough => None,
        };
        let hit = cached.is_some();
        let (symbols, location, seen) = match cached {
            Some((symbols, location)) => {
                // What has no symbol is found by a search alone.
                let named = ["linux_banner", "__start_BTF"];
                let seen = match named.iter().all(|name| symbols.address(name).is_some()) {
                    true => Sightings::default(),
                    false => self.look(),
                };
                (symbols, Some(location), seen)
            }
            None => {
                let seen = self.look();
                match self.symbols(&seen.digits, isf) {
                    Some((symbols, location)) => (symbols, location, seen),
                    None => return Ok(None),
                }
            }
        };
        let banner = self.banner(&symbols, &seen.banners);
        let types = match isf {
            Some(isf) => {
                isf.check_banner(&banner)?;
                isf.check_symbols(&symbols)?;
                Ok(isf.types().clone())
            }
            None => self.types(&symbols, &seen.btf),
        };
        let build_id = self.build_id(&symbols);
        let profile = Profile {
            build_id,
            banner,
            symbols,
            types,
        };
        if let (Some(folder), Some(location), false) = (&folder, location, hit) {
            self.store(folder, &profile, location);
        }
        let from = match (isf, hit) {
            (Some(_), _) => ProfileFrom::Isf,
            (None, true) => ProfileFrom::Cache,
            (None, false) => ProfileFrom::Memory,
        };
        Ok(Some(self.finish(profile, from)))
    }

    /// The symbols by a profile from the cache, if there is one that was made
    /// for the very bytes in this image. That there are others of the same
    /// build id is a conflict, whichever is used.
    fn cached(&mut self, folder: &Folder) -> Option<(Symbols, Location)> {
        let mut found = None;
        let mut others = 0;
        for listed in folder.list() {
            let end = listed
                .build_id_at
                .checked_add(listed.build_id.as_bytes().len() as u64);
            let here = end.and_then(|end| self.image.bytes(listed.build_id_at..end));
            if here.as_deref() != Some(listed.build_id.as_bytes()) {
                continue;
            }
            if found.is_some() {
                // The file's name has the digest of the names it is for.
                others += 1;
                continue;
            }
            let stored = match folder.load(&listed) {
                Ok(stored) => stored,
                Err(error) => {
                    self.cache = CacheOutcome::Rejected {
                        path: listed.path,
                        reason: error.to_string(),
                    };
                    continue;
                }
            };
            let location = stored.location.clone();
            let Some(symbols) = self.verified(stored) else {
                others += 1;
                continue;
            };
            if let Ok(symbols) = symbols
                && locate::fits(&self.image, &symbols)
            {
                self.cache = CacheOutcome::Hit(listed.path);
                found = Some((symbols, location));
            }
        }
        if others > 0 {
            self.conflict(
                Subject::Cache,
                "the symbol names in the guest".to_owned(),
                format!("{others} other sets of names seen before in kernels of its build id"),
                "somebody changed one of these kernels or forged its build id; only what is \
                 in the guest at hand is used",
            );
        }
        found
    }

    /// The symbols of the image by a profile; none if it was made for other
    /// names. Reading the types takes as long as checking the names, so a
    /// second thread does that meanwhile; whether they are the kernel's is seen
    /// afterwards, by its symbols.
    fn verified(&mut self, stored: Stored) -> Option<Result<Symbols, LocationError>> {
        let Stored {
            location,
            types,
            digest,
            slots,
            ..
        } = stored;
        let image = self.image;
        let (symbols, read) = std::thread::scope(|scope| {
            let builder = std::thread::Builder::new().name("types".to_owned());
            let range = types.clone();
            let reader = (!range.is_empty())
                .then(|| builder.spawn_scoped(scope, move || read_types(&image, range)));
            let raw = location.read(&image).filter(|raw| raw.digest() == digest);
            let symbols = raw.map(|raw| location.symbols(&image, raw, slots));
            // Without a thread, or if it failed, they are read in their turn.
            let read = reader.and_then(|reader| reader.ok()?.join().ok());
            (symbols, read)
        });
        if matches!(symbols, Some(Ok(_))) {
            self.early = read.map(|read| (types, read));
        }
        symbols
    }

    /// Keeps what was found for the next run, unless something contradicts
    /// it: a run that finds its profile does not look for contradictions.
    fn store(&mut self, folder: &Folder, profile: &Profile, location: Location) {
        let doubt = self.conflicts.iter().any(|conflict| {
            matches!(
                conflict.what,
                Subject::Symbols | Subject::Types | Subject::Banner | Subject::BuildId
            )
        });
        if doubt {
            self.cache = CacheOutcome::Withheld;
            return;
        }
        let Some((build_id, build_id_at)) = profile
            .build_id
            .clone()
            .and_then(|id| Some((id.clone(), self.build_id_at(&profile.symbols, &id)?)))
        else {
            return;
        };
        let Some(raw) = location.read(&self.image) else {
            return;
        };
        let stored = Stored {
            build_id,
            build_id_at,
            types: self.types_range(&profile.symbols).unwrap_or_default(),
            digest: raw.digest(),
            slots: profile.symbols.index().clone(),
            location,
        };
        let outcome = folder.store(&stored);
        // That a file was rejected is to be said, whatever became of the new.
        if !matches!(self.cache, CacheOutcome::Rejected { .. }) {
            self.cache = match outcome {
                Ok(path) => CacheOutcome::Stored(path),
                Err(error) => CacheOutcome::Unavailable(error.to_string()),
            };
        }
    }

    /// Searches the image, and says so if it is crowded with what looks like
    /// the parts that are looked for.
    fn look(&mut self) -> Sightings {
        let seen = self.search();
        for (subject, list) in [
            (Subject::Symbols, &seen.digits),
            (Subject::Types, &seen.btf),
            (Subject::Banner, &seen.banners),
        ] {
            if list.len() >= MAXIMUM_MATCHES {
                self.conflict(
                    subject,
                    format!("the first {MAXIMUM_MATCHES} places that look like it"),
                    "even more such places in the image, which were not looked at".to_owned(),
                    "no kernel has a hundred of them",
                );
            }
        }
        seen
    }

    fn search(&self) -> Sightings {
        let data = self.image.data(&self.space);
        let patterns = [DIGITS, BTF_START, BANNER_START];
        let [digits, btf, banners] = self.image.search(&data, patterns);
        if !digits.is_empty() {
            return Sightings {
                digits,
                btf,
                banners,
            };
        }
        // Whatever the tables say about execution: the rest as well.
        let [digits, btf, banners] = self.image.search(&[self.image.all()], patterns);
        Sightings {
            digits,
            btf,
            banners,
        }
    }

    /// Whether the page at `offset` is mapped without the right to write, as
    /// the kernel's constants are.
    fn is_read_only(&self, offset: u64) -> bool {
        self.space
            .translate(self.image.address(offset))
            .is_ok_and(|translation| !translation.rights.writable)
    }

    fn conflict(&mut self, what: Subject, chosen: String, other: String, why: &str) {
        let conflict = Conflict {
            what,
            chosen,
            other,
            why: why.to_owned(),
        };
        note(&mut self.conflicts, conflict);
    }

    fn symbols(
        &mut self,
        digits: &[u64],
        isf: Option<&Isf>,
    ) -> Option<(Symbols, Option<Location>)> {
        let mut tables: Vec<u64> = digits
            .iter()
            .copied()
            .filter(|digits| locate::has_tokens(&self.image, *digits))
            .collect();
        // Those in constants first, as the kernel's own is.
        tables.sort_by_key(|digits| (!self.is_read_only(*digits), *digits));
        if tables.len() > MAXIMUM_TABLES {
            tables.truncate(MAXIMUM_TABLES);
            self.conflict(
                Subject::Symbols,
                format!("the first {MAXIMUM_TABLES} token tables of the image"),
                "more token tables in the image, which were not looked at".to_owned(),
                "a kernel has one",
            );
        }
        let mut found: Vec<(Location, Symbols)> = tables
            .into_iter()
            .filter_map(|digits| locate::locate(&self.image, digits))
            .collect();
        // The kernel's own table is a constant; of several constants (which
        // nobody has made yet) the one that the kernel's linker put first.
        found.sort_by_key(|(location, _)| {
            let start = location.token_table.start;
            (!self.is_read_only(start), start)
        });
        let mut found = found.into_iter();
        let Some((location, symbols)) = found.next() else {
            let symbols = isf?.symbols(self.candidate.image.virtual_base)?;
            return Some((symbols, None));
        };
        let place = |location: &Location| {
            let address = self.image.address(location.token_table.start);
            format!("the symbol table with its tokens at {address}")
        };
        let chosen = place(&location);
        let others: Vec<String> = found.map(|(other, _)| place(&other)).collect();
        for other in others {
            let why = match self.is_read_only(location.token_table.start) {
                true => "the kernel maps it read-only, as it does its own table",
                false => "it comes first in the image",
            };
            self.conflict(Subject::Symbols, chosen.clone(), other, why);
        }
        Some((symbols, Some(location)))
    }

    fn banner(&mut self, symbols: &Symbols, seen: &[u64]) -> String {
        let own = symbols
            .addresses("linux_banner")
            .filter(|address| locate::is_banner(&self.image, *address))
            .find_map(|address| self.image.offset(address));
        let first = seen
            .iter()
            .copied()
            .find(|offset| self.is_read_only(*offset));
        let Some(own) = own.or(first).or(seen.first().copied()) else {
            return String::new();
        };
        let image = self.image;
        let text = |offset| {
            let bytes = image.string(offset, MAXIMUM_BANNER).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            text.lines().next().unwrap_or_default().to_owned()
        };
        let banner = text(own);
        for offset in seen {
            let other = text(*offset);
            if !is_of_another_kernel(&other, &banner) {
                continue;
            }
            let chosen = format!("{banner:?} at {}", self.image.address(own));
            let other = format!("{other:?} at {}", self.image.address(*offset));
            let why = "the symbol linux_banner leads there";
            self.conflict(Subject::Banner, chosen, other, why);
        }
        banner
    }

    /// The types of the kernel, by its symbols.
    fn types(&mut self, symbols: &Symbols, seen: &[u64]) -> Result<Types, ProfileError> {
        let range = match self.types_range(symbols) {
            Some(range) => range,
            None => {
                // Without the symbols only the blob's own header is left.
                let mut all: Vec<Range<u64>> = seen
                    .iter()
                    .filter_map(|offset| btf_range(&self.image, *offset))
                    .collect();
                all.sort_by_key(|range| (!self.is_read_only(range.start), range.start));
                match all.into_iter().next() {
                    Some(range) => range,
                    None => return Err(ProfileError::NoBtf),
                }
            }
        };
        let chosen = format!("the types at {}", self.image.address(range.start));
        let mut budget = MAXIMUM_BTF_LENGTH as u64;
        for offset in seen {
            if *offset == range.start {
                continue;
            }
            let Some(other) = btf_range(&self.image, *offset) else {
                continue;
            };
            let Some(left) = budget.checked_sub(other.end - other.start) else {
                let other = "more that looks like types, which was not looked at".to_owned();
                let why = "the kernel's symbols lead there";
                self.conflict(Subject::Types, chosen, other, why);
                break;
            };
            budget = left;
            let other = self.image.buffer(other).map(Types::parse);
            // An eBPF program that is built into the kernel brings types, too,
            // but not those of a kernel.
            if let Some(Ok(other)) = other
                && other.has_type("struct task_struct")
            {
                let other = format!("types at {}", self.image.address(*offset));
                let why = "the kernel's symbols lead there";
                self.conflict(Subject::Types, chosen.clone(), other, why);
            }
        }
        match self.early.take() {
            Some((early, types)) if early == range => types,
            _ => read_types(&self.image, range),
        }
    }

    /// Where the types lie, by the kernel's symbols.
    fn types_range(&self, symbols: &Symbols) -> Option<Range<u64>> {
        BTF_SYMBOLS.iter().find_map(|(start, stop)| {
            let range = symbols.address(start)?..symbols.address(stop)?;
            Some(self.image.offset(range.start)?..self.image.offset(range.end)?)
        })
    }

    /// The kernel's ELF notes, and where they start.
    fn notes(&self, symbols: &Symbols) -> Option<(u64, Vec<u8>)> {
        let start = self.image.offset(symbols.address("__start_notes")?)?;
        let stop = self.image.offset(symbols.address("__stop_notes")?)?;
        let stop = stop.min(start.saturating_add(MAXIMUM_NOTES));
        Some((start, self.image.bytes(start..stop)?))
    }

    /// Where the bytes of the build id lie.
    fn build_id_at(&self, symbols: &Symbols, id: &BuildId) -> Option<u64> {
        let (start, notes) = self.notes(symbols)?;
        let offset = memchr::memmem::find(&notes, id.as_bytes())?;
        Some(start + offset as u64)
    }

    fn build_id(&mut self, symbols: &Symbols) -> Option<BuildId> {
        let (_, notes) = self.notes(symbols)?;
        let id = build_ids(&notes).into_iter().next()?;
        // From 5.14 on the kernel keeps a copy of it for its oops messages.
        let copy = symbols
            .address("vmlinux_build_id")
            .and_then(|address| self.image.offset(address))
            .and_then(|offset| self.image.bytes(offset..offset.checked_add(20)?));
        if let Some(copy) = copy
            && id.as_bytes().len() == copy.len()
            && id.as_bytes() != copy
            && copy.iter().any(|byte| *byte != 0)
        {
            let other = BuildId::new(&copy).map(|id| id.to_string());
            self.conflict(
                Subject::BuildId,
                format!("{id} in the notes"),
                format!("{} in vmlinux_build_id", other.unwrap_or_default()),
                "the linker writes the notes",
            );
        }
        Some(id)
    }

    /// Finds the rest by the symbols.
    fn finish(mut self, profile: Profile, from: ProfileFrom) -> Kernel {
        let (root, root_from) = self.root(&profile.symbols);
        let space = AddressSpace::new(self.memory.clone(), root, self.candidate.mode);
        let usual = match space.mode() {
            PagingMode::FourLevel => FOUR_LEVEL_LAYOUT,
            PagingMode::FiveLevel => FIVE_LEVEL_LAYOUT,
        };
        let variable = |name: &str| {
            let value = self.image.read_u64(profile.symbols.address(name)?)?;
            // All three lie in the kernel's half.
            (value >> 63 != 0).then_some(value)
        };
        let vmalloc_base = variable("vmalloc_base").unwrap_or(usual[1]);
        let vmemmap_base = variable("vmemmap_base").unwrap_or(usual[2]);
        let stated = variable("page_offset_base");
        let direct_map = self.direct_map(&space, stated, usual[0]);
        let vmcoreinfo = self.vmcoreinfo(&space, &profile);
        Kernel {
            space,
            profile: Arc::new(profile),
            image: self.candidate.image,
            direct_map,
            direct_map_slide: direct_map.as_u64().wrapping_sub(usual[0]),
            vmalloc_base: VirtualAddress::new(vmalloc_base),
            vmemmap_base: VirtualAddress::new(vmemmap_base),
            conflicts: self.conflicts,
            vmcoreinfo,
            evidence: Evidence {
                tables: self.candidate.from,
                root: root_from,
                profile: from,
                cache: self.cache,
            },
        }
    }

    /// The physical address of `init_top_pgt`.
    fn root(&mut self, symbols: &Symbols) -> (PhysicalAddress, RootFrom) {
        let named = ["init_top_pgt", "swapper_pg_dir"]
            .iter()
            .find_map(|name| symbols.address(name))
            .and_then(|address| self.image.offset(address))
            .map(|offset| self.image.physical(offset));
        let memory = &**self.memory;
        if let Some(root) = named
            && tables::leads_to(memory, root, self.candidate.shared)
        {
            return (root, RootFrom::Symbol);
        }
        let found = tables::roots_in_image(memory, self.candidate);
        let (root, from) = match found.first() {
            Some(root) => (*root, RootFrom::Image),
            None => (self.candidate.root, RootFrom::Tables),
        };
        if let Some(named) = named {
            self.conflict(
                Subject::PageTables,
                format!("the root at {root}"),
                format!("the root that symbols put at {named}"),
                "the latter does not map the kernel as the tables in use do",
            );
        }
        (root, from)
    }

    fn direct_map(
        &mut self,
        space: &AddressSpace,
        stated: Option<u64>,
        usual: u64,
    ) -> VirtualAddress {
        let image = &self.candidate.image;
        let stated = stated.map(VirtualAddress::new);
        let usual = VirtualAddress::new(usual);
        for start in stated.into_iter().chain([usual]) {
            if tables::maps_image(space, start, image) {
                return start;
            }
        }
        let found = tables::direct_map_by_search(space, image);
        if let (Some(stated), Some(found)) = (stated, found) {
            self.conflict(
                Subject::DirectMap,
                format!("the direct map at {found}"),
                format!("page_offset_base, which says {stated}"),
                "the page tables map the image there",
            );
        }
        found.or(stated).unwrap_or(usual)
    }

    /// Reads VMCOREINFO and compares it with what was found without it.
    fn vmcoreinfo(&mut self, space: &AddressSpace, profile: &Profile) -> Option<VmcoreInfo> {
        let symbols = &profile.symbols;
        let address = self.image.read_u64(symbols.address("vmcoreinfo_data")?)?;
        let size = symbols
            .address("vmcoreinfo_size")
            .and_then(|address| self.image.read_u64(address))
            .unwrap_or(4096);
        let mut bytes = vec![0; (size as usize).min(MAXIMUM_VMCOREINFO)];
        space.read(VirtualAddress::new(address), &mut bytes).ok()?;
        let info = VmcoreInfo::parse(&bytes);
        let image = self.candidate.image;
        let place = format!("VMCOREINFO at {address:#x}");
        for (key, said, found) in differences(&info, &image, self.candidate.mode, profile) {
            self.conflict(
                Subject::VmcoreInfo,
                found,
                format!("{key}={said} in {place}"),
                "page tables and symbols agree on it",
            );
        }
        Some(info)
    }
}

/// Copies and reads the types that lie in `range` of the image.
fn read_types(image: &Image<'_>, range: Range<u64>) -> Result<Types, ProfileError> {
    let address = image.address(range.start).as_u64();
    let length = range.end.saturating_sub(range.start);
    if length > MAXIMUM_BTF_LENGTH as u64 {
        let source = BtfError::TooLong {
            length: length as usize,
        };
        return Err(ProfileError::DamagedBtf { address, source });
    }
    let Some(bytes) = image.buffer(range) else {
        let reason = "a page of it is missing".to_owned();
        return Err(ProfileError::UnreadableBtf { address, reason });
    };
    Types::parse(bytes).map_err(|source| ProfileError::DamagedBtf { address, source })
}

/// The bytes of a blob that starts at `offset`, by its header.
pub(crate) fn btf_range(image: &Image<'_>, offset: u64) -> Option<Range<u64>> {
    let mut header = [0; HEADER_LENGTH];
    image.read(offset, &mut header).ok()?;
    let left = image
        .size()
        .checked_sub(offset)?
        .min(MAXIMUM_BTF_LENGTH as u64);
    let header = Header::parse(&header, left as usize).ok()?;
    Some(offset..offset + header.end() as u64)
}

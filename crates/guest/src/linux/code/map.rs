//! All executable memory of the kernel beside all claims on it.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_memory::{MappedPage, PAGE_SIZE, VirtualAddress, Volatility};

use super::image::ImageSections;
use super::vmalloc::{self, Area};
use super::{Claims, CodeOwner, generated};
use crate::linux::module::views::module_area;
use crate::linux::module::{Module, modules};
use crate::{Diagnostic, Guest, TableError};

/// The lowest address of the upper half; both modes of paging have none
/// between.
const UPPER_HALF: u64 = 1 << 63;
/// More page tables than this are not read: those of a terabyte mapped page by
/// page.
const MOST_TABLES: usize = 1 << 19;
/// More pieces of executable memory than this are not kept; a hostile guest
/// can map any number.
const MOST_PIECES: usize = 1 << 16;
/// More unowned memory than this is not looked into.
const MOST_UNOWNED_PAGES: u64 = 1 << 14;
/// How long a live guest has to come to own what it maps: code is mapped before
/// it is listed, and unlisted before it is unmapped, a grace period of RCU
/// earlier.
const PATIENCE: Duration = Duration::from_millis(1000);
/// Between two looks at what is not owned yet.
const PAUSE: Duration = Duration::from_millis(10);

/// Executable memory that no record of the kernel explains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnownedCode {
    /// The addresses, whole pages.
    pub range: Range<VirtualAddress>,
    /// The `vmalloc` area that it lies in, where there is one.
    pub area: Option<Area>,
}

/// A record or a part of memory that could not be read in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incomplete {
    /// What.
    pub what: &'static str,
    /// Why, and what that means.
    pub reason: String,
}

/// What can be executed in the kernel's address space, and whose it is.
#[derive(Debug)]
pub struct CodeMap {
    /// The kernel's own sections.
    pub image: ImageSections,
    /// Where modules, and what else is made of code later, are put.
    pub module_area: Range<VirtualAddress>,
    /// The modules of the kernel's list.
    pub modules: Vec<Module>,
    claims: Claims,
    /// Executable runs by address.
    executable: Vec<Range<u64>>,
    unowned: Vec<UnownedCode>,
    /// What makes the map less than whole.
    pub incomplete: Vec<Incomplete>,
}

impl CodeMap {
    /// Reads page tables and records. On a live guest what has no owner at
    /// first is looked at again until it has one, is gone, or a second has
    /// passed; what had none for that long at an earlier reading is not waited
    /// for again.
    ///
    /// # Errors
    /// [`TableError`] if a record's symbol or type is missing.
    pub fn read(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let mut map = Self::read_once(guest, table)?;
        if guest.space().memory().volatility() == Volatility::Static {
            return Ok(map);
        }
        let deadline = Instant::now() + 2 * PATIENCE;
        loop {
            let ranges: Vec<_> = map.unowned.iter().map(|code| code.range.clone()).collect();
            // What is made or unmade just now is owned or gone at some look.
            let times = guest.unowned_code.note(&ranges, Instant::now());
            if times.iter().all(|time| *time >= PATIENCE) {
                return Ok(map);
            }
            if Instant::now() > deadline {
                // Code is made all the time: what stays is known all the same.
                let mut times = times.into_iter();
                map.unowned
                    .retain(|_| times.next().is_some_and(|time| time >= PATIENCE));
                return Ok(map);
            }
            std::thread::sleep(PAUSE);
            map = Self::read_once(guest, table)?;
        }
    }

    fn read_once(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let image = ImageSections::of(guest, table)?;
        let mut incomplete = Vec::new();
        let mut claims = Claims::default();
        claims.add(image.text.clone(), CodeOwner::Kernel);
        claims.add(image.text_gap(), CodeOwner::TextGap);
        claims.add(image.init.clone(), CodeOwner::Init);
        let modules: Vec<Module> = match guest.address("modules") {
            Some(_) => modules(guest, table)?.collect(),
            // Built without modules.
            None => Vec::new(),
        };
        for module in &modules {
            let owner = CodeOwner::Module {
                address: module.address,
                name: Arc::from(module.name.as_slice()),
            };
            for (start, size) in module.parts() {
                let Some(end) = start.checked_add(size) else {
                    continue;
                };
                claims.add(start..end, owner.clone());
            }
        }
        generated::claim(guest, table, &mut claims)?;
        let (executable, complaint) = executable(guest);
        incomplete.extend(complaint);
        let mut map = Self {
            module_area: module_area(guest, table)?,
            image,
            modules,
            claims,
            executable,
            unowned: Vec::new(),
            incomplete,
        };
        let mut unowned = map.find_unowned();
        if !unowned.is_empty() {
            // Rarely needed, and then for a few pages.
            let areas = match vmalloc::areas(guest, table) {
                Ok(areas) => areas,
                Err(error) => {
                    guest.diagnostics().record(Diagnostic {
                        table,
                        subject: "vmap_area".to_owned(),
                        address: None,
                        reason: format!("areas of code are not known: {error}"),
                    });
                    Vec::new()
                }
            };
            generated::claim_unnamed_programs(guest, table, &areas, &mut map.claims);
            unowned = map.find_unowned();
            map.unowned = unowned
                .iter()
                .flat_map(|range| without_inert_pages(guest, range))
                .map(|range| {
                    let area = areas.iter().find(|area| area.contains(range.start));
                    UnownedCode {
                        area: area.copied(),
                        range,
                    }
                })
                .collect();
        }
        Ok(map)
    }

    /// The executable pages that no claim touches, joined.
    fn find_unowned(&self) -> Vec<Range<VirtualAddress>> {
        let mut found: Vec<Range<VirtualAddress>> = Vec::new();
        let mut add = |start: u64, end: u64| {
            if start < end && found.len() < MOST_PIECES {
                found.push(VirtualAddress::new(start)..VirtualAddress::new(end));
            }
        };
        for run in &self.executable {
            let range = VirtualAddress::new(run.start)..VirtualAddress::new(run.end);
            let mut position = run.start;
            for claim in self.claims.touching(&range) {
                // A page that is claimed in part has an owner.
                let start = claim.start & !(PAGE_SIZE - 1);
                let end = claim
                    .end
                    .checked_next_multiple_of(PAGE_SIZE)
                    .unwrap_or(u64::MAX);
                add(position, start.min(run.end));
                position = position.max(end);
            }
            add(position, run.end);
        }
        found
    }

    /// Executable memory that nobody owns.
    pub fn unowned(&self) -> &[UnownedCode] {
        &self.unowned
    }

    /// Who owns the address; none if nobody does. It says nothing about whether
    /// the memory can be executed.
    pub fn owner_of(&self, address: VirtualAddress) -> Option<&CodeOwner> {
        self.claims.owner_of(address)
    }

    /// Whether the kernel's page tables let the address be executed.
    pub fn is_executable(&self, address: VirtualAddress) -> bool {
        let address = address.as_u64();
        let behind = self.executable.partition_point(|run| run.start <= address);
        behind
            .checked_sub(1)
            .and_then(|index| self.executable.get(index))
            .is_some_and(|run| address < run.end)
    }

    /// The executable memory that nobody owns at this address.
    pub fn unowned_at(&self, address: VirtualAddress) -> Option<&UnownedCode> {
        let behind = self
            .unowned
            .partition_point(|code| code.range.start <= address);
        behind
            .checked_sub(1)
            .and_then(|index| self.unowned.get(index))
            .filter(|code| code.range.contains(&address))
    }

    /// Runs of executable addresses, ascending.
    pub fn executable(&self) -> impl Iterator<Item = Range<VirtualAddress>> + '_ {
        self.executable
            .iter()
            .map(|run| VirtualAddress::new(run.start)..VirtualAddress::new(run.end))
    }
}

/// The executable runs of the kernel's half, and what was not looked at.
fn executable(guest: &Guest) -> (Vec<Range<u64>>, Option<Incomplete>) {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut dropped = 0_u64;
    let mut each = |page: MappedPage| {
        if !page.rights.executable {
            return;
        }
        let (start, end) = (page.address.as_u64(), page.end().as_u64());
        let full = runs.len() >= MOST_PIECES;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ if full => dropped += 1,
            _ => runs.push(start..end),
        }
    };
    let range = VirtualAddress::new(UPPER_HALF)..VirtualAddress::new(u64::MAX);
    let outcome = guest.space().mapped_pages(range, MOST_TABLES, &mut each);
    let reason = match outcome {
        Err(error) => Some(error.to_string()),
        Ok(()) if dropped > 0 => Some(format!("{dropped} more pieces were left out")),
        Ok(()) => None,
    };
    let incomplete = reason.map(|reason| Incomplete {
        what: "executable memory",
        reason,
    });
    (runs, incomplete)
}

/// The pages of the range that are not [inert](generated::is_inert), joined.
fn without_inert_pages(guest: &Guest, range: &Range<VirtualAddress>) -> Vec<Range<VirtualAddress>> {
    let pages = range.end.as_u64().saturating_sub(range.start.as_u64()) / PAGE_SIZE;
    if pages > MOST_UNOWNED_PAGES {
        return vec![range.clone()];
    }
    let mut bytes = [0; PAGE_SIZE as usize];
    let mut left: Vec<Range<VirtualAddress>> = Vec::new();
    for number in 0..pages {
        let start = range.start.wrapping_add(number * PAGE_SIZE);
        let end = start.wrapping_add(PAGE_SIZE);
        if guest.space().read(start, &mut bytes).is_ok() && generated::is_inert(&bytes) {
            continue;
        }
        match left.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => left.push(start..end),
        }
    }
    left
}

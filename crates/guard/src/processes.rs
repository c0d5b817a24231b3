//! Which processes there are, and what each can execute.
//!
//! In a monitoring VM there are threads of the kernel, process 1 and its
//! worker, all of one program. Of each, all page tables are walked: what is
//! executable must be the program's text, page by page as its file has it, or
//! the code that the kernel maps into every process.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_guest::linux::file::{Files, initial_root};
use secmon_guest::linux::memory_area::{Area, AreaModel, Mm};
use secmon_guest::linux::page_cache::PageCache;
use secmon_guest::linux::task::{Task, leaders};
use secmon_guest::linux::user::UserMemory;
use secmon_guest::{Guest, TableError};
use secmon_memory::{MappedPage, PAGE_SIZE, PhysicalAddress, VirtualAddress};

use crate::changes::changes;
use crate::configuration::Configuration;
use crate::finding::digits;
use crate::pages::{MOST_TABLES, writable_code};
use crate::program::PAGE;
use crate::{Finding, Kind, Reference, TABLE};

/// The first address that is not a process's own.
const USER_END: u64 = 1 << 63;
/// `VM_WRITE` and `VM_EXEC` (`include/linux/mm.h`).
const VM_WRITE: u64 = 2;
const VM_EXEC: u64 = 4;
/// More processes than this are not looked into.
const MOST_PROCESSES: usize = 64;
/// More executable pages of one process than this are told as a finding.
const MOST_EXECUTABLE: usize = 1 << 16;
/// How long there may be no worker: process 1 starts it again within this.
const NO_WORKER: Duration = Duration::from_secs(10);

/// What is remembered of processes from look to look.
pub struct Processes {
    /// The program's `struct address_space`, and where its pages lie.
    mapping: VirtualAddress,
    frames: Vec<Option<PhysicalAddress>>,
    /// By `mm_struct`: the relocated pages as they were when the program had
    /// started.
    relocated: BTreeMap<u64, (u64, Vec<u8>)>,
    configuration: Configuration,
    worker_seen: Instant,
    /// Where the worker's task lies.
    worker: Option<u64>,
}

impl Processes {
    /// Nothing was looked at yet.
    pub fn new() -> Self {
        Self {
            mapping: VirtualAddress::new(0),
            frames: Vec::new(),
            relocated: BTreeMap::new(),
            configuration: Configuration::default(),
            worker_seen: Instant::now(),
            worker: None,
        }
    }

    /// The worker's task when it was last looked for.
    pub fn worker(&self) -> Option<u64> {
        self.worker
    }

    /// Looks at all of them.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types lack what is needed.
    pub fn look(
        &mut self,
        guest: &Guest,
        reference: &Reference,
        findings: &mut Vec<Finding>,
    ) -> Result<(), TableError> {
        let tasks: Vec<Task> = leaders(guest, TABLE)?
            .filter(|task| !task.is_kernel_thread() && !task.mm.is_null())
            .take(MOST_PROCESSES)
            .collect();
        let Some(first) = tasks.iter().find(|task| task.tgid == 1) else {
            let finding = Finding::new(Kind::MissingProcess, "process 1", "/init", "none");
            findings.push(finding);
            return Ok(());
        };
        let workers = tasks
            .iter()
            .filter(|task| task.tgid != 1 && task.real_parent == first.address);
        self.worker = workers.clone().map(|task| task.address.as_u64()).next();
        if self.worker.is_some() {
            self.worker_seen = Instant::now();
        } else if self.worker_seen.elapsed() > NO_WORKER {
            let missing = Finding::new(Kind::MissingProcess, "the worker", "one", "none");
            findings.push(missing);
        }
        for extra in workers.skip(1) {
            findings.push(unexpected(extra, "one worker"));
        }
        for task in &tasks {
            if task.tgid != 1 && task.real_parent != first.address {
                findings.push(unexpected(task, "process 1 and its worker"));
            }
        }
        let look = Look {
            guest,
            reference,
            areas: AreaModel::new(guest, TABLE)?,
            files: Files::new(guest, TABLE, initial_root(guest, TABLE)?)?,
            cache: PageCache::new(guest, TABLE)?,
            vdso: vdso(guest),
        };
        self.mapping = look.program_of(first).unwrap_or(self.mapping);
        self.cached_pages(&look, findings);
        let mut present = Vec::new();
        for task in &tasks {
            present.push(task.mm.as_u64());
            self.process(&look, task, findings);
        }
        self.relocated.retain(|mm, _| present.contains(mm));
        Ok(())
    }

    /// Compares the program's pages, as the kernel keeps them for whoever runs
    /// it next, with the file.
    fn cached_pages(&mut self, look: &Look<'_>, findings: &mut Vec<Finding>) {
        let program = &look.reference.program;
        self.frames.resize(program.pages(), None);
        let memory = look.guest.space().memory();
        let mut found = [0; PAGE];
        for (index, frame) in self.frames.iter_mut().enumerate() {
            let Some(expected) = program.page(index) else {
                continue;
            };
            let mut same = |frame: &Option<PhysicalAddress>| match frame {
                Some(frame) => memory.read(*frame, &mut found).is_ok() && found == expected,
                None => false,
            };
            if same(frame) {
                continue;
            }
            // Never seen, moved or changed.
            match look.cache.page(look.guest, self.mapping, index as u64) {
                Ok(now) => *frame = now,
                Err(error) => {
                    let place = format!("/init, page {index}");
                    let text = error.to_string();
                    findings.push(Finding::new(
                        Kind::Unreadable,
                        place,
                        "the file's page",
                        text,
                    ));
                    continue;
                }
            }
            if frame.is_none() || same(frame) {
                continue;
            }
            findings.push(changed(
                Kind::ChangedProgram,
                "/init",
                index,
                &expected,
                &found,
            ));
        }
    }

    fn process(&mut self, look: &Look<'_>, task: &Task, findings: &mut Vec<Finding>) {
        let guest = look.guest;
        let name = format!("process {}", task.tgid);
        let Ok(memory) = UserMemory::new(guest, task.mm) else {
            // It has just ended; if not, it is told as unreadable below.
            return;
        };
        let Ok(mm) = look.areas.mm(guest, task.mm) else {
            return;
        };
        let areas = match look.areas.areas(guest, TABLE, &mm) {
            Ok((areas, _)) => areas,
            Err(error) => {
                let text = error.to_string();
                findings.push(Finding::new(Kind::Unreadable, name, "its areas", text));
                return;
            }
        };
        if let Some(index) = foreign_entry(guest, &memory) {
            findings.push(Finding::new(
                Kind::ForeignPageTable,
                format!("{name}, entry {index}"),
                "the kernel's entry of its top table",
                "another one",
            ));
        }
        let mut executable = Vec::new();
        let range = VirtualAddress::new(0)..VirtualAddress::new(USER_END);
        let walked = memory
            .space()
            .mapped_pages(range, MOST_TABLES, &mut |page| {
                if page.rights.executable && executable.len() < MOST_EXECUTABLE {
                    executable.push(page);
                }
            });
        if let Err(error) = walked {
            let place = format!("{name}: its page tables");
            findings.push(Finding::new(
                Kind::Unreadable,
                place,
                "all",
                error.to_string(),
            ));
        }
        for page in &executable {
            self.executable_page(look, &name, &areas, page, findings);
        }
        let base = look.base(&areas, self.mapping);
        if let Some(base) = base {
            self.relocated_pages(look, &name, (&mm, &areas, base), &memory, findings);
        }
        if task.tgid == 1
            && let Some(expected) = &look.reference.configuration
        {
            let heap = mm.start_brk..mm.brk;
            self.configuration.look(expected, &memory, heap, findings);
        }
    }

    /// An executable page must hold a page of the program's text, or be the
    /// kernel's own for every process.
    fn executable_page(
        &self,
        look: &Look<'_>,
        name: &str,
        areas: &[Area],
        page: &MappedPage,
        findings: &mut Vec<Finding>,
    ) {
        if page.rights.writable {
            findings.push(writable_code(name, page));
        }
        if look.vdso.contains(&page.physical) {
            return;
        }
        let address = page.address.as_u64();
        let area = areas
            .iter()
            .find(|area| (area.start..area.end).contains(&address));
        let index = area.and_then(|area| {
            let own = look.mapping(area) == Some(self.mapping) && area.flags & VM_EXEC != 0;
            let index = area
                .page_offset
                .checked_add((address - area.start) / PAGE_SIZE)?;
            own.then(|| usize::try_from(index).ok()).flatten()
        });
        let text = index.and_then(|index| {
            let (text, first) = look.reference.program.first_text_page()?;
            let last = look.reference.program.text().map(|text| text.end).max()?;
            let pages = last.saturating_sub(text).div_ceil(PAGE_SIZE);
            (first..first.saturating_add(pages))
                .contains(&(index as u64))
                .then_some(index)
        });
        let Some(index) = text else {
            let seen = match area {
                Some(_) => "it is executable",
                None => "it is executable, in no area of the process",
            };
            let place = format!("{name}, {address:#x}");
            let finding = Finding::new(Kind::UnknownCode, place, "no code", seen);
            findings.push(finding.at(address));
            return;
        };
        // The file's own page was compared already.
        if self.frames.get(index) == Some(&Some(page.physical)) {
            return;
        }
        let mut found = [0; PAGE];
        let memory = look.guest.space().memory();
        let Some(expected) = look.reference.program.page(index) else {
            return;
        };
        if memory.read(page.physical, &mut found).is_err() || found != expected {
            findings.push(changed(
                Kind::ChangedProgram,
                name,
                index,
                &expected,
                &found,
            ));
        }
    }

    /// What was relocated must be as the file and the base make it. Words that
    /// the C library computed as it started must stay as they were then.
    fn relocated_pages(
        &mut self,
        look: &Look<'_>,
        name: &str,
        (mm, areas, base): (&Mm, &[Area], u64),
        memory: &UserMemory,
        findings: &mut Vec<Finding>,
    ) {
        let Some(expected) = look.reference.program.relocated(base) else {
            return;
        };
        let start = base.wrapping_add(expected.start);
        let area = areas
            .iter()
            .find(|area| (area.start..area.end).contains(&start));
        // Until it has started it writes here.
        if area.is_none_or(|area| area.flags & VM_WRITE != 0) {
            return;
        }
        let address = mm.address.as_u64();
        let known = self.relocated.get(&address);
        let known = known.filter(|(of, bytes)| *of == base && bytes.len() == expected.bytes.len());
        // A page that was never touched is not there; with nothing relocated in
        // it, it would be as the file has it.
        let mut found = known.map_or(&expected.bytes, |(_, known)| known).clone();
        let mut at = start;
        let mut rest = found.as_mut_slice();
        while !rest.is_empty() {
            let left = usize::try_from(PAGE_SIZE - at % PAGE_SIZE).unwrap_or(PAGE);
            let (piece, others) = rest.split_at_mut(left.min(rest.len()));
            let mut now = vec![0; piece.len()];
            if memory
                .space()
                .read(VirtualAddress::new(at), &mut now)
                .is_ok()
            {
                piece.copy_from_slice(&now);
            }
            at = at.wrapping_add(piece.len() as u64);
            rest = others;
        }
        let Some((_, known)) = known.filter(|(of, _)| *of == base) else {
            let text: Vec<Range<u64>> = look.reference.program.text().collect();
            for at in &expected.free {
                let word = found.get(*at..).and_then(<[u8]>::first_chunk::<8>);
                let word = word.map_or(0, |word| u64::from_le_bytes(*word));
                let target = word.wrapping_sub(base);
                if !text.iter().any(|text| text.contains(&target)) {
                    let place = format!("{name}, a function that it chose");
                    let finding = Finding::new(
                        Kind::ChangedRelocated,
                        place,
                        "an address in its text",
                        format!("{word:#x}"),
                    );
                    findings.push(finding.at(start.wrapping_add(*at as u64)));
                    return;
                }
            }
            self.relocated.insert(address, (base, found));
            return;
        };
        for change in changes(known, &found) {
            let at = start.wrapping_add(change.start as u64);
            let shown = |bytes: &[u8]| digits(bytes.get(change.clone()).unwrap_or_default());
            let place = format!("{name}, {:#x}", expected.start + change.start as u64);
            let (before, after) = (shown(known), shown(&found));
            let finding = Finding::new(Kind::ChangedRelocated, place, before, after);
            findings.push(finding.at(at));
        }
    }
}

/// Whether process 1 has started its worker, which it does when all else is
/// done.
///
/// # Errors
/// [`TableError`] if there is no list of processes.
pub fn has_started(guest: &Guest) -> Result<bool, TableError> {
    let mut own = leaders(guest, TABLE)?
        .filter(|task| !task.is_kernel_thread() && !task.mm.is_null())
        .map(|task| task.tgid);
    Ok(own.any(|id| id == 1) && own.any(|id| id != 1))
}

/// What one look needs of the guest.
struct Look<'g> {
    guest: &'g Guest,
    reference: &'g Reference,
    areas: Arc<AreaModel>,
    files: Files,
    cache: PageCache,
    /// Where the pages lie that the kernel maps into every process.
    vdso: Vec<PhysicalAddress>,
}

impl Look<'_> {
    /// The `struct address_space` of the file in an area.
    fn mapping(&self, area: &Area) -> Option<VirtualAddress> {
        if area.file.is_null() {
            return None;
        }
        let file = self.files.open_file(self.guest, area.file).ok()?;
        Some(file.mapping)
    }

    /// That of the first executable file of a process.
    fn program_of(&self, task: &Task) -> Option<VirtualAddress> {
        let mm = self.areas.mm(self.guest, task.mm).ok()?;
        let (areas, _) = self.areas.areas(self.guest, TABLE, &mm).ok()?;
        let mut code = areas
            .iter()
            .filter(|area| area.flags & VM_EXEC != 0 && !area.file.is_null());
        code.find_map(|area| self.mapping(area))
    }

    /// How far the program was moved.
    fn base(&self, areas: &[Area], mapping: VirtualAddress) -> Option<u64> {
        let (address, first) = self.reference.program.first_text_page()?;
        let area = areas.iter().find(|area| {
            area.flags & VM_EXEC != 0
                && area.page_offset == first
                && self.mapping(area) == Some(mapping)
        })?;
        Some(area.start.wrapping_sub(address))
    }
}

/// Where the pages of `vdso_image_64` lie.
fn vdso(guest: &Guest) -> Vec<PhysicalAddress> {
    /// No kernel's is longer.
    const MOST_PAGES: u64 = 4;
    let data = guest
        .address("vdso_image_64")
        .and_then(|image| guest.space().read_u64(image).ok());
    let Some(data) = data else {
        return Vec::new();
    };
    (0..MOST_PAGES)
        .filter_map(|page| {
            let address = VirtualAddress::new(data.checked_add(page * PAGE_SIZE)?);
            Some(guest.space().translate(address).ok()?.physical)
        })
        .collect()
}

/// An entry for the kernel's half in a process's top table that is not the
/// kernel's own. One that is missing is filled in when it is needed.
fn foreign_entry(guest: &Guest, memory: &UserMemory) -> Option<usize> {
    const HALF: usize = PAGE / 2;
    const ACCESSED: u64 = 1 << 5;
    let physical = guest.space().memory();
    let read = |root: PhysicalAddress| {
        let mut half = [0; HALF];
        let address = root.as_u64().checked_add(HALF as u64)?;
        physical
            .read(PhysicalAddress::new(address), &mut half)
            .ok()?;
        Some(half)
    };
    let (own, kernel) = (read(memory.space().root())?, read(guest.space().root())?);
    let words = |half: [u8; HALF]| {
        let words: Vec<u64> = half
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word) & !ACCESSED)
            .collect();
        words
    };
    let (own, kernel) = (words(own), words(kernel));
    let found = own
        .iter()
        .zip(&kernel)
        .position(|(own, kernel)| *own != 0 && own != kernel);
    found.map(|index| index + 256)
}

fn unexpected(task: &Task, expected: &str) -> Finding {
    let comm = task.comm();
    let comm = comm.split(|byte| *byte == 0).next().unwrap_or_default();
    let place = format!("process {}", task.tgid);
    let seen = format!("one called {:?}", String::from_utf8_lossy(comm));
    Finding::new(Kind::UnexpectedProcess, place, expected, seen).at(task.address.as_u64())
}

fn changed(kind: Kind, whose: &str, index: usize, expected: &[u8], found: &[u8]) -> Finding {
    let run = changes(expected, found).into_iter().next().unwrap_or(0..0);
    let shown = |bytes: &[u8]| digits(bytes.get(run.clone()).unwrap_or_default());
    let offset = (index * PAGE + run.start) as u64;
    let place = format!("{whose}, {offset:#x} of its file");
    Finding::new(kind, place, shown(expected), shown(found))
}

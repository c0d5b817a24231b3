//! What can be executed in the kernel's half of memory.
//!
//! The kernel's text is compared elsewhere. All else that is executable – the
//! modules, the filters of system calls that the kernel compiles – must have an
//! owner that a monitor has, and stays as it was when it was first seen.

use secmon_guest::linux::code::image::ImageSections;
use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::{Guest, TableError};
use secmon_memory::{MappedPage, VirtualAddress};

use crate::changes::changes;
use crate::finding::digits;
use crate::kernel::symbol;
use crate::{Finding, Kind, Reference, TABLE};

/// The lowest address of the kernel's half.
const UPPER_HALF: u64 = 1 << 63;
/// More page tables than this are not read: those of 64 GiB mapped by pages of
/// 4 KiB.
pub const MOST_TABLES: usize = 1 << 15;
/// More runs of executable memory than this are told as one finding.
const MOST_RUNS: usize = 1 << 12;
/// The longest run of which a copy is kept.
const LONGEST_COPY: u64 = 8 << 20;

/// Executable addresses that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: u64,
    end: u64,
}

/// What was executable, and what it held.
#[derive(Debug, Default)]
pub struct KernelPages {
    runs: Vec<Run>,
    copies: Vec<(Run, Vec<u8>)>,
    /// The worker that was there when the copies were taken: a new one brings
    /// new filters of system calls.
    worker: Option<u64>,
}

impl KernelPages {
    /// Walks all page tables of the kernel's half; `worker` tells one worker
    /// from another.
    pub fn look(
        &mut self,
        guest: &Guest,
        reference: &Reference,
        worker: Option<u64>,
        findings: &mut Vec<Finding>,
    ) {
        let Ok(image) = ImageSections::of(guest, TABLE) else {
            return;
        };
        let mut runs: Vec<Run> = Vec::new();
        let mut writable = None;
        let mut bounded = false;
        let range = VirtualAddress::new(UPPER_HALF)..VirtualAddress::new(u64::MAX);
        let walked = guest.space().mapped_pages(range, MOST_TABLES, &mut |page| {
            let (start, end) = (page.address.as_u64(), page.end().as_u64());
            let rights = page.rights;
            if rights.writable && (rights.executable || image.rodata.contains(&page.address)) {
                writable.get_or_insert(page);
            }
            if !rights.executable {
                return;
            }
            let full = runs.len() >= MOST_RUNS;
            match runs.last_mut() {
                Some(run) if run.end == start => run.end = end,
                _ if full => bounded = true,
                _ => runs.push(Run { start, end }),
            }
        });
        if let Some(page) = writable {
            findings.push(writable_code(&symbol(guest, page.address.as_u64()), &page));
        }
        if let Err(error) = walked {
            let text = error.to_string();
            let finding = Finding::new(Kind::Unreadable, "the kernel's page tables", "all", text);
            findings.push(finding);
        }
        if bounded {
            let most = format!("at most {MOST_RUNS} runs");
            let finding = Finding::new(Kind::UnknownCode, "the kernel's half", most, "more");
            findings.push(finding);
        }
        if runs != self.runs || worker != self.worker {
            match self.judge(guest, reference, &runs, findings) {
                Ok(true) => {
                    let known: Vec<Run> = self.copies.iter().map(|(run, _)| *run).collect();
                    let renewed = worker != self.worker;
                    self.copies
                        .retain(|(run, _)| runs.contains(run) && !renewed);
                    for run in &runs {
                        let foreign = !image.text.contains(&VirtualAddress::new(run.start));
                        if foreign && (renewed || !known.contains(run)) {
                            let mut bytes = Vec::new();
                            if read(guest, *run, &mut bytes) {
                                self.copies.push((*run, bytes));
                            }
                        }
                    }
                    (self.runs, self.worker) = (runs, worker);
                }
                Ok(false) => {}
                Err(error) => {
                    let text = error.to_string();
                    findings.push(Finding::new(
                        Kind::Unreadable,
                        "owners of code",
                        "all",
                        text,
                    ));
                }
            }
        }
        let mut found = Vec::new();
        for (run, known) in &self.copies {
            if !read(guest, *run, &mut found) {
                // A change of the page tables is told above.
                continue;
            }
            for change in changes(known, &found) {
                let address = run.start.saturating_add(change.start as u64);
                let shown = |bytes: &[u8]| digits(bytes.get(change.clone()).unwrap_or_default());
                let place = symbol(guest, address);
                let (before, after) = (shown(known), shown(&found));
                let finding = Finding::new(Kind::ChangedGeneratedCode, place, before, after);
                findings.push(finding.at(address));
            }
        }
    }

    /// Whether all that is executable now and was not before has an owner that
    /// a monitor has.
    fn judge(
        &self,
        guest: &Guest,
        reference: &Reference,
        runs: &[Run],
        findings: &mut Vec<Finding>,
    ) -> Result<bool, TableError> {
        let map = CodeMap::read(guest, TABLE)?;
        let before = findings.len();
        for code in map.unowned() {
            let (start, end) = (code.range.start.as_u64(), code.range.end.as_u64());
            let place = symbol(guest, start);
            let seen = format!("{} executable bytes of nobody", end.saturating_sub(start));
            let finding = Finding::new(Kind::UnknownCode, place, "nothing executable", seen);
            findings.push(finding.at(start));
        }
        for module in &map.modules {
            let name = String::from_utf8_lossy(&module.name).into_owned();
            if !reference.modules.contains(&name) {
                let finding = Finding::new(
                    Kind::UnknownModule,
                    name,
                    "a module of the image",
                    "another one",
                );
                findings.push(finding.at(module.address.as_u64()));
            }
        }
        for run in runs.iter().filter(|run| !self.runs.contains(run)) {
            let owner = map.owner_of(VirtualAddress::new(run.start));
            let what = match owner {
                Some(CodeOwner::FtraceTrampoline { .. }) => "a trampoline of ftrace",
                Some(CodeOwner::KprobeSlots) => "slots of kprobes",
                Some(CodeOwner::KexecControl) => "a kernel to start by kexec",
                _ => continue,
            };
            let place = symbol(guest, run.start);
            let finding = Finding::new(Kind::UnknownCode, place, "code of a monitor", what);
            findings.push(finding.at(run.start));
        }
        Ok(findings.len() == before)
    }
}

/// That a page can be written that must not be.
pub fn writable_code(place: &str, page: &MappedPage) -> Finding {
    let seen = match page.rights.executable {
        true => "it can be written and executed",
        false => "it can be written",
    };
    Finding::new(Kind::WritableCode, place, "it can't be written", seen).at(page.address.as_u64())
}

fn read(guest: &Guest, run: Run, bytes: &mut Vec<u8>) -> bool {
    let length = (run.end.saturating_sub(run.start)).min(LONGEST_COPY);
    bytes.resize(usize::try_from(length).unwrap_or(0), 0);
    guest
        .space()
        .read(VirtualAddress::new(run.start), bytes)
        .is_ok()
}

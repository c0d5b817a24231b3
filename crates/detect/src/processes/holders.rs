//! Open files and directories that no living task has: their owner says that
//! it has ended, or is in no memory that tasks are kept in.

use std::collections::HashSet;

use secmon_guest::linux::views::holdings::{self, Held, Holding};
use secmon_guest::linux::views::slab;
use secmon_guest::linux::views::task_record::TaskRecord;
use secmon_guest::{Guest, TableError, Text};
use secmon_memory::VirtualAddress;

use super::NAME;
use super::gathered::Gathered;
use crate::{Class, Evidence, Finding, Severity, Subject, Technique};

/// How often what has no owner is looked at again: a process may begin or end
/// between two reads.
const ATTEMPTS: usize = 4;

/// What tasks have.
#[derive(Debug, Default)]
pub(super) struct Holders {
    /// What was in use before the tasks were read.
    pub(super) holdings: Vec<Holding>,
    /// What living tasks have.
    used: HashSet<VirtualAddress>,
    /// Tasks that say that they have ended.
    ended: Vec<TaskRecord>,
}

/// The kernel's caches of such.
const CACHES: [&str; 2] = ["files_cachep", "fs_cachep"];

/// The caches that this kernel has.
pub(super) fn caches(guest: &Guest) -> Vec<VirtualAddress> {
    CACHES
        .iter()
        .filter_map(|cache| slab::cache(guest, NAME, cache).ok())
        .collect()
}

impl Holders {
    /// Reads what is in use, before any task is read.
    pub(super) fn read(guest: &Guest, objects: &slab::SlabObjects) -> Result<Self, TableError> {
        let mut holdings = Vec::new();
        if let Ok(cache) = slab::cache(guest, NAME, CACHES[0]) {
            for address in objects.of(cache) {
                holdings.extend(holdings::files(guest, NAME, *address)?);
            }
        }
        if let Ok(cache) = slab::cache(guest, NAME, CACHES[1]) {
            for address in objects.of(cache) {
                holdings.extend(holdings::directories(guest, NAME, *address)?);
            }
        }
        Ok(Self {
            holdings,
            ..Self::default()
        })
    }

    /// Notes what lies in a place for tasks.
    pub(super) fn note(&mut self, record: &TaskRecord) {
        if !record.is_ended() {
            self.used.extend([record.files, record.fs]);
        } else if !record.files.is_null() || !record.fs.is_null() {
            self.ended.push(record.clone());
        }
    }

    fn without_owner(&self) -> Vec<Holding> {
        let holdings = self.holdings.iter().copied();
        holdings
            .filter(|holding| !self.used.contains(&holding.address))
            .collect()
    }
}

/// Looks at what has no owner, again and again.
pub(super) fn look(
    guest: &Guest,
    gathered: &Gathered,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), TableError> {
    let mut suspects = gathered.holders.without_owner();
    let mut last = None;
    for _ in 0..ATTEMPTS {
        if suspects.is_empty() {
            return Ok(());
        }
        let mut still = Vec::new();
        for holding in suspects {
            still.extend(holding.now(guest, NAME)?);
        }
        let again = everybody(guest, gathered)?;
        suspects = Vec::new();
        for holding in still {
            // Nobody had it while it was in use before and after.
            if !again.used.contains(&holding.address) {
                suspects.extend(holding.now(guest, NAME)?);
            }
        }
        last = Some(again);
    }
    let ended = last.map(|last| last.ended).unwrap_or_default();
    for holding in suspects {
        let owner = ended
            .iter()
            .find(|task| [task.files, task.fs].contains(&holding.address));
        findings(finding(&holding, owner.filter(|task| task.is_sound(guest))));
    }
    Ok(())
}

/// What all tasks have now, wherever they lie.
fn everybody(guest: &Guest, gathered: &Gathered) -> Result<Holders, TableError> {
    let cache = slab::cache(guest, NAME, "task_struct_cachep")?;
    let objects = slab::objects(guest, NAME, &[cache])?;
    let mut holders = Holders::default();
    let others = gathered.records.keys();
    for address in objects.of(cache).iter().chain(others) {
        if let Ok(record) = gathered.model.read(guest, *address) {
            holders.note(&record);
        }
    }
    Ok(holders)
}

fn finding(holding: &Holding, owner: Option<&TaskRecord>) -> Finding {
    let (kind, name, what) = match holding.held {
        Held::Files { open, sockets } => (
            "files_struct",
            "open_files_of_nobody",
            format!("a table of {open} open files, {sockets} of them sockets,"),
        ),
        Held::Directories => (
            "fs_struct",
            "directories_of_nobody",
            "a root and a current directory".to_owned(),
        ),
    };
    let evidence = Evidence::new(kind, format!("{what} in use")).with("address", holding.address);
    let found = match owner {
        Some(owner) => {
            let subject = Subject::Process {
                task: owner.address,
                pid: owner.tgid,
                started: owner.started,
                name: owner.name.clone().unwrap_or_default(),
            };
            let summary = format!("{subject} says that it has ended, and has {what} still");
            Finding::new(
                NAME,
                "disguised_process",
                Class::Attack,
                Severity::High,
                subject,
                summary,
            )
        }
        None => {
            let subject = Subject::KernelObject {
                kind,
                address: holding.address,
                name: Text::default(),
            };
            let summary = format!("{what} that no process has is in use");
            Finding::new(
                NAME,
                name,
                Class::Suspicion,
                Severity::High,
                subject,
                summary,
            )
        }
    };
    found.technique(Technique::ROOTKIT).evidence(evidence)
}

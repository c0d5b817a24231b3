//! Whether objects count as many references as were found to them.
//!
//! A pointer that was changed can lead to another real object of the same
//! type: a descriptor to a file of another process, a process to the memory of
//! another one. Each looks sound by itself. But whoever holds such an object
//! has taken a reference, and the object counts them, so an object that is
//! reached more often than it counts is reached by a pointer that is not true.
//!
//! References are taken before a pointer is set and given back after it is
//! cleared, so at each moment the count covers what there is. On a running
//! guest the pointers are not read at one moment and nothing is said here.

use std::sync::Arc;

use secmon_memory::{VirtualAddress, Volatility};
use secmon_profile::Member;

use super::file::OpenFile;
use super::hash::{AddressMap, AddressSet};
use super::list::is_object_address;
use super::rb_tree;
use super::task::Task;
use crate::{Diagnostic, Guest, TableError, layout};

/// More areas than these are looked at of no file.
const AREA_LIMIT: usize = 1 << 20;

layout! {
    /// `include/linux/mm_types.h`
    struct ProgramLayout: "mm_struct" {
        file: "exe_file",
    }
}

layout! {
    /// `include/linux/fs.h`
    struct MappingLayout: "address_space" {
        areas: "i_mmap",
    }
}

layout! {
    /// `include/linux/mm_types.h`
    struct MappedAreaLayout: "vm_area_struct" {
        node: "shared.rb",
        file: "vm_file",
    }
}

fn is_still(guest: &Guest) -> bool {
    guest.space().memory().volatility() == Volatility::Static
}

/// Counts the processes that share objects of one kind.
pub(crate) struct Sharers<'g> {
    guest: &'g Guest,
    table: &'static str,
    /// The object's structure and the member that counts, for diagnostics.
    what: &'static str,
    known: AddressMap<u64>,
}

impl<'g> Sharers<'g> {
    /// Nobody yet.
    pub fn new(guest: &'g Guest, table: &'static str, what: &'static str) -> Self {
        Self {
            guest,
            table,
            what,
            known: AddressMap::default(),
        }
    }

    /// Notes that the process of `task` uses `object`, which counts `count`
    /// users. True for the first process that does.
    pub fn note(&mut self, task: &Task, object: VirtualAddress, count: u64) -> bool {
        let users = self.known.entry(object).or_default();
        *users += 1;
        // Of more it is said once.
        if *users == count.saturating_add(1) && is_still(self.guest) {
            self.guest.diagnostics().record(Diagnostic {
                table: self.table,
                subject: format!("pid {}", task.tgid),
                address: Some(object),
                reason: format!(
                    "{users} processes use it, but {} is {count}: what is shown of one of them \
                     is another's",
                    self.what
                ),
            });
        }
        *users == 1
    }
}

/// What was found to refer to a file.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// How many references it counts.
    count: i64,
    /// How many descriptors lead to it.
    descriptors: i64,
    /// The `address_space` that knows where the file is mapped.
    mapping: VirtualAddress,
    /// The last one of the descriptors.
    pid: u32,
    fd: u64,
}

/// Counts what refers to open files: descriptors, memory areas, programs.
/// There is more that may, so only too many are wrong.
pub(crate) struct FileReferences<'g> {
    guest: &'g Guest,
    table: &'static str,
    program: Arc<ProgramLayout>,
    mapping: Arc<MappingLayout>,
    area: Arc<MappedAreaLayout>,
    held: AddressMap<Held>,
    programs: AddressMap<i64>,
    memories: AddressSet,
}

impl<'g> FileReferences<'g> {
    /// Nothing yet; none for a running guest.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types are not known or lack a member.
    pub fn new(guest: &'g Guest, table: &'static str) -> Result<Option<Self>, TableError> {
        if !is_still(guest) {
            return Ok(None);
        }
        Ok(Some(Self {
            guest,
            table,
            program: guest.layout(table)?,
            mapping: guest.layout(table)?,
            area: guest.layout(table)?,
            held: AddressMap::default(),
            programs: AddressMap::default(),
            memories: AddressSet::default(),
        }))
    }

    /// Notes the file that the process of `task` executes.
    pub fn program_of(&mut self, task: &Task) {
        if task.mm.is_null() || !self.memories.insert(task.mm) {
            return;
        }
        // What can't be read refers to nothing.
        if let Ok(file) = self.guest.pointer(task.mm, &self.program.file)
            && !file.is_null()
        {
            *self.programs.entry(file).or_default() += 1;
        }
    }

    /// Notes a descriptor. Those of a descriptor table that processes share
    /// count once.
    pub fn descriptor(&mut self, task: &Task, fd: u64, file: &OpenFile) {
        let held = self.held.entry(file.address).or_insert(Held {
            count: file.references,
            descriptors: 0,
            mapping: file.mapping,
            pid: task.tgid,
            fd,
        });
        held.descriptors += 1;
        (held.pid, held.fd) = (task.tgid, fd);
    }

    /// Says which files are reached more often than they count.
    pub fn report(&self) {
        let mut areas = AddressMap::<AddressMap<i64>>::default();
        let mut wrong = Vec::new();
        for (file, held) in &self.held {
            let mut found = held.descriptors;
            found += self.programs.get(file).copied().unwrap_or(0);
            let areas = areas
                .entry(held.mapping)
                .or_insert_with(|| self.areas_of(held.mapping));
            found += areas.get(file).copied().unwrap_or(0);
            if found > held.count {
                wrong.push((*file, *held, found));
            }
        }
        wrong.sort_by_key(|(_, held, _)| (held.pid, held.fd));
        for (file, held, found) in wrong {
            self.guest.diagnostics().record(Diagnostic {
                table: self.table,
                subject: format!("pid {} fd {}", held.pid, held.fd),
                address: Some(file),
                reason: format!(
                    "{} descriptors lead to this file, {} memory areas and programs use it, but \
                     it counts {} references: not all of these are true",
                    held.descriptors,
                    found - held.descriptors,
                    held.count
                ),
            });
        }
    }

    /// How many memory areas each file of this mapping has. What is damaged
    /// there counts for nothing.
    fn areas_of(&self, mapping: VirtualAddress) -> AddressMap<i64> {
        let mut areas = AddressMap::default();
        let space = self.guest.space();
        if !is_object_address(space, mapping) {
            return areas;
        }
        let pointer = |base: VirtualAddress, member: &Member| self.guest.pointer(base, member);
        let root = mapping.wrapping_add(self.mapping.areas.offset);
        for node in rb_tree::walk(space, root, AREA_LIMIT).items {
            let area = node.wrapping_sub(self.area.node.offset);
            if let Ok(file) = pointer(area, &self.area.file) {
                *areas.entry(file).or_default() += 1;
            }
        }
        areas
    }
}

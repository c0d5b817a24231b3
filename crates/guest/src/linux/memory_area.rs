//! The memory areas of a process: `struct vm_area_struct` and the tree that
//! holds them (`include/linux/mm_types.h`).

use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use super::list::is_object_address;
use super::span::{Copied, Span};
use super::tree::{TreeError, Walk, settle};
use super::{maple_tree, rb_tree};
use crate::{Guest, Layout, TableError, layout};

/// `VM_WRITE` of `vm_flags` (`include/linux/mm.h`).
pub(crate) const VM_WRITE: u64 = 0x2;
/// `VM_EXEC`.
pub(crate) const VM_EXEC: u64 = 0x4;

/// More areas than these are read of no process; the kernel's usual limit
/// (`vm.max_map_count`) is 65,530 or 1,048,576.
const AREA_LIMIT: usize = 1 << 21;

layout! {
    /// `include/linux/mm_types.h`
    pub(crate) struct AreaLayout: "vm_area_struct" {
        start: "vm_start",
        end: "vm_end",
        mm: "vm_mm",
        flags: "vm_flags" | "__vm_flags",
        offset: "vm_pgoff",
        file: "vm_file",
        operations: "vm_ops",
        private: "vm_private_data",
    } optional {
        /// Before 6.1.
        node: "vm_rb",
        /// Since 5.17, where the kernel is built with it. In its first form
        /// it shares its place with what links areas of a file.
        anonymous_name: "anon_name",
        links: "shared",
        /// In kernels with the patches of aufs, as Ubuntu's: the file that
        /// `/proc` shows, where it is not the one that is mapped.
        shown_file: "vm_prfile",
    }
}

layout! {
    /// `include/linux/mm_types.h`
    pub(crate) struct MmLayout: "mm_struct" {
        count: "map_count",
        users: "mm_users",
        start_brk: "start_brk",
        brk: "brk",
        start_stack: "start_stack",
    } optional {
        /// Since 6.1.
        maple_tree: "mm_mt",
        /// Before 6.1.
        rb_tree: "mm_rb",
        /// Whether it has a page for calls of old programs, by one of the
        /// bits; before 5.11 a flag says that it is a 32-bit process.
        context_flags: "context.flags",
        context_ia32: "context.ia32_compat",
    }
}

/// How memory areas of a guest are read.
#[derive(Debug)]
pub struct AreaModel {
    pub(crate) area: AreaLayout,
    pub(crate) mm: MmLayout,
    area_span: Span,
    mm_span: Span,
}

impl Layout for AreaModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let area = AreaLayout::resolve(types)?;
        let mm = MmLayout::resolve(types)?;
        if mm.maple_tree.is_none() && (mm.rb_tree.is_none() || area.node.is_none()) {
            // Says which member is missing.
            types.member("mm_struct", "mm_mt")?;
        }
        let optional = [&area.anonymous_name, &area.shown_file];
        let area_span = Span::of(
            [
                &area.start,
                &area.end,
                &area.mm,
                &area.flags,
                &area.offset,
                &area.file,
                &area.operations,
                &area.private,
            ]
            .into_iter()
            .chain(optional.into_iter().flatten()),
        );
        let mm_span = Span::of([
            &mm.count,
            &mm.users,
            &mm.start_brk,
            &mm.brk,
            &mm.start_stack,
        ]);
        Ok(Self {
            area,
            mm,
            area_span,
            mm_span,
        })
    }
}

/// What is needed of an `mm_struct` beside its areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mm {
    /// Its address.
    pub address: VirtualAddress,
    /// `map_count`: how many areas the kernel thinks there are.
    pub count: u64,
    /// `mm_users`: 0 once the memory is being given up.
    pub users: u64,
    /// Where the heap starts.
    pub start_brk: u64,
    /// Where it ends.
    pub brk: u64,
    /// Where the stack pointer was at the start of the program.
    pub start_stack: u64,
}

/// A memory area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// `struct vm_area_struct *`.
    pub address: VirtualAddress,
    /// The first address.
    pub start: u64,
    /// The first address after it.
    pub end: u64,
    /// `vm_flags`: `VM_…`.
    pub flags: u64,
    /// `vm_pgoff`: the offset in the file, in pages.
    pub page_offset: u64,
    /// `struct file *`, null for none; the one that `/proc` shows.
    pub file: VirtualAddress,
    /// `struct vm_operations_struct *`.
    pub operations: VirtualAddress,
    /// `vm_private_data`.
    pub private: VirtualAddress,
    /// `struct anon_vma_name *`, null for none.
    pub anonymous_name: VirtualAddress,
}

/// Something wrong among the areas of a process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AreaError {
    /// The tree that holds them is damaged.
    #[error("areas may be missing: {0}")]
    Tree(#[from] TreeError),
    /// An entry of the tree that is no area of this process.
    #[error("the area at {area} is left out: {reason}")]
    Entry {
        /// Where it should be.
        area: VirtualAddress,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An area that stands elsewhere in the tree than it says of itself: one
    /// that is just being made longer or shorter, or a damaged one.
    #[error(
        "the area at {area} reaches from {start} to {end} by its own account, \
         in the tree from {first} to {last}"
    )]
    Elsewhere {
        /// Where it is.
        area: VirtualAddress,
        /// Its first address.
        start: VirtualAddress,
        /// The address behind its last one.
        end: VirtualAddress,
        /// The first address in the tree.
        first: VirtualAddress,
        /// The last address in the tree.
        last: VirtualAddress,
    },
    /// An area that can't be read.
    #[error("the area at {area} is left out: {source}")]
    Read {
        /// Where it should be.
        area: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
    /// The kernel counts others.
    #[error("{found} areas were found, map_count is {expected}")]
    Count {
        /// `map_count`.
        expected: u64,
        /// How many were found.
        found: usize,
    },
}

impl AreaModel {
    /// The model for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types are not known or lack a member.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Arc<Self>, TableError> {
        guest.layout(table)
    }

    /// The `mm_struct` at `address`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn mm(&self, guest: &Guest, address: VirtualAddress) -> Result<Mm, ReadError> {
        let copied = self.mm_span.read(guest.space(), address)?;
        Ok(Mm {
            address,
            count: copied.number(&self.mm.count),
            users: copied.number(&self.mm.users),
            start_brk: copied.number(&self.mm.start_brk),
            brk: copied.number(&self.mm.brk),
            start_stack: copied.number(&self.mm.start_stack),
        })
    }

    /// The areas of `mm`, by address, each read and checked; all of them from
    /// one moment unless an error says otherwise.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types lack the tree.
    pub fn areas(
        &self,
        guest: &Guest,
        table: &'static str,
        mm: &Mm,
    ) -> Result<(Vec<Area>, Vec<AreaError>), TableError> {
        let maple = match &self.mm.maple_tree {
            Some(tree) => Some((tree, guest.layout::<maple_tree::MapleModel>(table)?)),
            None => None,
        };
        // The walks below repeat themselves while the tree changes; areas can
        // change without the tree, so all is repeated together as well.
        let mut failures = Vec::new();
        let walk = settle(guest.space(), guest.diagnostics(), || {
            failures.clear();
            let found = match (&maple, &self.mm.rb_tree, &self.area.node) {
                (Some((tree, model)), _, _) => {
                    let tree = mm.address.wrapping_add(tree.offset);
                    let walk = model.walk(guest.space(), tree, AREA_LIMIT);
                    let range = |range: maple_tree::Range| Found {
                        area: VirtualAddress::new(range.word),
                        range: Some((range.first, range.last)),
                    };
                    walk.map(range)
                }
                (None, Some(tree), Some(node)) => {
                    let root = mm.address.wrapping_add(tree.offset);
                    let walk = rb_tree::walk(guest.space(), root, AREA_LIMIT);
                    walk.map(|found| Found {
                        area: found.wrapping_sub(node.offset),
                        range: None,
                    })
                }
                (None, _, _) => Walk::default(),
            };
            let mut areas = Walk {
                items: Vec::with_capacity(found.items.len()),
                errors: found.errors,
            };
            for found in found.items {
                let area = match self.area(guest, mm, &found) {
                    Ok(area) => area,
                    Err(error) => {
                        failures.push(error);
                        continue;
                    }
                };
                if let Some((first, last)) = found.range
                    && (first, last) != (area.start, area.end - 1)
                {
                    failures.push(AreaError::Elsewhere {
                        area: area.address,
                        start: VirtualAddress::new(area.start),
                        end: VirtualAddress::new(area.end),
                        first: VirtualAddress::new(first),
                        last: VirtualAddress::new(last),
                    });
                }
                areas.items.push(area);
            }
            areas
        });
        let mut errors: Vec<_> = walk.errors.into_iter().map(AreaError::from).collect();
        errors.append(&mut failures);
        let areas = walk.items;
        // Areas left out are told already.
        if errors.is_empty() && areas.len() as u64 != mm.count {
            let now = self.mm(guest, mm.address).ok();
            let expected = now.map_or(mm.count, |now| now.count);
            let found = areas.len();
            if expected != found as u64 {
                errors.push(AreaError::Count { expected, found });
            }
        }
        Ok((areas, errors))
    }

    /// Reads and checks what was found in the tree of `mm`.
    fn area(&self, guest: &Guest, mm: &Mm, found: &Found) -> Result<Area, AreaError> {
        let area = found.area;
        let entry = |reason| AreaError::Entry { area, reason };
        if !is_object_address(guest.space(), area) {
            return Err(entry("it is no address of an area"));
        }
        let copied = self
            .area_span
            .read(guest.space(), area)
            .map_err(|source| AreaError::Read { area, source })?;
        let layout = &self.area;
        if copied.pointer(&layout.mm) != mm.address {
            return Err(entry("it belongs to another process"));
        }
        let (start, end) = (copied.number(&layout.start), copied.number(&layout.end));
        if start >= end {
            return Err(entry("it ends before it starts"));
        }
        let file = copied.pointer(&layout.file);
        let shown = copied.optional(layout.shown_file.as_ref());
        let shown = shown.filter(|shown| *shown != 0).map(VirtualAddress::new);
        Ok(Area {
            address: area,
            start,
            end,
            flags: copied.number(&layout.flags),
            page_offset: copied.number(&layout.offset),
            file: shown.unwrap_or(file),
            operations: copied.pointer(&layout.operations),
            private: copied.pointer(&layout.private),
            anonymous_name: self.anonymous_name(&copied, file),
        })
    }

    /// The name of an anonymous area. Where it shares its place with links,
    /// it is there only for an area without a file.
    fn anonymous_name(&self, copied: &Copied, file: VirtualAddress) -> VirtualAddress {
        let Some(name) = &self.area.anonymous_name else {
            return VirtualAddress::default();
        };
        let shared = self.area.links.as_ref().is_some_and(|links| {
            name.offset >= links.offset && name.offset < links.offset.saturating_add(links.size)
        });
        if shared && !file.is_null() {
            return VirtualAddress::default();
        }
        copied.pointer(name)
    }
}

/// An entry of a tree of areas.
struct Found {
    area: VirtualAddress,
    /// The addresses it stands at, if the tree says so.
    range: Option<(u64, u64)>,
}

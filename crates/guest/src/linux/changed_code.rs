//! The table `changed_code`: pages of programs and libraries that are no longer
//! what their file says.
//!
//! The kernel maps the file's own page into every process that runs it. A
//! process that writes to its code, or whose code a debugger writes to, gets a
//! private copy. So a page of an executable area of a file that is not the
//! file's page is compared with it byte by byte.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use secmon_memory::{
    NotPresent, PAGE_SIZE, PhysicalAddress, TableLevel, TranslationError, VirtualAddress,
    Volatility,
};

use super::file::{Files, initial_root};
use super::memory_area::{Area, AreaModel, VM_EXEC, VM_WRITE};
use super::page_cache::PageCache;
use super::page_difference::{Difference, differences};
use super::task::{Task, leaders};
use super::user::{FIRST_SPECIAL_SWAP, UserMemory};
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
    layout,
};

const TABLE: &str = "changed_code";

/// Of `vm_flags` (`include/linux/mm.h`): areas that do not show pages of a file's cache, though they have a file:
/// `VM_PFNMAP`, `VM_IO`, `VM_HUGETLB`, `VM_MIXEDMAP`.
const VM_OTHER: u64 = 0x400 | 0x4000 | 0x40_0000 | 0x1000_0000;

/// More pages than this are looked at of no area, 4 GiB.
const MOST_PAGES: u64 = 1 << 20;

layout! {
    /// `include/linux/mm_types.h`, `arch/x86/include/asm/mmu.h`
    struct VdsoLayout: "mm_struct" {
        start: "context.vdso",
        image: "context.vdso_image",
    }
}

layout! {
    /// `arch/x86/include/asm/vdso.h`
    struct VdsoImageLayout: "vdso_image" {
        bytes: "data",
        length: "size",
    }
}

/// A page of code that is not its file's.
pub struct ChangedPage {
    pid: u64,
    comm: Text,
    area: Area,
    /// The page's first address.
    address: u64,
    path: Value,
    /// The page's offset in its file.
    offset: u64,
    difference: Result<Difference, String>,
}

impl ChangedPage {
    fn difference(&self, value: impl FnOnce(&Difference) -> Value) -> Value {
        Value::from_read(self.difference.as_ref(), value)
    }
}

fn digits(bytes: &[u8]) -> Value {
    let text: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    text.join(" ").into()
}

/// The table.
pub static CHANGED_CODE: TableOf<ChangedPage> = TableOf {
    name: TABLE,
    aliases: &[],
    meaning: "Pages of programs and libraries in memory that differ from their file: a row for \
              each page of an executable area whose bytes a process, or somebody for it, has \
              changed. Debuggers and uprobes change single bytes to 0xcc.",
    columns: &[
        Column {
            name: "pid",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Process id.",
            value: |_, row| row.pid.into(),
        },
        Column {
            name: "comm",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Its name as its task_struct holds it.",
            value: |_, row| row.comm.clone().into(),
        },
        Column {
            name: "path",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "The file; [vdso] for the code that the kernel maps into every process.",
            value: |_, row| row.path.clone(),
        },
        Column {
            name: "first_change",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Address of the first byte that differs.",
            value: |_, row| {
                row.difference(|difference| {
                    Value::Address(row.address.saturating_add(difference.first as u64))
                })
            },
        },
        Column {
            name: "changed_bytes",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "How many bytes of the page differ; unreadable where the page was replaced \
                      and the file's own is not in memory.",
            value: |_, row| row.difference(|difference| difference.count.into()),
        },
        Column {
            name: "original",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "What the file has from the first changed byte on, in hexadecimal, at most \
                      16 bytes.",
            value: |_, row| row.difference(|difference| digits(&difference.original)),
        },
        Column {
            name: "found",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "What the process has there.",
            value: |_, row| row.difference(|difference| digits(&difference.found)),
        },
        Column {
            name: "page",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "The page's first address.",
            value: |_, row| Value::Address(row.address),
        },
        Column {
            name: "offset",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "The page's offset in its file, in bytes.",
            value: |_, row| row.offset.into(),
        },
        Column {
            name: "writable",
            kind: Kind::Boolean,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Whether the process may write to the area now.",
            value: |_, row| (row.area.flags & VM_WRITE != 0).into(),
        },
        Column {
            name: "address",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Address of the area's struct vm_area_struct.",
            value: |_, row| row.area.address.into(),
        },
    ],
    items,
};

fn items(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, ChangedPage>,
) -> Result<(), TableError> {
    let mut reader = Reader {
        guest,
        model: AreaModel::new(guest, TABLE)?,
        files: Files::new(guest, TABLE, initial_root(guest, TABLE)?)?,
        cache: PageCache::new(guest, TABLE)?,
        known: HashMap::new(),
        live: guest.space().memory().volatility() == Volatility::Live,
        vdso: guest.layout(TABLE)?,
        vdso_image: guest.layout(TABLE)?,
    };
    for task in leaders(guest, TABLE)? {
        if !selection.wants_pid(task.tgid.into()) || task.mm.is_null() || task.is_kernel_thread() {
            continue;
        }
        if reader.pages_of(&task, sink)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// What an executable area shows.
#[derive(Clone, Copy)]
enum Origin {
    /// Pages of the file with this `struct address_space`.
    File(VirtualAddress),
    /// Pages of the kernel's image, from this address on.
    Kernel(VirtualAddress),
}

/// A page as a process has it.
enum Mapped {
    At(PhysicalAddress),
    SwappedOut,
    /// None here, nor before this address.
    AbsentUntil(u64),
}

struct Reader<'g> {
    guest: &'g Guest,
    model: Arc<AreaModel>,
    files: Files,
    cache: PageCache,
    /// Pages of files of an image that were looked up.
    known: HashMap<(VirtualAddress, u64), PhysicalAddress>,
    live: bool,
    vdso: Arc<VdsoLayout>,
    vdso_image: Arc<VdsoImageLayout>,
}

/// The first address behind the area of one entry of a table of that level.
fn behind(address: u64, level: TableLevel) -> u64 {
    let bits = 12 + 9 * (level as u32 - 1);
    ((address >> bits) + 1)
        .checked_shl(bits)
        .unwrap_or(u64::MAX)
}

impl Reader<'_> {
    fn pages_of(
        &mut self,
        task: &Task,
        sink: &mut Items<'_, ChangedPage>,
    ) -> Result<ControlFlow<()>, TableError> {
        let guest = self.guest;
        let mm = match self.model.mm(guest, task.mm) {
            Ok(mm) if mm.users == 0 => return Ok(ControlFlow::Continue(())),
            Ok(mm) => mm,
            Err(error) => {
                self.record(task, task.mm, &error);
                return Ok(ControlFlow::Continue(()));
            }
        };
        let memory = match UserMemory::new(guest, task.mm) {
            Ok(memory) => memory,
            Err(error) => {
                self.record(task, task.mm, &error);
                return Ok(ControlFlow::Continue(()));
            }
        };
        let vdso = guest
            .number(mm.address, &self.vdso.start)
            .ok()
            .zip(guest.pointer(mm.address, &self.vdso.image).ok());
        let (areas, errors) = self.model.areas(guest, TABLE, &mm)?;
        if self.is_gone(task) {
            return Ok(ControlFlow::Continue(()));
        }
        for error in errors {
            self.record(task, mm.address, &error);
        }
        for area in areas {
            if area.flags & VM_EXEC == 0 {
                continue;
            }
            let is_vdso = vdso.filter(|(start, _)| *start == area.start && area.file.is_null());
            let origin = match is_vdso {
                Some((_, image)) => match guest.pointer(image, &self.vdso_image.bytes) {
                    Ok(bytes) => Origin::Kernel(bytes),
                    Err(error) => {
                        self.record(task, image, &error);
                        continue;
                    }
                },
                None if area.file.is_null() || area.flags & VM_OTHER != 0 => continue,
                None => match self.files.open_file(guest, area.file) {
                    Ok(file) => Origin::File(file.mapping),
                    Err(error) => {
                        if !self.is_gone(task) {
                            self.record(task, area.address, &error);
                        }
                        continue;
                    }
                },
            };
            for row in self.pages_in(task, &memory, area, origin) {
                if sink(row).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn record(&self, task: &Task, address: VirtualAddress, error: &dyn std::fmt::Display) {
        self.guest.diagnostics().record(Diagnostic {
            table: TABLE,
            subject: format!("pid {} mm_struct", task.tgid),
            address: Some(address),
            reason: error.to_string(),
        });
    }

    /// Whether the process no longer uses the memory that it was found with.
    fn is_gone(&self, task: &Task) -> bool {
        let member = &task.model().layout.mm;
        self.live && self.guest.pointer(task.address, member) != Ok(task.mm)
    }

    fn pages_in(
        &mut self,
        task: &Task,
        memory: &UserMemory,
        area: Area,
        origin: Origin,
    ) -> Vec<ChangedPage> {
        let mut rows = Vec::new();
        let last = area.start.saturating_add(MOST_PAGES * PAGE_SIZE);
        if area.end > last {
            let reason = format!("only the first {MOST_PAGES} pages of an area are looked at");
            self.record(task, area.address, &reason);
        }
        let mut address = area.start;
        while address < area.end.min(last) {
            let page = address;
            address = match mapped(memory, page) {
                Mapped::AbsentUntil(next) => next.max(page.saturating_add(PAGE_SIZE)),
                _ => page.saturating_add(PAGE_SIZE),
            };
            let Some(difference) = self.difference(memory, &area, origin, page) else {
                continue;
            };
            // Whose page it was when it was read is known only while the
            // process still has that memory.
            if self.is_gone(task) {
                return Vec::new();
            }
            rows.push(self.row(task, area, origin, page, difference));
        }
        rows
    }

    fn row(
        &self,
        task: &Task,
        area: Area,
        origin: Origin,
        page: u64,
        difference: Result<Difference, String>,
    ) -> ChangedPage {
        let path = match origin {
            Origin::Kernel(_) => "[vdso]".into(),
            Origin::File(_) => self.path(&area),
        };
        ChangedPage {
            pid: task.tgid.into(),
            comm: Text::new(task.comm()),
            area,
            address: page,
            path,
            offset: index(&area, origin, page).wrapping_mul(PAGE_SIZE),
            difference,
        }
    }

    fn path(&self, area: &Area) -> Value {
        let file = match self.files.open_file(self.guest, area.file) {
            Ok(file) => file,
            Err(error) => return Value::unreadable(error),
        };
        let (path, _) = self.files.seen_by_user(self.guest, &file);
        Value::from_read(self.files.paths.resolve(self.guest, path), |path| {
            path.text.clone().into()
        })
    }

    /// How a page differs from what it should be; none if it does not, or if
    /// it is not there.
    fn difference(
        &mut self,
        memory: &UserMemory,
        area: &Area,
        origin: Origin,
        page: u64,
    ) -> Option<Result<Difference, String>> {
        let index = index(area, origin, page);
        // On a running guest either side may be replaced meanwhile: what
        // differs once is looked at again.
        for _ in 0..if self.live { 3 } else { 1 } {
            let found = match mapped(memory, page) {
                Mapped::At(found) => found,
                Mapped::SwappedOut => {
                    return Some(Err("a changed page that is swapped out".to_owned()));
                }
                Mapped::AbsentUntil(_) => return None,
            };
            let original = match self.original(origin, index) {
                Ok(Some(original)) => original,
                Ok(None) if self.live && !self.is_still(memory, page, found) => continue,
                Ok(None) => {
                    return Some(Err("not the file's page, which is not in memory".to_owned()));
                }
                Err(reason) => return Some(Err(reason)),
            };
            if original == found {
                return None;
            }
            let compared = self.compare(original, found);
            let settled = !self.live
                || (self.is_still(memory, page, found)
                    && self.original(origin, index) == Ok(Some(original)));
            if settled {
                return compared.transpose();
            }
            self.guest.diagnostics().count_torn_read();
        }
        None
    }

    fn is_still(&self, memory: &UserMemory, page: u64, found: PhysicalAddress) -> bool {
        matches!(mapped(memory, page), Mapped::At(again) if again == found)
    }

    /// Where the page lies that should be there.
    fn original(&mut self, origin: Origin, index: u64) -> Result<Option<PhysicalAddress>, String> {
        match origin {
            Origin::Kernel(start) => {
                let address = start.wrapping_add(index.wrapping_mul(PAGE_SIZE));
                let found = self.guest.space().translate(address);
                found
                    .map(|found| Some(found.physical))
                    .map_err(|error| error.to_string())
            }
            Origin::File(mapping) => {
                if let Some(known) = self.known.get(&(mapping, index)) {
                    return Ok(Some(*known));
                }
                let found = self
                    .cache
                    .page(self.guest, mapping, index)
                    .map_err(|error| error.to_string())?;
                if let (false, Some(found)) = (self.live, found) {
                    self.known.insert((mapping, index), found);
                }
                Ok(found)
            }
        }
    }

    fn compare(
        &self,
        original: PhysicalAddress,
        found: PhysicalAddress,
    ) -> Result<Option<Difference>, String> {
        let memory = self.guest.space().memory();
        let read = |address: PhysicalAddress| {
            let mut page = vec![0; PAGE_SIZE as usize];
            memory
                .read(address, &mut page)
                .map(|()| page)
                .map_err(|error| error.to_string())
        };
        Ok(differences(&read(original)?, &read(found)?))
    }
}

/// The number of a page in what its area shows.
fn index(area: &Area, origin: Origin, page: u64) -> u64 {
    let pages = page.wrapping_sub(area.start) / PAGE_SIZE;
    match origin {
        Origin::File(_) => area.page_offset.wrapping_add(pages),
        Origin::Kernel(_) => pages,
    }
}

fn mapped(memory: &UserMemory, page: u64) -> Mapped {
    match memory.space().translate(VirtualAddress::new(page)) {
        Ok(found) => Mapped::At(found.physical),
        Err(TranslationError::NotPresent { level, meaning, .. }) => match meaning {
            NotPresent::ProtNone { physical } => Mapped::At(physical),
            NotPresent::Swap { kind, .. } if kind < FIRST_SPECIAL_SWAP => Mapped::SwappedOut,
            NotPresent::Swap { .. } => Mapped::AbsentUntil(page.saturating_add(PAGE_SIZE)),
            NotPresent::Zero => Mapped::AbsentUntil(behind(page, level)),
        },
        Err(_) => Mapped::AbsentUntil(page.saturating_add(PAGE_SIZE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_entry_ends_where_its_table_says() {
        assert_eq!(behind(0x1234_5000, TableLevel::Pt), 0x1234_6000);
        assert_eq!(behind(0x1234_5000, TableLevel::Pd), 0x1240_0000);
        assert_eq!(behind(0x1234_5000, TableLevel::Pdpt), 0x4000_0000);
        assert_eq!(behind(0x1234_5000, TableLevel::Pml4), 1 << 39);
    }
}

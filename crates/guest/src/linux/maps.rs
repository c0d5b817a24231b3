//! The table `maps`: the memory areas of processes.

use std::ops::ControlFlow;
use std::sync::Arc;

use secmon_memory::{PAGE_SIZE, VirtualAddress, Volatility};

use super::file::{Files, Inode, initial_root};
use super::memory_area::{Area, AreaModel, Mm, VM_EXEC, VM_WRITE};
use super::path::{Path, PathError, is_kernel_pointer};
use super::references::Sharers;
use super::task::{Task, leaders};
use super::tree::Patience;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
    layout,
};

const TABLE: &str = "maps";

/// `VM_…` (`include/linux/mm.h`).
const VM_READ: u64 = 0x1;
const VM_MAYSHARE: u64 = 0x80;

/// Where the page for calls of old programs lies, behind all areas
/// (`arch/x86/entry/vsyscall/vsyscall_64.c`).
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;
/// `NONE` of `vsyscall_mode`, in the same file.
const VSYSCALL_NONE: u32 = 2;
/// `MM_CONTEXT_HAS_VSYSCALL` of `context.flags`, as a mask.
const HAS_VSYSCALL: u64 = 1 << 1;

/// `ANON_VMA_NAME_MAX_LEN`.
const NAME_LIMIT: usize = 80;

/// How often what changed during the read is read again.
const ATTEMPTS: usize = 12;

layout! {
    /// `include/linux/mm.h`
    struct OperationsLayout: "vm_operations_struct" {
        name: "name",
    }
}

layout! {
    /// `include/linux/mm_types.h`
    struct SpecialMappingLayout: "vm_special_mapping" {
        name: "name",
    }
}

layout! {
    /// `include/linux/mm_types.h`
    struct AnonymousNameLayout: "anon_vma_name" {
        name: "name",
    }
}

/// What stands in an area.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// A file.
    File(Arc<Path>),
    /// A file whose path can't be told.
    Lost(PathError),
    /// Memory of its own, with a name that the process gave it.
    Named(Text),
    /// The heap that brk moves.
    Heap,
    /// The stack of the first thread.
    Stack,
    /// A page of the kernel's: `[vdso]`.
    Special(Text),
    /// Memory of its own.
    Anonymous,
}

/// A memory area of a process.
pub struct Mapping {
    pid: u64,
    area: Area,
    content: Content,
    /// Of the file.
    inode: Option<Result<Inode, PathError>>,
}

impl Mapping {
    fn permissions(&self) -> [u8; 4] {
        let letter = |flag, letter| {
            if self.area.flags & flag != 0 {
                letter
            } else {
                b'-'
            }
        };
        [
            letter(VM_READ, b'r'),
            letter(VM_WRITE, b'w'),
            letter(VM_EXEC, b'x'),
            if self.area.flags & VM_MAYSHARE != 0 {
                b's'
            } else {
                b'p'
            },
        ]
    }

    fn path(&self) -> Value {
        match &self.content {
            Content::File(path) => path.text.clone().into(),
            Content::Lost(error) => Value::unreadable(error),
            Content::Named(name) | Content::Special(name) => name.clone().into(),
            Content::Heap => "[heap]".into(),
            Content::Stack => "[stack]".into(),
            Content::Anonymous => Value::Null,
        }
    }

    fn kind(&self) -> &'static str {
        match &self.content {
            Content::File(_) | Content::Lost(_) => "file",
            Content::Named(_) if !self.area.file.is_null() => "file",
            Content::Named(_) | Content::Anonymous => "anonymous",
            Content::Heap => "heap",
            Content::Stack => "stack",
            Content::Special(_) => "special",
        }
    }

    fn inode(&self, value: impl FnOnce(&Inode) -> Value) -> Value {
        match &self.inode {
            None => Value::Null,
            Some(inode) => Value::from_read(inode.as_ref(), value),
        }
    }
}

/// The table.
pub static MAPS: TableOf<Mapping> = TableOf {
    name: TABLE,
    aliases: &["vmas"],
    meaning: "The memory areas of processes, as /proc/PID/maps shows them.",
    columns: &[
        Column {
            name: "pid",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Process id in the initial pid namespace.",
            value: |_, row| row.pid.into(),
        },
        Column {
            name: "start",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "First address.",
            value: |_, row| Value::Address(row.area.start),
        },
        Column {
            name: "end",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "First address after the area.",
            value: |_, row| Value::Address(row.area.end),
        },
        Column {
            name: "permissions",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "What the process may do: r read, w write, x execute, - not; then s for \
                      shared or p for private.",
            value: |_, row| Value::text(row.permissions()),
        },
        Column {
            name: "path",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Path of the mapped file, without the suffix \" (deleted)\" and with no \
                      character escaped; or [heap], [stack], [vdso], [anon:NAME]; null for \
                      other memory of the process's own.",
            value: |_, row| row.path(),
        },
        Column {
            name: "deleted",
            kind: Kind::Boolean,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Whether the mapped file was removed from its directory, or never had a \
                      place there; null where no file is mapped.",
            value: |_, row| match &row.content {
                Content::File(path) => path.deleted.into(),
                Content::Lost(error) => Value::unreadable(error),
                _ => Value::Null,
            },
        },
        Column {
            name: "type",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "What stands there: file, anonymous, heap, stack, or special for pages of \
                      the kernel's.",
            value: |_, row| row.kind().into(),
        },
        Column {
            name: "offset",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Offset of the area in the file, in bytes; 0 where no file is mapped.",
            value: |_, row| {
                let pages = if row.area.file.is_null() {
                    0
                } else {
                    row.area.page_offset
                };
                pages.wrapping_mul(PAGE_SIZE).into()
            },
        },
        Column {
            name: "device",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Device of the file's file system, MAJOR:MINOR in decimal.",
            value: |_, row| row.inode(|inode| inode.device.to_string().into()),
        },
        Column {
            name: "inode",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Inode number of the file.",
            value: |_, row| row.inode(|inode| inode.number.into()),
        },
        Column {
            name: "flags",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "All flags of the area, VM_… of the kernel's include/linux/mm.h.",
            value: |_, row| Value::Address(row.area.flags),
        },
        Column {
            name: "address",
            kind: Kind::Address,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Address of the struct vm_area_struct.",
            value: |_, row| row.area.address.into(),
        },
    ],
    items,
};

fn items(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Mapping>,
) -> Result<(), TableError> {
    let symbol = |name| guest.address(name);
    let reader = Reader {
        guest,
        model: AreaModel::new(guest, TABLE)?,
        files: Files::new(guest, TABLE, initial_root(guest, TABLE)?)?,
        operations: guest.layout(TABLE)?,
        special: guest.layout(TABLE)?,
        anonymous_name: guest.layout(TABLE).ok(),
        special_name: symbol("special_mapping_name"),
        gate: symbol("gate_vma").zip(symbol("vsyscall_mode")),
        live: guest.space().memory().volatility() == Volatility::Live,
        patience: Patience::default(),
    };
    let mut sharers = Sharers::new(guest, TABLE, "mm_struct.mm_users");
    for task in leaders(guest, TABLE)? {
        // A kernel thread can borrow the memory of a process; it is not shown
        // as the thread's.
        if !selection.wants_pid(task.tgid.into()) || task.mm.is_null() || task.is_kernel_thread() {
            continue;
        }
        if reader.mappings_of(&task, &mut sharers, sink)?.is_break() {
            break;
        }
    }
    Ok(())
}

struct Reader<'g> {
    guest: &'g Guest,
    model: Arc<AreaModel>,
    files: Files,
    operations: Arc<OperationsLayout>,
    special: Arc<SpecialMappingLayout>,
    anonymous_name: Option<Arc<AnonymousNameLayout>>,
    /// The function that names an area of the kernel's.
    special_name: Option<VirtualAddress>,
    /// The area of calls of old programs and whether it is used, where there
    /// is one: `gate_vma` and `vsyscall_mode`.
    gate: Option<(VirtualAddress, VirtualAddress)>,
    live: bool,
    patience: Patience,
}

impl Reader<'_> {
    fn mappings_of(
        &self,
        task: &Task,
        sharers: &mut Sharers<'_>,
        sink: &mut Items<'_, Mapping>,
    ) -> Result<ControlFlow<()>, TableError> {
        let mut rows = Vec::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.guest.diagnostics().count_torn_read();
                self.patience.wait(attempt);
            }
            let last = attempt + 1 == ATTEMPTS;
            if self.is_gone(task) {
                return Ok(ControlFlow::Continue(()));
            }
            let mm = match self.model.mm(self.guest, task.mm) {
                Ok(mm) => mm,
                Err(error) => {
                    self.record(task, Some(task.mm), &error);
                    return Ok(ControlFlow::Continue(()));
                }
            };
            if mm.users == 0 {
                // Given up: /proc shows nothing any more.
                return Ok(ControlFlow::Continue(()));
            }
            let (areas, errors) = self.model.areas(self.guest, TABLE, &mm)?;
            rows.clear();
            rows.extend(areas.iter().map(|area| self.mapping(task, &mm, *area)));
            rows.extend(self.vsyscall(task, &mm));
            if self.is_gone(task) {
                // What was read may be anybody's by now.
                rows.clear();
                continue;
            }
            // Errors and lost paths of a moment go away by themselves, and so
            // do files that an area no longer refers to.
            let sound = errors.is_empty()
                && rows
                    .iter()
                    .all(|row| !matches!(row.content, Content::Lost(_)));
            let settled = !self.live || (sound && self.is_settled(&mm, &areas)?);
            if settled || last {
                for error in errors {
                    self.record(task, Some(task.mm), &error);
                }
                sharers.note(task, task.mm, mm.users);
                break;
            }
        }
        for row in rows {
            if sink(row).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn record(&self, task: &Task, address: Option<VirtualAddress>, error: &dyn std::fmt::Display) {
        self.guest.diagnostics().record(Diagnostic {
            table: TABLE,
            subject: format!("pid {} mm_struct", task.tgid),
            address,
            reason: error.to_string(),
        });
    }

    /// Whether the process no longer uses the memory that it was found with.
    fn is_gone(&self, task: &Task) -> bool {
        let member = &task.model().layout.mm;
        self.live && self.guest.pointer(task.address, member) != Ok(task.mm)
    }

    /// Whether the areas are still those that were read.
    fn is_settled(&self, mm: &Mm, areas: &[Area]) -> Result<bool, TableError> {
        let (again, errors) = self.model.areas(self.guest, TABLE, mm)?;
        Ok(errors.is_empty() && again == areas)
    }

    fn mapping(&self, task: &Task, mm: &Mm, area: Area) -> Mapping {
        let (content, inode) = self.content(mm, &area);
        Mapping {
            pid: task.tgid.into(),
            area,
            content,
            inode,
        }
    }

    /// `get_vma_name` of `fs/proc/task_mmu.c`.
    fn content(&self, mm: &Mm, area: &Area) -> (Content, Option<Result<Inode, PathError>>) {
        if !area.file.is_null() {
            let file = match self.files.open_file(self.guest, area.file) {
                Ok(file) => file,
                Err(error) => return (Content::Lost(error.clone()), Some(Err(error))),
            };
            let (path, inode) = self.files.seen_by_user(self.guest, &file);
            let inode = Some(self.files.inode(self.guest, inode));
            if let Some(name) = self.anonymous_name(area, b"[anon_shmem:") {
                return (Content::Named(name), inode);
            }
            let content = match self.files.paths.resolve(self.guest, path) {
                Ok(path) => Content::File(path),
                Err(error) => Content::Lost(error),
            };
            return (content, inode);
        }
        let content = if let Some(name) = self.special_name(area) {
            Content::Special(name)
        } else if area.start < mm.brk && area.end > mm.start_brk {
            Content::Heap
        } else if area.start <= mm.start_stack && area.end >= mm.start_stack {
            Content::Stack
        } else if let Some(name) = self.anonymous_name(area, b"[anon:") {
            Content::Named(name)
        } else {
            Content::Anonymous
        };
        (content, None)
    }

    /// The name that the process gave to memory of its own
    /// (`PR_SET_VMA_ANON_NAME`), in brackets.
    fn anonymous_name(&self, area: &Area, prefix: &[u8]) -> Option<Text> {
        let layout = self.anonymous_name.as_ref()?;
        if !is_kernel_pointer(area.anonymous_name) {
            return None;
        }
        let address = area.anonymous_name.wrapping_add(layout.name.offset);
        let name = self.guest.space().read_c_string(address, NAME_LIMIT).ok()?;
        Some(Text::new([prefix, &name, b"]"].concat()))
    }

    /// The name of an area that the kernel installed, such as the vDSO.
    fn special_name(&self, area: &Area) -> Option<Text> {
        if !is_kernel_pointer(area.operations) {
            return None;
        }
        let function = self
            .guest
            .pointer(area.operations, &self.operations.name)
            .ok()?;
        if function.is_null() || Some(function) != self.special_name {
            return None;
        }
        // A struct vm_special_mapping.
        if !is_kernel_pointer(area.private) {
            return None;
        }
        let name = self.guest.pointer(area.private, &self.special.name).ok()?;
        if !is_kernel_pointer(name) {
            return None;
        }
        let name = self.guest.space().read_c_string(name, NAME_LIMIT).ok()?;
        Some(Text::new(name))
    }

    /// The page for calls of old programs, which is in no tree.
    fn vsyscall(&self, task: &Task, mm: &Mm) -> Option<Mapping> {
        let area = self.gate_area(mm)?;
        Some(Mapping {
            pid: task.tgid.into(),
            area,
            content: Content::Special("[vsyscall]".into()),
            inode: None,
        })
    }

    /// `get_gate_vma` of the kernel.
    fn gate_area(&self, mm: &Mm) -> Option<Area> {
        let guest = self.guest;
        let (address, mode) = self.gate?;
        if guest.space().read_u32(mode).ok()? == VSYSCALL_NONE {
            return None;
        }
        let layout = &self.model.mm;
        let number = |member| guest.number(mm.address, member).ok();
        let has_page = match (&layout.context_flags, &layout.context_ia32) {
            (Some(flags), _) => number(flags)? & HAS_VSYSCALL != 0,
            (None, Some(ia32)) => number(ia32)? == 0,
            (None, None) => true,
        };
        let layout = &self.model.area;
        let number = |member| guest.number(address, member).ok();
        let start = number(&layout.start)?;
        (has_page && start == VSYSCALL).then_some(Area {
            address,
            start,
            end: number(&layout.end)?,
            flags: number(&layout.flags)?,
            page_offset: 0,
            file: VirtualAddress::default(),
            operations: VirtualAddress::default(),
            private: VirtualAddress::default(),
            anonymous_name: VirtualAddress::default(),
        })
    }
}

//! Loaded kernel modules (`struct module`, `include/linux/module.h`).
//!
//! [`modules`] walks the kernel's list and hands out validated copies; what
//! was built into the kernel is not in that list.

pub mod knowledge;
pub mod parameter;
mod table;
pub mod views;

use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress, Volatility};
use secmon_profile::{Member, TypeError, Types};

use crate::linux::list::{entries, is_kernel_address};
use crate::linux::snapshot::{Snapshot, Spans};
use crate::{Diagnostic, Guest, Layout, TableError, layout};

pub use table::MODULES;

/// How often a module that changes while it is copied is copied again.
const ATTEMPTS: u32 = 8;
/// `struct module` keeps one reference of its own (`MODULE_REF_BASE`).
const REFERENCE_BASE: i64 = 1;
/// The most kinds of memory a module may have; there are 7 in Linux 7.2.
const MOST_MEMORY_KINDS: u64 = 16;
/// No module's part is larger: x86-64's module area has 1 GiB.
const LARGEST_PART: u64 = 1 << 30;
/// More modules than this use no module.
const MOST_USERS: usize = 1 << 12;

layout! {
    /// `include/linux/module.h`
    pub struct ModuleLayout: "module" {
        state: "state",
        list: "list",
        name: "name",
        kp: "kp",
        num_kp: "num_kp",
        num_syms: "num_syms",
        taints: "taints",
    } optional {
        /// Until 7.0 or so.
        num_gpl_syms: "num_gpl_syms",
        version: "version",
        srcversion: "srcversion",
        init: "init",
        kallsyms: "kallsyms",
        /// Where modules can be unloaded.
        source_list: "source_list",
        refcnt: "refcnt",
        sig_ok: "sig_ok",
        args: "args",
    }
}

layout! {
    /// `include/linux/module.h`: who uses whom.
    struct ModuleUseLayout: "module_use" {
        source_list: "source_list",
        source: "source",
    }
}

layout! {
    /// `include/linux/module.h`
    struct ModuleSymbolsLayout: "mod_kallsyms" {
        num_symtab: "num_symtab",
    }
}

/// One part of a module's memory.
#[derive(Clone, Debug)]
struct PartMembers {
    base: Member,
    size: Member,
}

/// How modules of a guest are read.
#[derive(Debug)]
pub struct ModuleModel {
    /// The members.
    pub layout: ModuleLayout,
    /// Text first, then the others.
    parts: Vec<PartMembers>,
    spans: Spans,
}

impl Layout for ModuleModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = ModuleLayout::resolve(types)?;
        let parts = parts(types)?;
        let required = [
            &layout.state,
            &layout.list,
            &layout.name,
            &layout.kp,
            &layout.num_kp,
            &layout.num_syms,
            &layout.taints,
        ];
        let optional = [
            &layout.num_gpl_syms,
            &layout.version,
            &layout.srcversion,
            &layout.init,
            &layout.kallsyms,
            &layout.source_list,
            &layout.refcnt,
            &layout.sig_ok,
            &layout.args,
        ];
        let spans = Spans::covering(
            required
                .into_iter()
                .chain(optional.into_iter().flatten())
                .chain(parts.iter().flat_map(|part| [&part.base, &part.size])),
        );
        Ok(Self {
            layout,
            parts,
            spans,
        })
    }
}

/// Where a module's parts are described: `mem[]` by kind since Linux 6.4,
/// `core_layout` and `init_layout` before.
fn parts(types: &Types) -> Result<Vec<PartMembers>, TypeError> {
    let part = |path: &str| -> Result<PartMembers, TypeError> {
        Ok(PartMembers {
            base: types.member("module", &format!("{path}.base"))?,
            size: types.member("module", &format!("{path}.size"))?,
        })
    };
    let Ok(memory) = types.member("module", "mem") else {
        return Ok(vec![part("core_layout")?, part("init_layout")?]);
    };
    let text = types
        .enumerator("mod_mem_type", "MOD_TEXT")
        .ok()
        .and_then(|value| u64::try_from(value).ok())
        .unwrap_or(0);
    let count = memory.count.unwrap_or(1).min(MOST_MEMORY_KINDS);
    let others = (0..count).filter(|kind| *kind != text);
    std::iter::once(text)
        .chain(others)
        .map(|kind| part(&format!("mem[{kind}]")))
        .collect()
}

/// `enum module_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleState {
    /// In use.
    Live,
    /// Its `init` runs.
    Loading,
    /// Its `exit` runs.
    Unloading,
    /// It is being set up; `/proc/modules` does not show it yet.
    Unformed,
}

impl ModuleState {
    fn new(value: u64) -> Option<Self> {
        match value {
            0 => Some(Self::Live),
            1 => Some(Self::Loading),
            2 => Some(Self::Unloading),
            3 => Some(Self::Unformed),
            _ => None,
        }
    }

    /// The word that `/proc/modules` has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "Live",
            Self::Loading => "Loading",
            Self::Unloading => "Unloading",
            Self::Unformed => "Unformed",
        }
    }
}

/// Why there is no module at an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// Its memory can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Its name is empty, has no end or holds what no name may.
    #[error("name is {found:?}, which no module has")]
    Name {
        /// The bytes of the name.
        found: crate::Text,
    },
    /// A number is out of its range.
    #[error("{member} is {found}, which no module has")]
    Number {
        /// The member.
        member: &'static str,
        /// What it holds.
        found: u64,
    },
    /// It was in the list no more after it had been copied.
    #[error("it was unloaded during the read")]
    Unloaded,
    /// The module was different in each copy.
    #[error("it changed during each of {attempts} reads")]
    Changing {
        /// How many copies were taken.
        attempts: u32,
    },
}

/// A validated copy of a `struct module`.
#[derive(Clone, Debug)]
pub struct Module {
    /// Where the structure lies.
    pub address: VirtualAddress,
    /// The name, never empty.
    pub name: Vec<u8>,
    /// Its state.
    pub state: ModuleState,
    /// Where its code lies.
    pub base: VirtualAddress,
    /// Bytes of all its parts.
    pub size: u64,
    model: Arc<ModuleModel>,
    snapshot: Snapshot,
}

impl Module {
    /// Copies and validates the module at `address`.
    ///
    /// # Errors
    /// [`ModuleError`] if there is no module there (any more).
    pub fn read(
        guest: &Guest,
        model: &Arc<ModuleModel>,
        address: VirtualAddress,
    ) -> Result<Self, ModuleError> {
        let space = guest.space();
        let mut snapshot = model.spans.read(space, address)?;
        if space.memory().volatility() == Volatility::Live {
            let mut attempts = 1;
            loop {
                if !is_linked(guest, model, address) {
                    return Err(ModuleError::Unloaded);
                }
                let again = model.spans.read(space, address)?;
                if again == snapshot {
                    break;
                }
                guest.diagnostics().count_torn_read();
                attempts += 1;
                if attempts > ATTEMPTS {
                    return Err(ModuleError::Changing { attempts });
                }
                snapshot = again;
            }
        }
        Self::validate(model, address, snapshot)
    }

    /// Copies and validates the module at `address`, whether a list leads to it
    /// or not: of a running guest it may be a copy of what is no module any
    /// more.
    ///
    /// # Errors
    /// [`ModuleError`] if there is none; a kernel without modules has none
    /// anywhere.
    pub fn read_unlisted(
        guest: &Guest,
        table: &'static str,
        address: VirtualAddress,
    ) -> Result<Self, ModuleError> {
        let model = guest
            .layout::<ModuleModel>(table)
            .map_err(|_| ModuleError::Unloaded)?;
        let snapshot = model.spans.read(guest.space(), address)?;
        Self::validate(&model, address, snapshot)
    }

    fn validate(
        model: &Arc<ModuleModel>,
        address: VirtualAddress,
        snapshot: Snapshot,
    ) -> Result<Self, ModuleError> {
        let number = |member| model.spans.number(&snapshot, member);
        let state = number(&model.layout.state) & 0xffff_ffff;
        let state = ModuleState::new(state).ok_or(ModuleError::Number {
            member: "state",
            found: state,
        })?;
        let name = model.spans.member(&snapshot, &model.layout.name);
        let name = match name.iter().position(|byte| *byte == 0) {
            Some(end) if end > 0 => name.get(..end).unwrap_or_default().to_vec(),
            _ => {
                return Err(ModuleError::Name {
                    found: crate::Text::new(name),
                });
            }
        };
        let mut size = 0;
        for part in &model.parts {
            let found = number(&part.size);
            if found > LARGEST_PART {
                return Err(ModuleError::Number {
                    member: "size",
                    found,
                });
            }
            size += found;
        }
        let base = model.parts.first().map(|part| number(&part.base));
        Ok(Self {
            address,
            name,
            state,
            base: VirtualAddress::new(base.unwrap_or(0)),
            size,
            model: model.clone(),
            snapshot,
        })
    }

    /// A member's value.
    fn number(&self, member: &Member) -> u64 {
        self.model.spans.number(&self.snapshot, member)
    }

    /// A member's value, where the kernel has that member.
    fn optional(&self, member: Option<&Member>) -> Option<u64> {
        member.map(|member| self.number(member))
    }

    /// The references that others hold; none where modules can't be unloaded.
    pub fn reference_count(&self) -> Option<i64> {
        let count = self.optional(self.model.layout.refcnt.as_ref())?;
        Some(i64::from(count as i32) - REFERENCE_BASE)
    }

    /// `taints`: a bit for each reason.
    pub fn taints(&self) -> u64 {
        self.number(&self.model.layout.taints)
    }

    /// Whether its signature was checked and good.
    pub fn is_signed(&self) -> Option<bool> {
        let value = self.optional(self.model.layout.sig_ok.as_ref())?;
        Some(value & 1 == 1)
    }

    /// The address of its `init` function: in memory that the kernel frees
    /// once the module is live.
    pub fn init(&self) -> Option<VirtualAddress> {
        let address = self.optional(self.model.layout.init.as_ref())?;
        (address != 0).then_some(VirtualAddress::new(address))
    }

    /// How many symbols it exports.
    pub fn exported_symbols(&self) -> u64 {
        let layout = &self.model.layout;
        self.number(&layout.num_syms) + self.optional(layout.num_gpl_syms.as_ref()).unwrap_or(0)
    }

    /// Where its array of parameters lies and how many there are.
    fn parameters(&self) -> (VirtualAddress, u64) {
        let layout = &self.model.layout;
        let address = VirtualAddress::new(self.number(&layout.kp));
        (address, self.number(&layout.num_kp))
    }

    /// Where a text of it lies: `version`, `srcversion`, `args`.
    fn text(&self, member: Option<&Member>) -> Option<VirtualAddress> {
        let address = self.optional(member)?;
        (address != 0).then_some(VirtualAddress::new(address))
    }

    /// Where its parts lie, with their sizes in bytes: text first; none that
    /// are empty.
    pub fn parts(&self) -> impl Iterator<Item = (VirtualAddress, u64)> + '_ {
        self.model
            .parts
            .iter()
            .map(|part| {
                (
                    VirtualAddress::new(self.number(&part.base)),
                    self.number(&part.size),
                )
            })
            .filter(|(_, size)| *size > 0)
    }

    /// How many entries its table of symbols has.
    fn symbol_count(&self, guest: &Guest, table: &'static str) -> Result<Option<u64>, ReadError> {
        let kallsyms = self.optional(self.model.layout.kallsyms.as_ref());
        let Some(kallsyms) = kallsyms.filter(|address| *address != 0) else {
            return Ok(None);
        };
        let Ok(layout) = guest.layout::<ModuleSymbolsLayout>(table) else {
            return Ok(None);
        };
        guest
            .number(VirtualAddress::new(kallsyms), &layout.num_symtab)
            .map(Some)
    }

    /// The names of the modules that use this one, in the kernel's order.
    fn users(&self, guest: &Guest, table: &'static str) -> Result<Vec<Vec<u8>>, TableError> {
        let Some(list) = &self.model.layout.source_list else {
            return Ok(Vec::new());
        };
        let layout = guest.layout::<ModuleUseLayout>(table)?;
        let head = self.address.wrapping_add(list.offset);
        let mut names = Vec::new();
        let subject = "module.source_list";
        for usage in
            entries(guest, table, subject, head, layout.source_list.offset).take(MOST_USERS)
        {
            let name = guest
                .pointer(usage, &layout.source)
                .and_then(|user| self.name_of(guest, user));
            match name {
                Ok(name) => names.push(name),
                Err(error) => guest.diagnostics().record(Diagnostic {
                    table,
                    subject: subject.to_owned(),
                    address: Some(usage),
                    reason: error.to_string(),
                }),
            }
        }
        Ok(names)
    }

    fn name_of(&self, guest: &Guest, module: VirtualAddress) -> Result<Vec<u8>, ReadError> {
        let name = &self.model.layout.name;
        let length = name.size.min(256) as usize;
        guest
            .space()
            .read_c_string(module.wrapping_add(name.offset), length)
    }
}

/// Whether the module's neighbour in the list still leads to it.
fn is_linked(guest: &Guest, model: &ModuleModel, address: VirtualAddress) -> bool {
    let space = guest.space();
    let node = address.wrapping_add(model.layout.list.offset);
    space
        .read_pointer(node.wrapping_add(8))
        .is_ok_and(|previous| {
            is_kernel_address(space, previous) && space.read_pointer(previous) == Ok(node)
        })
}

/// The modules in the kernel's list, in its order: newest first. What is in
/// the list and can't be a module becomes a diagnostic of `table`.
///
/// # Errors
/// [`TableError`] if the list can't be found.
pub fn modules<'g>(
    guest: &'g Guest,
    table: &'static str,
) -> Result<impl Iterator<Item = Module> + 'g, TableError> {
    let model = guest.layout::<ModuleModel>(table)?;
    let head = guest.symbol(table, "modules")?;
    let offset = model.layout.list.offset;
    Ok(entries(guest, table, "modules", head, offset).filter_map(
        move |address| match Module::read(guest, &model, address) {
            Ok(module) => Some(module),
            Err(ModuleError::Unloaded) => {
                guest.diagnostics().count_torn_read();
                None
            }
            Err(error) => {
                guest.diagnostics().record(Diagnostic {
                    table,
                    subject: "module".to_owned(),
                    address: Some(address),
                    reason: error.to_string(),
                });
                None
            }
        },
    ))
}

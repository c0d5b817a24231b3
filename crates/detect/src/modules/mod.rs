//! The detector `modules`: code in the kernel that is in no list.
//!
//! A module that hides takes itself out of the list that `/proc/modules` and
//! `lsmod` show, mostly out of `/sys/module` as well. What it can't do without
//! is memory that can be executed, and its own `struct module` knows itself.

mod pointers;

use std::collections::BTreeMap;

use secmon_guest::linux::code::{CodeMap, UnownedCode};
use secmon_guest::linux::module::views::{kobjects, traces, tree};
use secmon_guest::linux::module::{Module, ModuleState, modules};
use secmon_guest::{Guest, TableError, Text};
use secmon_memory::{VirtualAddress, Volatility};

use crate::code;
use crate::detector::whole;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "modules";
/// `MODULE_STATE_LIVE`.
const LIVE: u64 = 0;
/// How often views that differ are read again on a running guest before it is
/// said.
const LOOKS: u32 = 3;
/// Bytes of unowned code that are shown.
const SHOWN: usize = 32;
/// Pointers to unowned code that are shown.
const MOST_POINTERS: usize = 16;

/// Finds modules that are missing from a view, and executable memory that
/// nobody owns.
pub struct Modules;

impl Detector for Modules {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds kernel modules that are missing from one of the kernel's views of them, and \
         executable kernel memory that no record of the kernel accounts for."
    }

    fn compares(&self) -> &'static str {
        "The list of modules, the kobjects behind /sys/module, the tree of modules' addresses, \
         every struct module in the modules' memory (each holds a pointer to itself), and the \
         executable pages of the kernel's page tables with all records of code: the kernel's \
         sections, modules' parts, BPF programs, ftrace trampolines, kprobe slots and single \
         pages of the kernel."
    }

    fn evaded_by(&self) -> &'static str {
        "Code in memory that another module or a BPF program owns, code behind page tables \
         of one process only, a forged entry in one of the records, or code that is executable \
         only for moments."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[Technique::ROOTKIT, Technique::new("T1547.006")];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "All page tables of the kernel's half, the records of code, and the writable part of \
         the modules' memory: grows with the guest's memory by one table for each gigabyte, \
         and with the modules."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        if guest.address("modules").is_none() {
            return Err(DetectError::Missing { what: "modules" });
        }
        let before = guest.diagnostics().recorded();
        let mut seen = Views::read(guest)?.differing();
        if guest.space().memory().volatility() == Volatility::Live {
            for _ in 1..LOOKS {
                if seen.is_empty() {
                    break;
                }
                let again = Views::read(guest)?.differing();
                seen.retain(|address, view| again.get(address).is_some_and(|other| other == view));
            }
        }
        let map = code::map(guest, NAME)?;
        let mut hidden = Vec::new();
        for (address, view) in &seen {
            let finding = hidden_module(guest, *address, view);
            if !view.listed {
                hidden.extend(Module::read_unlisted(guest, NAME, *address).ok());
            }
            findings(finding);
        }
        for code in map.unowned() {
            findings(unowned_code(guest, &map, code, &hidden));
        }
        whole(guest, before, "kernel objects")
    }
}

/// Which views have a module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct View {
    listed: bool,
    kobject: bool,
    tree: bool,
    trace: bool,
    name: Vec<u8>,
}

impl View {
    /// The views with it, and those without it.
    fn names(&self) -> (Vec<&'static str>, Vec<&'static str>) {
        let views = [
            ("the list of modules", self.listed),
            ("/sys/module", self.kobject),
            ("the tree of modules", self.tree),
            ("the modules' memory", self.trace),
        ];
        let with = |wanted| {
            views
                .iter()
                .filter(|(_, has)| *has == wanted)
                .map(|(name, _)| *name)
                .collect()
        };
        (with(true), with(false))
    }
}

/// All views of all modules, by the address of the `struct module`.
struct Views {
    modules: BTreeMap<VirtualAddress, View>,
    /// Those in the list that are on their way in or out.
    moving: Vec<VirtualAddress>,
}

impl Views {
    fn read(guest: &Guest) -> Result<Self, TableError> {
        let mut all: BTreeMap<VirtualAddress, View> = BTreeMap::new();
        let mut moving = Vec::new();
        for trace in traces(guest, NAME)? {
            // One that is not formed is in no view: on its way in or out. It
            // keeps its executable memory, which is looked at as well.
            if trace.state != LIVE {
                moving.push(trace.address);
            }
            let view = all.entry(trace.address).or_default();
            view.trace = true;
            view.name = trace.name;
        }
        // A kernel that traces nothing has no tree.
        let has_tree = guest.address("mod_tree").is_some();
        if has_tree {
            for address in tree(guest, NAME)? {
                all.entry(address).or_default().tree = true;
            }
        }
        for address in kobjects(guest, NAME)? {
            all.entry(address).or_default().kobject = true;
        }
        for module in modules(guest, NAME)? {
            if module.state != ModuleState::Live {
                moving.push(module.address);
            }
            let view = all.entry(module.address).or_default();
            view.listed = true;
            view.tree |= !has_tree;
            view.name = module.name;
        }
        Ok(Self {
            modules: all,
            moving,
        })
    }

    /// The modules that some view lacks.
    fn differing(mut self) -> BTreeMap<VirtualAddress, View> {
        self.modules.retain(|address, view| {
            let whole = view.listed && view.kobject && view.tree && view.trace;
            !whole && !self.moving.contains(address)
        });
        self.modules
    }
}

fn hidden_module(guest: &Guest, address: VirtualAddress, view: &View) -> Finding {
    let (with, without) = view.names();
    let name = Text::new(&view.name);
    let shown = match view.name.is_empty() {
        true => format!("A module at {address}"),
        false => format!("Module {}", name.to_display()),
    };
    let (what, class) = match view.listed {
        false => ("hidden_module", Class::Attack),
        true => ("partly_hidden_module", Class::Attack),
    };
    let summary = format!("{shown} is missing from {}", without.join(", "));
    let subject = Subject::Module {
        address,
        name: name.clone(),
    };
    let mut finding = Finding::new(NAME, what, class, Severity::Critical, subject, summary)
        .technique(Technique::ROOTKIT);
    for (views, is) in [(with, "has it"), (without, "has it not")] {
        for view in views {
            finding = finding.evidence(Evidence::new(view, is));
        }
    }
    if let Ok(module) = Module::read_unlisted(guest, NAME, address) {
        finding = finding.evidence(
            Evidence::new("struct module", "what it says of itself")
                .with("address", address)
                .with("name", Text::new(&module.name))
                .with("state", module.state.name())
                .with("base", module.base)
                .with("size", module.size),
        );
    }
    finding
}

fn unowned_code(guest: &Guest, map: &CodeMap, code: &UnownedCode, hidden: &[Module]) -> Finding {
    let start = code.range.start;
    let size = code.range.end.as_u64().saturating_sub(start.as_u64());
    let module = hidden.iter().find(|module| {
        let mut parts = module.parts();
        parts.any(|(base, size)| start.as_u64().wrapping_sub(base.as_u64()) < size)
    });
    let owner = match module {
        Some(module) => format!("the hidden module {}", Text::new(&module.name).to_display()),
        None => "nobody".to_owned(),
    };
    let summary = format!("{size} executable bytes at {start} belong to {owner}");
    let subject = Subject::KernelCode {
        address: start,
        symbol: None,
    };
    let mut bytes = [0; SHOWN];
    let shown = match guest.space().read(start, &mut bytes) {
        Ok(()) => code::hex(&bytes),
        Err(error) => error.to_string(),
    };
    let mut finding = Finding::new(
        NAME,
        "unowned_code",
        Class::Attack,
        Severity::Critical,
        subject,
        summary,
    )
    .technique(Technique::ROOTKIT)
    .evidence(
        Evidence::new("page tables", "executable")
            .with("start", start)
            .with("size", size)
            .with("code", shown),
    );
    if let Some(area) = &code.area {
        finding = finding.evidence(
            Evidence::new("vmalloc areas", "it was asked for")
                .with("start", area.start)
                .with("size", area.size)
                .with("caller", area.caller)
                .with("symbol", code::symbol(guest, map, area.caller)),
        );
    }
    for (location, target) in pointers::into(guest, map, &code.range, MOST_POINTERS) {
        finding = finding.evidence(
            Evidence::new("kernel data", "a pointer that leads there")
                .with("location", location)
                .with("target", target)
                .with("symbol", code::symbol(guest, map, location)),
        );
    }
    finding
}

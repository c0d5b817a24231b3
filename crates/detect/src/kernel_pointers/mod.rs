//! The detector `kernel_pointers`: pointers to functions, and to tables of
//! functions, that lead where no function of their owner is.
//!
//! The kernel's constants are looked at as a whole: every operations table, of
//! `/proc`, of `seq_file`, of protocols and file systems, lies there, and after
//! the start nothing in it may lead into a module. Variables are looked at for
//! pointers into code that nobody owns. Objects made at run time are found
//! through the kernel's own lists.

mod image;

use secmon_guest::linux::callback::{Callback, LeadsTo, callbacks};
use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::{Guest, Text};
use secmon_memory::VirtualAddress;

use crate::code::{self, Target};
use crate::detector::whole;
use crate::rows::Parts;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "kernel_pointers";
/// No table of functions has more bytes.
const LARGEST_TABLE: u64 = 4096;
/// `T1056.001`, keylogging.
const KEYLOGGING: Technique = Technique::new("T1056.001");
/// `T1562.001`, disabled or modified tools of defense.
const IMPAIRED_DEFENSES: Technique = Technique::new("T1562.001");

/// Finds pointers that lead to foreign code.
pub struct KernelPointers;

impl Detector for KernelPointers {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds function pointers and operations tables of the kernel that were led elsewhere: \
         constants that lead into a module, anything that leads to executable memory which \
         nobody owns, and operations tables that lie where no such table is."
    }

    fn compares(&self) -> &'static str {
        "Every pointer in the kernel's read-only data and variables, and the callbacks in its \
         objects (notifier chains, binary formats, line disciplines, netfilter hooks, packet \
         handlers, operations of protocols and network devices, timers, work queues, kernel \
         threads, performance events, security hooks, mounted file systems and their roots, \
         entries of /proc), with the owners of \
         executable memory and the places where tables lie."
    }

    fn evaded_by(&self) -> &'static str {
        "A pointer that leads to other code of its own owner; a pointer in an object that is in \
         none of these lists and leads into a listed module."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[Technique::ROOTKIT, KEYLOGGING, IMPAIRED_DEFENSES];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "The kernel's data once (some 10 to 20 MiB), the lists of callbacks, and the map of \
         code."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let map = code::map(guest, NAME)?;
        let mut parts = Parts::default();
        parts.note(image::look(guest, &map, findings));
        let before = guest.diagnostics().recorded();
        let callbacks = callbacks(guest, NAME);
        for callback in &callbacks.found {
            if let Some(finding) = judge(guest, &map, callback) {
                findings(finding);
            }
        }
        parts.note(callbacks.error.map_or(Ok(()), |error| Err(error.into())));
        parts.note(whole(guest, before, "kernel objects"));
        parts.finish()
    }
}

/// What is wrong with a callback, or worth knowing.
fn judge(guest: &Guest, map: &CodeMap, callback: &Callback) -> Option<Finding> {
    let (location, target) = (callback.location, callback.target);
    // Read again: the object may have gone.
    let stands = || guest.space().read_pointer(location) == Ok(target);
    match callback.leads_to {
        LeadsTo::Function => {
            let target = code::target(map, callback.target);
            if target.is_foreign() {
                return stands().then(|| {
                    finding(
                        guest,
                        map,
                        callback,
                        "callback_to_foreign_code",
                        &target.describe(),
                    )
                });
            }
            let listens = callback.name.as_bytes() == b"keyboard_notifier_list";
            match target {
                Target::Owned(owner @ CodeOwner::Module { .. }) if listens => {
                    let mut finding = finding(
                        guest,
                        map,
                        callback,
                        "keyboard_notifier",
                        &owner.to_string(),
                    );
                    finding.class = Class::Information;
                    finding.severity = Severity::Medium;
                    Some(finding.technique(KEYLOGGING))
                }
                _ => None,
            }
        }
        LeadsTo::KernelFunction => {
            let target = code::target(map, callback.target);
            let name = match target {
                _ if target.is_foreign() => "callback_to_foreign_code",
                Target::Owned(CodeOwner::Module { .. }) => "operation_into_module",
                _ => return None,
            };
            stands().then(|| finding(guest, map, callback, name, &target.describe()))
        }
        LeadsTo::SecurityHook => {
            let target = code::target(map, callback.target);
            let module = matches!(target, Target::Owned(CodeOwner::Module { .. }));
            ((target.is_foreign() || module) && stands())
                .then(|| security_hook(guest, map, callback, &target.describe()))
        }
        LeadsTo::SecurityRecord => {
            let what = "an object outside of the kernel's image";
            (!in_image(map, callback.target) && stands())
                .then(|| security_hook(guest, map, callback, what))
        }
        LeadsTo::KernelTable(_) if !in_image(map, callback.target) => {
            let what = match map.owner_of(callback.target) {
                Some(owner) => owner.to_string(),
                None => "memory that holds no operations table".to_owned(),
            };
            stands().then(|| finding(guest, map, callback, "operations_table_moved", &what))
        }
        LeadsTo::KernelTable(_) => None,
        LeadsTo::Table(bytes) => {
            if !holds_tables(map, callback.target) {
                let what = "memory that holds no operations table".to_owned();
                return stands()
                    .then(|| finding(guest, map, callback, "operations_table_moved", &what));
            }
            // Tables in the image are looked at there.
            if in_image(map, callback.target) {
                return None;
            }
            let (member, foreign) = foreign_member(guest, map, callback.target, bytes)?;
            let inner = Callback {
                location: member,
                target: foreign,
                ..callback.clone()
            };
            let what = code::target(map, foreign).describe();
            (guest.space().read_pointer(member) == Ok(foreign))
                .then(|| finding(guest, map, &inner, "callback_to_foreign_code", &what))
        }
    }
}

/// A hook of no security module of the kernel's.
fn security_hook(guest: &Guest, map: &CodeMap, callback: &Callback, leads_to: &str) -> Finding {
    finding(guest, map, callback, "security_hook", leads_to).technique(IMPAIRED_DEFENSES)
}

fn in_image(map: &CodeMap, address: VirtualAddress) -> bool {
    map.image.rodata.contains(&address)
        || map.image.data.contains(&address)
        || map.image.bss.contains(&address)
}

/// Whether operations tables lie there: in the kernel's image or in a module.
fn holds_tables(map: &CodeMap, address: VirtualAddress) -> bool {
    in_image(map, address) || matches!(map.owner_of(address), Some(CodeOwner::Module { .. }))
}

/// The first pointer to foreign code in the table.
fn foreign_member(
    guest: &Guest,
    map: &CodeMap,
    table: VirtualAddress,
    bytes: u64,
) -> Option<(VirtualAddress, VirtualAddress)> {
    (0..bytes.min(LARGEST_TABLE) / 8).find_map(|number| {
        let place = table.wrapping_add(number * 8);
        let target = guest.space().read_pointer(place).ok()?;
        code::target(map, target)
            .is_foreign()
            .then_some((place, target))
    })
}

fn finding(
    guest: &Guest,
    map: &CodeMap,
    callback: &Callback,
    name: &'static str,
    leads_to: &str,
) -> Finding {
    let Callback {
        kind,
        name: object,
        location,
        target,
        ..
    } = callback;
    let symbol = code::symbol(guest, map, *location)
        .unwrap_or_else(|| format!("{kind} of {}", object.to_display()));
    let summary = format!(
        "{kind} of {} at {location} leads to {target}, {leads_to}",
        object.to_display()
    );
    let subject = Subject::KernelPointer {
        location: *location,
        target: *target,
        symbol: Some(symbol),
    };
    Finding::new(
        NAME,
        name,
        Class::Attack,
        Severity::Critical,
        subject,
        summary,
    )
    .technique(Technique::ROOTKIT)
    .evidence(
        Evidence::new(kind, "the pointer")
            .with("object", Text::clone(object))
            .with("location", *location)
            .with("target", *target),
    )
    .evidence(code::target_evidence(guest, map, *target))
}

//! The pointers in the kernel's own image.

use std::ops::Range;

use secmon_guest::Guest;
use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_memory::{PAGE_SIZE, VirtualAddress};

use super::NAME;
use crate::code::{self, Target};
use crate::{Class, DetectError, Evidence, Finding, Severity, Subject, Technique};

/// No kernel has more data than this.
const MOST_BYTES: u64 = 1 << 30;
/// Bytes that are copied at a time.
const BLOCK: usize = 1 << 18;
/// The upper 16 bits of all addresses of the kernel's code and modules.
const HIGH: u64 = 0xffff;

/// Looks at each word of the kernel's constants and variables.
pub(super) fn look(
    guest: &Guest,
    map: &CodeMap,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    let sections = [
        ("read-only data", &map.image.rodata, true),
        ("data", &map.image.data, false),
        ("bss", &map.image.bss, false),
    ];
    let mut exempt = memory_limits(guest);
    exempt.push(device_numbers(guest));
    for (view, section, constant) in sections {
        words(guest, section, &mut |location, target| {
            if exempt.iter().any(|range| range.contains(&location)) {
                return;
            }
            let Some(judgement) = judge(guest, map, target, constant) else {
                return;
            };
            // The word may have changed meanwhile.
            if guest.space().read_pointer(location) != Ok(target) {
                return;
            }
            findings(finding(guest, map, view, location, target, judgement));
        })?;
    }
    Ok(())
}

/// The tables of PCI devices that need a fixup: `struct pci_fixup` holds no
/// address, but the numbers of any class, vendor and device read as one
/// (0xffffffff9a238086) that can lie behind the image, where KASLR puts it so.
fn device_numbers(guest: &Guest) -> Range<VirtualAddress> {
    let bounds = (
        guest.address("__start_pci_fixups_early"),
        guest.address("__end_pci_fixups_suspend_late"),
    );
    match bounds {
        (Some(start), Some(end)) => start..end,
        _ => VirtualAddress::new(0)..VirtualAddress::new(0),
    }
}

/// The `execmem_info`s (`mm/execmem.c`, `arch/x86/mm/init.c`, since 6.10):
/// constants that say where the modules' memory starts, which is where the first
/// module may lie.
fn memory_limits(guest: &Guest) -> Vec<Range<VirtualAddress>> {
    let Ok(types) = guest.types(NAME) else {
        return Vec::new();
    };
    let Ok(size) = types.size_of("execmem_info") else {
        return Vec::new();
    };
    ["execmem_info", "default_execmem_info"]
        .into_iter()
        .flat_map(|symbol| guest.symbols().addresses(symbol).collect::<Vec<_>>())
        .map(|start| start..start.wrapping_add(size))
        .collect()
}

/// What is wrong with a word that leads there, if something is.
fn judge(
    guest: &Guest,
    map: &CodeMap,
    target: VirtualAddress,
    constant: bool,
) -> Option<&'static str> {
    // The end of the text is an address that variables hold.
    if target == map.image.text.end {
        return None;
    }
    // Constants lead to nothing that was not there when they were made: what
    // is in the modules' memory came later, data as well as code.
    // A mask of high bits is no address: that of a gigabyte reads as the first
    // of the modules' memory.
    let mask = target.as_u64().wrapping_neg().is_power_of_two();
    if constant && !mask && map.module_area.contains(&target) {
        return match map.owner_of(target) {
            Some(CodeOwner::Module { .. }) => Some("constant_into_module"),
            Some(_) => None,
            None if guest.space().translate(target).is_ok() => Some("pointer_to_foreign_memory"),
            None => None,
        };
    }
    match code::target(map, target) {
        Target::Unowned => Some("pointer_to_foreign_code"),
        // Pages behind the text are marked by their limits only.
        Target::NoCode(_) if !target.is_aligned(PAGE_SIZE) => Some("pointer_to_foreign_code"),
        _ => None,
    }
}

/// Gives each aligned word of the section that can be an address of code.
fn words(
    guest: &Guest,
    section: &Range<VirtualAddress>,
    each: &mut dyn FnMut(VirtualAddress, VirtualAddress),
) -> Result<(), DetectError> {
    let size = section.end.as_u64().saturating_sub(section.start.as_u64());
    let size = size.min(MOST_BYTES);
    let mut block = vec![0; BLOCK];
    let mut done = 0;
    while done < size {
        let start = section.start.wrapping_add(done);
        let count = (size - done).min(BLOCK as u64) as usize;
        let bytes = &mut block[..count];
        done += count as u64;
        if guest.space().read(start, bytes).is_err() {
            // Parts of the image can be given away: page by page.
            by_page(guest, start, bytes);
        }
        for (index, word) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            if word >> 48 == HIGH {
                each(
                    start.wrapping_add(index as u64 * 8),
                    VirtualAddress::new(word),
                );
            }
        }
    }
    Ok(())
}

/// Reads what can be read; what can't is zero.
fn by_page(guest: &Guest, start: VirtualAddress, bytes: &mut [u8]) {
    let mut done = 0;
    while done < bytes.len() {
        let address = start.wrapping_add(done as u64);
        let left = (PAGE_SIZE - address.page_offset()) as usize;
        let end = bytes.len().min(done + left);
        let part = &mut bytes[done..end];
        if guest.space().read(address, part).is_err() {
            part.fill(0);
        }
        done = end;
    }
}

fn finding(
    guest: &Guest,
    map: &CodeMap,
    view: &'static str,
    location: VirtualAddress,
    target: VirtualAddress,
    name: &'static str,
) -> Finding {
    let symbol = code::symbol(guest, map, location);
    let shown = symbol.as_deref().unwrap_or("a pointer");
    let leads_to = code::target(map, target).describe();
    let summary = format!("{shown} at {location} leads to {target}, {leads_to}");
    let subject = Subject::KernelPointer {
        location,
        target,
        symbol,
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
        Evidence::new(view, "the pointer")
            .with("location", location)
            .with("target", target),
    )
    .evidence(code::target_evidence(guest, map, target))
}

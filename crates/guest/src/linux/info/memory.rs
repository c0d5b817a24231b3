//! Facts about memory: how much there is, and where the kernel put itself.

use secmon_memory::PagingMode;

use super::{Fact, FactError, TABLE};
use crate::{Guest, layout};

/// Where these areas start without KASLR
/// (`Documentation/arch/x86/x86_64/mm.rst`), with 4 and with 5 levels.
const VMALLOC_BASE: [u64; 2] = [0xffff_c900_0000_0000, 0xffa0_0000_0000_0000];
const VMEMMAP_BASE: [u64; 2] = [0xffff_ea00_0000_0000, 0xffd4_0000_0000_0000];

/// Bytes of a page.
const PAGE: u64 = 4096;

layout! {
    /// `arch/x86/include/asm/processor.h`; a type that all kernels have, to
    /// say whether there are types at all.
    struct CounterLayout: "atomic64_t" {
        counter: "counter",
    }
}

pub(super) const FACTS: &[Fact] = &[
    Fact {
        name: "memory_total",
        meaning: "Bytes of memory that the kernel manages.",
        value: |guest| {
            let Some(address) = super::symbol(guest, "_totalram_pages") else {
                return Ok(None);
            };
            let pages = guest.space().read_u64(address)?;
            Ok(Some(pages.saturating_mul(PAGE).to_string()))
        },
    },
    Fact {
        name: "memory_free",
        meaning: "Bytes that nobody uses, as the kernel last summed them up.",
        value: free_memory,
    },
    Fact {
        name: "memory_visible",
        meaning: "Bytes of guest physical memory that can be seen from here.",
        value: |guest| Ok(Some(guest.space().memory().size().to_string())),
    },
    Fact {
        name: "page_levels",
        meaning: "Levels of the page tables: 4 or 5.",
        value: |guest| {
            Ok(Some(
                match guest.space().mode() {
                    PagingMode::FourLevel => "4",
                    PagingMode::FiveLevel => "5",
                }
                .to_owned(),
            ))
        },
    },
    Fact {
        name: "page_table_root",
        meaning: "The physical address of the kernel's own page tables.",
        value: |guest| Ok(Some(guest.space().root().to_string())),
    },
    Fact {
        name: "kernel_base",
        meaning: "The address of the kernel's image (_text).",
        value: |guest| Ok(Some(guest.kernel().image.virtual_base.to_string())),
    },
    Fact {
        name: "kernel_physical_base",
        meaning: "Where the kernel's image is in physical memory.",
        value: |guest| Ok(Some(guest.kernel().image.physical_base.to_string())),
    },
    Fact {
        name: "kaslr_text_slide",
        meaning: "How far KASLR moved the image; 0 if it did not.",
        value: |guest| Ok(Some(format!("{:#x}", guest.kernel().image.slide))),
    },
    Fact {
        name: "direct_map",
        meaning: "Where the kernel maps all of physical memory.",
        value: |guest| Ok(Some(guest.kernel().direct_map.to_string())),
    },
    Fact {
        name: "kaslr_direct_map_slide",
        meaning: "How far KASLR moved that map.",
        value: |guest| Ok(Some(format!("{:#x}", guest.kernel().direct_map_slide))),
    },
    Fact {
        name: "vmalloc_base",
        meaning: "Where memory from vmalloc starts.",
        value: |guest| Ok(Some(guest.kernel().vmalloc_base.to_string())),
    },
    Fact {
        name: "kaslr_vmalloc_slide",
        meaning: "How far KASLR moved it, up or down.",
        value: |guest| {
            let base = guest.kernel().vmalloc_base.as_u64();
            Ok(slide(guest, base, VMALLOC_BASE))
        },
    },
    Fact {
        name: "vmemmap_base",
        meaning: "Where the array of struct page starts.",
        value: |guest| Ok(Some(guest.kernel().vmemmap_base.to_string())),
    },
    Fact {
        name: "kaslr_vmemmap_slide",
        meaning: "How far KASLR moved it, up or down.",
        value: |guest| {
            let base = guest.kernel().vmemmap_base.as_u64();
            Ok(slide(guest, base, VMEMMAP_BASE))
        },
    },
];

fn slide(guest: &Guest, base: u64, usual: [u64; 2]) -> Option<String> {
    let [four, five] = usual;
    let usual = match guest.space().mode() {
        PagingMode::FourLevel => four,
        PagingMode::FiveLevel => five,
    };
    // KASLR lays the areas one behind the other: they can come to lie below
    // their usual place too.
    Some(match base.checked_sub(usual) {
        Some(slide) => format!("{slide:#x}"),
        None => format!("-{:#x}", usual - base),
    })
}

fn free_memory(guest: &Guest) -> Result<Option<String>, FactError> {
    let Some(counters) = super::symbol(guest, "vm_zone_stat") else {
        return Ok(None);
    };
    let size = guest.layout::<CounterLayout>(TABLE)?.size;
    let number = guest
        .types(TABLE)?
        .enumerator("zone_stat_item", "NR_FREE_PAGES")
        .map_err(|error| FactError::Other(error.to_string()))?;
    let number = u64::try_from(number).unwrap_or_default();
    let pages = guest
        .space()
        .read_u64(counters.wrapping_add(number.wrapping_mul(size)))?;
    // Each CPU's changes are added now and then: it can be below 0.
    let pages = u64::try_from(pages as i64).unwrap_or_default();
    Ok(Some(pages.saturating_mul(PAGE).to_string()))
}

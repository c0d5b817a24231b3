//! What was found of a kernel in physical memory.

use std::fmt;
use std::sync::Arc;

use secmon_memory::{AddressSpace, PhysicalAddress, VirtualAddress};

use crate::{BuildId, CacheOutcome, Profile};

/// A Linux kernel found in physical memory.
#[derive(Clone)]
pub struct Kernel {
    /// The kernel's own address space: the tables at `init_top_pgt`.
    pub space: AddressSpace,
    /// Its symbols and types.
    pub profile: Arc<Profile>,
    /// Where its image lies.
    pub image: KernelImage,
    /// Where it maps all of physical memory (`page_offset_base`).
    pub direct_map: VirtualAddress,
    /// How far KASLR moved the direct map from its usual place.
    pub direct_map_slide: u64,
    /// Where `vmalloc` memory starts (`vmalloc_base`).
    pub vmalloc_base: VirtualAddress,
    /// Where the array of `struct page` starts (`vmemmap_base`).
    pub vmemmap_base: VirtualAddress,
    /// What contradicted the rest, and was not believed.
    pub conflicts: Vec<Conflict>,
    /// The kernel's notes for crash dumps, where it has some.
    pub vmcoreinfo: Option<VmcoreInfo>,
    /// How each part was found.
    pub evidence: Evidence,
}

/// Where the kernel image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelImage {
    /// The run-time address of `_text`.
    pub virtual_base: VirtualAddress,
    /// Where that is in physical memory.
    pub physical_base: PhysicalAddress,
    /// How far KASLR moved the image up from the address it was linked for.
    pub slide: u64,
    /// The bytes from `_text` to the end of what is mapped.
    pub size: u64,
}

/// How the parts of a [`Kernel`] were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// What led to the page tables.
    pub tables: TablesFrom,
    /// What led to the kernel's own root.
    pub root: RootFrom,
    /// What led to symbols and types.
    pub profile: ProfileFrom,
    /// What became of the cache.
    pub cache: CacheOutcome,
}

/// What led to the kernel's page tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TablesFrom {
    /// A root that the caller gave, such as a vCPU's CR3.
    Hint(PhysicalAddress),
    /// The real-mode trampoline's page tables, below 1 MiB.
    Trampoline(PhysicalAddress),
    /// A search of all pages; nothing below 1 MiB led to a kernel.
    #[default]
    Search,
}

/// What led to the kernel's own page-table root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RootFrom {
    /// The symbol `init_top_pgt`; the root there maps the kernel as the tables
    /// that were found do.
    Symbol,
    /// A look at the image's pages for such a root, as the symbol is missing
    /// or leads elsewhere.
    Image,
    /// The tables that were found, whosever they are: the image holds none.
    #[default]
    Tables,
}

/// What led to the symbols and types.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProfileFrom {
    /// The guest's memory alone.
    #[default]
    Memory,
    /// The guest's memory, and an index of it from the cache.
    Cache,
    /// An ISF file.
    Isf,
}

/// Two places in memory that should say the same and don't.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What they speak about.
    pub what: Subject,
    /// What is believed, and where it was found.
    pub chosen: String,
    /// What contradicts it, and where it was found.
    pub other: String,
    /// Why the former was believed.
    pub why: String,
}

/// Conflicts about one subject that are listed: a guest can plant any number.
const MAXIMUM_CONFLICTS: usize = 16;

/// Appends `conflict`, unless as many about the same are listed already; the
/// last one listed says so.
pub(crate) fn note(conflicts: &mut Vec<Conflict>, mut conflict: Conflict) {
    let known = conflicts
        .iter()
        .filter(|known| known.what == conflict.what)
        .count();
    if known >= MAXIMUM_CONFLICTS {
        return;
    }
    if known == MAXIMUM_CONFLICTS - 1 {
        conflict
            .other
            .push_str(" (and maybe more that are not listed)");
    }
    conflicts.push(conflict);
}

/// What a [`Conflict`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// The page-table root or where the kernel image lies.
    PageTables,
    /// The banner.
    Banner,
    /// The build id.
    BuildId,
    /// The symbol table.
    Symbols,
    /// The type information.
    Types,
    /// The notes for crash dumps.
    VmcoreInfo,
    /// Where physical memory is mapped.
    DirectMap,
    /// The profile cache.
    Cache,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PageTables => "page tables",
            Self::Banner => "banner",
            Self::BuildId => "build id",
            Self::Symbols => "symbols",
            Self::Types => "types",
            Self::VmcoreInfo => "VMCOREINFO",
            Self::DirectMap => "direct map",
            Self::Cache => "profile cache",
        })
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            what,
            chosen,
            other,
            why,
        } = self;
        write!(
            f,
            "{what}: {other} contradicts {chosen}; the latter is believed: {why}"
        )
    }
}

/// The kernel's notes for crash dumps (`VMCOREINFO`), as far as they are used
/// here, with the whole text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmcoreInfo {
    /// The lines as they were found.
    pub text: String,
    /// `OSRELEASE=`
    pub release: Option<String>,
    /// `BUILD-ID=`
    pub build_id: Option<BuildId>,
    /// `KERNELOFFSET=`: how far KASLR moved the image.
    pub kernel_offset: Option<u64>,
    /// `NUMBER(phys_base)=`
    pub physical_base: Option<i64>,
    /// `SYMBOL(_stext)=`
    pub text_start: Option<VirtualAddress>,
    /// `SYMBOL(init_top_pgt)=` or `SYMBOL(swapper_pg_dir)=`
    pub page_table_root: Option<VirtualAddress>,
    /// `NUMBER(pgtable_l5_enabled)=`
    pub five_levels: Option<bool>,
}

//! Looks at all of memory for what contradicts the kernel that was found:
//! other symbol tables, types, banners and VMCOREINFO.
//!
//! None of it can mislead: what was found was led to by page tables and
//! symbols. But that somebody put it there, or that it was left behind by
//! another kernel, is worth knowing.

use std::ops::Range;
use std::sync::Arc;

use secmon_memory::{PhysicalAddress, PhysicalMemory, VirtualAddress};

use crate::attempt::{BTF_START, MAXIMUM_BANNER, MAXIMUM_TABLES, btf_range};
use crate::crosscheck::differences;
use crate::image::Image;
use crate::kernel::note;
use crate::locate::{self, BANNER_START, DIGITS};
use crate::notes::MAXIMUM_VMCOREINFO;
use crate::{Conflict, Kernel, KernelImage, MAXIMUM_BTF_LENGTH, Subject, Types, VmcoreInfo};

/// How VMCOREINFO starts.
const VMCOREINFO_START: &[u8] = b"OSRELEASE=";

/// Appends to the kernel's conflicts what is found outside of its image.
pub(crate) fn search_all(memory: &Arc<dyn PhysicalMemory>, kernel: &mut Kernel) {
    let memory = &**memory;
    let mut rivals = Vec::new();
    for region in memory.populated() {
        // A region read as if it were an image: by offset from its start.
        let place = KernelImage {
            virtual_base: VirtualAddress::new(0),
            physical_base: region.start,
            slide: 0,
            size: region.length,
        };
        let whole = Image::new(memory, place);
        let own = own_range(&kernel.image, region.start, region.length);
        let outside = [0..own.start, own.end..region.length];
        let patterns = [DIGITS, BTF_START, VMCOREINFO_START, BANNER_START];
        let [digits, types, info, banners] = whole.search(&outside, patterns);
        let search = Search {
            whole,
            start: region.start,
            kernel,
        };
        let tables = digits
            .into_iter()
            .filter(|at| locate::has_tokens(&whole, *at));
        let tables = tables.take(MAXIMUM_TABLES);
        rivals.extend(tables.filter_map(|at| search.symbols(at)));
        // As many bytes as one blob may have, in as many pieces as there are.
        let mut budget = MAXIMUM_BTF_LENGTH as u64;
        rivals.extend(
            types
                .into_iter()
                .filter_map(|at| search.types(at, &mut budget)),
        );
        rivals.extend(info.into_iter().flat_map(|at| search.vmcoreinfo(at)));
        rivals.extend(banners.into_iter().filter_map(|at| search.banner(at)));
    }
    for rival in rivals {
        // Many copies of one text say no more than the first.
        let known = kernel.conflicts.iter().any(|conflict| {
            conflict.what == rival.what
                && conflict.what == Subject::Banner
                && text(&conflict.other) == text(&rival.other)
        });
        if !known {
            note(&mut kernel.conflicts, rival);
        }
    }
}

/// What is quoted in a description.
fn text(description: &str) -> &str {
    description
        .rsplit_once('"')
        .map_or(description, |(text, _)| text)
}

/// The part of a region that the image takes, by offset.
fn own_range(image: &KernelImage, start: PhysicalAddress, length: u64) -> Range<u64> {
    let first = image.physical_base.as_u64();
    let end = first.saturating_add(image.size);
    let clip = |address: u64| address.saturating_sub(start.as_u64()).min(length);
    clip(first)..clip(end)
}

struct Search<'a> {
    whole: Image<'a>,
    start: PhysicalAddress,
    kernel: &'a Kernel,
}

impl Search<'_> {
    fn place(&self, offset: u64) -> PhysicalAddress {
        self.start.wrapping_add(offset)
    }

    fn symbols(&self, digits: u64) -> Option<Conflict> {
        let (at, count) = locate::table_like(&self.whole, digits)?;
        Some(Conflict {
            what: Subject::Symbols,
            chosen: "the symbol table in the kernel's image".to_owned(),
            other: format!("a table of {count} symbols at physical {}", self.place(at)),
            why: "it is not in the image that the page tables map".to_owned(),
        })
    }

    fn types(&self, offset: u64, budget: &mut u64) -> Option<Conflict> {
        let range = btf_range(&self.whole, offset)?;
        *budget = budget.checked_sub(range.end - range.start)?;
        let bytes = self.whole.bytes(range)?;
        let own = self.kernel.profile.types().ok();
        if own.is_some_and(|own| own.bytes() == bytes) {
            return None;
        }
        let types = Types::parse(bytes).ok()?;
        // Those of a module continue a kernel's and have no such structure.
        types.has_type("struct task_struct").then(|| Conflict {
            what: Subject::Types,
            chosen: "the types in the kernel's image".to_owned(),
            other: format!(
                "{} other types at physical {}",
                types.len(),
                self.place(offset)
            ),
            why: "they are not in the image that the page tables map".to_owned(),
        })
    }

    fn vmcoreinfo(&self, offset: u64) -> Vec<Conflict> {
        let Some(bytes) = self.whole.string(offset, MAXIMUM_VMCOREINFO) else {
            return Vec::new();
        };
        let info = VmcoreInfo::parse(&bytes);
        // A note of a few lines says nothing that could mislead.
        if info.kernel_offset.is_none() && info.physical_base.is_none() {
            return Vec::new();
        }
        let Kernel {
            image,
            profile,
            space,
            ..
        } = self.kernel;
        differences(&info, image, space.mode(), profile)
            .into_iter()
            .map(|(key, said, found)| Conflict {
                what: Subject::VmcoreInfo,
                chosen: found,
                other: format!(
                    "{key}={said} in a VMCOREINFO at physical {}",
                    self.place(offset)
                ),
                why: "page tables and symbols agree on it".to_owned(),
            })
            .collect()
    }

    fn banner(&self, offset: u64) -> Option<Conflict> {
        let bytes = self.whole.string(offset, MAXIMUM_BANNER)?;
        let end = bytes
            .iter()
            .position(|byte| !(b' '..0x7f).contains(byte))
            .unwrap_or(bytes.len());
        let found = str::from_utf8(&bytes[..end]).ok()?;
        let own = self.kernel.profile.banner();
        // "Linux version 6.1.0-1-amd64 (who@where) (compiler) #1 SMP date"
        let complete = found.contains(" (") && found.contains(" #");
        if !complete || own.starts_with(found) || found.starts_with(own) {
            return None;
        }
        Some(Conflict {
            what: Subject::Banner,
            chosen: format!("{own:?} in the kernel's image"),
            other: format!("{found:?} at physical {}", self.place(offset)),
            why: "the symbol linux_banner leads to the former".to_owned(),
        })
    }
}

//! All objects of slab caches, found by the pages that they lie in: allocated
//! ones and free ones, in whatever list, or in none (`mm/slub.c`).
//!
//! The kernel has a `struct page` for each page of memory, in one array. Of a
//! page that belongs to a slab it says to which cache. The lists of a cache
//! would not do: a slab whose objects are all in use is in none of them.

use std::collections::BTreeMap;

use secmon_memory::{PAGE_SIZE, ReadError, VirtualAddress};
use secmon_profile::{Member, TypeError, Types};

use crate::linux::list::is_object_address;
use crate::{Guest, Layout, TableError, extract, layout};

/// Bytes of the array that are copied at once: they lie in one page of 2 MiB.
const PIECE: u64 = 64 << 10;
/// More bytes are in no slab: `KMALLOC_MAX_SIZE` and more.
const LARGEST_SLAB: u64 = 4 << 20;
/// More objects of a cache are not looked at.
const MOST_OBJECTS: usize = 1 << 22;
/// How many reasons are kept why objects may be missing.
const MOST_ERRORS: usize = 8;

layout! {
    /// `mm/slab.h`, since 5.17; it lies over `struct page`.
    struct SlabLayout: "slab" {
        cache: "slab_cache",
        objects: "objects",
    }
}

layout! {
    /// `include/linux/mm_types.h`; the first two before 5.17 only.
    struct PageLayout: "page" {
        flags: "flags",
    } optional {
        cache: "slab_cache",
        objects: "objects",
    }
}

layout! {
    /// `include/linux/slub_def.h`, `mm/slab.h`
    struct CacheLayout: "kmem_cache" {
        stride: "size",
        object_size: "object_size",
    } optional {
        /// What lies before the first object, where the cache is debugged.
        padding: "red_left_pad",
    }
}

/// Where the members lie.
#[derive(Debug)]
struct SlabModel {
    page_size: u64,
    cache: Member,
    objects: Member,
    of_cache: CacheLayout,
}

impl Layout for SlabModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let page = PageLayout::resolve(types)?;
        let (cache, objects) = match (page.cache, page.objects) {
            (Some(cache), Some(objects)) => (cache, objects),
            _ => {
                let slab = SlabLayout::resolve(types)?;
                (slab.cache, slab.objects)
            }
        };
        Ok(Self {
            page_size: page.size,
            cache,
            objects,
            of_cache: CacheLayout::resolve(types)?,
        })
    }
}

/// The places for objects of one cache.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Where they lie, allocated or free, ascending in each slab.
    pub addresses: Vec<VirtualAddress>,
    /// The slabs that they lie in.
    pub slabs: usize,
}

/// The places for objects of several caches.
#[derive(Clone, Debug, Default)]
pub struct SlabObjects {
    /// By the address of the `kmem_cache`.
    pub caches: BTreeMap<VirtualAddress, Objects>,
    /// Why some may be missing.
    pub errors: Vec<String>,
}

impl SlabObjects {
    fn fail(&mut self, error: impl std::fmt::Display) {
        if self.errors.len() < MOST_ERRORS {
            self.errors.push(error.to_string());
        }
    }

    /// The places for objects of this cache.
    pub fn of(&self, cache: VirtualAddress) -> &[VirtualAddress] {
        self.caches
            .get(&cache)
            .map_or(&[], |objects| &objects.addresses)
    }
}

/// The `kmem_cache` that a kernel variable leads to.
///
/// # Errors
/// [`TableError`] if there is no such variable, or it leads nowhere.
pub fn cache(
    guest: &Guest,
    table: &'static str,
    variable: &'static str,
) -> Result<VirtualAddress, TableError> {
    let read = |source| TableError::Read {
        table,
        what: variable,
        source,
    };
    let cache = guest
        .space()
        .read_pointer(guest.symbol(table, variable)?)
        .map_err(read)?;
    if is_object_address(guest.space(), cache) {
        Ok(cache)
    } else {
        Err(TableError::Symbol {
            table,
            symbol: variable,
        })
    }
}

/// How the objects of a cache lie in a slab.
#[derive(Clone, Copy, Debug)]
struct Shape {
    stride: u64,
    padding: u64,
}

impl SlabModel {
    fn shape(&self, guest: &Guest, cache: VirtualAddress) -> Result<Shape, String> {
        let number = |member| {
            guest
                .number(cache, member)
                .map_err(|error| error.to_string())
        };
        let stride = number(&self.of_cache.stride)? & 0xffff_ffff;
        let object_size = number(&self.of_cache.object_size)? & 0xffff_ffff;
        let padding = match &self.of_cache.padding {
            Some(padding) => number(padding)? & 0xffff_ffff,
            None => 0,
        };
        if object_size == 0 || stride < object_size || stride > LARGEST_SLAB || padding >= stride {
            return Err(format!(
                "the kmem_cache at {cache} has objects of {object_size} bytes each {stride} bytes"
            ));
        }
        Ok(Shape { stride, padding })
    }
}

/// The places for objects of these caches, out of all of the guest's memory.
///
/// # Errors
/// [`TableError`] if the kernel's types lack something.
pub fn objects(
    guest: &Guest,
    table: &'static str,
    caches: &[VirtualAddress],
) -> Result<SlabObjects, TableError> {
    let model = guest.layout::<SlabModel>(table)?;
    let mut found = SlabObjects::default();
    let mut shapes = BTreeMap::new();
    for cache in caches {
        found.caches.entry(*cache).or_default();
        match model.shape(guest, *cache) {
            Ok(shape) => {
                shapes.insert(cache.as_u64(), shape);
            }
            Err(error) => found.fail(error),
        }
    }
    let page_size = model.page_size;
    if !(16..=PAGE_SIZE).contains(&page_size) {
        found.fail(format_args!("a struct page has {page_size} bytes"));
        return Ok(found);
    }
    let pages = PIECE / page_size;
    let mut piece = vec![0; (pages * page_size) as usize];
    for region in guest.space().memory().regions() {
        let mut page = region.start.as_u64() / PAGE_SIZE;
        let end = region.end().as_u64() / PAGE_SIZE;
        while page < end {
            // Pieces begin at multiples of their length, so that each is mapped
            // as a whole or not at all.
            let next = (page / pages + 1) * pages;
            let count = next.min(end) - page;
            let length = (count * page_size) as usize;
            let bytes = piece.get_mut(..length).unwrap_or_default();
            let start = guest.kernel().vmemmap_base.wrapping_add(page * page_size);
            match guest.space().read(start, bytes) {
                Ok(()) => {
                    let base = guest.kernel().direct_map.wrapping_add(page * PAGE_SIZE);
                    scan(&model, &shapes, base, bytes, &mut found);
                }
                // Memory that the kernel has no pages for: it has no slabs.
                Err(ReadError::Translation(_)) => {}
                Err(error) => found.fail(error),
            }
            page += count;
        }
    }
    Ok(found)
}

/// Looks for slabs in a piece of the array, which begins with the page that is
/// mapped at `base`.
fn scan(
    model: &SlabModel,
    shapes: &BTreeMap<u64, Shape>,
    base: VirtualAddress,
    bytes: &[u8],
    found: &mut SlabObjects,
) {
    let at = model.cache.offset as usize;
    for (index, one) in (0_u64..).zip(bytes.chunks_exact(model.page_size as usize)) {
        let word = one.get(at..).and_then(<[u8]>::first_chunk);
        let Some(cache) = word.map(|word| u64::from_le_bytes(*word)) else {
            return;
        };
        // One in ten thousand pages.
        if cache >> 63 == 0 {
            continue;
        }
        let Some(shape) = shapes.get(&cache) else {
            continue;
        };
        let raw = one.get(model.objects.offset as usize..).unwrap_or_default();
        let mut word = [0; 8];
        for (to, from) in word.iter_mut().zip(raw) {
            *to = *from;
        }
        let count = extract(&model.objects, u64::from_le_bytes(word));
        let count = count.min(LARGEST_SLAB / shape.stride);
        let slab = base.wrapping_add(index * PAGE_SIZE);
        let objects = found.caches.entry(VirtualAddress::new(cache)).or_default();
        objects.slabs += 1;
        let room = MOST_OBJECTS.saturating_sub(objects.addresses.len()) as u64;
        let place = |object: u64| slab.wrapping_add(shape.padding + object * shape.stride);
        objects.addresses.extend((0..count.min(room)).map(place));
        if count > room {
            found.fail(format_args!(
                "the kmem_cache at {cache:#x} has more than {MOST_OBJECTS} objects"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CACHE: u64 = 0xffff_8880_0010_0000;
    const OTHER: u64 = 0xffff_8880_0010_0100;
    const BASE: VirtualAddress = VirtualAddress::new(0xffff_8880_0400_0000);

    fn member(offset: u64, size: u64, bit_offset: u8, bit_size: u8) -> Member {
        Member {
            offset,
            size,
            bit_offset,
            bit_size,
            signed: false,
            count: None,
            type_name: String::new(),
            pointer: false,
        }
    }

    /// As in 6.1.
    fn model() -> SlabModel {
        let of_cache = CacheLayout {
            size: 256,
            stride: member(24, 4, 0, 0),
            object_size: member(28, 4, 0, 0),
            padding: None,
        };
        SlabModel {
            page_size: 64,
            cache: member(8, 8, 0, 0),
            objects: member(40, 4, 16, 15),
            of_cache,
        }
    }

    fn shapes() -> BTreeMap<u64, Shape> {
        let shape = Shape {
            stride: 0x1000,
            padding: 0x40,
        };
        BTreeMap::from([(CACHE, shape)])
    }

    fn page(cache: u64, objects: u32) -> Vec<u8> {
        let mut page = vec![0; 64];
        page[8..16].copy_from_slice(&cache.to_le_bytes());
        // In use: 3 of them; the top bit says that the slab is a CPU's.
        let counters = 1 << 31 | objects << 16 | 3;
        page[40..44].copy_from_slice(&counters.to_le_bytes());
        page
    }

    #[test]
    fn finds_the_objects_of_the_caches_asked_for() {
        let pages = [page(OTHER, 9), page(CACHE, 2), page(0, 7), page(CACHE, 1)].concat();
        let mut found = SlabObjects::default();
        scan(&model(), &shapes(), BASE, &pages, &mut found);
        let cache = VirtualAddress::new(CACHE);
        let places = [0x1040, 0x2040, 0x3040].map(|offset| BASE.wrapping_add(offset));
        assert_eq!(found.of(cache), places);
        assert_eq!(found.caches[&cache].slabs, 2);
        assert!(found.of(VirtualAddress::new(OTHER)).is_empty());
        assert_eq!(found.errors, [""; 0]);
    }

    proptest! {
        /// Whatever the pages say, there are no more objects than fit a slab.
        #[test]
        fn any_pages_are_bounded(
            pages in prop::collection::vec((any::<bool>(), any::<u32>()), 0..40),
            cut in 0_usize..64,
        ) {
            let slabs = pages.iter().filter(|(ours, _)| *ours).count();
            let mut bytes: Vec<u8> = pages
                .iter()
                .flat_map(|(ours, objects)| page(if *ours { CACHE } else { OTHER }, *objects))
                .collect();
            bytes.truncate(bytes.len().saturating_sub(cut));
            let mut found = SlabObjects::default();
            scan(&model(), &shapes(), BASE, &bytes, &mut found);
            let most = slabs as u64 * LARGEST_SLAB / 0x1000;
            prop_assert!(found.of(VirtualAddress::new(CACHE)).len() as u64 <= most);
        }
    }
}

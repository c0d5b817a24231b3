//! Pages of files in memory: the `struct address_space` of a file
//! (`include/linux/fs.h`) and the folios that its xarray holds
//! (`include/linux/mm_types.h`).

use std::sync::Arc;

use secmon_memory::{PAGE_SIZE, PhysicalAddress, ReadError, VirtualAddress};

use super::list::is_object_address;
use super::tree::TreeError;
use super::xarray::XarrayModel;
use crate::{Guest, TableError, layout};

layout! {
    /// `include/linux/fs.h`
    struct AddressSpaceLayout: "address_space" {
        /// The xarray of pages, by their number in the file.
        pages: "i_pages",
    }
}

layout! {
    /// `include/linux/mm_types.h`
    struct PageLayout: "page" {
        /// The number in its file of a folio's first page; `index` until 6.15.
        index: "index" | "__folio_index",
    }
}

/// Why a file's page could not be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageCacheError {
    /// The file leads to no table of pages.
    #[error("the file's address_space is {mapping}, which is no object")]
    Mapping {
        /// Its address.
        mapping: VirtualAddress,
    },
    /// The table of its pages is damaged.
    #[error("address_space.i_pages at {mapping}: {source}")]
    Tree {
        /// The `struct address_space`.
        mapping: VirtualAddress,
        /// What is wrong.
        source: TreeError,
    },
    /// An entry that is no page.
    #[error("page {index} of the file is said to be {entry}, which is no struct page")]
    NoPage {
        /// The page's number in the file.
        index: u64,
        /// The entry.
        entry: VirtualAddress,
    },
    /// A page that stands elsewhere than it says.
    #[error("page {index} of the file is in a folio that starts at page {first}")]
    Elsewhere {
        /// The page's number in the file.
        index: u64,
        /// What the folio says.
        first: u64,
    },
    /// The page's own structure can't be read.
    #[error("struct page at {page}: {source}")]
    Read {
        /// Its address.
        page: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
}

/// More pages than this has no folio: `MAX_PAGECACHE_ORDER` allows 2^9 of 4 KiB,
/// huge pages 2^18.
const MOST_PAGES: u64 = 1 << 18;

/// Finds pages of files in memory.
pub struct PageCache {
    mapping: Arc<AddressSpaceLayout>,
    page: Arc<PageLayout>,
    tree: Arc<XarrayModel>,
}

impl PageCache {
    /// How this guest keeps pages of files, for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's types are not known or lack a member.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        Ok(Self {
            mapping: guest.layout(table)?,
            page: guest.layout(table)?,
            tree: guest.layout(table)?,
        })
    }

    /// Where the page with number `index` of the file with this
    /// `struct address_space` lies; none if it is not in memory.
    ///
    /// # Errors
    /// [`PageCacheError`] if what should lead there is damaged.
    pub fn page(
        &self,
        guest: &Guest,
        mapping: VirtualAddress,
        index: u64,
    ) -> Result<Option<PhysicalAddress>, PageCacheError> {
        if !is_object_address(guest.space(), mapping) {
            return Err(PageCacheError::Mapping { mapping });
        }
        let pages = mapping.wrapping_add(self.mapping.pages.offset);
        let entry = self
            .tree
            .load(guest.space(), pages, index)
            .map_err(|source| PageCacheError::Tree { mapping, source })?;
        // A value stands for a page that was here: where it is in the swap
        // area, or when it was dropped.
        let Some(entry) = entry.and_then(|entry| entry.pointer()) else {
            return Ok(None);
        };
        self.frame(guest, entry, index).map(Some)
    }

    /// The frame of page `index` of a file, in the folio at `folio`.
    fn frame(
        &self,
        guest: &Guest,
        folio: VirtualAddress,
        index: u64,
    ) -> Result<PhysicalAddress, PageCacheError> {
        let no_page = PageCacheError::NoPage {
            index,
            entry: folio,
        };
        let base = guest.kernel().vmemmap_base;
        let Some(offset) = folio.as_u64().checked_sub(base.as_u64()) else {
            return Err(no_page);
        };
        let size = self.page.size.max(1);
        if offset % size != 0 {
            return Err(no_page);
        }
        let first =
            guest
                .number(folio, &self.page.index)
                .map_err(|source| PageCacheError::Read {
                    page: folio,
                    source,
                })?;
        let inside = index.wrapping_sub(first);
        if inside >= MOST_PAGES {
            return Err(PageCacheError::Elsewhere { index, first });
        }
        let frame = (offset / size).saturating_add(inside);
        match frame.checked_mul(PAGE_SIZE) {
            Some(address) => Ok(PhysicalAddress::new(address)),
            None => Err(no_page),
        }
    }
}

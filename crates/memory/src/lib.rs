//! Guest physical memory, x86-64 page tables and typed reads that race with a
//! running guest.
//!
//! The way of a byte: a [`PhysicalMemory`] (a *source*: a mapped image, a live
//! process, a compressed dump) answers reads by [`PhysicalAddress`]; an
//! [`AddressSpace`] is one page-table root over it and answers reads by
//! [`VirtualAddress`].
//!
//! This crate knows nothing of guests, hypervisors or file formats.

mod address;
mod buffer;
mod cache;
mod heap;
mod mapped;
mod mappings;
mod paging;
mod physical;
mod registers;
mod space;
mod tlb;
mod volatile;

pub use address::{PAGE_SIZE, PhysicalAddress, VirtualAddress};
pub use buffer::Buffer;
pub use cache::{CachedMemory, Freshness};
pub use heap::HeapMemory;
pub use mapped::{MapError, MappedMemory};
pub use mappings::{MappedPage, MappingsError};
pub use paging::{
    NotPresent, PageSize, PagingMode, Rights, TableLevel, Translation, TranslationError,
};
pub use physical::{LayoutError, MemoryRegion, PhysicalMemory, PhysicalReadError, Volatility};
pub use registers::CpuRegisters;
pub use space::{AddressSpace, ReadError, WalkStep};
pub use volatile::VolatileBytes;

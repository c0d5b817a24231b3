//! One page-table root over physical memory: reads by virtual address.

use std::ops::Range;
use std::sync::Arc;

use crate::paging::walk;
use crate::tlb::Tlb;
use crate::{
    MappedMemory, PagingMode, PhysicalAddress, PhysicalMemory, PhysicalReadError, TableLevel,
    Translation, TranslationError, VirtualAddress, Volatility,
};

/// An address space: physical memory seen through one page-table root.
///
/// Unless asked, it holds no cache: every read walks the tables as they are
/// now. Cloning is cheap, and a clone with another root
/// ([`with_root`](Self::with_root)) is a process's address space.
#[derive(Clone)]
pub struct AddressSpace {
    memory: Arc<dyn PhysicalMemory>,
    mapped: Option<MappedMemory>,
    root: PhysicalAddress,
    mode: PagingMode,
    tlb: Option<Arc<Tlb>>,
}

/// Why virtual memory could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The address leads nowhere.
    #[error(transparent)]
    Translation(#[from] TranslationError),
    /// It leads to physical memory that can't be read.
    #[error("virtual address {address}: {source}")]
    Physical {
        /// The virtual address whose page could not be read.
        address: VirtualAddress,
        /// What happened there.
        source: PhysicalReadError,
    },
    /// A length that would run over the end of the address space.
    #[error("{length} bytes at {address} run over the end of the address space")]
    Wrap {
        /// Where the read started.
        address: VirtualAddress,
        /// How long it was to be.
        length: u64,
    },
}

/// One entry that a walk over the page tables read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkStep {
    /// The table that holds the entry.
    pub level: TableLevel,
    /// Where the entry lies.
    pub entry_address: PhysicalAddress,
    /// The entry as it was read.
    pub entry: u64,
}

impl AddressSpace {
    /// The space of the tables at `root`. Only bits 51 to 12 of `root` count:
    /// a CR3 value with its PCID serves as it is.
    pub fn new(memory: Arc<dyn PhysicalMemory>, root: PhysicalAddress, mode: PagingMode) -> Self {
        let mapped = memory.mapped().cloned();
        Self {
            memory,
            mapped,
            root,
            mode,
            tlb: None,
        }
    }

    /// The same memory through other tables.
    #[must_use]
    pub fn with_root(&self, root: PhysicalAddress) -> Self {
        Self {
            memory: self.memory.clone(),
            mapped: self.mapped.clone(),
            root,
            mode: self.mode,
            tlb: None,
        }
    }

    /// The same space with a translation cache if its memory is static, where
    /// a cache can't be stale; live memory goes on without.
    #[must_use]
    pub fn with_tlb(self) -> Self {
        match self.memory.volatility() {
            Volatility::Static => self.with_stale_tlb(),
            Volatility::Live => self,
        }
    }

    /// The same space with a translation cache that never forgets: for a live
    /// target what the tables said when an address was first used. For callers
    /// that want one moment's translations and drop the space soon.
    #[must_use]
    pub fn with_stale_tlb(self) -> Self {
        Self {
            tlb: Some(Arc::new(Tlb::new())),
            ..self
        }
    }

    /// As [`with_stale_tlb`](Self::with_stale_tlb), but only translations of
    /// these ranges are remembered: those that the caller knows to stay while
    /// the space is used.
    #[must_use]
    pub fn with_stale_tlb_in(self, ranges: &[Range<VirtualAddress>]) -> Self {
        if ranges.is_empty() {
            return self;
        }
        Self {
            tlb: Some(Arc::new(Tlb::of_ranges(ranges))),
            ..self
        }
    }

    /// The physical memory below.
    pub fn memory(&self) -> &Arc<dyn PhysicalMemory> {
        &self.memory
    }

    /// The page-table root as it was given.
    pub fn root(&self) -> PhysicalAddress {
        self.root
    }

    /// Four or five levels.
    pub fn mode(&self) -> PagingMode {
        self.mode
    }

    #[inline]
    fn read_entry(&self, address: PhysicalAddress) -> Option<u64> {
        if let Some(mapped) = &self.mapped {
            return mapped.read_u64(address);
        }
        let mut bytes = [0; 8];
        self.memory.read(address, &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// Where `address` leads, by the tables as they are now.
    ///
    /// # Errors
    /// [`TranslationError`] with the level and the entry that ended the walk.
    #[inline]
    pub fn translate(&self, address: VirtualAddress) -> Result<Translation, TranslationError> {
        walk(self.root, self.mode, address, |entry| {
            self.read_entry(entry)
        })
    }

    /// As [`translate`](Self::translate), with each entry that was read on the
    /// way, the top level's first: for people who want to see the walk.
    pub fn trace(
        &self,
        address: VirtualAddress,
    ) -> (Vec<WalkStep>, Result<Translation, TranslationError>) {
        let mut steps = Vec::with_capacity(5);
        let mut level = Some(self.mode.top_level());
        let outcome = walk(self.root, self.mode, address, |entry_address| {
            let entry = self.read_entry(entry_address)?;
            if let Some(now) = level {
                steps.push(WalkStep {
                    level: now,
                    entry_address,
                    entry,
                });
                level = now.below();
            }
            Some(entry)
        });
        (steps, outcome)
    }

    /// The physical address, and the bytes from it to the end of its page.
    #[inline]
    fn locate(&self, address: VirtualAddress) -> Result<(PhysicalAddress, u64), TranslationError> {
        if let Some(found) = self.tlb.as_ref().and_then(|tlb| tlb.get(address)) {
            return Ok(found);
        }
        let translation = self.translate(address)?;
        if let Some(tlb) = &self.tlb {
            tlb.set(address, &translation);
        }
        let size = translation.page_size.bytes();
        Ok((translation.physical, size - (address.as_u64() & (size - 1))))
    }

    /// The 8-byte integers at many addresses, each with its own outcome.
    /// All are located first and their cache lines fetched side by side, so
    /// that reads scattered over memory do not wait for each other.
    pub fn read_u64_batch(&self, addresses: &[VirtualAddress]) -> Vec<Result<u64, ReadError>> {
        /// Lines in flight: more than the hardware's fill buffers, few enough
        /// to stay in the first-level cache.
        const BATCH: usize = 64;
        let mut values = Vec::with_capacity(addresses.len());
        let mut located = [None; BATCH];
        for chunk in addresses.chunks(BATCH) {
            let Some(mapped) = &self.mapped else {
                values.extend(chunk.iter().map(|address| self.read_u64(*address)));
                continue;
            };
            for (address, slot) in chunk.iter().zip(&mut located) {
                *slot = self.locate(*address).ok().map(|(physical, _)| physical);
                if let Some(physical) = *slot {
                    mapped.prefetch(physical);
                }
            }
            for (address, slot) in chunk.iter().zip(&located) {
                let inside_page = address.page_offset() <= crate::PAGE_SIZE - 8;
                let value = slot
                    .filter(|_| inside_page)
                    .and_then(|at| mapped.read_u64(at));
                // Whatever is not simple is read the exact way, which also
                // gives the exact error.
                values.push(value.map_or_else(|| self.read_u64(*address), Ok));
            }
        }
        values
    }

    /// Copies the bytes from `address` on into `buffer`, across pages.
    ///
    /// # Errors
    /// [`ReadError`] for the first page that can't be read; `buffer` then
    /// holds nothing to be used.
    #[inline]
    pub fn read(&self, address: VirtualAddress, buffer: &mut [u8]) -> Result<(), ReadError> {
        // Nearly all reads: in one page that was translated before.
        if let (Some(mapped), Some(tlb)) = (&self.mapped, &self.tlb)
            && let Some((physical, left)) = tlb.get(address)
            && buffer.len() as u64 <= left
            && mapped.read_within(physical, buffer)
        {
            return Ok(());
        }
        self.read_pages(address, buffer)
    }

    /// As [`read`](Self::read), page by page.
    fn read_pages(&self, address: VirtualAddress, buffer: &mut [u8]) -> Result<(), ReadError> {
        let length = buffer.len() as u64;
        if length > 0 && address.as_u64().checked_add(length - 1).is_none() {
            return Err(ReadError::Wrap { address, length });
        }
        let mut position = address;
        let mut rest = buffer;
        while !rest.is_empty() {
            let (physical, left) = self.locate(position)?;
            let count = rest.len().min(left as usize);
            let (now, later) = rest.split_at_mut(count);
            let outcome = match &self.mapped {
                // The mapping knows no reasons; the memory around it may.
                Some(mapped) => mapped
                    .read(physical, now)
                    .or_else(|_| self.memory.read(physical, now)),
                None => self.memory.read(physical, now),
            };
            outcome.map_err(|source| ReadError::Physical {
                address: position,
                source,
            })?;
            position = position.wrapping_add(count as u64);
            rest = later;
        }
        Ok(())
    }

    /// The byte at `address`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline]
    pub fn read_u8(&self, address: VirtualAddress) -> Result<u8, ReadError> {
        let mut bytes = [0; 1];
        self.read(address, &mut bytes)?;
        Ok(bytes[0])
    }

    /// The little-endian 2-byte integer at `address`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline]
    pub fn read_u16(&self, address: VirtualAddress) -> Result<u16, ReadError> {
        let mut bytes = [0; 2];
        self.read(address, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// The little-endian 4-byte integer at `address`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline]
    pub fn read_u32(&self, address: VirtualAddress) -> Result<u32, ReadError> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// The little-endian 8-byte integer at `address`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline]
    pub fn read_u64(&self, address: VirtualAddress) -> Result<u64, ReadError> {
        if let (Some(mapped), true) = (&self.mapped, address.page_offset() <= crate::PAGE_SIZE - 8)
        {
            let (physical, _) = self.locate(address)?;
            if let Some(value) = mapped.read_u64(physical) {
                return Ok(value);
            }
        }
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The pointer at `address`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline]
    pub fn read_pointer(&self, address: VirtualAddress) -> Result<VirtualAddress, ReadError> {
        self.read_u64(address).map(VirtualAddress::new)
    }

    /// The bytes from `address` up to the first zero byte, at most `limit` of
    /// them; a string that reaches an unreadable page before its end is an
    /// error.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_c_string(
        &self,
        address: VirtualAddress,
        limit: usize,
    ) -> Result<Vec<u8>, ReadError> {
        let mut bytes = Vec::new();
        let mut position = address;
        while bytes.len() < limit {
            let mut chunk = [0; 64];
            let left_in_page = (crate::PAGE_SIZE - position.page_offset()) as usize;
            let count = chunk.len().min(left_in_page).min(limit - bytes.len());
            let chunk = &mut chunk[..count];
            self.read(position, chunk)?;
            if let Some(end) = chunk.iter().position(|byte| *byte == 0) {
                bytes.extend_from_slice(&chunk[..end]);
                return Ok(bytes);
            }
            bytes.extend_from_slice(chunk);
            position = position.wrapping_add(count as u64);
        }
        Ok(bytes)
    }
}

//! A memory image with pages that were changed afterwards, and memory added:
//! what somebody who can write to the guest's memory can make of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use secmon_memory::{
    MemoryRegion, PAGE_SIZE, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility,
};

type Page = [u8; PAGE_SIZE as usize];

/// Memory over another one. It is not mapped, so that everything is read
/// through [`PhysicalMemory::read`].
#[derive(Clone)]
pub struct Forged {
    base: Arc<dyn PhysicalMemory>,
    regions: Vec<MemoryRegion>,
    pages: BTreeMap<u64, Arc<Page>>,
}

impl Forged {
    /// As `base` is.
    pub fn new(base: &Arc<dyn PhysicalMemory>) -> Self {
        Self {
            base: base.clone(),
            regions: base.regions().to_vec(),
            pages: BTreeMap::new(),
        }
    }

    /// Adds memory above all other, full of zeroes, and says where.
    pub fn add_region(&mut self, length: u64) -> PhysicalAddress {
        let end = self.regions.last().expect("some memory").end().as_u64();
        let start = PhysicalAddress::new(end.next_multiple_of(1 << 30));
        self.regions.push(MemoryRegion::new(start, length));
        start
    }

    /// Changes the bytes from `address` on.
    pub fn write(&mut self, address: PhysicalAddress, bytes: &[u8]) {
        let mut position = address;
        let mut rest = bytes;
        while !rest.is_empty() {
            let number = position.page().as_u64();
            let offset = position.page_offset() as usize;
            let (now, later) = rest.split_at(rest.len().min(PAGE_SIZE as usize - offset));
            let mut page = self.page(number).expect("memory to write to");
            page[offset..offset + now.len()].copy_from_slice(now);
            self.pages.insert(number, Arc::new(page));
            position = position.wrapping_add(now.len() as u64);
            rest = later;
        }
    }

    /// Changes one entry of a page table.
    pub fn write_entry(&mut self, table: PhysicalAddress, index: u64, entry: u64) {
        self.write(table.wrapping_add(index * 8), &entry.to_le_bytes());
    }

    /// The bytes from `address` on.
    pub fn bytes(&self, address: PhysicalAddress, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.read(address, &mut bytes).expect("memory to read");
        bytes
    }

    fn page(&self, number: u64) -> Result<Page, PhysicalReadError> {
        if let Some(page) = self.pages.get(&number) {
            return Ok(**page);
        }
        let address = PhysicalAddress::new(number);
        let mut page = [0; PAGE_SIZE as usize];
        if self
            .base
            .regions()
            .iter()
            .any(|region| region.contains(address))
        {
            self.base.read(address, &mut page)?;
        } else if !self.regions.iter().any(|region| region.contains(address)) {
            return Err(PhysicalReadError::Hole { address });
        }
        Ok(page)
    }
}

impl PhysicalMemory for Forged {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        Volatility::Static
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let end = address.as_u64().saturating_add(buffer.len() as u64);
        let changed = self
            .pages
            .range(address.page().as_u64()..end)
            .next()
            .is_some();
        let inside = |memory: &[MemoryRegion]| {
            memory
                .iter()
                .any(|region| region.contains(address) && end <= region.end().as_u64())
        };
        if !changed && inside(self.base.regions()) {
            return self.base.read(address, buffer);
        }
        let mut position = address;
        let mut rest = buffer;
        while !rest.is_empty() {
            let page = self.page(position.page().as_u64())?;
            let offset = position.page_offset() as usize;
            let count = rest.len().min(page.len() - offset);
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&page[offset..offset + count]);
            position = position.wrapping_add(count as u64);
            rest = later;
        }
        Ok(())
    }
}

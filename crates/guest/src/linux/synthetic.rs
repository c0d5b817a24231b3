//! A small made-up memory for unit tests: one megabyte, mapped where kernels
//! have their direct map, that can change between two reads.

use std::sync::{Arc, Mutex};

use secmon_memory::{
    AddressSpace, MemoryRegion, PagingMode, PhysicalAddress, PhysicalMemory, PhysicalReadError,
    VirtualAddress, Volatility,
};

/// Where physical address 0 is mapped.
pub const BASE: u64 = 0xffff_8880_0000_0000;
/// Bytes of memory.
const SIZE: usize = 1 << 20;
/// Bytes at the start that hold the page tables.
const TABLES: u64 = 0x3000;

/// A change that happens before the read with that number.
pub type Change = Box<dyn FnMut(&mut Vec<u8>, u64) + Send>;

struct Inner {
    bytes: Vec<u8>,
    reads: u64,
    change: Option<Change>,
}

/// The memory; clones share it.
#[derive(Clone)]
pub struct Synthetic {
    inner: Arc<Mutex<Inner>>,
    regions: [MemoryRegion; 1],
    volatility: Volatility,
}

impl Synthetic {
    /// Memory with nothing but its page tables.
    pub fn new(volatility: Volatility) -> Self {
        let mut bytes = vec![0; SIZE];
        // PML4 at 0, PDPT at 0x1000, PD at 0x2000 with one 2 MiB page.
        write(&mut bytes, BASE + 273 * 8, 0x1000 | 3);
        write(&mut bytes, BASE + 0x1000, 0x2000 | 3);
        write(&mut bytes, BASE + 0x2000, 0x83);
        Self {
            inner: Arc::new(Mutex::new(Inner {
                bytes,
                reads: 0,
                change: None,
            })),
            regions: [MemoryRegion::new(PhysicalAddress::new(0), SIZE as u64)],
            volatility,
        }
    }

    /// Lets `change` act on memory before each read outside of the page
    /// tables; it is given the read's number.
    pub fn on_read(&self, change: Change) {
        self.inner.lock().expect("not poisoned").change = Some(change);
    }

    /// Writes 8 bytes at a virtual address.
    pub fn set(&self, address: u64, value: u64) {
        write(
            &mut self.inner.lock().expect("not poisoned").bytes,
            address,
            value,
        );
    }

    /// Links these `list_head`s, the first of which is the head, to a ring.
    pub fn link(&self, nodes: &[u64]) {
        for (index, node) in nodes.iter().enumerate() {
            let next = nodes[(index + 1) % nodes.len()];
            self.set(*node, next);
            self.set(next + 8, *node);
        }
    }

    /// Links these `hlist_node`s behind the pointer that comes first, with
    /// this end.
    pub fn chain(&self, nodes: &[u64], end: u64) {
        for pair in nodes.windows(2) {
            self.set(pair[0], pair[1]);
            self.set(pair[1] + 8, pair[0]);
        }
        if let Some(last) = nodes.last() {
            self.set(*last, end);
        }
    }

    /// The address space that its page tables make.
    pub fn space(&self) -> AddressSpace {
        AddressSpace::new(
            Arc::new(self.clone()),
            PhysicalAddress::new(0),
            PagingMode::FourLevel,
        )
    }
}

/// Writes 8 bytes at a virtual address.
pub fn write(bytes: &mut [u8], address: u64, value: u64) {
    let offset = (address - BASE) as usize;
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

/// The virtual address of the `index`-th of many nodes.
pub fn node(index: u64) -> VirtualAddress {
    VirtualAddress::new(BASE + 0x4000 + index * 32)
}

impl PhysicalMemory for Synthetic {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        self.volatility
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let mut inner = self.inner.lock().expect("not poisoned");
        if address.as_u64() >= TABLES {
            inner.reads += 1;
            let reads = inner.reads;
            if let Some(mut change) = inner.change.take() {
                change(&mut inner.bytes, reads);
                inner.change = Some(change);
            }
        }
        let hole = PhysicalReadError::Hole { address };
        let start = usize::try_from(address.as_u64()).map_err(|_| hole.clone())?;
        let bytes = start
            .checked_add(buffer.len())
            .and_then(|end| inner.bytes.get(start..end))
            .ok_or(hole)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

//! Memory for tests: a few megabytes that a test fills, behind page tables
//! like those of a kernel's direct map.

use std::sync::{Arc, Mutex, PoisonError};

use secmon_memory::{
    AddressSpace, MemoryRegion, PagingMode, PhysicalAddress, PhysicalMemory, PhysicalReadError,
    VirtualAddress, Volatility,
};

/// Where the memory appears: `PAGE_OFFSET` of an x86-64 kernel.
pub(crate) const BASE: VirtualAddress = VirtualAddress::new(0xffff_8880_0000_0000);

/// Bytes that a test can fill: [`BASE`] to `BASE + SIZE`.
pub(crate) const SIZE: u64 = 4 << 20;

/// The tables lie behind the bytes.
const PML4: u64 = SIZE;
const PDPT: u64 = SIZE + 0x1000;
const PD: u64 = SIZE + 0x2000;
/// Tables for one piece of user memory.
const USER_PDPT: u64 = SIZE + 0x3000;
const USER_PD: u64 = SIZE + 0x4000;
const USER_PT: u64 = SIZE + 0x5000;
const TOTAL: usize = SIZE as usize + 0x6000;

/// Called with each physical address that is read, before it is.
type OnRead = Box<dyn FnMut(&mut Vec<u8>, u64) + Send>;

/// Physical memory with an address space over it.
pub(crate) struct Synthetic {
    memory: Arc<Ram>,
}

struct Ram {
    regions: [MemoryRegion; 1],
    volatility: Volatility,
    state: Mutex<(Vec<u8>, Option<OnRead>)>,
}

impl PhysicalMemory for Ram {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        self.volatility
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, on_read) = &mut *state;
        if let Some(on_read) = on_read {
            on_read(bytes, address.as_u64());
        }
        let source = usize::try_from(address.as_u64())
            .ok()
            .and_then(|start| bytes.get(start..)?.get(..buffer.len()))
            .ok_or(PhysicalReadError::Hole { address })?;
        buffer.copy_from_slice(source);
        Ok(())
    }
}

impl Synthetic {
    /// All zero.
    pub(crate) fn new(volatility: Volatility) -> Self {
        let mut bytes = vec![0; TOTAL];
        let mut entry = |address: u64, value: u64| {
            let start = address as usize;
            bytes[start..start + 8].copy_from_slice(&value.to_le_bytes());
        };
        entry(PML4 + ((BASE.as_u64() >> 39) & 0x1ff) * 8, PDPT | 3);
        entry(PDPT + ((BASE.as_u64() >> 30) & 0x1ff) * 8, PD | 3);
        for page in 0..SIZE >> 21 {
            entry(PD + page * 8, (page << 21) | 0x83);
        }
        let regions = [MemoryRegion::new(PhysicalAddress::new(0), TOTAL as u64)];
        Self {
            memory: Arc::new(Ram {
                regions,
                volatility,
                state: Mutex::new((bytes, None)),
            }),
        }
    }

    /// The address space.
    pub(crate) fn space(&self) -> AddressSpace {
        AddressSpace::new(
            self.memory.clone(),
            PhysicalAddress::new(PML4),
            PagingMode::FourLevel,
        )
    }

    /// Maps pages of user memory from `start` on, a multiple of 2 MiB, to
    /// these physical ones.
    pub(crate) fn map_user(&self, start: u64, pages: &[Option<u64>]) {
        self.write_u64(PML4 + ((start >> 39) & 0x1ff) * 8, USER_PDPT | 7);
        self.write_u64(USER_PDPT + ((start >> 30) & 0x1ff) * 8, USER_PD | 7);
        self.write_u64(USER_PD + ((start >> 21) & 0x1ff) * 8, USER_PT | 7);
        for (index, page) in pages.iter().enumerate() {
            let entry = page.map_or(0, |page| page | 7);
            self.write_u64(USER_PT + index as u64 * 8, entry);
        }
    }

    /// Lets `change` see, and change, the memory before each read of it.
    pub(crate) fn on_read(&self, change: impl FnMut(&mut Vec<u8>, u64) + Send + 'static) {
        self.lock().1 = Some(Box::new(change));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Vec<u8>, Option<OnRead>)> {
        self.memory
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The address `offset` bytes into the memory.
    pub(crate) fn at(offset: u64) -> VirtualAddress {
        BASE.wrapping_add(offset)
    }

    /// Puts bytes there.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let start = offset as usize;
        self.lock().0[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Puts an integer there.
    pub(crate) fn write_u64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Puts an integer at a virtual address.
    pub(crate) fn set(&self, address: u64, value: u64) {
        self.write_u64(address - BASE.as_u64(), value);
    }

    /// Puts the address of `target` there.
    pub(crate) fn write_pointer(&self, offset: u64, target: u64) {
        self.write_u64(offset, Self::at(target).as_u64());
    }
}

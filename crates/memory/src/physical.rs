//! What a source of guest physical memory is.

use crate::{MappedMemory, PhysicalAddress};

/// A run of guest physical addresses that holds memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryRegion {
    /// The first address.
    pub start: PhysicalAddress,
    /// The number of bytes, at least 1.
    pub length: u64,
}

impl MemoryRegion {
    /// A region of `length` bytes at `start`.
    pub const fn new(start: PhysicalAddress, length: u64) -> Self {
        Self { start, length }
    }

    /// The address one past the last byte, saturating at 2^64 - 1.
    pub const fn end(&self) -> PhysicalAddress {
        PhysicalAddress::new(self.start.as_u64().saturating_add(self.length))
    }

    /// Whether a region can be of this place and size at all.
    ///
    /// # Errors
    /// [`LayoutError`] if it is empty or reaches past 2^52.
    pub fn check(&self) -> Result<(), LayoutError> {
        if self.length == 0 {
            return Err(LayoutError::Empty(self.start));
        }
        match self.start.checked_add(self.length) {
            Some(end) if end.as_u64() <= 1 << 52 => Ok(()),
            _ => Err(LayoutError::TooHigh(self.start)),
        }
    }

    /// Whether `address` lies in the region.
    pub const fn contains(&self, address: PhysicalAddress) -> bool {
        address.as_u64().wrapping_sub(self.start.as_u64()) < self.length
    }
}

/// Whether memory can change between two reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Volatility {
    /// A running guest writes it meanwhile.
    Live,
    /// An image of the past: equal reads give equal bytes.
    Static,
}

/// Guest physical memory, wherever it comes from.
///
/// A new source implements [`regions`](Self::regions),
/// [`volatility`](Self::volatility) and [`read`](Self::read); one whose bytes
/// are mapped into this process also gives [`mapped`](Self::mapped), which
/// [`AddressSpace`](crate::AddressSpace) uses to read without a call through
/// this trait.
pub trait PhysicalMemory: Send + Sync {
    /// The regions that hold memory: sorted, disjoint, none of length 0.
    /// What lies between them is a hole.
    fn regions(&self) -> &[MemoryRegion];

    /// Whether a guest may be writing this memory now.
    fn volatility(&self) -> Volatility;

    /// Copies the bytes from `address` on into `buffer`, all of them or none
    /// that may be used.
    ///
    /// # Errors
    /// [`PhysicalReadError`] names the first address that could not be read.
    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError>;

    /// The same memory as a mapping of this process, where there is one.
    fn mapped(&self) -> Option<&MappedMemory> {
        None
    }

    /// The parts of the regions that may hold anything but zeros now: sorted,
    /// disjoint, of whole pages. A look at all of memory needs to look at no
    /// more, and at a live target should not: reading memory that the host has
    /// not given to the guest yet may make the host give it.
    ///
    /// Of live memory it is what was so at the call; a source that does not
    /// know gives all regions.
    fn populated(&self) -> Vec<MemoryRegion> {
        self.regions().to_vec()
    }

    /// The bytes of RAM in all regions.
    fn size(&self) -> u64 {
        self.regions().iter().map(|region| region.length).sum()
    }
}

/// Why physical memory could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PhysicalReadError {
    /// No RAM is known there: a hole of the machine, or a device.
    #[error("no memory at physical address {address}")]
    Hole {
        /// The first address that is in no region.
        address: PhysicalAddress,
    },
    /// The image says that this page was left out when it was written.
    #[error("the page at physical address {address} is not in the image: {reason}")]
    Excluded {
        /// The first address left out.
        address: PhysicalAddress,
        /// Why the writer left it out, or why the file lacks it.
        reason: &'static str,
    },
    /// The image holds bytes for this page that can't be decoded.
    #[error("the page at physical address {address} is corrupt in the image: {reason}")]
    Corrupt {
        /// The first address of the page.
        address: PhysicalAddress,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused.
    #[error("reading physical address {address}: {reason}")]
    Host {
        /// The first address that could not be read.
        address: PhysicalAddress,
        /// The host's words.
        reason: String,
    },
}

/// Why a list of regions is not a layout of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A region of no bytes.
    #[error("the memory region at {0} is empty")]
    Empty(PhysicalAddress),
    /// A region that reaches past 2^52, the end of x86-64's physical addresses.
    #[error("the memory region at {0} reaches past the end of physical memory")]
    TooHigh(PhysicalAddress),
    /// Two regions that share an address, or are out of order.
    #[error("the memory regions at {0} and {1} overlap or are out of order")]
    Overlap(PhysicalAddress, PhysicalAddress),
    /// A region that lies outside of the file or mapping which should hold it.
    #[error("the memory region at {start} needs bytes up to {needed:#x}, there are {available:#x}")]
    OutOfBounds {
        /// Where the region starts.
        start: PhysicalAddress,
        /// The offset one past the last byte needed.
        needed: u64,
        /// The bytes there are.
        available: u64,
    },
}

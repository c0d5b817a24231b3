//! A page cache over a source whose reads are expensive: a system call into a
//! running process, a page to decompress.
//!
//! It can't be stale unless asked. Over an image of the past every page stays
//! as long as there is room. Over live memory nothing is kept, and each read
//! goes to the source, unless the cache was made with a [`Freshness`] that
//! allows otherwise; then no byte is older than that when it is returned.
//!
//! What a bounded age means for reading structures: bytes of one page come
//! from one moment (the copy of a page is not atomic, but takes under a
//! microsecond), bytes of different pages from moments up to the age apart. A
//! reader that validates by reading again gets the same bytes again while the
//! page is in the cache: call [`CachedMemory::clear`] before the second look.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{
    MappedMemory, MemoryRegion, PAGE_SIZE, PhysicalAddress, PhysicalMemory, PhysicalReadError,
    Volatility,
};

const PAGE: usize = PAGE_SIZE as usize;

/// Pages that share a lock; one of them is replaced when a page is new.
const WAYS: usize = 4;

/// Reads of more bytes than this pass by the cache: they are scans, which
/// would only empty it.
const LARGE_READ: usize = 16 * PAGE;

/// How old a cached byte may be when it is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Not at all: every read goes to the source.
    Now,
    /// Read at most this long before the read that returns it began.
    MaxAge(Duration),
    /// Of any age since the cache was made or last
    /// [cleared](CachedMemory::clear): one look at a guest, in which equal
    /// reads give equal bytes as long as there is room.
    SinceClear,
}

/// Physical memory with a page cache in front. It can't be stale unless asked:
/// over live memory nothing is kept but within a [`Freshness`] given.
///
/// Bytes of one page come from one moment, bytes of different pages from
/// moments up to the allowed age apart; a reader that validates by reading
/// again calls [`clear`](Self::clear) before the second look.
///
/// Where the source is mapped into this process there is nothing to gain, and
/// nothing is cached.
pub struct CachedMemory {
    source: Arc<dyn PhysicalMemory>,
    freshness: Freshness,
    /// What is in the cache from before is not valid.
    epoch: AtomicU64,
    made: Instant,
    sets: Box<[Mutex<Set>]>,
}

#[derive(Default)]
struct Set {
    slots: [Slot; WAYS],
    /// The slot that is replaced next.
    next: usize,
}

#[derive(Default)]
struct Slot {
    page: u64,
    epoch: u64,
    /// Just before the page was read, since the cache was made.
    read_at: Duration,
    bytes: Option<Box<[u8; PAGE]>>,
}

impl CachedMemory {
    /// Memory taken where nothing else is said: 16 MiB.
    pub const DEFAULT_CAPACITY: usize = 16 << 20;

    /// A cache of at most `capacity` bytes that is never stale: over an image
    /// pages are kept, over live memory they are not.
    pub fn new(source: Arc<dyn PhysicalMemory>, capacity: usize) -> Self {
        let freshness = match source.volatility() {
            Volatility::Static => Freshness::SinceClear,
            Volatility::Live => Freshness::Now,
        };
        Self::with_freshness(source, capacity, freshness)
    }

    /// A cache of at most `capacity` bytes that may return what was true
    /// before, within `freshness`.
    pub fn with_freshness(
        source: Arc<dyn PhysicalMemory>,
        capacity: usize,
        freshness: Freshness,
    ) -> Self {
        let passes = source.mapped().is_some() || freshness == Freshness::Now;
        let sets = if passes { 0 } else { capacity / PAGE / WAYS };
        Self {
            source,
            freshness,
            epoch: AtomicU64::new(1),
            made: Instant::now(),
            sets: (0..sets).map(|_| Mutex::default()).collect(),
        }
    }

    /// The memory below.
    pub fn source(&self) -> &Arc<dyn PhysicalMemory> {
        &self.source
    }

    /// Forgets everything: what is read from now on is read anew.
    pub fn clear(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// The lock for a page.
    fn set(&self, page: u64) -> Option<&Mutex<Set>> {
        // Fibonacci hashing: neighbouring pages go to different sets.
        let hash = (page / PAGE_SIZE).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let index = (u128::from(hash) * self.sets.len() as u128) >> 64;
        self.sets.get(index as usize)
    }

    /// Copies bytes of one page, from the cache or through it.
    fn read_in_page(
        &self,
        address: PhysicalAddress,
        buffer: &mut [u8],
        epoch: u64,
        began: Duration,
    ) -> Result<(), PhysicalReadError> {
        let page = address.page().as_u64();
        let offset = address.page_offset() as usize;
        let Some(set) = self.set(page) else {
            return self.source.read(address, buffer);
        };
        // A panic while the lock was held leaves at worst a slot without bytes.
        let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = |slot: &&Slot| {
            slot.page == page
                && slot.epoch == epoch
                && match self.freshness {
                    Freshness::Now => false,
                    Freshness::MaxAge(age) => began.saturating_sub(slot.read_at) <= age,
                    Freshness::SinceClear => true,
                }
        };
        if let Some(bytes) = set
            .slots
            .iter()
            .find(fresh)
            .and_then(|slot| slot.bytes.as_ref())
            && let Some(bytes) = bytes.get(offset..offset + buffer.len())
        {
            buffer.copy_from_slice(bytes);
            return Ok(());
        }
        // A stale copy of the page makes room for the new one.
        let stale = set.slots.iter().position(|slot| slot.page == page);
        let index = stale.unwrap_or(set.next % WAYS);
        set.next = (index + 1) % WAYS;
        let Some(slot) = set.slots.get_mut(index) else {
            return self.source.read(address, buffer);
        };
        slot.epoch = 0;
        let mut bytes = slot.bytes.take().unwrap_or_else(|| Box::new([0; PAGE]));
        let read_at = self.made.elapsed();
        let outcome = self
            .source
            .read(PhysicalAddress::new(page), bytes.as_mut_slice());
        if outcome.is_err() {
            // Part of the page may well be readable, and the error must name
            // the address asked for.
            slot.bytes = Some(bytes);
            return self.source.read(address, buffer);
        }
        if let Some(bytes) = bytes.get(offset..offset + buffer.len()) {
            buffer.copy_from_slice(bytes);
        }
        *slot = Slot {
            page,
            epoch,
            read_at,
            bytes: Some(bytes),
        };
        Ok(())
    }
}

impl PhysicalMemory for CachedMemory {
    fn regions(&self) -> &[MemoryRegion] {
        self.source.regions()
    }

    fn volatility(&self) -> Volatility {
        self.source.volatility()
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        if self.sets.is_empty() || buffer.len() > LARGE_READ {
            return self.source.read(address, buffer);
        }
        let epoch = self.epoch.load(Ordering::SeqCst);
        let began = match self.freshness {
            Freshness::MaxAge(_) => self.made.elapsed(),
            Freshness::Now | Freshness::SinceClear => Duration::ZERO,
        };
        let mut position = address;
        let mut rest = buffer;
        while !rest.is_empty() {
            let left = PAGE - position.page_offset() as usize;
            let (now, later) = rest.split_at_mut(rest.len().min(left));
            self.read_in_page(position, now, epoch, began)?;
            position = position.wrapping_add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    fn mapped(&self) -> Option<&MappedMemory> {
        self.source.mapped()
    }

    fn populated(&self) -> Vec<MemoryRegion> {
        self.source.populated()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU8;

    use proptest::prelude::*;

    use super::*;

    /// Memory whose every byte is the value of a counter, with a hole and an
    /// end inside of a page.
    struct Counter {
        value: AtomicU8,
        reads: AtomicU64,
        volatility: Volatility,
        regions: [MemoryRegion; 2],
    }

    const END: u64 = 0x4_0800;

    impl Counter {
        fn new(volatility: Volatility) -> Arc<Self> {
            Arc::new(Self {
                value: AtomicU8::new(0),
                reads: AtomicU64::new(0),
                volatility,
                regions: [
                    MemoryRegion::new(PhysicalAddress::new(0), 0x1_0000),
                    MemoryRegion::new(PhysicalAddress::new(0x2_0000), END - 0x2_0000),
                ],
            })
        }

        fn tick(&self) {
            self.value.fetch_add(1, Ordering::SeqCst);
        }

        fn reads(&self) -> u64 {
            self.reads.load(Ordering::SeqCst)
        }
    }

    impl PhysicalMemory for Counter {
        fn regions(&self) -> &[MemoryRegion] {
            &self.regions
        }

        fn volatility(&self) -> Volatility {
            self.volatility
        }

        fn read(
            &self,
            address: PhysicalAddress,
            buffer: &mut [u8],
        ) -> Result<(), PhysicalReadError> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            for (index, byte) in buffer.iter_mut().enumerate() {
                let address = address.wrapping_add(index as u64);
                if !self.regions.iter().any(|region| region.contains(address)) {
                    return Err(PhysicalReadError::Hole { address });
                }
                *byte = self.value.load(Ordering::SeqCst);
            }
            Ok(())
        }
    }

    fn value(memory: &dyn PhysicalMemory, address: u64) -> u8 {
        let mut byte = [0xee];
        memory
            .read(PhysicalAddress::new(address), &mut byte)
            .expect("memory");
        byte[0]
    }

    const CAPACITY: usize = 64 * PAGE;

    #[test]
    fn live_memory_is_not_cached_unless_asked() {
        let source = Counter::new(Volatility::Live);
        let cached = CachedMemory::new(source.clone(), CAPACITY);
        for expected in 0..200 {
            assert_eq!(value(&cached, 0x5000), expected);
            source.tick();
        }
        assert_eq!(source.reads(), 200);
    }

    #[test]
    fn an_image_is_read_once() {
        let source = Counter::new(Volatility::Static);
        let cached = CachedMemory::new(source.clone(), CAPACITY);
        for _ in 0..100 {
            assert_eq!(value(&cached, 0x5000), 0);
            assert_eq!(value(&cached, 0x5fff), 0);
        }
        assert_eq!(source.reads(), 1);
    }

    #[test]
    fn nothing_is_older_than_allowed() {
        let source = Counter::new(Volatility::Live);
        let age = Duration::from_millis(20);
        let cached = CachedMemory::with_freshness(source.clone(), CAPACITY, Freshness::MaxAge(age));
        assert_eq!(value(&cached, 0x5000), 0);
        source.tick();
        std::thread::sleep(age + Duration::from_millis(1));
        assert_eq!(value(&cached, 0x5000), 1);
        // As fast as it gets: whatever comes is a value of the last 20 ms.
        let mut history = vec![(Instant::now(), 1)];
        for _ in 0..2000 {
            let began = Instant::now();
            let seen = value(&cached, 0x5000);
            let until = history
                .iter()
                .rposition(|(_, value)| *value == seen)
                .and_then(|index| history.get(index + 1))
                .map_or(began, |(changed, _)| *changed);
            assert!(began.saturating_duration_since(until) <= age);
            std::thread::sleep(Duration::from_micros(50));
            source.tick();
            history.push((Instant::now(), source.value.load(Ordering::SeqCst)));
            if history.len() > 250 {
                history.remove(0);
            }
        }
        assert!(source.reads() < 1000, "and yet something is kept");
        let strict = Freshness::MaxAge(Duration::ZERO);
        let cached = CachedMemory::with_freshness(source.clone(), CAPACITY, strict);
        let before = source.value.load(Ordering::SeqCst);
        assert_eq!(value(&cached, 0x5000), before);
        source.tick();
        std::thread::sleep(Duration::from_micros(10));
        assert_eq!(value(&cached, 0x5000), before.wrapping_add(1));
    }

    #[test]
    fn clearing_makes_everything_new() {
        let source = Counter::new(Volatility::Live);
        let cached = CachedMemory::with_freshness(source.clone(), CAPACITY, Freshness::SinceClear);
        for round in 0..50 {
            for page in 0..16 {
                assert_eq!(value(&cached, page * PAGE_SIZE), round);
            }
            source.tick();
            for page in 0..16 {
                assert_eq!(value(&cached, page * PAGE_SIZE), round, "one look");
            }
            cached.clear();
        }
        assert_eq!(source.reads(), 50 * 16);
    }

    #[test]
    fn holes_and_ends_inside_of_pages_are_exact() {
        let source = Counter::new(Volatility::Static);
        let cached = CachedMemory::new(source.clone(), CAPACITY);
        let read =
            |address, length| cached.read(PhysicalAddress::new(address), &mut vec![0; length]);
        assert_eq!(read(END - 8, 8), Ok(()));
        let hole = |address| {
            Err(PhysicalReadError::Hole {
                address: PhysicalAddress::new(address),
            })
        };
        assert_eq!(read(END - 8, 9), hole(END));
        assert_eq!(read(0xfff8, 16), hole(0x1_0000));
        assert_eq!(read(0x1_8004, 4), hole(0x1_8004));
        assert_eq!(read(u64::MAX, 1), hole(u64::MAX));
    }

    #[test]
    fn no_room_is_no_error() {
        let source = Counter::new(Volatility::Static);
        for capacity in [0, PAGE, WAYS * PAGE] {
            let cached = CachedMemory::new(source.clone(), capacity);
            for page in 0..16 {
                assert_eq!(value(&cached, page * PAGE_SIZE), 0);
            }
        }
    }

    #[test]
    fn threads_share_it() {
        let source = Counter::new(Volatility::Live);
        let cached = CachedMemory::with_freshness(source.clone(), 8 * PAGE, Freshness::SinceClear);
        let ticked = AtomicU8::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (cached, ticked) = (&cached, &ticked);
                scope.spawn(move || {
                    for step in 0..5000 {
                        // What was there before the last clear must not be
                        // seen after it.
                        let least = ticked.load(Ordering::SeqCst);
                        let page = (step * 7 + thread * 3) % 16;
                        assert!(value(cached, page * PAGE_SIZE) >= least);
                    }
                });
            }
            for _ in 0..100 {
                source.tick();
                cached.clear();
                ticked.fetch_add(1, Ordering::SeqCst);
                std::thread::yield_now();
            }
        });
    }

    /// Memory where each byte tells its address.
    struct Pattern([MemoryRegion; 1]);

    impl PhysicalMemory for Pattern {
        fn regions(&self) -> &[MemoryRegion] {
            &self.0
        }

        fn volatility(&self) -> Volatility {
            Volatility::Static
        }

        fn read(
            &self,
            address: PhysicalAddress,
            buffer: &mut [u8],
        ) -> Result<(), PhysicalReadError> {
            for (index, byte) in buffer.iter_mut().enumerate() {
                let address = address.wrapping_add(index as u64);
                if !self.0[0].contains(address) {
                    return Err(PhysicalReadError::Hole { address });
                }
                *byte = (address.as_u64().wrapping_mul(0x9e37_79b9) >> 13) as u8;
            }
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn the_cache_changes_no_byte(
            reads in prop::collection::vec((0_u64..0x2_0000, 0_usize..0x3000), 1..60),
            pages in 0_usize..20,
        ) {
            let region = MemoryRegion::new(PhysicalAddress::new(0x800), 0x1_a123);
            let source = Arc::new(Pattern([region]));
            let cached = CachedMemory::new(source.clone(), pages * PAGE);
            for (address, length) in reads {
                let address = PhysicalAddress::new(address);
                let (mut expected, mut found) = (vec![0; length], vec![0; length]);
                let outcome = source.read(address, &mut expected);
                prop_assert_eq!(cached.read(address, &mut found), outcome.clone());
                if outcome.is_ok() {
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }
}

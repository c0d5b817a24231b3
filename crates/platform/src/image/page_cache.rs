//! A bounded cache of decoded pages, for images that are compressed.
//!
//! Sharded, so that threads that read different pages seldom wait for each
//! other. Images don't change, so nothing in it can be stale.

use std::sync::Mutex;

/// Shards; a power of two.
const SHARDS: usize = 16;
/// Entries that one key may be in.
const WAYS: usize = 8;

/// What a key stands for.
#[derive(Clone, Debug)]
pub(crate) enum Cached {
    /// Nothing but zeros: most free memory, so it costs none here.
    Zeros,
    /// These bytes.
    Bytes(Box<[u8]>),
}

impl Cached {
    /// Copies from `offset` on into `buffer`; false if they are not all there.
    pub(crate) fn copy_to(&self, offset: usize, buffer: &mut [u8]) -> bool {
        match self {
            Self::Zeros => {
                buffer.fill(0);
                true
            }
            Self::Bytes(bytes) => match bytes.get(offset..).and_then(|b| b.get(..buffer.len())) {
                Some(bytes) => {
                    buffer.copy_from_slice(bytes);
                    true
                }
                None => false,
            },
        }
    }

    /// `bytes`, without keeping them if they are all zero.
    pub(crate) fn new(bytes: Box<[u8]>) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            Self::Zeros
        } else {
            Self::Bytes(bytes)
        }
    }
}

#[derive(Debug)]
struct Entry {
    key: u64,
    used: u64,
    value: Cached,
}

#[derive(Debug, Default)]
struct Shard {
    sets: Vec<Vec<Entry>>,
    clock: u64,
}

/// The cache: at most a fixed number of entries, the least recently used of a
/// set goes first.
#[derive(Debug)]
pub(crate) struct PageCache {
    shards: Vec<Mutex<Shard>>,
    sets: usize,
}

impl PageCache {
    /// A cache of at most about `entries`, whose values have the size that the
    /// caller puts in.
    pub(crate) fn new(entries: usize) -> Self {
        let sets = (entries / (SHARDS * WAYS)).max(1);
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            sets,
        }
    }

    /// The shard and set of `key`.
    fn place(&self, key: u64) -> (usize, usize) {
        // Fibonacci hashing: neighbouring keys go to different shards.
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
        let hash = hash as usize;
        (hash % SHARDS, (hash / SHARDS) % self.sets)
    }

    /// Calls `use_value` with the value of `key`, if it is there.
    pub(crate) fn with<R>(&self, key: u64, use_value: impl FnOnce(&Cached) -> R) -> Option<R> {
        let (shard, set) = self.place(key);
        // A panic in another thread leaves nothing half-written here.
        let mut shard = self
            .shards
            .get(shard)?
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        shard.clock += 1;
        let clock = shard.clock;
        let entry = shard
            .sets
            .get_mut(set)?
            .iter_mut()
            .find(|entry| entry.key == key)?;
        entry.used = clock;
        Some(use_value(&entry.value))
    }

    /// Puts a value in, in place of the one that was used longest ago if its
    /// set is full.
    pub(crate) fn insert(&self, key: u64, value: Cached) {
        let (shard, set) = self.place(key);
        let Some(shard) = self.shards.get(shard) else {
            return;
        };
        let mut shard = shard
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        shard.clock += 1;
        let used = shard.clock;
        if shard.sets.is_empty() {
            shard.sets.resize_with(self.sets, Vec::new);
        }
        let Some(set) = shard.sets.get_mut(set) else {
            return;
        };
        let entry = Entry { key, used, value };
        if let Some(same) = set.iter_mut().find(|other| other.key == key) {
            *same = entry;
        } else if set.len() < WAYS {
            set.push(entry);
        } else if let Some(oldest) = set.iter_mut().min_by_key(|other| other.used) {
            *oldest = entry;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_no_more_than_it_may_and_keeps_what_is_used() {
        let cache = PageCache::new(256);
        for key in 0..10_000u64 {
            cache.insert(key, Cached::new(vec![key as u8 | 1; 16].into()));
            let kept = cache.with(
                0,
                |value| matches!(value, Cached::Bytes(bytes) if bytes[0] == 1),
            );
            assert_eq!(kept, Some(true), "the key in use stays");
        }
        let held = (0..10_000)
            .filter(|key| cache.with(*key, |_| ()).is_some())
            .count();
        assert!((128..=256).contains(&held), "{held}");
    }

    #[test]
    fn zeros_cost_nothing() {
        assert!(matches!(Cached::new(vec![0; 4096].into()), Cached::Zeros));
        let mut buffer = [7; 4];
        assert!(Cached::Zeros.copy_to(4000, &mut buffer));
        assert_eq!(buffer, [0; 4]);
        let bytes = Cached::new(vec![1, 2, 3].into());
        assert!(!bytes.copy_to(2, &mut buffer));
        assert!(bytes.copy_to(1, &mut buffer[..2]));
        assert_eq!(buffer[..2], [2, 3]);
    }
}

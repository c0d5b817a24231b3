//! Sets and maps by address that are fast: two multiplications a look-up.
//!
//! The guest chooses the addresses. So each process draws a random key, and
//! both halves of each product are used: without the key nobody can prepare
//! addresses that collide. The second multiplication is by a constant, since
//! for some keys in a hundred the first one alone leaves neighbours together.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

use secmon_memory::VirtualAddress;

/// A set of addresses.
pub type AddressSet = HashSet<VirtualAddress, Keyed>;
/// A map by address.
pub type AddressMap<T> = HashMap<VirtualAddress, T, Keyed>;

/// Makes [`Folded`] hashers with the key of this process.
#[derive(Clone, Copy, Debug)]
pub struct Keyed {
    key: u64,
}

impl Default for Keyed {
    fn default() -> Self {
        static KEY: OnceLock<u64> = OnceLock::new();
        let draw = || RandomState::new().hash_one(0_u64) | 1;
        Self {
            key: *KEY.get_or_init(draw),
        }
    }
}

impl BuildHasher for Keyed {
    type Hasher = Folded;

    #[inline]
    fn build_hasher(&self) -> Folded {
        Folded {
            key: self.key,
            state: self.key.rotate_left(32),
        }
    }
}

/// 2^64 divided by the golden ratio, odd: neighbours end up far apart.
const GOLDEN_RATIO: u64 = 0x9e37_79b9_7f4a_7c15;

/// The two halves of the product, one over the other.
#[inline]
fn fold(left: u64, right: u64) -> u64 {
    let product = u128::from(left) * u128::from(right);
    (product >> 64) as u64 ^ product as u64
}

/// Multiplies and folds.
#[derive(Clone, Copy, Debug)]
pub struct Folded {
    key: u64,
    state: u64,
}

impl Hasher for Folded {
    #[inline]
    fn finish(&self) -> u64 {
        fold(self.state ^ self.key, GOLDEN_RATIO)
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.state = fold(self.state ^ value, self.key);
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut value = [0; 8];
            value[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_neighbours_with_every_key() {
        let mut key = 0x1234_5678_9abc_def1_u64;
        for _ in 0..300 {
            key = key.wrapping_mul(6_364_136_223_846_793_005) | 1;
            let keyed = Keyed { key };
            let hashes: HashSet<u64> = (0..4096_u64)
                .map(|index| {
                    keyed.hash_one(VirtualAddress::new(0xffff_8880_0000_0000 + index * 64))
                })
                .collect();
            assert_eq!(hashes.len(), 4096, "key {key:#x}");
            for shift in [0, 57] {
                let buckets: HashSet<u64> =
                    hashes.iter().map(|hash| hash >> shift & 0x7f).collect();
                assert!(buckets.len() > 100, "key {key:#x}, bits from {shift} on");
            }
        }
    }
}

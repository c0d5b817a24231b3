//! Which records have a name: a hash table over the strings of a blob, made
//! in one pass, as most of its names are never asked for.

/// The longest name that can be asked for (`KSYM_NAME_LEN`), its zero byte
/// included.
pub(super) const MAXIMUM_NAME: usize = 512;
/// Records of one bucket that are looked at. Real ones have a few.
const MAXIMUM_CHAIN: usize = 4096;

/// Record indices by the hash of the record's name. Different names may have
/// one hash: who asks compares the names.
#[derive(Debug)]
pub(super) struct NameIndex {
    /// By the low bits of the hash: the newest entry plus one, 0 for none.
    buckets: Vec<u32>,
    entries: Vec<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    record: u32,
    /// The entry before it in its bucket plus one, 0 for none.
    before: u32,
}

impl NameIndex {
    /// An empty index, of a size for some `names`.
    pub(super) fn new(names: usize) -> Self {
        let buckets = names.clamp(64, 1 << 20).next_power_of_two();
        Self {
            buckets: vec![0; buckets],
            entries: Vec::with_capacity(names),
        }
    }

    /// Notes the record under a name of this hash.
    #[inline]
    pub(super) fn insert(&mut self, hash: u64, record: u32) {
        let mask = self.buckets.len() as u64 - 1;
        if let Some(bucket) = self.buckets.get_mut((hash & mask) as usize) {
            let before = std::mem::replace(bucket, self.entries.len() as u32 + 1);
            self.entries.push(Entry { record, before });
        }
    }

    /// The records that may have this name, the newest first.
    pub(super) fn candidates(&self, name: &[u8]) -> impl Iterator<Item = u32> {
        let mask = self.buckets.len() as u64 - 1;
        let bucket = self.buckets.get((hash(name) & mask) as usize);
        let entry = |number: u32| self.entries.get(number.checked_sub(1)? as usize).copied();
        let first = bucket.and_then(|bucket| entry(*bucket));
        std::iter::successors(first, move |last| entry(last.before))
            .take(MAXIMUM_CHAIN)
            .map(|entry| entry.record)
    }
}

/// The hash of the name at the start of `text`, which a zero byte ends; none
/// for a name without an end, or one longer than any that can be asked for.
#[inline]
pub(super) fn hash_terminated(text: &[u8]) -> Option<u64> {
    let mut hash = 0;
    for position in (0..MAXIMUM_NAME).step_by(8) {
        let rest = text.get(position..)?;
        let word = match rest.first_chunk() {
            Some(bytes) => u64::from_le_bytes(*bytes),
            None => {
                // What is not there is no zero byte.
                let mut bytes = [0xff; 8];
                for (to, from) in bytes.iter_mut().zip(rest) {
                    *to = *from;
                }
                u64::from_le_bytes(bytes)
            }
        };
        // The lowest bit that is set is the highest of the first zero byte.
        let zero = word.wrapping_sub(0x0101_0101_0101_0101) & !word & 0x8080_8080_8080_8080;
        if zero != 0 {
            let bits = zero.trailing_zeros() & !7;
            return Some(mix(hash, word & !(u64::MAX << bits)));
        }
        hash = mix(hash, word);
    }
    None
}

/// The hash of a name.
pub(super) fn hash(name: &[u8]) -> u64 {
    let (words, rest) = name.as_chunks::<8>();
    let hash = words
        .iter()
        .fold(0, |hash, word| mix(hash, u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    mix(hash, u64::from_le_bytes(last))
}

#[inline]
fn mix(hash: u64, word: u64) -> u64 {
    // The halves of a product, one over the other: each bit depends on each.
    let product = u128::from(hash ^ word ^ 0x243f_6a88_85a3_08d3) * 0x9e37_79b9_7f4a_7c15;
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Both ways to a name's hash agree, whatever follows its end.
        #[test]
        fn hashes_agree(
            name in prop::collection::vec(1_u8.., 0..40),
            after in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut text = name.clone();
            prop_assert_eq!(hash_terminated(&text), None);
            text.push(0);
            text.extend(after);
            prop_assert_eq!(hash_terminated(&text), Some(hash(&name)));
        }

        /// Whatever is put in is found under its name.
        #[test]
        fn finds_what_was_put_in(names in prop::collection::vec("[a-c]{0,3}", 0..200)) {
            let mut index = NameIndex::new(names.len() / 4);
            for (record, name) in names.iter().enumerate() {
                index.insert(hash(name.as_bytes()), record as u32);
            }
            for (record, name) in names.iter().enumerate() {
                prop_assert!(index.candidates(name.as_bytes()).any(|found| found == record as u32));
            }
        }
    }

    #[test]
    fn names_without_end_have_no_hash() {
        assert_eq!(hash_terminated(b""), None);
        assert_eq!(hash_terminated(&[b'x'; 4096]), None);
        let mut longest = vec![b'x'; MAXIMUM_NAME];
        longest[MAXIMUM_NAME - 1] = 0;
        assert!(hash_terminated(&longest).is_some());
    }

    #[test]
    fn a_crowded_bucket_is_not_walked_to_its_end() {
        let mut index = NameIndex::new(0);
        for record in 0..3 * MAXIMUM_CHAIN as u32 {
            index.insert(hash(b"same"), record);
        }
        assert_eq!(index.candidates(b"same").count(), MAXIMUM_CHAIN);
    }
}

//! The symbols of a kernel or a module: names and run-time addresses.
//!
//! The names stay compressed as the kernel keeps them (see `kallsyms.rs`); a
//! hash table of symbol numbers answers for one name by unpacking the few
//! candidates. Only listings, and the search for the symbol nearest to an
//! address, unpack all names, once.

use std::sync::{Arc, OnceLock};

use secmon_memory::{Buffer, VirtualAddress};

use crate::kallsyms::{KallsymsError, MAXIMUM_NAMESAKES, NameHash, Names, Offsets};
use crate::part::{Part, Words};

/// One symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolRef<'a> {
    /// Its name; what is not UTF-8 in it is replaced by U+FFFD.
    pub name: &'a str,
    /// Where it is now, KASLR included. Of a per-CPU symbol: what is to be
    /// added to a CPU's `__per_cpu_offset` to get there.
    pub address: VirtualAddress,
    /// Its kind as in `/proc/kallsyms` and `nm`: `T` text, `D` data, `A`
    /// absolute, lower case for local ones; `?` where it is not known.
    pub kind: char,
}

/// The symbols of one kernel build or module.
#[derive(Debug)]
pub struct Symbols {
    names: Names,
    offsets: Offsets,
    /// Open addressing by name: symbol numbers plus one, 0 where empty. The
    /// length is a power of two, at least a third of it empty.
    slots: Words,
    /// Symbol numbers by address, if they are not in that order already.
    by_address: OnceLock<Option<Vec<u32>>>,
    unpacked: OnceLock<Unpacked>,
}

/// All names, one after the other.
#[derive(Debug)]
struct Unpacked {
    text: String,
    /// Where each name ends, and its kind.
    ends: Vec<(u32, char)>,
}

impl Symbols {
    /// The symbols of these names and addresses, as many of each, with an index
    /// made by [`index`], maybe kept in a cache. One that does not fit makes
    /// lookups fail, nothing worse; the cache guards against that.
    pub(crate) fn with_index(names: Names, offsets: Offsets, slots: Words) -> Self {
        debug_assert_eq!(names.len(), offsets.len());
        Self {
            names,
            offsets,
            slots,
            by_address: OnceLock::new(),
            unpacked: OnceLock::new(),
        }
    }

    /// Takes the other's memory in place of its own where the bytes are the
    /// same.
    pub(crate) fn share(&mut self, other: &Self) {
        self.names.share(&other.names);
        self.offsets.share(&other.offsets);
        self.slots.share(&other.slots);
    }

    /// Symbol numbers by address, if they are not in that order already.
    fn by_address(&self) -> Option<&[u32]> {
        let order = self.by_address.get_or_init(|| {
            (!self.offsets.are_sorted()).then(|| {
                let mut numbers: Vec<u32> = (0..self.len() as u32).collect();
                numbers.sort_by_key(|number| self.offsets.get(*number as usize));
                numbers
            })
        });
        order.as_deref()
    }

    /// Symbols from a list, for sources other than the kernel's own tables.
    pub(crate) fn from_list(list: &[(String, u64, char)]) -> Result<Self, KallsymsError> {
        let names = list.iter().map(|(name, _, kind)| (name.as_str(), *kind));
        let addresses = list.iter().map(|(_, address, _)| *address).collect();
        let names = Names::from_list(names)?;
        let slots = index(&names)?;
        Ok(Self::with_index(names, Offsets::Absolute(addresses), slots))
    }

    /// How many symbols there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first symbol of that name.
    pub fn address(&self, name: &str) -> Option<VirtualAddress> {
        self.addresses(name).next()
    }

    /// The addresses of all symbols of that name, lowest first: names of
    /// `static` functions and variables repeat.
    pub fn addresses(&self, name: &str) -> impl Iterator<Item = VirtualAddress> {
        let mut found: Vec<u64> = numbers_of(&self.names, &self.slots, name)
            .into_iter()
            .filter_map(|number| self.offsets.get(number))
            .collect();
        found.sort_unstable();
        found.into_iter().map(VirtualAddress::new)
    }

    /// The last symbol at or below `address`, and the distance to it. It says
    /// nothing about whether the address belongs to that symbol.
    pub fn nearest(&self, address: VirtualAddress) -> Option<(SymbolRef<'_>, u64)> {
        let order = self.by_address();
        let at = |position: usize| -> Option<u64> {
            let number = match order {
                Some(order) => *order.get(position)? as usize,
                None => position,
            };
            self.offsets.get(number)
        };
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match at(middle) {
                Some(other) if other <= address.as_u64() => low = middle + 1,
                _ => high = middle,
            }
        }
        let mut position = low.checked_sub(1)?;
        let found = at(position)?;
        // Of several symbols at one address the kernel means the first.
        while position > 0 && at(position - 1) == Some(found) {
            position -= 1;
        }
        let number = match order {
            Some(order) => *order.get(position)? as usize,
            None => position,
        };
        Some((self.symbol(number)?, address.as_u64() - found))
    }

    /// All symbols, in the order of the kernel's table.
    pub fn iter(&self) -> impl Iterator<Item = SymbolRef<'_>> {
        (0..self.len()).filter_map(|number| self.symbol(number))
    }

    fn symbol(&self, number: usize) -> Option<SymbolRef<'_>> {
        let unpacked = self.unpacked.get_or_init(|| Unpacked::new(&self.names));
        let (end, kind) = *unpacked.ends.get(number)?;
        let start = match number.checked_sub(1) {
            Some(before) => unpacked.ends.get(before)?.0,
            None => 0,
        };
        Some(SymbolRef {
            name: unpacked.text.get(start as usize..end as usize)?,
            address: VirtualAddress::new(self.offsets.get(number)?),
            kind,
        })
    }

    /// The index, to be kept in a cache.
    pub(crate) fn index(&self) -> &Words {
        &self.slots
    }
}

impl Unpacked {
    fn new(names: &Names) -> Self {
        let mut text = String::with_capacity(names.len() * 24);
        let mut ends = Vec::with_capacity(names.len());
        names.for_each(|kind, name| {
            match str::from_utf8(name) {
                Ok(name) => text.push_str(name),
                Err(_) => text.push_str(&String::from_utf8_lossy(name)),
            }
            ends.push((text.len() as u32, char::from(kind)));
        });
        Self { text, ends }
    }
}

/// The length of the hash table for that many symbols.
pub(crate) fn index_length(symbols: usize) -> usize {
    (symbols + symbols / 2 + 1).next_power_of_two()
}

/// The hash table of all names: see [`Symbols`].
///
/// # Errors
/// [`KallsymsError::TooLong`] if the names are longer than any kernel's,
/// [`KallsymsError::Namesakes`] if too many are the same.
pub(crate) fn index(names: &Names) -> Result<Words, KallsymsError> {
    let mut buffer = Buffer::zeroed(index_length(names.len()) * 4);
    let slots = buffer.as_chunks_mut::<4>().0;
    let mask = slots.len() - 1;
    let mut number = 0_u32;
    // A guest can choose names of equal hashes: with each of them behind all
    // others there would be no end of it.
    let mut crowded = false;
    names.hashes(|hash| {
        number += 1;
        if crowded {
            return;
        }
        let mut places =
            (0..MAXIMUM_NAMESAKES).map(|step| (hash as usize).wrapping_add(step) & mask);
        let empty = places.find(|place| slots[*place] == [0; 4]);
        match empty {
            Some(place) => slots[place] = number.to_le_bytes(),
            None => crowded = true,
        }
    })?;
    if crowded {
        return Err(KallsymsError::Namesakes);
    }
    let length = buffer.len();
    Ok(Part::new(&Arc::new(buffer), 0..length).into())
}

/// The numbers of all symbols of that name.
pub(crate) fn numbers_of(names: &Names, slots: &Words, name: &str) -> Vec<usize> {
    let mut slot = hash(name) as usize;
    let mut found = Vec::new();
    let mut unpacked = Vec::new();
    for _ in 0..slots.len().min(MAXIMUM_NAMESAKES) {
        slot &= slots.len() - 1;
        let Some(number) = slots.get(slot).and_then(|number| number.checked_sub(1)) else {
            break;
        };
        if names.get(number as usize, &mut unpacked).is_some() && unpacked == name.as_bytes() {
            found.push(number as usize);
        }
        slot += 1;
    }
    found
}

fn hash(name: &str) -> u64 {
    let mut hash = NameHash::new();
    hash.add(name.as_bytes());
    hash.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: [(&str, u64, char); 6] = [
        ("cpu_number", 0x1000, 'A'),
        ("_text", 0xffff_ffff_8100_0000, 'T'),
        ("_stext", 0xffff_ffff_8100_0000, 'T'),
        ("twice", 0xffff_ffff_8100_0040, 't'),
        ("banner", 0xffff_ffff_8200_0000, 'D'),
        ("twice", 0xffff_ffff_8100_0080, 't'),
    ];

    fn sample() -> Symbols {
        let list = SAMPLE.map(|(name, address, kind)| (name.to_owned(), address, kind));
        Symbols::from_list(&list).expect("a short list")
    }

    #[test]
    fn finds_by_name() {
        let symbols = sample();
        let found = symbols.address("banner");
        assert_eq!(found, Some(VirtualAddress::new(0xffff_ffff_8200_0000)));
        assert_eq!(symbols.address("bann"), None);
        assert_eq!(symbols.address(""), None);
        let twice: Vec<u64> = symbols
            .addresses("twice")
            .map(VirtualAddress::as_u64)
            .collect();
        assert_eq!(twice, [0xffff_ffff_8100_0040, 0xffff_ffff_8100_0080]);
    }

    #[test]
    fn finds_by_address() {
        let symbols = sample();
        let near = |address| {
            symbols
                .nearest(VirtualAddress::new(address))
                .map(|(symbol, distance)| (symbol.name, distance))
        };
        assert_eq!(near(0xfff), None);
        assert_eq!(near(0x1004), Some(("cpu_number", 4)));
        assert_eq!(near(0xffff_ffff_8100_0001), Some(("_text", 1)));
        assert_eq!(near(0xffff_ffff_8100_0081), Some(("twice", 1)));
        assert_eq!(near(u64::MAX), Some(("banner", 0x7dff_ffff)));
    }

    #[test]
    fn an_index_that_does_not_fit_finds_nothing() {
        for slots in [vec![], vec![7; 16], vec![u32::MAX; 4]] {
            let names = Names::from_list(SAMPLE.iter().map(|(name, _, kind)| (*name, *kind)));
            let offsets = Offsets::Absolute(SAMPLE.map(|(_, address, _)| address).to_vec());
            let symbols = Symbols::with_index(names.expect("a short list"), offsets, slots.into());
            assert_eq!(symbols.address("banner"), None);
        }
    }

    #[test]
    fn namesakes_are_bounded() {
        let list = |count| vec![("same".to_owned(), 1, 't'); count];
        let symbols = Symbols::from_list(&list(MAXIMUM_NAMESAKES)).expect("as many as accepted");
        assert_eq!(symbols.addresses("same").count(), MAXIMUM_NAMESAKES);
        let refused = Symbols::from_list(&list(MAXIMUM_NAMESAKES + 1));
        assert!(matches!(refused, Err(KallsymsError::Namesakes)));
    }
}

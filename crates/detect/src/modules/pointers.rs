//! Pointers in the kernel's and its modules' variables that lead into a range.

use std::ops::Range;

use secmon_guest::Guest;
use secmon_guest::linux::code::CodeMap;
use secmon_memory::{PAGE_SIZE, VirtualAddress};

/// No more bytes of variables than this are searched.
const MOST_BYTES: u64 = 256 << 20;

/// The first `most` places in data of the kernel and of listed modules that
/// hold an address in `range`, with that address.
pub(super) fn into(
    guest: &Guest,
    map: &CodeMap,
    range: &Range<VirtualAddress>,
    most: usize,
) -> Vec<(VirtualAddress, VirtualAddress)> {
    let image = [&map.image.rodata, &map.image.data, &map.image.bss];
    let mut places: Vec<(u64, u64)> = image
        .into_iter()
        .map(|range| (range.start.as_u64(), range.end.as_u64()))
        .collect();
    for module in &map.modules {
        for (start, size) in module.parts() {
            places.push((start.as_u64(), start.as_u64().saturating_add(size)));
        }
    }
    let mut found = Vec::new();
    let mut page = [0; PAGE_SIZE as usize];
    let mut left = MOST_BYTES / PAGE_SIZE;
    for (start, end) in places {
        let mut position = start & !(PAGE_SIZE - 1);
        while position < end && left > 0 && found.len() < most {
            left -= 1;
            let address = VirtualAddress::new(position);
            position = match position.checked_add(PAGE_SIZE) {
                Some(next) => next,
                None => break,
            };
            if guest.space().read(address, &mut page).is_err() {
                continue;
            }
            for (index, word) in page.as_chunks::<8>().0.iter().enumerate() {
                let target = VirtualAddress::new(u64::from_le_bytes(*word));
                if range.contains(&target) && found.len() < most {
                    found.push((address.wrapping_add(index as u64 * 8), target));
                }
            }
        }
    }
    found
}

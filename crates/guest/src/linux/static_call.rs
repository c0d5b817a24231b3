//! Static calls (`include/linux/static_call.h`): calls that the kernel writes
//! into its text anew when the function behind them changes. Tracepoints with
//! one function, and callbacks of virtual machines' monitors, lead into modules
//! that way.

use std::collections::HashMap;

use secmon_memory::VirtualAddress;

use super::hash::AddressMap;
use crate::{Guest, TableError, layout};

/// More sites than this has no kernel.
const MOST_SITES: u64 = 1 << 20;
/// Bytes of a site's record: the distances to it and to its key.
const RECORD: usize = 8;
/// What the low bits of the distance to the key are for (`STATIC_CALL_SITE_FLAGS`).
const FLAGS: u64 = 3;

layout! {
    /// `include/linux/static_call_types.h`
    struct KeyLayout: "static_call_key" {
        function: "func",
    }
}

/// The keys of static calls in the kernel's text, by the addresses of the calls.
#[derive(Debug, Default)]
pub struct StaticCalls {
    keys: AddressMap<VirtualAddress>,
    function: u64,
}

impl StaticCalls {
    /// Reads the kernel's records; empty if it has none.
    ///
    /// # Errors
    /// [`TableError`] if they can't be read.
    pub fn read(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let (Some(start), Some(end)) = (
            guest.address("__start_static_call_sites"),
            guest.address("__stop_static_call_sites"),
        ) else {
            return Ok(Self::default());
        };
        let Ok(layout) = guest.layout::<KeyLayout>(table) else {
            return Ok(Self::default());
        };
        let count = end.as_u64().saturating_sub(start.as_u64()) / RECORD as u64;
        let mut bytes = vec![0; count.min(MOST_SITES) as usize * RECORD];
        guest
            .space()
            .read(start, &mut bytes)
            .map_err(|source| TableError::Read {
                table,
                what: "static_call_sites",
                source,
            })?;
        let mut keys: AddressMap<VirtualAddress> = HashMap::default();
        for (index, record) in bytes.as_chunks::<RECORD>().0.iter().enumerate() {
            let [a, b, c, d, e, f, g, h] = *record;
            let place = start.as_u64().wrapping_add((index * RECORD) as u64);
            let to = |from: u64, distance: [u8; 4]| {
                from.wrapping_add_signed(i32::from_le_bytes(distance).into())
            };
            let site = to(place, [a, b, c, d]);
            let key = to(place.wrapping_add(4), [e, f, g, h]) & !FLAGS;
            keys.insert(VirtualAddress::new(site), VirtualAddress::new(key));
        }
        Ok(Self {
            keys,
            function: layout.function.offset,
        })
    }

    /// The key of the call at `site`: one in the text, or a trampoline, whose
    /// symbol has the key's name.
    pub fn key_of(&self, guest: &Guest, site: VirtualAddress) -> Option<VirtualAddress> {
        if let Some(key) = self.keys.get(&site) {
            return Some(*key);
        }
        let (symbol, distance) = guest.symbols().nearest(site)?;
        let name = symbol.name.strip_prefix("__SCT__")?;
        let key = guest.symbols().address(&format!("__SCK__{name}"));
        key.filter(|_| distance == 0)
    }

    /// The function behind a key.
    pub fn function_of(&self, guest: &Guest, key: VirtualAddress) -> Option<VirtualAddress> {
        guest
            .space()
            .read_pointer(key.wrapping_add(self.function))
            .ok()
    }
}

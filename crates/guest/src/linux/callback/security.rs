//! Hooks of security modules (`security/security.c`): lists of them in the
//! kernel's constants until Linux 6.11, static calls since.

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use super::{LeadsTo, Walk};
use crate::linux::hash::AddressSet;
use crate::linux::list::is_object_address;
use crate::{Layout, TableError, Text, layout};

/// More security modules than this are in no list.
const MOST_MODULES: usize = 1 << 8;
/// No kernel's table of hooks has more bytes.
const LARGEST_TABLE: u64 = 1 << 20;
/// Bytes of the head of a list.
const HEAD: u64 = 8;

layout! {
    /// `include/linux/lsm_hooks.h`, until Linux 6.11.
    struct HookLayout: "security_hook_list" {
        next: "list",
        function: "hook",
    }
}

layout! {
    /// `include/linux/lsm_hooks.h`, since Linux 6.12.
    struct CallLayout: "lsm_static_call" {
        key: "key",
        trampoline: "trampoline",
        hook: "hl",
    }
}

layout! {
    /// `include/linux/static_call_types.h`
    struct KeyLayout: "static_call_key" {
        function: "func",
    }
}

/// The hooks, by their places in the table of one kernel.
trait Table: Layout {
    /// The structure's name.
    const NAME: &'static str;
}

/// The members of a table of hooks: names, places and sizes.
struct Places<const LISTS: bool> {
    hooks: Vec<(Text, u64, u64)>,
    size: u64,
}

impl Table for Places<true> {
    const NAME: &'static str = "security_hook_heads";
}

impl Table for Places<false> {
    const NAME: &'static str = "lsm_static_calls_table";
}

impl<const LISTS: bool> Layout for Places<LISTS>
where
    Self: Table,
{
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let members = types.members(Self::NAME)?;
        let hooks = members.into_iter().map(|named| {
            let name = Text::from(named.name.unwrap_or_default());
            (name, named.member.offset, named.member.size)
        });
        Ok(Self {
            hooks: hooks.collect(),
            size: types.size_of(Self::NAME)?,
        })
    }
}

/// The functions of all hooks.
pub(super) fn hooks(walk: &mut Walk<'_>) -> Result<(), TableError> {
    if let Some(heads) = walk.guest.address("security_hook_heads") {
        lists(walk, heads)?;
    }
    if let Some(calls) = walk.guest.address("static_calls_table")
        && walk.guest.types(walk.table)?.has_type("lsm_static_call")
    {
        static_calls(walk, calls)?;
    }
    Ok(())
}

fn lists(walk: &mut Walk<'_>, heads: VirtualAddress) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let places = guest.layout::<Places<true>>(table)?;
    let layout = guest.layout::<HookLayout>(table)?;
    for (name, offset, _) in places.hooks.iter().filter(|(_, _, size)| *size == HEAD) {
        let mut link = heads.wrapping_add(*offset);
        let mut seen = AddressSet::default();
        let mut step = || -> Result<bool, ReadError> {
            let hook = guest.space().read_pointer(link)?;
            walk.keep(
                "security_hook_list",
                name,
                link,
                hook,
                LeadsTo::SecurityRecord,
            );
            if !is_object_address(guest.space(), hook)
                || seen.len() >= MOST_MODULES
                || !seen.insert(hook)
            {
                return Ok(false);
            }
            let hook = hook.wrapping_sub(layout.next.offset);
            let function = hook.wrapping_add(layout.function.offset);
            walk.add("security_hook", name, function, LeadsTo::SecurityHook)?;
            link = hook.wrapping_add(layout.next.offset);
            Ok(true)
        };
        let stopped = loop {
            match step() {
                Ok(true) => {}
                Ok(false) => break None,
                Err(error) => break Some(error),
            }
        };
        if let Some(error) = stopped {
            walk.complain("security_hook_list", link, &error);
        }
    }
    Ok(())
}

fn static_calls(walk: &mut Walk<'_>, calls: VirtualAddress) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let places = guest.layout::<Places<false>>(table)?;
    let layout = guest.layout::<CallLayout>(table)?;
    let key = guest.layout::<KeyLayout>(table)?;
    let mut bytes = vec![0; places.size.min(LARGEST_TABLE) as usize];
    guest
        .space()
        .read(calls, &mut bytes)
        .map_err(|source| TableError::Read {
            table,
            what: "static_calls_table",
            source,
        })?;
    let word = |offset: u64| -> VirtualAddress {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| bytes.get(offset..)?.first_chunk::<8>());
        VirtualAddress::new(bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes)))
    };
    let step = layout.size.max(HEAD);
    for (name, offset, size) in &places.hooks {
        for number in 0..size.min(&places.size) / step {
            let call = offset.wrapping_add(number * step);
            if call >= places.size {
                break;
            }
            let mut keep = |kind, member: u64, leads_to| {
                let place = call.wrapping_add(member);
                walk.keep(kind, name, calls.wrapping_add(place), word(place), leads_to);
            };
            keep(
                "security_hook_list",
                layout.hook.offset,
                LeadsTo::SecurityRecord,
            );
            keep(
                "static_call_key",
                layout.key.offset,
                LeadsTo::SecurityRecord,
            );
            keep(
                "lsm_static_call",
                layout.trampoline.offset,
                LeadsTo::SecurityHook,
            );
            let key_at = word(call.wrapping_add(layout.key.offset));
            if !is_object_address(guest.space(), key_at) {
                continue;
            }
            let function = key_at.wrapping_add(key.function.offset);
            if let Err(error) = walk.add("security_hook", name, function, LeadsTo::SecurityHook) {
                walk.complain("static_call_key", key_at, &error);
            }
        }
    }
    Ok(())
}

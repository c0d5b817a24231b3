//! The sites of ftrace: five bytes at the start of nearly each function, which
//! hold nothing or a call for tracing.

use std::ops::Range;

use secmon_guest::Guest;
use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::linux::tracing::ftrace_sites;
use secmon_memory::VirtualAddress;

use super::{NAME, finding};
use crate::code::{self, Target};
use crate::{DetectError, Finding};

/// Bytes of a site.
const SITE: usize = 5;
/// What x86-64 kernels have put where nothing is to be done.
const EMPTY: [[u8; SITE]; 4] = [
    [0x0f, 0x1f, 0x44, 0x00, 0x00],
    [0x66, 0x66, 0x66, 0x66, 0x90],
    [0x3e, 0x8d, 0x74, 0x26, 0x00],
    [0x66, 0x66, 0x66, 0x90, 0x90],
];
const CALL: u8 = 0xe8;
/// What stands there for moments, and where a kprobe is.
const BREAKPOINT: u8 = 0xcc;
/// Bytes that are read at a time.
const BLOCK: u64 = 1 << 16;

/// Looks at each site that lies in the kernel or in a listed module.
pub(super) fn look(
    guest: &Guest,
    map: &CodeMap,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    let sites = ftrace_sites(guest, NAME)?;
    let mut text = Window::default();
    for site in sites.iter() {
        let address = site.address;
        let Some(bytes) = text.at(guest, address) else {
            continue;
        };
        let Some(fault) = fault(guest, map, address, bytes) else {
            continue;
        };
        // Records of memory that was freed tell nothing.
        if !matches!(
            map.owner_of(address),
            Some(CodeOwner::Kernel | CodeOwner::Module { .. })
        ) {
            continue;
        }
        // Tracing may be switched on or off just now.
        let mut again = [0; SITE];
        let same = guest.space().read(address, &mut again).is_ok() && again == bytes;
        if same {
            let (target, what) = fault;
            findings(finding(
                guest,
                map,
                "traced_function",
                address,
                target,
                what,
            ));
        }
    }
    Ok(())
}

/// What is wrong with the bytes of a site, if something is.
fn fault(
    guest: &Guest,
    map: &CodeMap,
    address: VirtualAddress,
    bytes: [u8; SITE],
) -> Option<(Option<VirtualAddress>, &'static str)> {
    if EMPTY.contains(&bytes) || bytes[0] == BREAKPOINT {
        return None;
    }
    let [CALL, a, b, c, d] = bytes else {
        return Some((None, "starts with what is no call for tracing"));
    };
    let distance = i32::from_le_bytes([a, b, c, d]);
    let next = address.wrapping_add(SITE as u64);
    let target = VirtualAddress::new(next.as_u64().wrapping_add_signed(distance.into()));
    (!may_trace(guest, map, target)).then_some((Some(target), "calls"))
}

/// Whether ftrace lets traced functions call that.
pub(crate) fn may_trace(guest: &Guest, map: &CodeMap, target: VirtualAddress) -> bool {
    match code::target(map, target) {
        Target::Owned(CodeOwner::Kernel) => is_tracer(guest, target),
        // Direct calls may be registered by a module of its own functions.
        Target::Owned(
            CodeOwner::FtraceTrampoline { .. }
            | CodeOwner::Bpf { .. }
            | CodeOwner::BpfPack
            | CodeOwner::Module { .. },
        ) => true,
        _ => false,
    }
}

/// Whether ftrace's own code is there.
fn is_tracer(guest: &Guest, target: VirtualAddress) -> bool {
    let known = ["ftrace_caller", "ftrace_regs_caller", "__fentry__"];
    known
        .into_iter()
        .any(|symbol| guest.address(symbol) == Some(target))
}

/// A piece of text that was read last: sites come by ascending address.
#[derive(Default)]
struct Window {
    range: Range<u64>,
    bytes: Vec<u8>,
}

impl Window {
    fn at(&mut self, guest: &Guest, address: VirtualAddress) -> Option<[u8; SITE]> {
        let start = address.as_u64();
        let end = start.checked_add(SITE as u64)?;
        if start < self.range.start || end > self.range.end {
            self.bytes.resize(BLOCK as usize, 0);
            // The last site of a module may lie right before its end.
            let full = guest.space().read(address, &mut self.bytes).is_ok();
            if !full {
                self.bytes.truncate(SITE);
                guest.space().read(address, &mut self.bytes).ok()?;
            }
            self.range = start..start.checked_add(self.bytes.len() as u64)?;
        }
        let offset = (start - self.range.start) as usize;
        self.bytes.get(offset..)?.first_chunk().copied()
    }
}

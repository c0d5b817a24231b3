//! Instructions in text that lead to code outside of the kernel: jumps and calls
//! by distance, and those through an address that stands in the code.
//!
//! The text is looked at byte by byte, which finds every such instruction and
//! bytes in the middle of others that look like one. The few of them that would
//! lead to foreign code are decoded from the start of their function on.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};
use secmon_guest::Guest;
use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::linux::module::knowledge::symbols_of;
use secmon_guest::linux::static_call::StaticCalls;
use secmon_memory::{PAGE_SIZE, VirtualAddress};

use super::{NAME, finding};
use crate::code::{self, Target};
use crate::{DetectError, Finding};

/// No text of a kernel or module is longer.
const MOST_BYTES: u64 = 256 << 20;
/// Bytes that are looked at at a time.
const BLOCK: usize = 1 << 18;
/// The longest form that is looked for, in bytes.
const LONGEST: usize = 16;
/// Suspects that lie no further apart are looked for together.
const CLOSE: u64 = 4 << 20;
/// A function whose start lies further away is not decoded.
const LONGEST_FUNCTION: u64 = 1 << 16;
/// More candidates than this are not decoded in one text.
const MOST_CANDIDATES: usize = 1 << 14;

/// Looks at the text of the kernel and of each listed module.
pub(super) fn look(
    guest: &Guest,
    map: &CodeMap,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    let calls = StaticCalls::read(guest, NAME)?;
    let mut judge = |text: &Range<VirtualAddress>, candidates: Vec<Candidate>, kernel: bool| {
        for candidate in candidates {
            if !is_suspect(map, candidate.target, kernel)
                || is_static_call(guest, map, &calls, candidate)
                || !is_instruction(guest, map, text, candidate.address)
            {
                continue;
            }
            // The kernel may be changing its text just now.
            if again(guest, candidate) {
                findings(finding(
                    guest,
                    map,
                    "code_detour",
                    candidate.address,
                    Some(candidate.target),
                    "leads to",
                ));
            }
        }
    };
    let text = &map.image.text;
    let suspects = Suspects::of(map, true);
    let found = candidates(guest, text, &suspects)?;
    judge(text, found, true);
    let suspects = Suspects::of(map, false);
    if suspects.is_empty() {
        return Ok(());
    }
    for module in &map.modules {
        let Some((start, size)) = module.parts().next() else {
            continue;
        };
        let Some(end) = start.checked_add(size) else {
            continue;
        };
        let text = start..end;
        // A module may be on its way out.
        let Ok(found) = candidates(guest, &text, &suspects) else {
            continue;
        };
        judge(&text, found, false);
    }
    Ok(())
}

/// Bytes that look like an instruction which leads out of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Candidate {
    address: VirtualAddress,
    target: VirtualAddress,
}

/// Where the code lies that a text does not lead to.
struct Suspects(Vec<Range<u64>>);

impl Suspects {
    /// Of the kernel's text: code of modules, and of nobody. Of a module's:
    /// code of nobody.
    fn of(map: &CodeMap, kernel: bool) -> Self {
        let mut ranges: Vec<Range<u64>> = map
            .unowned()
            .iter()
            .map(|code| code.range.start.as_u64()..code.range.end.as_u64())
            .collect();
        if kernel {
            for module in &map.modules {
                // The first part is the one that is executed.
                ranges.extend(module.parts().next().map(|(start, size)| {
                    let start = start.as_u64();
                    start..start.saturating_add(size)
                }));
            }
        }
        ranges.sort_unstable_by_key(|range| range.start);
        // What lies close together is one range: who exactly owns an address
        // is asked later.
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match joined.last_mut() {
                Some(last) if range.start <= last.end.saturating_add(CLOSE) => {
                    last.end = last.end.max(range.end);
                }
                _ => joined.push(range),
            }
        }
        Self(joined)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn contain(&self, target: u64) -> bool {
        self.0.iter().any(|range| range.contains(&target))
    }

    /// Which bytes can be the highest of four that lead from code between
    /// `start` and `end` to a suspect, as a distance or as the lower half of
    /// an address.
    fn highest_bytes(&self, start: u64, end: u64) -> [bool; 256] {
        let mut table = [false; 256];
        for range in &self.0 {
            let lowest = range.start.wrapping_sub(end.wrapping_add(LONGEST as u64));
            let highest = range.end.wrapping_sub(start);
            for (first, last) in [(lowest, highest), (range.start, range.end)] {
                let length = last.wrapping_sub(first).min(1 << 32) >> 24;
                for step in 0..=length + 1 {
                    let byte = (first >> 24).wrapping_add(step) as u8;
                    table[usize::from(byte)] = true;
                }
            }
        }
        table
    }
}

/// Whether an address of code is one that this text does not lead to.
fn is_suspect(map: &CodeMap, target: VirtualAddress, kernel: bool) -> bool {
    match code::target(map, target) {
        Target::Unowned => true,
        Target::NoCode(owner) => *owner == CodeOwner::TextGap,
        // Text of the kernel was linked without modules; that of modules may
        // lead to other modules.
        Target::Owned(CodeOwner::Module { .. }) => kernel,
        Target::Owned(_) | Target::Beside | Target::NotExecutable => false,
    }
}

/// Whether the kernel's own record of a static call leads there, to a listed
/// module: so do tracepoints with one function, and callbacks for guests of
/// this guest. A security hook never does: no module can have one.
fn is_static_call(guest: &Guest, map: &CodeMap, calls: &StaticCalls, candidate: Candidate) -> bool {
    if !matches!(
        map.owner_of(candidate.target),
        Some(CodeOwner::Module { .. })
    ) {
        return false;
    }
    let Some(key) = calls.key_of(guest, candidate.address) else {
        return false;
    };
    let security = guest
        .symbols()
        .nearest(key)
        .is_some_and(|(symbol, _)| symbol.name.starts_with("__SCK__lsm_static_call"));
    !security && calls.function_of(guest, key) == Some(candidate.target)
}

/// All candidates in `text`.
fn candidates(
    guest: &Guest,
    text: &Range<VirtualAddress>,
    suspects: &Suspects,
) -> Result<Vec<Candidate>, DetectError> {
    let size = text.end.as_u64().saturating_sub(text.start.as_u64());
    let size = size.min(MOST_BYTES) as usize;
    let mut found = Vec::new();
    let mut bytes = vec![0; BLOCK.min(size) + LONGEST];
    let mut done = 0;
    while done < size {
        let start = text.start.wrapping_add(done as u64);
        let count = (size - done).min(BLOCK);
        let padded = (count + LONGEST).min(size - done);
        let part = bytes.get_mut(..padded).unwrap_or_default();
        guest
            .space()
            .read(start, part)
            .map_err(|source| DetectError::Read {
                what: "text",
                address: start,
                source,
            })?;
        scan(
            part,
            count,
            start.as_u64(),
            suspects,
            &mut |offset, target| {
                if found.len() < MOST_CANDIDATES {
                    found.push(Candidate {
                        address: start.wrapping_add(offset as u64),
                        target: VirtualAddress::new(target),
                    });
                }
            },
        );
        done += count;
    }
    Ok(found)
}

/// Gives the offset and target of each form that starts in the first `count`
/// bytes of code at `start` and leads to a suspect.
///
/// The address or distance is looked for, not the instruction: the highest of
/// its bytes is a rare one.
fn scan(
    code: &[u8],
    count: usize,
    start: u64,
    suspects: &Suspects,
    each: &mut dyn FnMut(usize, u64),
) {
    let table = suspects.highest_bytes(start, start.wrapping_add(count as u64));
    for (place, byte) in code.iter().enumerate() {
        if !table[usize::from(*byte)] {
            continue;
        }
        // The forms have one, two or six bytes before the four.
        for before in [1, 2, 6] {
            let Some(offset) = place.checked_sub(3 + before) else {
                continue;
            };
            let rest = code.get(offset..).filter(|_| offset < count);
            let at = start.wrapping_add(offset as u64);
            let target = rest.and_then(|rest| leads_to(rest, before, at));
            if let Some(target) = target.filter(|target| suspects.contain(*target)) {
                each(offset, target);
            }
        }
    }
}

/// Where the instruction at `address` leads, if it is of one of the forms that
/// detours have, with that many bytes before its address or distance.
fn leads_to(code: &[u8], before: usize, address: u64) -> Option<u64> {
    let relative = || -> Option<u64> {
        let distance = i32::from_le_bytes(*code.get(before..)?.first_chunk()?);
        let next = address.wrapping_add(before as u64 + 4);
        Some(next.wrapping_add_signed(distance.into()))
    };
    let absolute =
        || -> Option<u64> { Some(u64::from_le_bytes(*code.get(before..)?.first_chunk()?)) };
    match (before, code) {
        // call, jmp
        (1, [0xe8 | 0xe9, ..]) => relative(),
        // push $address; ret
        (1, [0x68, a, b, c, d, 0xc3, ..]) => {
            let value = i32::from_le_bytes([*a, *b, *c, *d]);
            Some(i64::from(value) as u64)
        }
        // A condition and a jump.
        (2, [0x0f, 0x80..=0x8f, ..]) => relative(),
        // mov $address,%r
        (2, [0x48 | 0x49, 0xb8..=0xbf, ..]) => absolute(),
        // jmp or call through the eight bytes that follow.
        (6, [0xff, 0x25 | 0x15, 0, 0, 0, 0, ..]) => absolute(),
        _ => None,
    }
}

/// Whether an instruction starts there, by decoding the function from its
/// start.
fn is_instruction(
    guest: &Guest,
    map: &CodeMap,
    text: &Range<VirtualAddress>,
    address: VirtualAddress,
) -> bool {
    let start = match map.owner_of(address) {
        Some(CodeOwner::Module {
            address: module, ..
        }) => map
            .modules
            .iter()
            .find(|other| other.address == *module)
            .and_then(|module| symbols_of(guest, "symbols", module).ok().flatten())
            .and_then(|symbols| symbols.nearest(address).map(|(symbol, _)| symbol.address)),
        _ => guest
            .symbols()
            .nearest(address)
            .map(|(symbol, _)| symbol.address),
    };
    let Some(start) = start.filter(|start| {
        *start >= text.start && address.as_u64() - start.as_u64() < LONGEST_FUNCTION
    }) else {
        // Without a function to start from it is taken at its word.
        return true;
    };
    let length = (address.as_u64() - start.as_u64()) as usize + LONGEST;
    let mut bytes = vec![0; length];
    if guest.space().read(start, &mut bytes).is_err() {
        return false;
    }
    let decoder = Decoder::with_ip(64, &bytes, start.as_u64(), DecoderOptions::NONE);
    decoder
        .into_iter()
        .map(|instruction| instruction.ip())
        .take_while(|ip| *ip <= address.as_u64())
        .any(|ip| ip == address.as_u64())
}

/// Whether the same stands there when it is read again.
fn again(guest: &Guest, candidate: Candidate) -> bool {
    let mut bytes = [0; LONGEST];
    let left = (PAGE_SIZE - candidate.address.page_offset()) as usize;
    let whole = guest.space().read(candidate.address, &mut bytes).is_ok();
    if !whole {
        let part = bytes.get_mut(..left.min(LONGEST)).unwrap_or_default();
        if guest.space().read(candidate.address, part).is_err() {
            return false;
        }
    }
    [1, 2, 6].into_iter().any(|before| {
        let target = leads_to(&bytes, before, candidate.address.as_u64());
        target == Some(candidate.target.as_u64())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 0xffff_ffff_8100_0000;
    const MODULE: u64 = 0xffff_ffff_c012_3450;

    fn suspects() -> Suspects {
        let area = 0xffff_ffff_c010_0000..0xffff_ffff_c020_0000;
        Suspects([area].into())
    }

    /// Where the code leads that stands somewhere in a text.
    fn target_of(code: &[u8]) -> Option<u64> {
        let mut text = vec![0x90; 0x100];
        let place = 0x80;
        text[place..place + code.len()].copy_from_slice(code);
        let mut found = None;
        scan(
            &text,
            text.len(),
            START - 0x80,
            &suspects(),
            &mut |offset, target| {
                assert_eq!(offset, place);
                found = Some(target);
            },
        );
        found
    }

    fn relative(opcode: &[u8], target: u64) -> Vec<u8> {
        let next = START + opcode.len() as u64 + 4;
        let distance = target.wrapping_sub(next) as u32;
        [opcode, &distance.to_le_bytes()].concat()
    }

    #[test]
    fn knows_the_forms_of_detours() {
        let address = MODULE.to_le_bytes();
        let forms = [
            relative(&[0xe8], MODULE),
            relative(&[0xe9], MODULE),
            relative(&[0x0f, 0x84], MODULE),
            [&[0x48, 0xb8], &address[..], &[0xff, 0xe0]].concat(),
            [&[0x49, 0xbb], &address[..], &[0x41, 0xff, 0xe3]].concat(),
            [&[0xff, 0x25, 0, 0, 0, 0], &address[..]].concat(),
            [&[0x68], &address[..4], &[0xc3]].concat(),
        ];
        for form in forms {
            assert_eq!(target_of(&form), Some(MODULE), "{form:x?}");
        }
        assert_eq!(target_of(&relative(&[0xe8], START + 0x40)), None);
        assert_eq!(target_of(&[0x90; 16]), None);
        assert_eq!(target_of(&[0xe8, 0, 0]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_looked_at(code in prop::collection::vec(any::<u8>(), 0..64)) {
            scan(&code, code.len(), START, &suspects(), &mut |offset, target| {
                assert!(offset < code.len());
                assert!(suspects().contain(target));
            });
        }

        #[test]
        fn any_place_leads_to_any_suspect(from in 0_u64..0x1000_0000, to in 0_u64..0x10_0000) {
            let target = 0xffff_ffff_c010_0000 + to;
            let distance = target.wrapping_sub(START + from + 5) as u32;
            let code = [&[0xe9][..], &distance.to_le_bytes()].concat();
            let mut found = None;
            scan(&code, code.len(), START + from, &suspects(), &mut |_, target| {
                found = Some(target);
            });
            prop_assert_eq!(found, Some(target));
        }
    }
}

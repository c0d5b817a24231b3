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
use secmon_memory::{PAGE_SIZE, VirtualAddress};

use super::finding;
use crate::code::{self, Target};
use crate::{DetectError, Finding};

/// No text of a kernel or module is longer.
const MOST_BYTES: u64 = 256 << 20;
/// Bytes that are looked at at a time.
const BLOCK: usize = 1 << 20;
/// The longest form that is looked for, in bytes.
const LONGEST: usize = 16;
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
    let limits = Limits::of(map);
    let mut judge = |text: &Range<VirtualAddress>, candidates: Vec<Candidate>, kernel: bool| {
        for candidate in candidates {
            if !is_suspect(map, candidate.target, kernel)
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
    let found = candidates(guest, text, &limits, map, true)?;
    judge(text, found, true);
    for module in &map.modules {
        let Some((start, size)) = module.parts().next() else {
            continue;
        };
        let Some(end) = start.checked_add(size) else {
            continue;
        };
        let text = start..end;
        // A module may be on its way out.
        let Ok(found) = candidates(guest, &text, &limits, map, false) else {
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

/// The lowest and highest addresses outside of the kernel's text that can be
/// executed, as far as a jump by distance reaches: a quick test.
struct Limits {
    text: Range<u64>,
    executable: Range<u64>,
}

impl Limits {
    fn of(map: &CodeMap) -> Self {
        let text = map.image.text.start.as_u64()..map.image.text.end.as_u64();
        let outside = map.executable().filter(|run| run.end.as_u64() > text.end);
        let start = outside
            .map(|run| run.start.as_u64())
            .min()
            .unwrap_or(text.end);
        Self {
            executable: start..u64::MAX,
            text,
        }
    }

    #[inline]
    fn may_be_outside(&self, target: u64) -> bool {
        self.executable.contains(&target) && !self.text.contains(&target)
            || target >> 47 == 0x1_ffff && target < self.text.start
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

/// All candidates in `text`.
fn candidates(
    guest: &Guest,
    text: &Range<VirtualAddress>,
    limits: &Limits,
    map: &CodeMap,
    kernel: bool,
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
        let mut each = |offset: usize, target: u64| {
            let target = VirtualAddress::new(target);
            if found.len() < MOST_CANDIDATES && is_suspect(map, target, kernel) {
                found.push(Candidate {
                    address: start.wrapping_add(offset as u64),
                    target,
                });
            }
        };
        scan(part, count, start.as_u64(), limits, &mut each);
        done += count;
    }
    Ok(found)
}

/// Gives the offset and target of each form in the first `count` bytes of code
/// at `start`.
fn scan(code: &[u8], count: usize, start: u64, limits: &Limits, each: &mut dyn FnMut(usize, u64)) {
    for offset in 0..count.min(code.len()) {
        let Some(target) = code
            .get(offset..)
            .and_then(|rest| leads_to(rest, start.wrapping_add(offset as u64), limits))
        else {
            continue;
        };
        each(offset, target);
    }
}

/// Where the instruction at `address` leads, if it is of one of the forms that
/// detours have and may lead out of the kernel's text.
#[inline]
fn leads_to(code: &[u8], address: u64, limits: &Limits) -> Option<u64> {
    let relative = |at: usize| -> Option<u64> {
        let distance = i32::from_le_bytes(*code.get(at..)?.first_chunk()?);
        let next = address.wrapping_add(at as u64 + 4);
        Some(next.wrapping_add_signed(distance.into()))
    };
    let absolute =
        |at: usize| -> Option<u64> { Some(u64::from_le_bytes(*code.get(at..)?.first_chunk()?)) };
    let target = match code {
        // call, jmp
        [0xe8 | 0xe9, ..] => relative(1),
        // A condition and a jump.
        [0x0f, 0x80..=0x8f, ..] => relative(2),
        // mov $address,%r
        [0x48 | 0x49, 0xb8..=0xbf, ..] => absolute(2),
        // jmp or call through the eight bytes that follow.
        [0xff, 0x25 | 0x15, 0, 0, 0, 0, ..] => absolute(6),
        // push $address; ret
        [0x68, a, b, c, d, 0xc3, ..] => {
            let value = i32::from_le_bytes([*a, *b, *c, *d]);
            Some(i64::from(value) as u64)
        }
        _ => None,
    }?;
    limits.may_be_outside(target).then_some(target)
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
    let everywhere = Limits {
        text: 0..0,
        executable: 0..u64::MAX,
    };
    leads_to(&bytes, candidate.address.as_u64(), &everywhere) == Some(candidate.target.as_u64())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 0xffff_ffff_8100_0000;
    const MODULE: u64 = 0xffff_ffff_c012_3450;

    fn limits() -> Limits {
        Limits {
            text: START..START + 0x100_0000,
            executable: 0xffff_ffff_c000_0000..u64::MAX,
        }
    }

    fn target_of(code: &[u8]) -> Option<u64> {
        leads_to(code, START, &limits())
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
            let mut last = None;
            scan(&code, code.len(), START, &limits(), &mut |offset, target| {
                assert!(Some(offset) > last);
                assert!(limits().may_be_outside(target));
                last = Some(offset);
            });
        }
    }
}

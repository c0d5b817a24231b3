//! Instructions that stand in place of others on processors with, or without,
//! some feature (`apply_alternatives`).

use iced_x86::{Decoder, DecoderOptions, OpKind};

use crate::Running;
use crate::image::Image;
use crate::instructions::branch_to;
use crate::records::{Alternative, Records};

/// The longest that a record can say.
const LONGEST: usize = 255;

pub(super) fn apply(
    image: &mut Image,
    records: Records<'_>,
    running: &dyn Running,
    loose: &mut Vec<(u64, usize)>,
) {
    let all = records.alternatives(running.alternative_size());
    let mut rest = all.as_slice();
    while let Some(first) = rest.first() {
        // Several for one place follow each other; the last that applies
        // stays.
        let count = rest
            .iter()
            .take_while(|other| other.code == first.code)
            .count();
        let (group, after) = rest.split_at(count);
        rest = after;
        let length = group.iter().map(|one| one.length).max().unwrap_or(0);
        let Some(original) = image.get(first.code, length).map(<[u8]>::to_vec) else {
            continue;
        };
        let applies = |one: &&Alternative| running.has_feature(one.feature) != one.without;
        if let Some(chosen) = group.iter().rev().find(applies)
            && let Some(code) = replacement(image, running, chosen, &original)
        {
            image.set(chosen.code, &code);
        }
        loose.push((first.code, length));
    }
}

/// The code that an alternative puts in place of `original`.
fn replacement(
    image: &Image,
    running: &dyn Running,
    chosen: &Alternative,
    original: &[u8],
) -> Option<Vec<u8>> {
    let source = image.get(chosen.replacement, chosen.replacement_length)?;
    let mut code = match chosen.direct_call {
        true => direct_call(running, chosen.code, original)?,
        false => moved(source, chosen.replacement, chosen.code),
    };
    code.resize(original.len().clamp(code.len(), LONGEST), 0x90);
    (code.len() == original.len()).then_some(code)
}

/// A call of what the original calls through a pointer
/// (`alt_replace_call`).
fn direct_call(running: &dyn Running, address: u64, original: &[u8]) -> Option<Vec<u8>> {
    let [0xff, 0x15, distance @ ..] = original else {
        return None;
    };
    let distance = i32::from_le_bytes(*distance.first_chunk()?);
    let pointer = address.wrapping_add(6).wrapping_add_signed(distance.into());
    let target = match running.read_u64(pointer)? {
        0 => running.symbol("BUG_func")?,
        target => target,
    };
    Some(match Some(target) == running.symbol("nop_func") {
        true => Vec::new(),
        false => branch_to(0xe8, address, target).to_vec(),
    })
}

/// A code that stands at `to` and does what it did at `from`: distances to
/// what lies outside of it change.
fn moved(source: &[u8], from: u64, to: u64) -> Vec<u8> {
    let mut code = source.to_vec();
    let mut decoder = Decoder::with_ip(64, source, from, DecoderOptions::NONE);
    let inside = from..=from.wrapping_add(source.len() as u64);
    while decoder.can_decode() {
        let start = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        let offsets = decoder.get_constant_offsets(&instruction);
        let branches = matches!(instruction.op0_kind(), OpKind::NearBranch64);
        let (target, offset, size) = if branches {
            let target = instruction.near_branch_target();
            (target, offsets.immediate_offset(), offsets.immediate_size())
        } else if instruction.is_ip_rel_memory_operand() {
            let target = instruction.ip_rel_memory_address();
            (
                target,
                offsets.displacement_offset(),
                offsets.displacement_size(),
            )
        } else {
            continue;
        };
        if inside.contains(&target) {
            continue;
        }
        let distance = from.wrapping_sub(to);
        match (size, code.get_mut(start + offset..)) {
            (4, Some(place)) => {
                if let Some(place) = place.first_chunk_mut::<4>() {
                    let value = u32::from_le_bytes(*place).wrapping_add(distance as u32);
                    *place = value.to_le_bytes();
                }
            }
            (1, Some([place, ..])) => *place = place.wrapping_add(distance as u8),
            _ => {}
        }
    }
    code
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::instructions::branch;

    proptest! {
        #[test]
        fn a_moved_call_leads_to_the_same_place(target in any::<i32>(), to in any::<u32>()) {
            let from = 0xffff_ffff_83d9_0000;
            let target = 0xffff_ffff_8100_0000_u64.wrapping_add_signed(i64::from(target) >> 8);
            let to = 0xffff_ffff_8100_0000 + u64::from(to >> 8);
            let code = moved(&branch_to(0xe8, from, target), from, to);
            let inside = (from..=from + 5).contains(&target);
            prop_assert!(inside || branch(to, &code) == Some((target, 5)));
        }

        #[test]
        fn any_code_is_moved(code in prop::collection::vec(any::<u8>(), 0..40), from in any::<u64>()) {
            prop_assert_eq!(moved(&code, from, from.wrapping_add(99)).len(), code.len());
        }
    }
}

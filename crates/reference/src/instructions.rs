//! Instructions that mean the same.
//!
//! Where the kernel puts other instructions into its text, it fills what is
//! left with instructions that do nothing, by rules that changed over the years
//! (`optimize_nops`, `add_nops`, `apply_relocation` in
//! `arch/x86/kernel/alternative.c`). What such a place holds is right if its
//! instructions are, at their places, whatever stands between them and does
//! nothing.

use iced_x86::{Code, Decoder, DecoderOptions, Mnemonic};

/// The instruction that traps, and what fills what is never reached.
pub(crate) const BREAKPOINT: u8 = 0xcc;
/// A prefix that calls through registers may have for length.
const CS_PREFIX: u8 = 0x2e;

/// What an instruction does.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Meaning<'b> {
    /// Jumps there, whatever the length of the distance.
    Jump(u64),
    /// What its bytes say.
    Bytes(&'b [u8]),
}

/// Whether two codes at `address` do the same.
pub(crate) fn are_same(address: u64, one: &[u8], other: &[u8]) -> bool {
    if one == other {
        return true;
    }
    one.len() == other.len()
        && match (meanings(address, one), meanings(address, other)) {
            (Some(one), Some(other)) => one == other,
            _ => false,
        }
}

/// What is done, and at which offset; `None` if the bytes are no whole
/// instructions.
fn meanings(address: u64, code: &[u8]) -> Option<Vec<(usize, Meaning<'_>)>> {
    let mut found = Vec::new();
    let mut offset = 0_usize;
    // Behind a jump or return comes nothing that is reached.
    let mut unreached = false;
    while let Some(rest) = code.get(offset..).filter(|rest| !rest.is_empty()) {
        let at = address.wrapping_add(offset as u64);
        let instruction = Decoder::with_ip(64, rest, at, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            return None;
        }
        let bytes = rest.get(..instruction.len())?;
        let next = offset + instruction.len();
        let was_unreached = unreached;
        unreached = false;
        match instruction.code() {
            Code::Int3 if was_unreached => unreached = true,
            _ if instruction.mnemonic() == Mnemonic::Nop => unreached = was_unreached,
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => {
                let target = instruction.near_branch_target();
                match skipped(address, code, next, target) {
                    Some(end) => {
                        offset = end;
                        continue;
                    }
                    None => found.push((offset, Meaning::Jump(target))),
                }
                unreached = true;
            }
            _ => {
                let mut bytes = bytes;
                if instruction.code() == Code::Call_rm64 {
                    while let [CS_PREFIX, rest @ ..] = bytes {
                        bytes = rest;
                    }
                }
                unreached = matches!(
                    instruction.code(),
                    Code::Retnq | Code::Retnq_imm16 | Code::Jmp_rm64
                );
                found.push((offset, Meaning::Bytes(bytes)));
            }
        }
        offset = next;
    }
    Some(found)
}

/// Where a jump leads that only skips what does nothing: fillings, and jumps
/// over fillings.
fn skipped(address: u64, code: &[u8], next: usize, target: u64) -> Option<usize> {
    let end = usize::try_from(target.checked_sub(address)?).ok()?;
    let between = code.get(next..end)?;
    let start = address.wrapping_add(next as u64);
    let inert = Decoder::with_ip(64, between, start, DecoderOptions::NONE)
        .into_iter()
        .all(|instruction| match instruction.code() {
            Code::Int3 => true,
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => {
                (start..=target).contains(&instruction.near_branch_target())
            }
            _ => instruction.mnemonic() == Mnemonic::Nop,
        });
    inert.then_some(end)
}

/// Where the `call`, `jmp` or conditional jump leads that a code starts with,
/// and its length: by a distance of four bytes, with or without a prefix.
pub(crate) fn branch(address: u64, code: &[u8]) -> Option<(u64, usize)> {
    let before = match code {
        [0xe8 | 0xe9, ..] => 1,
        [CS_PREFIX, 0xe8 | 0xe9, ..] | [0x0f, 0x80..=0x8f, ..] => 2,
        _ => return None,
    };
    let distance = i32::from_le_bytes(*code.get(before..)?.first_chunk()?);
    let next = address.wrapping_add(before as u64 + 4);
    Some((next.wrapping_add_signed(distance.into()), before + 4))
}

/// A `call` or `jmp` to `target`.
pub(crate) fn branch_to(opcode: u8, address: u64, target: u64) -> [u8; 5] {
    let distance = target.wrapping_sub(address.wrapping_add(5)) as u32;
    let [a, b, c, d] = distance.to_le_bytes();
    [opcode, a, b, c, d]
}

/// Whether a code is one instruction that does nothing.
pub(crate) fn is_nop(code: &[u8]) -> bool {
    let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
    instruction.mnemonic() == Mnemonic::Nop && instruction.len() == code.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT: u64 = 0xffff_ffff_8100_1000;

    #[test]
    fn fillings_do_not_matter_and_all_else_does() {
        // call, then five bytes of nothing in several ways
        let call = [0xe8, 1, 2, 3, 4];
        let with = |rest: &[u8]| [&call[..], rest].concat();
        let plain = with(&[0x90; 5]);
        for filling in [
            &[0x0f, 0x1f, 0x44, 0, 0][..],
            &[0x66, 0x66, 0x90, 0x66, 0x90],
            &[0xeb, 3, 0xcc, 0xcc, 0xcc],
        ] {
            assert!(are_same(AT, &plain, &with(filling)), "{filling:x?}");
        }
        for other in [
            &[0xeb, 3, 0xcc, 0xcc, 0xc3][..],
            &[0xcc, 0x90, 0x90, 0x90, 0x90],
            &[0x90, 0x90, 0x90, 0x90, 0xc3],
            &[0xf3, 0x90, 0x90, 0x90, 0x90],
        ] {
            assert!(!are_same(AT, &plain, &with(other)), "{other:x?}");
        }
        // A call from another place leads elsewhere.
        let moved = [&[0x90][..], &call, &[0x90; 4]].concat();
        assert!(!are_same(AT, &plain, &moved));
    }

    #[test]
    fn a_jump_may_become_shorter() {
        let long = branch_to(0xe9, AT, AT + 0x40);
        assert!(are_same(AT, &long, &[0xeb, 0x3e, 0xcc, 0xcc, 0xcc]));
        assert!(are_same(AT, &long, &[0xeb, 0x3e, 0x0f, 0x1f, 0x00]));
        assert!(!are_same(AT, &long, &[0xeb, 0x3f, 0xcc, 0xcc, 0xcc]));
        // A jump to what follows it does nothing.
        let next = branch_to(0xe9, AT, AT + 5);
        assert!(are_same(AT, &next, &[0xeb, 0x03, 0x0f, 0x1f, 0x00]));
        let over = [&[0xeb, 6][..], &[0x90; 6]].concat();
        assert!(are_same(
            AT,
            &over,
            &[0xeb, 6, 0xeb, 4, 0xcc, 0xcc, 0xcc, 0xcc]
        ));
        assert!(!are_same(
            AT,
            &over,
            &[0xeb, 6, 0xeb, 4, 0xcc, 0xc3, 0xcc, 0xcc]
        ));
    }

    #[test]
    fn knows_calls_through_registers_with_prefixes() {
        let call = [0xff, 0xd0, 0x90, 0x90, 0x90];
        assert!(are_same(AT, &call, &[0xff, 0xd0, 0x0f, 0x1f, 0x00]));
        let prefixed = [0x2e, 0x2e, 0x2e, 0xff, 0xd0];
        assert!(are_same(AT, &call, &prefixed));
        assert!(!are_same(AT, &call, &[0x2e, 0x2e, 0x2e, 0xff, 0xd1]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_compared(
            one in prop::collection::vec(any::<u8>(), 0..24),
            other in prop::collection::vec(any::<u8>(), 0..24),
        ) {
            prop_assert!(are_same(AT, &one, &one));
            prop_assert_eq!(are_same(AT, &one, &other), are_same(AT, &other, &one));
            let _ = branch(AT, &one);
        }

        #[test]
        fn branches_lead_where_they_were_made_to(target in any::<i32>()) {
            let target = AT.wrapping_add_signed(target.into());
            let code = branch_to(0xe8, AT, target);
            prop_assert_eq!(branch(AT, &code), Some((target, 5)));
        }
    }
}

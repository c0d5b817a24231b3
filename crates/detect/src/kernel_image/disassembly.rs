//! Changed code as instructions, as it should be and as it is.

use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};
use secmon_guest::Guest;
use secmon_memory::VirtualAddress;
use secmon_reference::{Difference, Expected};

/// A function whose start lies further away is not decoded from there.
const LONGEST_FUNCTION: u64 = 1 << 16;
/// The longest instruction, in bytes.
const LONGEST: usize = 15;
/// More instructions than this are not shown.
const MOST: usize = 12;

/// The instructions that a change touches, by the kernel's file and by memory.
pub(super) fn both(
    guest: &Guest,
    expected: &Expected,
    difference: &Difference,
) -> (String, String) {
    let start = first_instruction(guest, expected, difference.address);
    let change = difference.address.saturating_sub(start) as usize + difference.found.len();
    let length = change.saturating_add(LONGEST);
    let before = expected.bytes(start, length).unwrap_or_default();
    // No further than the file, which may end here.
    let mut after = vec![0; before.len()];
    if guest
        .space()
        .read(VirtualAddress::new(start), &mut after)
        .is_err()
    {
        after.clear();
    }
    (show(start, before, change), show(start, &after, change))
}

/// Where the instruction starts that holds `address`, by the file.
fn first_instruction(guest: &Guest, expected: &Expected, address: u64) -> u64 {
    let symbol = guest.symbols().nearest(VirtualAddress::new(address));
    let start = symbol
        .map(|(symbol, _)| symbol.address.as_u64())
        .filter(|start| address.saturating_sub(*start) < LONGEST_FUNCTION);
    let Some(start) = start else {
        return address;
    };
    let length = (address - start) as usize + LONGEST;
    let Some(code) = expected.bytes(start, length) else {
        return address;
    };
    let decoder = Decoder::with_ip(64, code, start, DecoderOptions::NONE);
    decoder
        .into_iter()
        .map(|instruction| instruction.ip())
        .take_while(|ip| *ip <= address)
        .last()
        .unwrap_or(address)
}

/// The instructions that start in the first `length` bytes.
fn show(start: u64, code: &[u8], length: usize) -> String {
    let end = start.saturating_add(length as u64);
    let mut formatter = GasFormatter::new();
    let mut shown = Vec::new();
    for instruction in Decoder::with_ip(64, code, start, DecoderOptions::NONE) {
        if instruction.ip() >= end {
            break;
        }
        if shown.len() == MOST {
            shown.push("…".to_owned());
            break;
        }
        let mut text = String::new();
        formatter.format(&instruction, &mut text);
        shown.push(text);
    }
    shown.join("; ")
}

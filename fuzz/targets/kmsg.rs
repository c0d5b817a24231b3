//! Both forms of the kernel's log, made of any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_guest::linux::kmsg::{layout, log_buffer, ring};
use secmon_memory::{ReadError, VirtualAddress};

const BASE: u64 = 0xffff_8000_0000_0000;

fuzz_target!(|data: &[u8]| {
    let Some((numbers, buffer)) = data.split_first_chunk::<16>() else {
        return;
    };
    let number = |at: usize| u64::from(u16::from_le_bytes([numbers[at], numbers[at + 1]]));
    let indices = log_buffer::Indices {
        first: number(0),
        next: number(2),
        first_sequence: number(4),
        next_sequence: number(6),
    };
    let old = log_buffer::LogLayout::standard(numbers[8] & 1 == 1);
    let _ = log_buffer::records(&old, buffer, indices, &mut |_| true);

    let _ = layout::ring_from_core_information(buffer);
    let _ = layout::log_from_core_information(buffer);
    // The structures lie in the bytes wherever their pointers lead, modulo the
    // bytes there are.
    let read = |address: VirtualAddress, target: &mut [u8]| -> Result<(), ReadError> {
        for (offset, byte) in target.iter_mut().enumerate() {
            let place = address.as_u64().wrapping_add(offset as u64) % (buffer.len() as u64).max(1);
            *byte = buffer.get(place as usize).copied().unwrap_or_default();
        }
        Ok(())
    };
    let _ = layout::ring_by_proof(VirtualAddress::new(BASE), &read);
    for known in layout::known_layouts() {
        let mut left = 4096;
        let _ = ring::records(&known, VirtualAddress::new(BASE), &read, &mut |_| {
            left -= 1;
            left > 0
        });
    }
});

//! What a gdbstub sends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_gate::gdb::{Decoder, Item, StopReply, encode, registers, threads};

fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::default();
    for byte in data {
        if let Some(Item::Packet(payload)) = decoder.push(*byte) {
            let _ = (
                StopReply::parse(&payload),
                threads(&payload),
                registers(&payload),
            );
        }
    }
    let mut decoder = Decoder::default();
    let items: Vec<Item> = encode(data)
        .iter()
        .filter_map(|byte| decoder.push(*byte))
        .collect();
    assert_eq!(items, [Item::Packet(data.to_vec())]);
});

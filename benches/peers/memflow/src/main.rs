//! Virtual reads of a raw image by memflow, through its own file mapping and
//! its own x86-64 translation. Prints one JSON object: nanoseconds for each
//! read, the sum of all values read, and how many reads failed.
//!
//! Usage: peer-memflow IMAGE ROOT ADDRESSES MODE [SIZE]
//!
//! ADDRESSES holds virtual addresses, 8 bytes each, little endian. MODE is
//! `single`, `single-tlb`, `batch`, `batch-tlb` (8 bytes from each address) or
//! `pages`, `pages-tlb` (4096 bytes from each).

use std::fs::File;
use std::hint::black_box;
use std::time::Instant;

use memflow::architecture::x86::x64;
use memflow::connector::MmapInfo;
use memflow::mem::{CachedVirtualTranslate, DirectTranslate, MemoryMap, MemoryView, VirtualDma};
use memflow::types::{Address, umem};

/// Reads given to one batch, as in the notes on memflow's own figures.
const BATCH: usize = 4096;
const PAGE: usize = 4096;

type Error = Box<dyn std::error::Error>;

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [image, root, addresses, mode] = arguments.as_slice() else {
        return Err("usage: peer-memflow IMAGE ROOT ADDRESSES MODE".into());
    };
    let file = File::open(image)?;
    let mut map = MemoryMap::new();
    map.push_remap(Address::NULL, file.metadata()?.len() as umem, Address::NULL);
    let memory = MmapInfo::try_with_filemap(file, map)
        .map_err(|error| format!("{error:?}"))?
        .into_connector();
    let root = u64::from_str_radix(root.trim_start_matches("0x"), 16)?;
    let translator = x64::new_translator(Address::from(root));
    let addresses: Vec<u64> = std::fs::read(addresses)?
        .chunks_exact(8)
        .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
        .collect();
    match mode.strip_suffix("-tlb") {
        None => run(
            VirtualDma::new(memory, x64::ARCH, translator),
            &addresses,
            mode,
        ),
        Some(mode) => {
            let cache = CachedVirtualTranslate::builder(DirectTranslate::new())
                .arch(x64::ARCH)
                .build()
                .map_err(|error| format!("{error:?}"))?;
            run(
                VirtualDma::with_vat(memory, x64::ARCH, translator, cache),
                &addresses,
                mode,
            )
        }
    }
}

fn run(mut memory: impl MemoryView, addresses: &[u64], mode: &str) -> Result<(), Error> {
    let mut sum = 0_u64;
    let mut failed = 0_usize;
    let start = Instant::now();
    match mode {
        "single" => {
            for address in addresses {
                match memory.read::<u64>(Address::from(*address)) {
                    Ok(value) => sum = sum.wrapping_add(value),
                    Err(_) => failed += 1,
                }
            }
        }
        "batch" => {
            let mut values = vec![0_u64; BATCH];
            for addresses in addresses.chunks(BATCH) {
                let mut batcher = memory.batcher();
                for (address, value) in addresses.iter().zip(&mut values) {
                    batcher.read_into(Address::from(*address), value);
                }
                if batcher.commit_rw().is_err() {
                    failed += 1;
                }
                drop(batcher);
                for value in &values[..addresses.len()] {
                    sum = sum.wrapping_add(*value);
                }
            }
        }
        "pages" => {
            let mut page = vec![0_u8; PAGE];
            for address in addresses {
                if memory
                    .read_raw_into(Address::from(*address), &mut page)
                    .is_err()
                {
                    failed += 1;
                }
                black_box(&page);
                // Every page's first bytes, so that a wrong page is seen.
                let first = page[..8].try_into().expect("eight bytes");
                sum = sum.wrapping_add(u64::from_le_bytes(first));
            }
        }
        other => return Err(format!("unknown mode {other}").into()),
    }
    let elapsed = start.elapsed();
    let each = elapsed.as_nanos() as f64 / addresses.len().max(1) as f64;
    println!("{{\"nanoseconds\":{each},\"sum\":{sum},\"failed\":{failed}}}");
    Ok(())
}

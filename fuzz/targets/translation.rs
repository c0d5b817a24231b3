//! The page walk over memory that holds anything: an answer or an error, and
//! the same one with and without a translation cache; and everything that the
//! tables map, which is what translation finds.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use secmon_memory::{AddressSpace, HeapMemory, PagingMode, PhysicalAddress, VirtualAddress};

fuzz_target!(|data: &[u8]| {
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    let Some((address, tables)) = rest.split_first_chunk::<8>() else {
        return;
    };
    let mode = if mode & 1 == 0 {
        PagingMode::FourLevel
    } else {
        PagingMode::FiveLevel
    };
    let address = VirtualAddress::new(u64::from_le_bytes(*address));
    let Ok(memory) = HeapMemory::new(vec![(PhysicalAddress::new(0), tables.to_vec())]) else {
        return;
    };
    let space = AddressSpace::new(Arc::new(memory), PhysicalAddress::new(0), mode);
    let cached = space.clone().with_tlb();
    let plain = space.read_u64(address);
    assert_eq!(plain, cached.read_u64(address));
    assert_eq!(plain, cached.read_u64(address));
    let _ = space.read_c_string(address, 1 << 16);
    let all = VirtualAddress::new(0)..VirtualAddress::new(u64::MAX);
    let mut last = None;
    let _ = space.mapped_pages(all, 16, &mut |page| {
        assert!(last < Some(page.address));
        last = Some(page.address);
        let found = space.translate(page.address).expect("it is mapped");
        assert_eq!(
            (found.physical, found.page_size, found.rights),
            (page.physical, page.size, page.rights)
        );
    });
});

use proptest::prelude::*;

use super::super::layout::{core_number, known_layouts, ring_by_proof, ring_from_core_information};
use super::*;

/// A printk ring in a byte array that starts at address 0, written as the
/// kernel writes it.
struct Writer {
    layout: RingLayout,
    memory: Vec<u8>,
    count_bits: u32,
    size_bits: u32,
    descriptors: u64,
    infos: u64,
    data: u64,
    head_id: u64,
    tail_id: u64,
    head: u64,
    sequence: u64,
    /// Whether a block may end with the ring, as from Linux 6.18 on.
    exact: bool,
}

/// The layout of the kernels that most machines run: the first known one.
fn layout() -> RingLayout {
    known_layouts().next().expect("a known layout")
}

impl Writer {
    fn new(count_bits: u32, size_bits: u32) -> Self {
        let layout = layout();
        let count = 1_u64 << count_bits;
        let descriptors = 128;
        let infos = descriptors + count * layout.descriptor_size;
        let data = infos + count * layout.info_size;
        let first = 0_u64.wrapping_sub(count + 1) & ID_MASK;
        let mut writer = Self {
            layout,
            memory: vec![0; (data + (1 << size_bits)) as usize],
            count_bits,
            size_bits,
            descriptors,
            infos,
            data,
            head_id: first,
            tail_id: first,
            head: 0_u64.wrapping_sub(1 << size_bits),
            sequence: 0,
            exact: false,
        };
        // The descriptor that each ring starts with: reusable, without text.
        writer.put_descriptor(first, 3, FAILED_POSITION, FAILED_POSITION);
        writer.put_header();
        writer
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = offset as usize;
        self.memory[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn put_header(&mut self) {
        self.put(0, &self.count_bits.to_le_bytes());
        self.put(8, &self.descriptors.to_le_bytes());
        self.put(16, &self.infos.to_le_bytes());
        self.put(24, &self.head_id.to_le_bytes());
        self.put(32, &self.tail_id.to_le_bytes());
        self.put(48, &self.size_bits.to_le_bytes());
        self.put(56, &self.data.to_le_bytes());
    }

    fn slot(&self, id: u64) -> u64 {
        id & ((1 << self.count_bits) - 1)
    }

    fn put_descriptor(&mut self, id: u64, state: u64, begin: u64, next: u64) {
        let place = self.descriptors + self.slot(id) * 24;
        self.put(place, &(id | state << STATE_SHIFT).to_le_bytes());
        self.put(place + 8, &begin.to_le_bytes());
        self.put(place + 16, &next.to_le_bytes());
    }

    fn set_state(&mut self, id: u64, state: u64) {
        let place = self.descriptors + self.slot(id) * 24;
        self.put(place, &(id | state << STATE_SHIFT).to_le_bytes());
    }

    fn write(&mut self, text: &[u8]) -> u64 {
        let id = self.head_id.wrapping_add(1) & ID_MASK;
        self.head_id = id;
        if (id.wrapping_sub(self.tail_id) & ID_MASK) >= 1 << self.count_bits {
            self.tail_id = self.tail_id.wrapping_add(1) & ID_MASK;
        }
        let (begin, next) = if text.is_empty() {
            (3, 3)
        } else {
            let size = (8 + text.len() as u64).div_ceil(8) * 8;
            let begin = self.head;
            let mut next = begin.wrapping_add(size);
            let mut index = begin & ((1 << self.size_bits) - 1);
            let last = if self.exact {
                next.wrapping_sub(1)
            } else {
                next
            };
            if begin >> self.size_bits != last >> self.size_bits {
                index = 0;
                next = (last >> self.size_bits << self.size_bits).wrapping_add(size);
            }
            self.head = next;
            let place = self.data + index;
            self.put(place, &id.to_le_bytes());
            self.put(place + 8, text);
            (begin, next)
        };
        let info = self.infos + self.slot(id) * 88;
        let sequence = self.sequence;
        self.sequence += 1;
        self.put(info, &sequence.to_le_bytes());
        self.put(info + 8, &(sequence * 1000).to_le_bytes());
        self.put(info + 16, &(text.len() as u16).to_le_bytes());
        self.put(info + 18, &[1, 4 << 5 | 2]);
        self.put(info + 20, &77_u32.to_le_bytes());
        self.put(info + 24, b"pci\0");
        self.put_descriptor(id, 2, begin, next);
        self.put_header();
        id
    }

    fn read(&self) -> impl Fn(VirtualAddress, &mut [u8]) -> Result<(), ReadError> + '_ {
        slice_reader(&self.memory)
    }

    fn found(&self) -> Vec<Found> {
        walk(&self.layout, &self.memory)
    }

    fn texts(&self) -> Vec<Vec<u8>> {
        let text = |found| match found {
            Found::Record(record) => Some(record.text),
            Found::Lost(_) => None,
        };
        self.found().into_iter().filter_map(text).collect()
    }
}

fn slice_reader(memory: &[u8]) -> impl Fn(VirtualAddress, &mut [u8]) -> Result<(), ReadError> + '_ {
    |address, buffer| {
        let source = usize::try_from(address.as_u64())
            .ok()
            .and_then(|start| memory.get(start..)?.get(..buffer.len()));
        let length = buffer.len() as u64;
        buffer.copy_from_slice(source.ok_or(ReadError::Wrap { address, length })?);
        Ok(())
    }
}

fn walk(layout: &RingLayout, memory: &[u8]) -> Vec<Found> {
    let mut found = Vec::new();
    let _ = records(
        layout,
        VirtualAddress::new(0),
        &slice_reader(memory),
        &mut |item| {
            found.push(item);
            true
        },
    );
    found
}

#[test]
fn an_empty_ring_has_no_records() {
    assert_eq!(Writer::new(4, 8).found(), []);
}

#[test]
fn reads_what_was_written() {
    let mut ring = Writer::new(4, 9);
    ring.write(b"hello");
    ring.write(b"");
    let found = ring.found();
    assert_eq!(
        found[0],
        Found::Record(Record {
            sequence: 0,
            nanoseconds: 0,
            facility: 1,
            level: 4,
            flags: 2,
            caller: Some(77),
            command: Vec::new(),
            text: b"hello".to_vec(),
            subsystem: b"pci".to_vec(),
            device: Vec::new(),
            complete: true,
            truncated: 0,
        })
    );
    assert!(matches!(&found[1], Found::Record(record) if record.text.is_empty()));
    assert_eq!(found.len(), 2);
}

#[test]
fn a_block_whose_place_was_taken_is_said() {
    // The text ring wraps before the descriptors do: the oldest records'
    // blocks are written over although their descriptors still stand.
    let mut ring = Writer::new(6, 8);
    for number in 0..30 {
        ring.write(format!("message number {number}").as_bytes());
    }
    let found = ring.found();
    assert_eq!(found.len(), 30);
    let lost = found
        .iter()
        .filter(|found| matches!(found, Found::Lost(Loss::OtherBlock { .. })));
    let lost = lost.count();
    assert!((1..30).contains(&lost), "{lost}");
    assert_eq!(ring.texts().last().unwrap(), b"message number 29");
    for (number, text) in (lost..).zip(ring.texts()) {
        assert_eq!(text, format!("message number {number}").into_bytes());
    }
}

#[test]
fn states_are_told_apart() {
    let mut ring = Writer::new(4, 9);
    let committed = ring.write(b"to be continued");
    let reserved = ring.write(b"half");
    let reusable = ring.write(b"given up");
    let no_room = ring.write(b"never there");
    let stale = ring.write(b"older");
    ring.set_state(committed, 1);
    ring.set_state(reserved, 0);
    ring.set_state(reusable, 3);
    ring.put_descriptor(no_room, 2, FAILED_POSITION, FAILED_POSITION);
    ring.set_state(stale.wrapping_add(16) & ID_MASK, 2);
    let found = ring.found();
    assert!(matches!(&found[0], Found::Record(record) if !record.complete));
    assert_eq!(found[1], Found::Lost(Loss::Reserved { id: reserved }));
    assert_eq!(found[2], Found::Lost(Loss::NoRoom { sequence: 3 }));
    assert_eq!(
        found[3],
        Found::Lost(Loss::Overwritten {
            first: stale,
            count: 1
        })
    );
    assert_eq!(found.len(), 4);
}

#[test]
fn sizes_no_kernel_has_are_refused() {
    let mut ring = Writer::new(4, 9);
    ring.put(48, &40_u32.to_le_bytes());
    let outcome = records(
        &ring.layout,
        VirtualAddress::new(0),
        &ring.read(),
        &mut |_| true,
    );
    assert!(matches!(
        outcome,
        Err(RingError::Size {
            what: "size_bits",
            found: 40,
            ..
        })
    ));
}

#[test]
fn the_layout_is_proved_by_the_data() {
    let mut ring = Writer::new(6, 12);
    for number in 0..20 {
        ring.write(format!("message number {number}").as_bytes());
    }
    let proved = ring_by_proof(VirtualAddress::new(0), &ring.read());
    assert_eq!(proved, Some(layout()));
    let nothing = vec![0; 4096];
    assert_eq!(
        ring_by_proof(VirtualAddress::new(0), &slice_reader(&nothing)),
        None
    );
}

#[test]
fn the_layout_is_taken_from_core_information() {
    let text = b"OSRELEASE=x\nSIZE(printk_ringbuffer)=80\nOFFSET(printk_ringbuffer.desc_ring)=0\n\
OFFSET(printk_ringbuffer.text_data_ring)=48\nSIZE(prb_desc_ring)=48\nOFFSET(prb_desc_ring.count_bits)=0\n\
OFFSET(prb_desc_ring.descs)=8\nOFFSET(prb_desc_ring.infos)=16\nOFFSET(prb_desc_ring.head_id)=24\n\
OFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\nOFFSET(prb_desc.state_var)=0\n\
OFFSET(prb_desc.text_blk_lpos)=8\nOFFSET(prb_data_blk_lpos.begin)=0\nOFFSET(prb_data_blk_lpos.next)=8\n\
SIZE(printk_info)=88\nOFFSET(printk_info.seq)=0\nOFFSET(printk_info.ts_nsec)=8\n\
OFFSET(printk_info.text_len)=16\nOFFSET(printk_info.caller_id)=20\nOFFSET(printk_info.dev_info)=24\n\
OFFSET(dev_printk_info.subsystem)=0\nLENGTH(printk_info_subsystem)=16\n\
OFFSET(dev_printk_info.device)=16\nLENGTH(printk_info_device)=48\n\
OFFSET(prb_data_ring.size_bits)=0\nOFFSET(prb_data_ring.data)=8\n";
    assert_eq!(ring_from_core_information(text), Some(layout()));
    assert_eq!(core_number(text, "SIZE", "prb_desc"), Some(24));
    assert_eq!(ring_from_core_information(b"SIZE(prb_desc)=24\n"), None);
}

#[test]
fn a_ring_that_claims_to_be_huge_is_given_up() {
    let mut ring = Writer::new(4, 10);
    ring.count_bits = MOST_DESCRIPTOR_BITS;
    ring.tail_id = 1;
    ring.head_id = 1 << MOST_DESCRIPTOR_BITS;
    ring.put_header();
    // Every descriptor can be read, and none is of a record.
    let memory = std::mem::take(&mut ring.memory);
    let reads = std::cell::Cell::new(0_u64);
    let read = |address: VirtualAddress, target: &mut [u8]| {
        reads.set(reads.get() + 1);
        let start = address.as_u64() as usize;
        match memory
            .get(start..)
            .and_then(|rest| rest.get(..target.len()))
        {
            Some(source) if start < 128 => target.copy_from_slice(source),
            _ => target.fill(0xff),
        }
        Ok(())
    };
    let mut found = Vec::new();
    let walked = records(&layout(), VirtualAddress::new(0), &read, &mut |one| {
        found.push(one);
        true
    });
    assert_eq!(walked, Ok(()));
    let [
        Found::Lost(Loss::Barren {
            first: 1,
            count,
            left,
        }),
    ] = found[..]
    else {
        panic!("{found:?}");
    };
    assert_eq!(count, MOST_BARREN + 1);
    assert_eq!(count + left, 1 << MOST_DESCRIPTOR_BITS);
    assert!(reads.get() < 8 * MOST_BARREN, "{} reads", reads.get());
}

proptest! {
    #[test]
    fn gives_back_every_record(
        texts in proptest::collection::vec(proptest::collection::vec(1..=255_u8, 0..40), 0..16),
        exact in any::<bool>(),
    ) {
        // Room for all: 16 records of at most 48 bytes.
        let mut ring = Writer::new(4, 10);
        ring.exact = exact;
        // Start near the end, so that blocks wrap.
        ring.head = ring.head.wrapping_add((1 << 10) - 120);
        for text in &texts {
            ring.write(text);
        }
        prop_assert_eq!(ring.texts(), texts);
    }

    #[test]
    fn never_panics_and_always_ends(
        memory in proptest::collection::vec(any::<u8>(), 0..2048),
        count_bits in 0..10_u32, size_bits in 0..12_u32,
    ) {
        let mut memory = memory;
        if memory.len() > 64 {
            memory[..4].copy_from_slice(&count_bits.to_le_bytes());
            memory[8..16].copy_from_slice(&64_u64.to_le_bytes());
            memory[16..24].copy_from_slice(&128_u64.to_le_bytes());
            memory[48..52].copy_from_slice(&size_bits.to_le_bytes());
            memory[56..64].copy_from_slice(&512_u64.to_le_bytes());
        }
        prop_assert!(walk(&layout(), &memory).len() <= 1 << 10);
        ring_by_proof(VirtualAddress::new(0), &slice_reader(&memory));
    }

    #[test]
    fn damage_is_never_a_record_of_another(
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), 0..8_u32), 1..20),
    ) {
        let mut ring = Writer::new(4, 9);
        for number in 0..10 {
            ring.write(format!("message {number}").as_bytes());
        }
        for (place, bit) in flips {
            let place = place.index(ring.memory.len());
            ring.memory[place] ^= 1 << bit;
        }
        prop_assert!(ring.found().len() <= 1 << 26);
    }
}

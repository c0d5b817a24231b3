//! A made-up kernel in made-up memory, for tests: the smallest thing that is
//! found, in every layout that symbol tables have had.

use std::ops::Range;
use std::sync::Arc;

use secmon_memory::{
    MemoryRegion, PagingMode, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility,
};

use crate::types::Kind;
use crate::types::encode::Encoder;

/// The run-time address of the image.
pub(crate) const BASE: u64 = 0xffff_ffff_8100_0000;
/// Where the image is in physical memory.
pub(crate) const IMAGE: usize = 2 << 20;
pub(crate) const BANNER: &str = "Linux version 9.9.9 (me@here) (cc 1) #1 SMP today";
const SIZE: usize = 24 << 20;
/// Offsets in the image. Constants start at 4 MiB, variables at 8 MiB.
const BANNER_AT: usize = 0x40_0000;
const TABLE_AT: usize = 0x40_1000;
const BTF_AT: usize = 0x60_0000;
const NOTES_AT: usize = 0x70_0000;
const ROOT_AT: usize = 0x80_0000;
const DIRECT_MAP_AT: usize = 0x80_1000;
const FILLERS: u64 = 5000;
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
const FIVE_LEVEL_DIRECT_MAP: u64 = 0xff11_0000_0000_0000;

/// The order of the parts of a symbol table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// To 6.1: addresses, number, names, markers, tokens.
    First,
    /// 6.2 and 6.3: the order of names after the markers.
    WithOrder,
    /// From 6.4 on: number, names, markers, tokens, addresses, order.
    AddressesLast,
    /// 7.0 and later: the same, aligned to 4 bytes only.
    Unaligned,
}

/// How the addresses are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Addresses {
    Absolute,
    BaseRelative,
    AbsolutePerCpu,
    PlaceRelative,
}

/// What to make.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    pub layout: Layout,
    pub addresses: Addresses,
    pub mode: PagingMode,
}

impl Recipe {
    /// All that there have been, and some that there have not.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        use Addresses::{Absolute, AbsolutePerCpu, BaseRelative, PlaceRelative};
        use Layout::{AddressesLast, First, Unaligned, WithOrder};
        let layouts = [First, WithOrder, AddressesLast, Unaligned];
        layouts.into_iter().flat_map(|layout| {
            [Absolute, BaseRelative, AbsolutePerCpu, PlaceRelative]
                .into_iter()
                // The place-relative encoding came long after the order changed.
                .filter(move |addresses| {
                    *addresses != PlaceRelative || matches!(layout, AddressesLast | Unaligned)
                })
                .flat_map(move |addresses| {
                    [PagingMode::FourLevel, PagingMode::FiveLevel].map(|mode| Self {
                        layout,
                        addresses,
                        mode,
                    })
                })
        })
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            layout: Layout::First,
            addresses: Addresses::AbsolutePerCpu,
            mode: PagingMode::FourLevel,
        }
    }
}

/// Memory that is nothing but its bytes.
#[derive(Clone)]
pub(crate) struct Memory {
    regions: [MemoryRegion; 1],
    pub bytes: Vec<u8>,
}

impl PhysicalMemory for Memory {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn volatility(&self) -> Volatility {
        Volatility::Static
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let start = usize::try_from(address.as_u64()).unwrap_or(usize::MAX);
        let bytes = start
            .checked_add(buffer.len())
            .and_then(|end| self.bytes.get(start..end));
        let bytes = bytes.ok_or(PhysicalReadError::Hole { address })?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

impl Memory {
    pub(crate) fn shared(&self) -> Arc<dyn PhysicalMemory> {
        Arc::new(self.clone())
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let place = IMAGE + offset;
        self.bytes[place..place + bytes.len()].copy_from_slice(bytes);
    }

    fn entry(&mut self, page: usize, index: usize, value: u64) {
        let place = page + index * 8;
        self.bytes[place..place + 8].copy_from_slice(&value.to_le_bytes());
    }
}

/// Every symbol with its kind and address, in the table's order.
pub(crate) fn symbols(recipe: Recipe) -> Vec<(String, char, u64)> {
    let mut all = Vec::new();
    if matches!(
        recipe.addresses,
        Addresses::Absolute | Addresses::AbsolutePerCpu
    ) {
        all.push(("per_cpu_thing".to_owned(), 'A', 0x1_f000));
    }
    all.push(("_text".to_owned(), 'T', BASE));
    for number in 0..FILLERS {
        all.push((format!("filler_{number}"), 't', BASE + 16 * number));
    }
    let btf = types().len() as u64;
    let notes = notes().len() as u64;
    for (name, kind, offset) in [
        ("linux_banner", 'D', BANNER_AT as u64),
        ("__start_BTF", 'R', BTF_AT as u64),
        ("__stop_BTF", 'R', BTF_AT as u64 + btf),
        ("__start_notes", 'R', NOTES_AT as u64),
        ("__stop_notes", 'R', NOTES_AT as u64 + notes),
        ("init_top_pgt", 'D', ROOT_AT as u64),
        ("page_offset_base", 'D', DIRECT_MAP_AT as u64),
    ] {
        all.push((name.to_owned(), kind, BASE + offset));
    }
    all
}

fn types() -> Vec<u8> {
    let mut encoder = Encoder::new();
    encoder.structure(Kind::Structure, "task_struct", 64, &[]);
    encoder.finish()
}

fn notes() -> Vec<u8> {
    let mut notes: Vec<u8> = [4_u32, 20, 3]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    notes.extend(b"GNU\0");
    notes.extend([0xab; 20]);
    notes
}

/// The bytes of the symbol table, as the kernel's build writes them, if they
/// start at offset `start` of the image.
fn table(recipe: Recipe, start: usize) -> Vec<u8> {
    let all = symbols(recipe);
    let mut names = Vec::new();
    let mut markers = Vec::new();
    for (number, (name, kind, _)) in all.iter().enumerate() {
        if number % 256 == 0 {
            markers.extend((names.len() as u32).to_le_bytes());
        }
        names.push(name.len() as u8 + 1);
        names.push(*kind as u8);
        names.extend(name.bytes());
    }
    // Compressed a little: token 1 stands for what fills most names.
    let mut packed = Vec::new();
    let mut packed_markers = Vec::new();
    let mut rest = &names[..];
    let mut number = 0;
    while let Some((length, after)) = rest.split_first() {
        if number % 256 == 0 {
            packed_markers.extend((packed.len() as u32).to_le_bytes());
        }
        number += 1;
        let (name, after) = after.split_at(usize::from(*length));
        match name.strip_prefix(b"tfiller_") {
            Some(digits) => {
                packed.push(digits.len() as u8 + 1);
                packed.push(1);
                packed.extend(digits);
            }
            None => {
                packed.push(*length);
                packed.extend(name);
            }
        }
        rest = after;
    }
    let mut tokens = Vec::new();
    let mut index = Vec::new();
    for token in 0..=255_u8 {
        index.extend((tokens.len() as u16).to_le_bytes());
        match token {
            1 => tokens.extend(b"tfiller_"),
            b'!'..=b'~' => tokens.push(token),
            _ => {}
        }
        tokens.push(0);
    }
    let count = all.len() as u32;
    let order = vec![0x5a; all.len() * 3];
    let alignment = match recipe.layout {
        Layout::Unaligned => 4,
        _ => 8,
    };
    let mut parts: Vec<Part> = Vec::new();
    let rest = [
        Part::Bytes(count.to_le_bytes().to_vec()),
        Part::Bytes(packed),
        Part::Bytes(packed_markers),
    ];
    match recipe.layout {
        Layout::First | Layout::WithOrder => {
            parts.push(Part::Addresses);
            parts.extend(rest);
            if recipe.layout == Layout::WithOrder {
                parts.push(Part::Bytes(order));
            }
            parts.extend([Part::Bytes(tokens), Part::Bytes(index)]);
        }
        Layout::AddressesLast | Layout::Unaligned => {
            parts.extend(rest);
            parts.extend([Part::Bytes(tokens), Part::Bytes(index), Part::Addresses]);
            parts.push(Part::Bytes(order));
        }
    }
    let mut table = Vec::new();
    for part in parts {
        table.resize(table.len().next_multiple_of(alignment), 0);
        match part {
            Part::Bytes(bytes) => table.extend(bytes),
            Part::Addresses => {
                let place = BASE + (start + table.len()) as u64;
                let addresses = all.iter().map(|(.., address)| *address);
                table.extend(addresses_part(
                    recipe.addresses,
                    place,
                    alignment as u64,
                    addresses,
                ));
            }
        }
    }
    table
}

enum Part {
    Bytes(Vec<u8>),
    Addresses,
}

fn addresses_part(
    kind: Addresses,
    place: u64,
    alignment: u64,
    all: impl Iterator<Item = u64>,
) -> Vec<u8> {
    let mut part = Vec::new();
    for (number, address) in all.enumerate() {
        let offset = match kind {
            Addresses::Absolute => {
                part.extend(address.to_le_bytes());
                continue;
            }
            Addresses::BaseRelative => address - BASE,
            Addresses::AbsolutePerCpu if address < BASE => address,
            Addresses::AbsolutePerCpu => BASE.wrapping_sub(address).wrapping_sub(1),
            Addresses::PlaceRelative => address.wrapping_sub(place + number as u64 * 4),
        };
        part.extend((offset as u32).to_le_bytes());
    }
    if matches!(kind, Addresses::BaseRelative | Addresses::AbsolutePerCpu) {
        let end = place + part.len() as u64;
        part.resize(
            part.len() + (end.next_multiple_of(alignment) - end) as usize,
            0,
        );
        part.extend(BASE.to_le_bytes());
    }
    part
}

/// Where the parts lie that tests change: the page tables and the table.
pub(crate) fn interesting(recipe: Recipe) -> [Range<usize>; 4] {
    let table = table(recipe, TABLE_AT).len();
    [
        0x1000..0x6000,
        IMAGE + TABLE_AT..IMAGE + TABLE_AT + table,
        IMAGE + BTF_AT..IMAGE + BTF_AT + types().len(),
        IMAGE + ROOT_AT..IMAGE + DIRECT_MAP_AT + 8,
    ]
}

/// Memory with a kernel made after `recipe`.
pub(crate) fn memory(recipe: Recipe) -> Memory {
    let mut memory = Memory {
        regions: [MemoryRegion::new(PhysicalAddress::new(0), SIZE as u64)],
        bytes: vec![0; SIZE],
    };
    // A trampoline at 0x1000 and the kernel's own root share 0x2000.
    let root = IMAGE + ROOT_AT;
    let (upper, directory, direct) = (0x3000, 0x4000, 0x5000);
    let shared = match recipe.mode {
        PagingMode::FourLevel => upper,
        PagingMode::FiveLevel => {
            memory.entry(0x2000, 511, upper as u64 | 0x63);
            0x2000
        }
    };
    memory.entry(0x1000, 511, shared as u64 | 0x63);
    memory.entry(root, 511, shared as u64 | 0x63);
    memory.entry(upper, 510, directory as u64 | 0x63);
    for step in 0..10_u64 {
        let rights = match step {
            0..2 => 0x1e1,
            2..4 => 1 << 63 | 0x1e1,
            _ => 1 << 63 | 0x1e3,
        };
        let page = IMAGE as u64 + step * (2 << 20);
        memory.entry(directory, 8 + step as usize, page | rights);
    }
    // The direct map: the first GiB in one page.
    let direct_map = match recipe.mode {
        PagingMode::FourLevel => {
            memory.entry(root, 0x111, direct as u64 | 0x63);
            memory.entry(direct, 0, 1 << 63 | 0x1e3);
            DIRECT_MAP
        }
        PagingMode::FiveLevel => {
            memory.entry(root, 0x111, direct as u64 | 0x63);
            memory.entry(direct, 0, 0x6063);
            memory.entry(0x6000, 0, 1 << 63 | 0x1e3);
            FIVE_LEVEL_DIRECT_MAP
        }
    };
    memory.write(BANNER_AT, format!("{BANNER}\n").as_bytes());
    memory.write(TABLE_AT, &table(recipe, TABLE_AT));
    memory.write(BTF_AT, &types());
    memory.write(NOTES_AT, &notes());
    memory.write(DIRECT_MAP_AT, &direct_map.to_le_bytes());
    memory
}

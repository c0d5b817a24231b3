//! The page walk, held against QEMU's own in a live guest: every page that
//! `info tlb` lists, and single addresses, mapped or not, by `gva2gpa`.

use anyhow::{Context, Result, bail, ensure};
use secmon_lab::{Backing, Guest, Paging, Suite, Workload};
use secmon_memory::{
    AddressSpace, MappedMemory, MemoryRegion, PageSize, PagingMode, PhysicalAddress,
    TranslationError, VirtualAddress, Volatility,
};

/// The fewest pages that are compared in each mode.
const PAGES: usize = 100_000;
/// Addresses asked for one by one in each mode.
const SINGLE_ADDRESSES: usize = 20_000;
/// Memory of the guest's first process that is mapped page by page, so that
/// there are enough of them.
const TOUCHED_MIB: u32 = 400;

/// A line of `info tlb`.
struct Page {
    address: u64,
    physical: u64,
    flags: String,
}

impl Page {
    /// `ffff888000000000: 0000000000000000 XGPDACTUW`, a dash for a flag that
    /// is not set (QEMU's `print_pte`, `target/i386/monitor.c`).
    fn parse(line: &str) -> Option<Self> {
        let (address, rest) = line.trim().split_once(": ")?;
        let (physical, flags) = rest.split_once(' ')?;
        Some(Self {
            address: u64::from_str_radix(address, 16).ok()?,
            physical: u64::from_str_radix(physical, 16).ok()?,
            flags: flags.to_owned(),
        })
    }

    /// The flags of an entry as `info tlb` writes them.
    fn flags_of(entry: u64, large: bool) -> String {
        let bits = [
            (63, 'X'),
            (8, 'G'),
            (7, 'P'),
            (6, 'D'),
            (5, 'A'),
            (4, 'C'),
            (3, 'T'),
            (2, 'U'),
            (1, 'W'),
        ];
        let letter = |(bit, letter): (u32, char)| {
            // Bit 7 of a page table's entry is the PAT bit; QEMU prints it as P.
            let set = entry >> bit & 1 == 1 && (letter != 'P' || large || entry >> 7 & 1 == 1);
            if set { letter } else { '-' }
        };
        bits.into_iter().map(letter).collect()
    }
}

fn register(registers: &str, name: &str) -> Result<u64> {
    let start = registers
        .find(&format!("{name}="))
        .with_context(|| format!("no {name}"))?;
    let value = &registers[start + name.len() + 1..];
    let digits: String = value.chars().take_while(char::is_ascii_hexdigit).collect();
    u64::from_str_radix(&digits, 16).with_context(|| format!("{name} is {digits:?}"))
}

/// The guest's RAM, mapped live. 512 MiB lie in one piece below the hole.
fn map_ram(guest: &Guest) -> Result<MappedMemory> {
    let file = std::fs::File::open(guest.ram_file().context("a RAM file")?)?;
    let region = MemoryRegion::new(PhysicalAddress::new(0), file.metadata()?.len());
    Ok(MappedMemory::map_file(
        &file,
        &[(region, 0)],
        Volatility::Live,
    )?)
}

fn compare_pages(space: &AddressSpace, pages: &[Page]) -> Result<()> {
    for (index, page) in pages.iter().enumerate() {
        let address = VirtualAddress::new(page.address);
        let translation = space
            .translate(address)
            .with_context(|| format!("QEMU maps {address} to {:#x}", page.physical))?;
        ensure!(
            translation.physical.as_u64() == page.physical,
            "{address}: {translation:?}, QEMU says {:#x}",
            page.physical
        );
        let large = translation.page_size != PageSize::Size4KiB;
        let flags = Page::flags_of(translation.entry, large);
        ensure!(
            flags == page.flags,
            "{address}: flags {flags}, QEMU says {}",
            page.flags
        );
        // Anywhere inside the page, too.
        let inside = (index as u64).wrapping_mul(0x9e37_79b9) % translation.page_size.bytes();
        let physical = space.translate(address.wrapping_add(inside))?.physical;
        ensure!(
            physical.as_u64() == page.physical + inside,
            "{address} + {inside:#x}: {physical}"
        );
    }
    Ok(())
}

/// Addresses in and around mapped pages, and anywhere.
fn single_addresses(pages: &[Page], mode: PagingMode) -> Vec<u64> {
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    let unused = 64 - mode.address_bits();
    let canonical = |address: u64| ((address << unused) as i64 >> unused) as u64;
    (0..SINGLE_ADDRESSES)
        .map(|index| {
            let page = &pages[random() as usize % pages.len()];
            match index % 4 {
                0 => page.address + random() % 4096,
                1 => canonical(page.address.wrapping_add(random() % (1 << 22))),
                2 => canonical(page.address.wrapping_sub(random() % (1 << 31))),
                _ => canonical(random()),
            }
        })
        .collect()
}

fn compare(paging: Paging, mode: PagingMode) -> Result<()> {
    let guest = Guest::builder(Suite::Trixie)
        .memory_mib(512)
        .paging(paging)
        .backing(Backing::File)
        .kernel_argument("transparent_hugepage=never")
        .workload(Workload::small())
        .boot()?;
    let memory = std::sync::Arc::new(map_ram(&guest)?);
    // The processor stops wherever it is; another process's tables have fewer
    // pages, so try until it is the one that was touched.
    for _ in 0..50 {
        guest.truth().touch_memory(TOUCHED_MIB, 0x5a)?;
        let compared = guest.while_stopped(|control| {
            let registers = control.registers(0)?;
            let root = PhysicalAddress::new(register(&registers, "CR3")?);
            let five_levels = register(&registers, "CR4")? >> 12 & 1 == 1;
            ensure!(
                five_levels == (mode == PagingMode::FiveLevel),
                "the guest does not page as it was told to"
            );
            let space = AddressSpace::new(memory.clone(), root, mode);
            let listing = control.human("info tlb")?;
            let pages: Vec<Page> = listing.lines().filter_map(Page::parse).collect();
            ensure!(
                pages.len() == listing.lines().count(),
                "unknown lines in `info tlb`"
            );
            if pages.len() < PAGES {
                return Ok(None);
            }
            compare_pages(&space, &pages)?;
            let mut mapped = 0;
            for address in single_addresses(&pages, mode) {
                let theirs = control.guest_physical(0, address)?;
                let ours = space.translate(VirtualAddress::new(address));
                match (theirs, ours) {
                    (Some(theirs), Ok(ours)) => {
                        ensure!(
                            ours.physical.as_u64() == theirs,
                            "{address:#x}: {ours:?}, QEMU says {theirs:#x}"
                        );
                        mapped += 1;
                    }
                    (None, Err(TranslationError::NotPresent { .. })) => {}
                    (theirs, ours) => bail!("{address:#x}: {ours:?}, QEMU says {theirs:x?}"),
                }
            }
            ensure!(mapped > SINGLE_ADDRESSES / 5 && mapped < SINGLE_ADDRESSES);
            Ok(Some((pages.len(), mapped)))
        })?;
        if let Some((pages, mapped)) = compared {
            println!(
                "{mode:?}: {pages} pages and {SINGLE_ADDRESSES} addresses ({mapped} mapped) agree"
            );
            return Ok(());
        }
    }
    bail!("the processor never stopped in the process whose memory was touched")
}

#[test]
fn four_levels_agree_with_qemu() -> Result<()> {
    compare(Paging::FourLevel, PagingMode::FourLevel)
}

#[test]
fn five_levels_agree_with_qemu() -> Result<()> {
    compare(Paging::FiveLevel, PagingMode::FiveLevel)
}

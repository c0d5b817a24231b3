//! The text of QEMU's monitor command `info mtree -f`.
//!
//! It lists "flat views", one for each distinct view of an address space, as
//! ranges that do not overlap:
//!
//! ```text
//! FlatView #1
//!  AS "memory", root: system
//!  AS "cpu-memory-0", root: system
//!  Root memory region: system
//!   0000000000000000-000000000009ffff (prio 0, ram): pc.ram
//!   00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
//!   0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000
//! ```
//!
//! Source: QEMU `softmmu/memory.c`, `mtree_print_flatview`.

use secmon_memory::{LayoutError, MemoryRegion, PhysicalAddress};

use super::{MAX_REGIONS, RamLayout};

/// The most ranges of one view that are looked at; a real machine has a few
/// hundred.
const MAX_RANGES: usize = 65_536;

/// Where ROM, option ROM and the VGA window lie over RAM on every PC.
const LEGACY: std::ops::Range<u64> = 0xa_0000..0x10_0000;

/// What lies behind a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// RAM: the machine's, or a device's such as video memory.
    Ram,
    /// ROM, or RAM that is write-protected now.
    Rom,
    /// Anything else: a device's registers, a ROM device.
    Other,
}

/// One range of a flat view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatRange {
    /// Its addresses.
    pub region: MemoryRegion,
    /// What lies there.
    pub kind: RangeKind,
    /// The name of the memory region, for RAM that of its block's last part:
    /// `pc.ram`, `vga.vram`, a memory backend's id.
    pub name: String,
    /// Where the range starts inside that memory region.
    pub offset: u64,
}

/// Why the text gives no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MtreeError {
    /// No view of the address space `memory` in it.
    #[error("`info mtree -f` shows no view of the address space \"memory\"")]
    NoMemoryView,
    /// A line in the view that is not a range.
    #[error("`info mtree -f`, line {line}: {found:?} is not a memory range")]
    Line {
        /// The number of the line, from 1.
        line: usize,
        /// Its start.
        found: String,
    },
    /// More ranges than any machine has.
    #[error("`info mtree -f` shows more than {MAX_RANGES} ranges")]
    TooMany,
    /// No RAM at address 0.
    #[error("`info mtree -f` shows no RAM at address 0")]
    NoRam,
    /// Ranges that can't go together.
    #[error("`info mtree -f`: {0}")]
    Layout(#[from] LayoutError),
}

/// The ranges of the view of the address space `memory`, which devices and
/// vCPUs outside of system management mode see.
///
/// # Errors
/// [`MtreeError`] if the view is missing, or a line of it can't be understood.
pub fn parse_mtree(text: &str) -> Result<Vec<FlatRange>, MtreeError> {
    let mut lines = text.lines().enumerate();
    lines
        .find(|(_, line)| line.trim_start().starts_with("AS \"memory\","))
        .ok_or(MtreeError::NoMemoryView)?;
    let mut ranges = Vec::new();
    for (index, line) in lines {
        let line = line.trim();
        if line.starts_with("AS ") || line.starts_with("Root memory region") {
            continue;
        }
        // An empty line, the next view or a note ends the list.
        if !line.starts_with(|c: char| c.is_ascii_hexdigit()) || line.starts_with("FlatView") {
            break;
        }
        if ranges.len() == MAX_RANGES {
            return Err(MtreeError::TooMany);
        }
        let range = parse_range(line).ok_or_else(|| MtreeError::Line {
            line: index + 1,
            found: line.chars().take(80).collect(),
        })?;
        ranges.push(range);
    }
    if ranges.is_empty() {
        return Err(MtreeError::NoMemoryView);
    }
    Ok(ranges)
}

/// `START-LAST (prio N, KIND): NAME[ @OFFSET][ KVM]…`
fn parse_range(line: &str) -> Option<FlatRange> {
    let (addresses, rest) = line.split_once(" (prio ")?;
    let (start, last) = addresses.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let last = u64::from_str_radix(last, 16).ok()?;
    let length = last.checked_sub(start)?.checked_add(1)?;
    let (properties, name) = rest.split_once("): ")?;
    let (_, kind) = properties.split_once(", ")?;
    let kind = match kind.trim() {
        "ram" | "nv-ram" => RangeKind::Ram,
        "rom" => RangeKind::Rom,
        _ => RangeKind::Other,
    };
    // A name may hold spaces; the offset is the last " @" and 16 digits.
    let (name, offset) = match name.rsplit_once(" @") {
        Some((name, offset)) => {
            let digits = offset.split(' ').next()?;
            (name, u64::from_str_radix(digits, 16).ok()?)
        }
        // With no offset, QEMU's note on the accelerator may follow the name.
        None => (name.strip_suffix(" KVM").unwrap_or(name), 0),
    };
    Some(FlatRange {
        region: MemoryRegion::new(PhysicalAddress::new(start), length),
        kind,
        name: name.to_owned(),
        offset,
    })
}

/// The layout of the block at address 0, the machine's main memory.
pub(super) fn main_ram(ranges: &[FlatRange]) -> Result<RamLayout, MtreeError> {
    let first = ranges
        .iter()
        .find(|range| range.kind == RangeKind::Ram && range.region.start.is_null())
        .ok_or(MtreeError::NoRam)?;
    block_layout(ranges, &first.name)
}

/// The layout of the RAM block with this name.
///
/// Neighbouring ranges that continue each other are joined, and the ranges
/// that ROM and VGA hide between 0xa0000 and 0xfffff are filled with the RAM
/// beneath them if both sides of the gap belong to it.
pub(crate) fn block_layout(ranges: &[FlatRange], name: &str) -> Result<RamLayout, MtreeError> {
    let mut entries: Vec<(MemoryRegion, u64)> = Vec::new();
    for range in ranges {
        // RAM that is write-protected in the legacy area is shown as ROM, under
        // the same name.
        let ram = match range.kind {
            RangeKind::Ram => true,
            RangeKind::Rom => LEGACY.contains(&range.region.start.as_u64()),
            RangeKind::Other => false,
        };
        if !ram || range.name != name {
            continue;
        }
        if let Some((last, offset)) = entries.last_mut() {
            let gap = range
                .region
                .start
                .as_u64()
                .checked_sub(last.end().as_u64())
                .ok_or(LayoutError::Overlap(last.start, range.region.start))?;
            let continues = range.offset.wrapping_sub(*offset)
                == range.region.start.as_u64() - last.start.as_u64();
            let hidden =
                last.end().as_u64() >= LEGACY.start && range.region.start.as_u64() <= LEGACY.end;
            if continues && (gap == 0 || hidden) {
                last.length = range.region.end().as_u64() - last.start.as_u64();
                continue;
            }
        }
        if entries.len() == MAX_REGIONS {
            return Err(MtreeError::TooMany);
        }
        entries.push((range.region, range.offset));
    }
    if entries.is_empty() {
        return Err(MtreeError::NoRam);
    }
    Ok(RamLayout::new(entries)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As QEMU 7.2 prints it for `-machine pc -m 6G` after its firmware ran.
    const VIEW: &str = "FlatView #0
 AS \"I/O\", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS \"memory\", root: system
 AS \"cpu-memory-0\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000 KVM
  00000000000cb000-00000000000cdfff (prio 0, ram): pc.ram @00000000000cb000 KVM
  00000000000ce000-00000000000e7fff (prio 0, rom): pc.ram @00000000000ce000
  00000000000e8000-00000000000effff (prio 0, ram): pc.ram @00000000000e8000
  00000000000f0000-00000000000fffff (prio 0, rom): pc.ram @00000000000f0000
  0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-00000001bfffffff (prio 0, ram): pc.ram @00000000c0000000

FlatView #2
 AS \"cpu-smm-0\", root: memory
 Root memory region: memory
  0000000000000000-0000000000000fff (prio 0, ram): other
";

    #[test]
    fn main_memory_is_joined_across_what_hides_it() {
        let layout = RamLayout::from_mtree(VIEW).expect("a layout");
        assert_eq!(
            layout.to_string(),
            "0x0-0xc0000000@0x0,0x100000000-0x1c0000000@0xc0000000"
        );
        let ranges = parse_mtree(VIEW).expect("ranges");
        assert_eq!(ranges.len(), 12, "only the view of \"memory\"");
        let video = block_layout(&ranges, "vga.vram").expect("a layout");
        assert_eq!(video.to_string(), "0xfd000000-0xfe000000@0x0");
    }

    #[test]
    fn carriage_returns_do_not_matter() {
        let text = VIEW.replace('\n', "\r\n");
        assert_eq!(RamLayout::from_mtree(&text), RamLayout::from_mtree(VIEW));
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            RamLayout::from_mtree("unknown command: 'info'"),
            Err(MtreeError::NoMemoryView)
        );
        let no_ram = VIEW.replace("ram): pc.ram", "i/o): pc.ram");
        assert_eq!(RamLayout::from_mtree(&no_ram), Err(MtreeError::NoRam));
        let broken = VIEW.replace("00000000000cb000-", "00000000000cb000_");
        assert!(matches!(
            RamLayout::from_mtree(&broken),
            Err(MtreeError::Line { line: 13, .. })
        ));
    }

    #[test]
    fn a_name_with_spaces_and_an_at_sign() {
        let range = parse_range(
            "0000000000000000-0000000000000fff (prio 0, ram): a @b c @0000000000002000 KVM",
        );
        let range = range.expect("a range");
        assert_eq!((range.name.as_str(), range.offset), ("a @b c", 0x2000));
    }

    proptest! {
        #[test]
        fn any_text_is_a_layout_or_an_error(lines in prop::collection::vec(
            (0_u64..0x20_0000, 0_u64..0x20_0000, 0_u64..0x20_0000, prop::bool::ANY), 0..12
        ), cut in 0_usize..2000) {
            let mut text = String::from(" AS \"memory\", root: system\n");
            for (start, last, offset, rom) in lines {
                let kind = if rom { "rom" } else { "ram" };
                text += &format!("  {start:016x}-{last:016x} (prio 0, {kind}): r @{offset:016x}\n");
            }
            text.truncate(cut);
            let _ = RamLayout::from_mtree(&text);
        }
    }
}

//! Where a machine's RAM lies in guest physical memory.
//!
//! QEMU keeps a guest's RAM in one block (a file, a run of anonymous memory),
//! but the guest sees it in two parts: below the hole for PCI devices under
//! 4 GiB, and from 4 GiB on. A [`RamLayout`] says which region lies at which
//! offset of the block. It comes from the machine type, from QEMU's own
//! `info mtree -f`, or from the user.
//!
//! Sources of the rules: QEMU `hw/i386/pc_q35.c` (`pc_q35_init`),
//! `hw/i386/pc_piix.c` (`pc_init1`), `hw/i386/pc.c` (`pc_memory_init`),
//! `hw/i386/microvm.c` (`microvm_memory_init`).

use std::fmt;
use std::str::FromStr;

use secmon_memory::{LayoutError, MemoryRegion, PhysicalAddress};

mod mtree;

pub(crate) use mtree::block_layout;
pub use mtree::{FlatRange, MtreeError, RangeKind, parse_mtree};

const GIB: u64 = 1 << 30;

/// The most regions that a stated or reported layout may have. Machines have
/// two; each hotplugged DIMM adds one, and there are at most 256 slots.
const MAX_REGIONS: usize = 1024;

/// A machine type whose RAM layout is known without asking QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Machine {
    /// `q35` and its versions, `pc-q35-7.2`.
    Q35,
    /// `pc` and its versions, `pc-i440fx-7.2`.
    I440fx,
    /// `microvm`.
    Microvm,
}

/// How a machine type divides its RAM.
struct Division {
    /// RAM of this size or more is divided at `divided_at`, less RAM at
    /// `limit` (which it doesn't reach).
    limit: u64,
    divided_at: u64,
}

impl Machine {
    /// The machine that QEMU means by a `-machine` name such as `q35`,
    /// `pc-q35-7.2`, `pc`, `pc-i440fx-6.0` or `microvm`. Other machines
    /// (`isapc`, `xenfv`, `none`) give `None`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "q35" => Some(Self::Q35),
            "pc" => Some(Self::I440fx),
            "microvm" => Some(Self::Microvm),
            _ if name.starts_with("pc-q35-") => Some(Self::Q35),
            _ if name.starts_with("pc-i440fx-") => Some(Self::I440fx),
            _ => None,
        }
    }

    const fn division(self) -> Division {
        match self {
            Self::Q35 => Division {
                limit: 0xb000_0000,
                divided_at: 0x8000_0000,
            },
            Self::I440fx => Division {
                limit: 0xe000_0000,
                divided_at: 0xc000_0000,
            },
            Self::Microvm => Division {
                limit: 0xc000_0000,
                divided_at: 0xc000_0000,
            },
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q35 => "q35",
            Self::I440fx => "i440fx",
            Self::Microvm => "microvm",
        })
    }
}

/// Which region of guest physical memory lies at which offset of the RAM.
///
/// Regions are sorted and disjoint, none is empty, and there is at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout(Vec<(MemoryRegion, u64)>);

impl RamLayout {
    /// The layout with these regions, in any order, each with its offset.
    ///
    /// # Errors
    /// [`LayoutError`] if a region is empty, reaches past the end of physical
    /// memory (2^52) or overlaps another. No region at all counts as an empty
    /// one at address 0.
    pub fn new(mut entries: Vec<(MemoryRegion, u64)>) -> Result<Self, LayoutError> {
        entries.sort_by_key(|(region, _)| region.start);
        if entries.is_empty() {
            return Err(LayoutError::Empty(PhysicalAddress::new(0)));
        }
        for (region, offset) in &entries {
            let start = region.start;
            if region.length == 0 {
                return Err(LayoutError::Empty(start));
            }
            let end = start.checked_add(region.length);
            let last = offset.checked_add(region.length);
            if end.is_none_or(|end| end.as_u64() > 1 << 52) || last.is_none() {
                return Err(LayoutError::TooHigh(start));
            }
        }
        for pair in entries.windows(2) {
            if let [(first, _), (second, _)] = pair
                && first.end() > second.start
            {
                return Err(LayoutError::Overlap(first.start, second.start));
            }
        }
        Ok(Self(entries))
    }

    /// RAM that lies in one piece from address 0 on, as in a raw image
    /// without holes.
    ///
    /// # Errors
    /// [`LayoutError`] for a size of 0 or above 2^52.
    pub fn contiguous(ram_size: u64) -> Result<Self, LayoutError> {
        let start = PhysicalAddress::new(0);
        Self::new(vec![(MemoryRegion::new(start, ram_size), 0)])
    }

    /// What QEMU gives a guest with `ram_size` bytes on this machine.
    ///
    /// Two machines are not covered, and only QEMU itself can tell their
    /// layouts: those of nearly 1 TiB of RAM and more with an AMD CPU model,
    /// whose upper part QEMU moves to 1 TiB; and machine types from before
    /// QEMU 2.1, which divide RAM elsewhere.
    ///
    /// # Errors
    /// [`LayoutError`] for a size of 0 or one that leads past 2^52.
    pub fn for_machine(machine: Machine, ram_size: u64) -> Result<Self, LayoutError> {
        Self::for_machine_with(machine, ram_size, None)
    }

    /// As [`for_machine`](Self::for_machine), with the machine's option
    /// `max-ram-below-4g` where it was given.
    ///
    /// # Errors
    /// As `for_machine`.
    pub fn for_machine_with(
        machine: Machine,
        ram_size: u64,
        max_ram_below_4g: Option<u64>,
    ) -> Result<Self, LayoutError> {
        let max_ram_below_4g = max_ram_below_4g.filter(|limit| *limit > 0);
        let Division { limit, divided_at } = machine.division();
        let low = match machine {
            // The user's limit only ever lowers what the machine would do.
            Machine::Q35 => {
                let machine_limit = if ram_size >= limit { divided_at } else { limit };
                machine_limit.min(max_ram_below_4g.unwrap_or(4 * GIB))
            }
            // Here the user's limit takes the place of the machine's, and RAM
            // that doesn't reach it isn't divided.
            Machine::I440fx => {
                let limit = max_ram_below_4g.unwrap_or(limit);
                if ram_size >= limit {
                    limit.min(divided_at)
                } else {
                    limit
                }
            }
            // It has no such option.
            Machine::Microvm => divided_at,
        };
        let below = ram_size.min(low);
        let mut entries = vec![(MemoryRegion::new(PhysicalAddress::new(0), below), 0)];
        if ram_size > below {
            let above = MemoryRegion::new(PhysicalAddress::new(4 * GIB), ram_size - below);
            entries.push((above, below));
        }
        Self::new(entries)
    }

    /// The layout that QEMU reports in the text of `info mtree -f`.
    ///
    /// Only the RAM block that lies at address 0 counts, QEMU's main memory;
    /// video memory and other devices' RAM do not. Where ROM and the VGA
    /// window lie over RAM (0xa0000 to 0xfffff) the RAM beneath is meant.
    ///
    /// # Errors
    /// [`MtreeError`] if the text holds no such view of memory.
    pub fn from_mtree(text: &str) -> Result<Self, MtreeError> {
        mtree::main_ram(&parse_mtree(text)?)
    }

    /// The regions and their offsets, as
    /// [`MappedMemory::map_file`](secmon_memory::MappedMemory::map_file) takes
    /// them.
    pub fn entries(&self) -> &[(MemoryRegion, u64)] {
        &self.0
    }

    /// The regions alone.
    pub fn regions(&self) -> impl Iterator<Item = MemoryRegion> + '_ {
        self.0.iter().map(|(region, _)| *region)
    }

    /// The bytes in all regions.
    pub fn ram_size(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum: u64, (region, _)| sum.saturating_add(region.length))
    }

    /// The offset one past the last byte used: what a file must hold.
    pub fn needed(&self) -> u64 {
        let ends = self
            .0
            .iter()
            .map(|(region, offset)| offset.saturating_add(region.length));
        ends.max().unwrap_or(0)
    }
}

impl fmt::Display for RamLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (region, offset)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let (start, end) = (region.start, region.end());
            write!(f, "{comma}{start:#x}-{end:#x}@{offset:#x}")?;
        }
        Ok(())
    }
}

/// Why a stated layout could not be understood. `position` counts characters
/// from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutParseError {
    /// A number was expected.
    #[error(
        "memory layout, character {position}: {found:?} is not a number such as 0x80000000 or 2048"
    )]
    Number {
        /// Where the number should start.
        position: usize,
        /// What stands there, up to the next separator.
        found: String,
    },
    /// A separator was expected.
    #[error(
        "memory layout, character {position}: expected {expected:?} (the form is START-END@OFFSET,…, for example 0-0x80000000@0,0x100000000-0x180000000@0x80000000)"
    )]
    Separator {
        /// Where it should stand.
        position: usize,
        /// `-` or `@`.
        expected: char,
    },
    /// A region that ends before it starts, or where it starts.
    #[error(
        "memory layout, character {position}: the region ends at {end:#x}, not after its start {start:#x}"
    )]
    Backwards {
        /// Where the region starts in the text.
        position: usize,
        /// Its first address.
        start: u64,
        /// The address one past its last.
        end: u64,
    },
    /// More regions than any machine has.
    #[error("memory layout, character {position}: more than {limit} regions")]
    TooMany {
        /// Where the first region too many starts.
        position: usize,
        /// How many there may be.
        limit: usize,
    },
    /// Regions that can't go together.
    #[error("memory layout: {0}")]
    Layout(#[from] LayoutError),
}

/// Reads `START-END@OFFSET,…`: END is one past the last address, numbers are
/// decimal or hexadecimal with `0x`. `@OFFSET` may be left out: the region
/// then follows the one before it in RAM.
impl FromStr for RamLayout {
    type Err = LayoutParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut entries: Vec<(MemoryRegion, u64)> = Vec::new();
        let mut next_offset = 0_u64;
        let mut position = 1;
        for part in text.split(',') {
            if entries.len() == MAX_REGIONS {
                return Err(LayoutParseError::TooMany {
                    position,
                    limit: MAX_REGIONS,
                });
            }
            let Some((start_text, rest)) = part.split_once('-') else {
                number(part, position)?;
                return Err(LayoutParseError::Separator {
                    position: position + part.chars().count(),
                    expected: '-',
                });
            };
            let start = number(start_text, position)?;
            let end_position = position + start_text.chars().count() + 1;
            let (end_text, offset_text) = match rest.split_once('@') {
                Some((end, offset)) => (end, Some(offset)),
                None => (rest, None),
            };
            let end = number(end_text, end_position)?;
            let offset = match offset_text {
                Some(offset) => number(offset, end_position + end_text.chars().count() + 1)?,
                None => next_offset,
            };
            if end <= start {
                return Err(LayoutParseError::Backwards {
                    position,
                    start,
                    end,
                });
            }
            let region = MemoryRegion::new(PhysicalAddress::new(start), end - start);
            next_offset = offset.saturating_add(region.length);
            entries.push((region, offset));
            position += part.chars().count() + 1;
        }
        Ok(Self::new(entries)?)
    }
}

/// A decimal or `0x` hexadecimal number that is all of `text`.
fn number(text: &str, position: usize) -> Result<u64, LayoutParseError> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let value = match digits {
        // from_str_radix would take a sign.
        Some(digits) if digits.starts_with(['+', '-']) => None,
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None if text.starts_with(['+', '-']) => None,
        None => text.parse().ok(),
    };
    value.ok_or_else(|| LayoutParseError::Number {
        position,
        found: text.chars().take(40).collect(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(machine: Machine, ram_size: u64) -> String {
        RamLayout::for_machine(machine, ram_size)
            .expect("a layout")
            .to_string()
    }

    #[test]
    fn machines_divide_ram_where_qemu_does() {
        assert_eq!(text(Machine::Q35, 512 << 20), "0x0-0x20000000@0x0");
        assert_eq!(
            text(Machine::Q35, 0xb000_0000),
            "0x0-0x80000000@0x0,0x100000000-0x130000000@0x80000000"
        );
        assert_eq!(
            text(Machine::Q35, 0xaff0_0000),
            "0x0-0xaff00000@0x0",
            "just below the limit nothing moves"
        );
        assert_eq!(text(Machine::I440fx, 3 * GIB), "0x0-0xc0000000@0x0");
        assert_eq!(
            text(Machine::I440fx, 0xdff0_0000),
            "0x0-0xdff00000@0x0",
            "RAM under 3.5 GiB is not divided"
        );
        assert_eq!(
            text(Machine::I440fx, 0xe000_0000),
            "0x0-0xc0000000@0x0,0x100000000-0x120000000@0xc0000000"
        );
    }

    #[test]
    fn max_ram_below_4g_moves_the_division() {
        let layout = |machine, size, limit| {
            RamLayout::for_machine_with(machine, size, Some(limit))
                .expect("a layout")
                .to_string()
        };
        assert_eq!(
            layout(Machine::Q35, 2 * GIB, GIB),
            "0x0-0x40000000@0x0,0x100000000-0x140000000@0x40000000"
        );
        assert_eq!(
            layout(Machine::Q35, 3 * GIB, 4 * GIB),
            text(Machine::Q35, 3 * GIB),
            "it can only lower the division"
        );
        assert_eq!(
            layout(Machine::I440fx, 2 * GIB, GIB),
            "0x0-0x40000000@0x0,0x100000000-0x140000000@0x40000000"
        );
        assert_eq!(
            layout(Machine::I440fx, 2 * GIB, 0),
            text(Machine::I440fx, 2 * GIB),
            "0 means the machine's own limit"
        );
    }

    #[test]
    fn names_of_machines() {
        assert_eq!(Machine::from_name("pc-q35-7.2"), Some(Machine::Q35));
        assert_eq!(Machine::from_name("q35"), Some(Machine::Q35));
        assert_eq!(Machine::from_name("pc"), Some(Machine::I440fx));
        assert_eq!(Machine::from_name("pc-i440fx-2.4"), Some(Machine::I440fx));
        assert_eq!(Machine::from_name("microvm"), Some(Machine::Microvm));
        assert_eq!(Machine::from_name("isapc"), None);
        assert_eq!(Machine::from_name(""), None);
    }

    #[test]
    fn a_stated_layout_is_understood() {
        let stated = "0-0x80000000@0,0x100000000-0x180000000@0x80000000";
        let layout: RamLayout = stated.parse().expect("a layout");
        assert_eq!(layout.ram_size(), 4 * GIB);
        assert_eq!(layout.needed(), 4 * GIB);
        let without_offsets: RamLayout = "0-0x80000000,0x100000000-0x180000000"
            .parse()
            .expect("a layout");
        assert_eq!(layout, without_offsets);
        let decimal: RamLayout = "0-4096@4096".parse().expect("a layout");
        assert_eq!(decimal.to_string(), "0x0-0x1000@0x1000");
    }

    #[test]
    fn errors_name_the_position() {
        let error = |text: &str| text.parse::<RamLayout>().expect_err(text);
        assert_eq!(
            error("0-0x1000@0,x-5"),
            LayoutParseError::Number {
                position: 12,
                found: "x".into()
            }
        );
        assert_eq!(
            error("0"),
            LayoutParseError::Separator {
                position: 2,
                expected: '-'
            }
        );
        assert!(matches!(
            error(""),
            LayoutParseError::Number { position: 1, .. }
        ));
        assert!(matches!(
            error("0-0x1000@0,"),
            LayoutParseError::Number { position: 12, .. }
        ));
        assert!(matches!(
            error("0-0x1000@"),
            LayoutParseError::Number { position: 10, .. }
        ));
        assert!(matches!(
            error("0-+5"),
            LayoutParseError::Number { position: 3, .. }
        ));
        assert!(matches!(
            error("0-0x1000@0,9-9"),
            LayoutParseError::Backwards { position: 12, .. }
        ));
        assert!(matches!(
            error("0-0x1000@0,0xfff-0x2000@0x1000"),
            LayoutParseError::Layout(LayoutError::Overlap(..))
        ));
        assert!(matches!(
            error("0-0x1000@0xffffffffffffffff"),
            LayoutParseError::Layout(LayoutError::TooHigh(_))
        ));
        let many = vec!["0-1@0"; MAX_REGIONS + 1].join(",");
        assert!(matches!(error(&many), LayoutParseError::TooMany { .. }));
    }

    proptest! {
        #[test]
        fn any_text_is_a_layout_or_an_error(text in "[-0-9a-fx@, ]{0,60}|\\PC{0,40}") {
            if let Ok(layout) = text.parse::<RamLayout>() {
                let again: RamLayout = layout.to_string().parse().expect("its own form");
                prop_assert_eq!(again, layout);
            }
        }

        #[test]
        fn machine_layouts_lose_no_byte(size in 1_u64..(1 << 40), limit: Option<u32>) {
            for machine in [Machine::Q35, Machine::I440fx, Machine::Microvm] {
                let limit = limit.map(u64::from);
                let layout = RamLayout::for_machine_with(machine, size, limit).expect("a layout");
                prop_assert_eq!(layout.ram_size(), size);
                prop_assert_eq!(layout.needed(), size);
            }
        }
    }
}

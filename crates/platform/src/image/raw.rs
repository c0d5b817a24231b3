//! Raw images: the guest's RAM and nothing else, so its place in physical
//! memory has to come from the user, from what the RAM holds, or from the
//! rules by which machines lay RAM out (see [`crate::layout`]).

use std::sync::Arc;

use secmon_memory::{MemoryRegion, PAGE_SIZE, PhysicalAddress, PhysicalMemory};

use super::bytes::ImageBytes;
use super::pieces::{Piece, memory_of};
use super::{Image, ImageError, ImageFormat, ImageHints, ImageNote, ImageOptions};
use crate::layout::{Machine, RamLayout};

/// The layouts that a raw file of this length can have, the likeliest first.
/// Less RAM than the lowest split has a single one.
///
/// Besides what today's machines do there are two more: a split at the limit
/// itself (machine types from before QEMU 1.7), and a file whose offsets are
/// physical addresses, the hole included.
pub fn candidate_layouts(file_length: u64) -> Vec<RamLayout> {
    let mut layouts: Vec<RamLayout> = Vec::new();
    let today =
        [Machine::Q35, Machine::I440fx].map(|machine| RamLayout::for_machine(machine, file_length));
    let unrounded = [0xe000_0000, 0xb000_0000].map(|low: u64| {
        let region = |start: u64, length| MemoryRegion::new(PhysicalAddress::new(start), length);
        RamLayout::new(vec![
            (region(0, low), 0),
            (region(1 << 32, file_length.saturating_sub(low)), low),
        ])
    });
    let all = today
        .into_iter()
        .chain(unrounded)
        .chain([RamLayout::contiguous(file_length)]);
    // A split above the end of the file is no layout.
    for layout in all.flatten() {
        if !layouts.contains(&layout) {
            layouts.push(layout);
        }
    }
    layouts
}

/// The end of the RAM below 4 GiB.
fn low_end(layout: &RamLayout) -> u64 {
    layout
        .regions()
        .map(|region| region.end().as_u64())
        .filter(|end| *end <= 1 << 32)
        .max()
        .unwrap_or(0)
}

pub(crate) fn open(
    file: &Arc<dyn ImageBytes>,
    options: &ImageOptions<'_>,
    mut notes: Vec<ImageNote>,
) -> Result<Image, ImageError> {
    if let Some(layout) = options.layout {
        let pieces = pieces(layout);
        return Ok(Image {
            memory: memory_of(file, &pieces, Vec::new(), options.volatility)?,
            format: ImageFormat::Raw,
            notes,
            hints: ImageHints::default(),
        });
    }
    let whole = file.len() & !(PAGE_SIZE - 1);
    if whole == 0 {
        return Err(ImageError::Truncated {
            what: "first page of a raw image",
            offset: 0,
            needed: PAGE_SIZE,
            available: file.len(),
        });
    }
    if whole != file.len() {
        notes.push(ImageNote::Damaged {
            offset: whole,
            what: format!(
                "the last page has {} of 4096 bytes: the file is cut, or no memory image",
                file.len() - whole
            ),
        });
    }
    let (memory, note) = infer(file, options, candidate_layouts(whole))?;
    notes.extend(note);
    Ok(Image {
        memory,
        format: ImageFormat::Raw,
        notes,
        hints: ImageHints::default(),
    })
}

fn pieces(layout: &RamLayout) -> Vec<Piece> {
    layout
        .entries()
        .iter()
        .map(|(region, offset)| Piece {
            start: region.start.as_u64(),
            length: region.length,
            offset: *offset,
        })
        .collect()
}

/// Tries each layout; says what decided if there was a choice.
fn infer(
    file: &Arc<dyn ImageBytes>,
    options: &ImageOptions<'_>,
    layouts: Vec<RamLayout>,
) -> Result<(Arc<dyn PhysicalMemory>, Option<ImageNote>), ImageError> {
    let choice = layouts.len() > 1;
    let low_memory_end = if choice {
        low_memory_end(file.as_ref())
    } else {
        None
    };
    let has_hole = low_memory_end.is_some_and(|end| has_hole(file.as_ref(), end));
    let mut best: Option<(u64, &'static str, Arc<dyn PhysicalMemory>, RamLayout)> = None;
    for layout in layouts {
        let memory = memory_of(file, &pieces(&layout), Vec::new(), options.volatility)?;
        if !choice {
            return Ok((memory, None));
        }
        let asked = options.validate.map_or(0, |validate| validate(&memory));
        let fits_firmware = low_memory_end.is_some_and(|end| end == low_end(&layout));
        let (score, evidence) = if asked > 0 {
            (asked.saturating_add(3), "the guest's own structures fit it")
        } else if has_hole && layout.entries().len() == 1 {
            (2, "the firmware's ACPI tables end below an empty hole")
        } else if fits_firmware {
            (
                1,
                "the firmware's ACPI tables end where its low memory ends",
            )
        } else {
            (
                0,
                "nothing in the image decides; state the layout if it is wrong",
            )
        };
        // The earlier candidate wins a tie.
        if best.as_ref().is_none_or(|(other, ..)| score > *other) {
            best = Some((score, evidence, memory, layout));
        }
    }
    match best {
        Some((_, evidence, memory, layout)) => Ok((
            memory,
            Some(ImageNote::LayoutInferred {
                layout: layout.to_string(),
                evidence,
            }),
        )),
        None => Err(ImageError::Damaged {
            format: ImageFormat::Raw,
            offset: 0,
            what: "no memory layout fits its length".to_owned(),
        }),
    }
}

/// Where the RAM below 4 GiB ends: SeaBIOS puts the ACPI tables into its last
/// MiB, and RAM is a whole number of MiB. The root pointer is searched where
/// BIOSes leave it (ACPI specification, section 5.2.5.1); up to the lowest
/// split, file offsets are physical addresses in every layout.
fn low_memory_end(file: &dyn ImageBytes) -> Option<u64> {
    const MIB: u64 = 1 << 20;
    for address in (0xe_0000..0x10_0000).step_by(16) {
        let mut pointer = [0; 20];
        file.read(address, &mut pointer, "ACPI root pointer").ok()?;
        let sum = pointer
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        if !pointer.starts_with(b"RSD PTR ") || sum != 0 {
            continue;
        }
        let [.., a, b, c, d] = pointer;
        let table = u64::from(u32::from_le_bytes([a, b, c, d]));
        let mut signature = [0; 4];
        file.read(table, &mut signature, "ACPI root table").ok()?;
        return (&signature == b"RSDT").then(|| (table + 1).next_multiple_of(MIB));
    }
    None
}

/// Whether the file has nothing from `start`, the end of low RAM, up to where
/// a PC's own devices are, but something behind that: then its offsets are
/// physical addresses and it includes the hole.
fn has_hole(file: &dyn ImageBytes, start: u64) -> bool {
    const DEVICES: u64 = 0xfec0_0000;
    const FOUR_GIB: u64 = 1 << 32;
    file.len() >= FOUR_GIB
        && start < DEVICES
        && is_empty(file, start, DEVICES)
        && !is_empty(file, DEVICES, file.len())
}

/// Whether there are only zeros from `start` to `end`: for certain where the
/// file is sparse there, else by samples.
fn is_empty(file: &dyn ImageBytes, start: u64, end: u64) -> bool {
    const SAMPLES: u64 = 512;
    if let Some(sparse) = file.as_file() {
        match rustix::fs::seek(sparse, rustix::fs::SeekFrom::Data(start)) {
            Ok(data) if data >= end => return true,
            Err(rustix::io::Errno::NXIO) => return true,
            _ => {}
        }
    }
    let step = ((end - start) / SAMPLES).next_multiple_of(PAGE_SIZE);
    let mut page = [0; PAGE_SIZE as usize];
    // The last page as well: a ROM ends there.
    let last = (end - PAGE_SIZE).max(start);
    (start..end)
        .step_by(usize::try_from(step.max(PAGE_SIZE)).unwrap_or(usize::MAX))
        .chain([last])
        .filter(|offset| offset + PAGE_SIZE <= end)
        .all(|offset| {
            file.read(offset, &mut page, "sample").is_ok() && page.iter().all(|byte| *byte == 0)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// The regions as (start, length, file offset).
    fn regions(layout: &RamLayout) -> Vec<(u64, u64, u64)> {
        layout
            .entries()
            .iter()
            .map(|(region, offset)| (region.start.as_u64(), region.length, *offset))
            .collect()
    }

    #[test]
    fn small_ram_has_one_layout() {
        for length in [PAGE_SIZE, 512 << 20, 2 * GIB, 0xb000_0000 - PAGE_SIZE] {
            let layouts = candidate_layouts(length);
            assert_eq!(layouts.len(), 1, "{length:#x}");
            assert_eq!(regions(&layouts[0]), [(0, length, 0)]);
        }
    }

    #[test]
    fn large_ram_splits_as_the_machine_does() {
        let layouts = candidate_layouts(6 * GIB);
        assert_eq!(
            regions(&layouts[0]),
            [(0, 2 * GIB, 0), (4 * GIB, 4 * GIB, 2 * GIB)]
        );
        assert_eq!(
            regions(&layouts[1]),
            [(0, 3 * GIB, 0), (4 * GIB, 3 * GIB, 3 * GIB)]
        );
        let layouts = candidate_layouts(3 * GIB);
        assert_eq!(
            regions(&layouts[0]),
            [(0, 2 * GIB, 0), (4 * GIB, GIB, 2 * GIB)]
        );
        assert_eq!(regions(&layouts[1]), [(0, 3 * GIB, 0)]);
    }
}

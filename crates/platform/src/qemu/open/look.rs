//! Where RAM lies, without asking: by the command line, QEMU's own records in
//! its heap, its mappings, and what firmware leaves in low RAM.

use secmon_memory::MemoryRegion;

use super::error::denied;
use super::{LayoutSource, LocatedBlock, Opening, QemuError};
use crate::layout::RamLayout;
use crate::qemu::locate::{self, BlockRecord};
use crate::qemu::memory::{ForeignMemory, HostRegion};

/// A RAM block of this size or more that is not in the layout is worth a note.
const NOTEWORTHY: u64 = 64 << 20;

impl Opening<'_> {
    /// Finds RAM by the command line, QEMU's own records and the mappings.
    pub(super) fn look(&mut self) -> Result<(Vec<HostRegion>, LayoutSource), QemuError> {
        let pid = self.pid();
        let command_line = &self.process.command_line;
        let probe = self.mappings.iter().find(|mapping| mapping.readable);
        let probe = probe.map_or(0, |mapping| mapping.start);
        let memory = ForeignMemory::open(self.process.id, probe)
            .map_err(|error| denied(self.process.id, error))?;
        let records = locate::block_records(&memory, &self.mappings);
        let blocks = match command_line.main_blocks() {
            Some(blocks) => blocks,
            // The sizes are in a file; the records have them.
            None => {
                let main = records
                    .iter()
                    .find(|record| record.name == "pc.ram")
                    .or_else(|| records.iter().max_by_key(|record| record.length));
                let main = main.ok_or_else(|| QemuError::RamNotFound {
                    pid,
                    block: "pc.ram".to_owned(),
                    size: 0,
                    reason: "neither the command line nor QEMU's heap says how large it is"
                        .to_owned(),
                })?;
                vec![(main.name.clone(), main.length)]
            }
        };
        let located = blocks
            .iter()
            .map(|(name, size)| self.locate(&memory, &records, name, *size))
            .collect::<Result<Vec<LocatedBlock>, QemuError>>()?;
        self.note_other_blocks(&records, &blocks);
        let size = located
            .iter()
            .fold(0, |sum: u64, block| sum.saturating_add(block.length));
        if let Some(layout) = &self.options.layout {
            return Ok((self.pieces(layout, &located)?, LayoutSource::Stated));
        }
        let machine = self.process.command_line.machine_type();
        let machine = machine.ok_or_else(|| QemuError::UnknownMachine {
            pid,
            machine: self
                .process
                .command_line
                .machine_name
                .clone()
                .unwrap_or_default(),
        })?;
        let limit = self.process.command_line.max_ram_below_4g;
        let layout = RamLayout::for_machine_with(machine, size, limit)
            .map_err(|source| QemuError::Layout { pid, source })?;
        Ok((
            self.pieces(&layout, &located)?,
            LayoutSource::Machine(machine),
        ))
    }

    /// Finds one block.
    fn locate(
        &mut self,
        memory: &ForeignMemory,
        records: &[BlockRecord],
        name: &str,
        size: u64,
    ) -> Result<LocatedBlock, QemuError> {
        let pid = self.pid();
        let length = size.next_multiple_of(4096);
        let found = |host_address| LocatedBlock {
            host_address,
            length: size,
        };
        let not_found = |reason: String| QemuError::RamNotFound {
            pid,
            block: name.to_owned(),
            size,
            reason,
        };
        // Old machine types call a backend's block by its path.
        let path = format!("/objects/{name}");
        let mut of_this_name: Vec<u64> = records
            .iter()
            .filter(|record| record.name == name || record.name == path)
            .filter(|record| record.length == length)
            .map(|record| record.host_address)
            .collect();
        of_this_name.sort_unstable();
        of_this_name.dedup();
        if let [host_address] = of_this_name.as_slice() {
            return Ok(found(*host_address));
        }
        let backend = self.process.command_line.backend(name);
        let candidates = match backend.map(|backend| (backend.kind.as_str(), &backend.path)) {
            Some(("memory-backend-file", Some(path))) => {
                let path = path.to_string_lossy();
                locate::file_candidates(&self.mappings, path.as_bytes(), length)
            }
            Some(("memory-backend-memfd", _)) => {
                let path = b"/memfd:memory-backend-memfd";
                locate::file_candidates(&self.mappings, path, length)
            }
            _ => locate::anonymous_candidates(&self.mappings, length),
        };
        let with_signs: Vec<(u64, Vec<&'static str>)> = candidates
            .iter()
            .map(|host_address| {
                let mut bytes = vec![0; 1 << 20];
                let count = memory.read(*host_address, &mut bytes);
                bytes.truncate(count);
                (*host_address, locate::signs_of_low_ram(&bytes))
            })
            .filter(|(_, signs)| !signs.is_empty())
            .collect();
        match (candidates.as_slice(), with_signs.as_slice()) {
            ([], _) => Err(not_found(
                "QEMU's heap has no record of it, and the process has no mapping of that size; \
                 give access to QMP"
                    .to_owned(),
            )),
            (_, [(host_address, signs)]) => {
                self.notes.push(format!(
                    "RAM block {name:?} was located by its size and confirmed by {}",
                    signs.join(", ")
                ));
                Ok(found(*host_address))
            }
            ([host_address], []) => {
                self.notes.push(format!(
                    "RAM block {name:?} was located by its size alone: QEMU's heap has no record of it, and no firmware has left its marks in it yet"
                ));
                Ok(found(*host_address))
            }
            (candidates, _) => {
                let addresses: Vec<String> = candidates
                    .iter()
                    .map(|address| format!("{address:#x}"))
                    .collect();
                Err(not_found(format!(
                    "it could lie at any of {} and nothing tells which; give access to QMP",
                    addresses.join(", ")
                )))
            }
        }
    }

    /// Says which large blocks are not part of main RAM.
    fn note_other_blocks(&mut self, records: &[BlockRecord], main: &[(String, u64)]) {
        let command_line = &self.process.command_line;
        let mut names: Vec<&str> = Vec::new();
        for record in records {
            let name = record
                .name
                .strip_prefix("/objects/")
                .unwrap_or(&record.name);
            let is_main = main.iter().any(|(main, _)| main == name);
            // Devices' memory and ROMs are named by the device, with a slash
            // or a dot.
            let is_backend = !name.contains(['/', '.']);
            if !is_main && is_backend && record.length >= NOTEWORTHY && !names.contains(&name) {
                names.push(name);
                self.notes.push(format!(
                    "RAM block {name:?} of {:#x} bytes is not in the layout (a memory device plugged in, or RAM of a device): it is a hole here; with QMP its place would be known",
                    record.length
                ));
            }
        }
        for name in &command_line.device_backends {
            if !names.contains(&name.as_str()) {
                self.notes.push(format!(
                    "the memory device of backend {name:?} is not in the layout: it is a hole here; with QMP its place would be known"
                ));
            }
        }
    }

    /// The layout's regions as pieces of the located blocks, which follow each
    /// other in RAM.
    pub(super) fn pieces(
        &self,
        layout: &RamLayout,
        blocks: &[LocatedBlock],
    ) -> Result<Vec<HostRegion>, QemuError> {
        let size = blocks
            .iter()
            .fold(0, |sum: u64, block| sum.saturating_add(block.length));
        if layout.needed() > size {
            return Err(QemuError::LayoutTooLarge {
                pid: self.pid(),
                needed: layout.needed(),
                size,
            });
        }
        let mut pieces = Vec::new();
        for (region, offset) in layout.entries() {
            let mut block_start = 0_u64;
            for block in blocks {
                let block_end = block_start.saturating_add(block.length);
                let start = (*offset).max(block_start);
                let end = offset.saturating_add(region.length).min(block_end);
                if start < end {
                    pieces.push(HostRegion {
                        region: MemoryRegion::new(
                            region.start.wrapping_add(start - offset),
                            end - start,
                        ),
                        host_address: block.host_address.wrapping_add(start - block_start),
                    });
                }
                block_start = block_end;
            }
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::Machine as MachineType;
    use crate::qemu::discovery::{self, QemuProcess};
    use crate::qemu::machine::Machine;
    use crate::qemu::process::{self, ProcessId};
    use crate::qemu::{QemuOptions, Selector, find};

    /// Without QEMU's records and without QMP: the mappings and what the
    /// firmware left must do.
    #[test]
    fn ram_is_found_without_records_too() {
        let cases: [(&str, u64, &[&str]); 6] = [
            ("pc.ram", 512, &[]),
            ("pc.ram", 3072, &["-machine", "q35"]),
            // As large as video memory.
            ("pc.ram", 16, &[]),
            (
                "m",
                256,
                &[
                    "-object",
                    "memory-backend-ram,id=m,size=256M",
                    "-machine",
                    "memory-backend=m",
                ],
            ),
            (
                "m",
                256,
                &[
                    "-object",
                    "memory-backend-memfd,id=m,size=256M",
                    "-machine",
                    "memory-backend=m",
                ],
            ),
            (
                "m",
                256,
                &[
                    "-object",
                    "memory-backend-file,id=m,size=256M,mem-path=ram,share=off",
                    "-machine",
                    "memory-backend=m",
                ],
            ),
        ];
        for (name, size, arguments) in cases {
            let size_argument = size.to_string();
            let all = [&["-m", &size_argument], arguments].concat();
            let mut machine = Machine::start(&all);
            machine.run_firmware();
            let process = find(&Selector::Pid(machine.pid())).expect("a QEMU");
            let mappings = process::mappings(machine.pid()).expect("mappings");
            let memory = ForeignMemory::open(process.id, mappings[0].start).expect("memory");
            let records = locate::block_records(&memory, &mappings);
            let truth = records.iter().find(|record| record.name == name);
            let truth = truth.expect("QEMU's record").host_address;
            let mut opening = Opening {
                process: &process,
                options: &QemuOptions::default(),
                mappings,
                notes: Vec::new(),
                page_table_roots: Vec::new(),
                registers: Vec::new(),
            };
            let located = opening.locate(&memory, &[], name, size << 20);
            let located = located.unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
            assert_eq!(located.host_address, truth, "{arguments:?}");
            assert!(
                opening.notes[0].contains("confirmed by"),
                "{:?}",
                opening.notes
            );
        }
    }

    proptest! {
        #[test]
        fn pieces_cover_the_layout(
            sizes in prop::collection::vec(1_u64..64, 1..5),
            cut in 0_u64..256,
        ) {
            const MIB: u64 = 1 << 20;
            let process = QemuProcess {
                id: ProcessId { pid: 1, start_time: 0 },
                executable: PathBuf::new(),
                command_line: Default::default(),
                monitors: Vec::new(),
                reach: discovery::Reach::ProcessMemory,
            };
            let opening = Opening {
                process: &process,
                options: &QemuOptions::default(),
                mappings: Vec::new(),
                notes: Vec::new(),
                page_table_roots: Vec::new(),
                registers: Vec::new(),
            };
            // Blocks whose offset in RAM can be told from their address.
            let total: u64 = sizes.iter().sum();
            let mut offset = 0;
            let blocks: Vec<LocatedBlock> = sizes
                .iter()
                .enumerate()
                .map(|(index, size)| {
                    let host_address = ((index as u64) << 40) + offset * MIB;
                    offset += size;
                    LocatedBlock { host_address, length: size * MIB }
                })
                .collect();
            let limit = Some((cut % total).max(1) * MIB);
            let layout = RamLayout::for_machine_with(MachineType::Q35, total * MIB, limit)
                .expect("a layout");
            let pieces = opening.pieces(&layout, &blocks).expect("pieces");
            let length: u64 = pieces.iter().map(|piece| piece.region.length).sum();
            prop_assert_eq!(length, total * MIB);
            for piece in pieces {
                let start = piece.region.start.as_u64();
                let (region, offset) = layout
                    .entries()
                    .iter()
                    .find(|(region, _)| region.contains(piece.region.start))
                    .expect("inside of the layout");
                let in_ram = offset + (start - region.start.as_u64());
                prop_assert_eq!(piece.host_address & ((1 << 40) - 1), in_ram);
            }
        }
    }
}

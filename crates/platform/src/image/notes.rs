//! ELF notes, as core files and kdump files carry them: what the hypervisor
//! and the guest's kernel say about themselves.
//!
//! Sources: System V ABI, chapter 5, "Note Section"; QEMU
//! `target/i386/arch_dump.c` (`QEMUCPUState`) and `hw/misc/vmcoreinfo.c`.

use object::LittleEndian;
use object::elf;
use object::read::elf::NoteIterator;
use secmon_memory::{PhysicalAddress, VirtualAddress};

use super::{ImageHints, ImageNote, VcpuState};

/// The most vCPUs whose state is kept; QEMU allows fewer.
const MAX_VCPUS: usize = 4096;
/// Bytes of `QEMUCPUState`, version 1.
const QEMU_STATE_SIZE: usize = 440;

/// Collects notes from any number of note segments.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    hints: ImageHints,
    damaged: bool,
}

impl Notes {
    /// Takes the notes out of one segment, padded to 4 bytes each as core
    /// files have them.
    pub(crate) fn parse(&mut self, bytes: &[u8]) {
        let iterator = NoteIterator::<elf::FileHeader64<LittleEndian>>::new(LittleEndian, 4, bytes);
        let Ok(iterator) = iterator else {
            self.damaged = true;
            return;
        };
        for note in iterator {
            let Ok(note) = note else {
                self.damaged = true;
                return;
            };
            match (note.name(), note.n_type(LittleEndian).0) {
                (b"QEMU", 0) => match parse_qemu_state(note.desc()) {
                    Some(state) if self.hints.vcpus.len() < MAX_VCPUS => {
                        self.hints.vcpus.push(state);
                    }
                    _ => self.damaged = true,
                },
                (b"VMCOREINFO", _) => self.hints.vmcoreinfo = Some(note.desc().to_vec()),
                _ => {}
            }
        }
    }

    /// The VMCOREINFO text where a format names it apart from the notes.
    pub(crate) fn set_vmcoreinfo(&mut self, bytes: Vec<u8>) {
        self.hints.vmcoreinfo = Some(bytes);
    }

    /// What was found; adds a note if some of it could not be read.
    pub(crate) fn finish(self, notes: &mut Vec<ImageNote>) -> ImageHints {
        if self.damaged {
            notes.push(ImageNote::Skipped {
                count: 1,
                what: "or more notes that could not be read",
            });
        }
        self.hints
    }
}

/// Reads `QEMUCPUState`, which starts with its version and its size.
pub fn parse_qemu_state(bytes: &[u8]) -> Option<VcpuState> {
    let word = |offset: usize| -> Option<u64> {
        let bytes = bytes.get(offset..offset + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let version_and_size = word(0)?;
    let version = version_and_size as u32;
    let size = (version_and_size >> 32) as usize;
    // Version 1 until now; the field after cr[4] came without a new version,
    // and size tells whether it is there.
    if version != 1 || size > bytes.len() || size < QEMU_STATE_SIZE - 8 {
        return None;
    }
    const SEGMENTS: usize = 152;
    const SEGMENT: usize = 24;
    const BASE: usize = 16;
    const CONTROL: usize = SEGMENTS + 10 * SEGMENT;
    Some(VcpuState {
        instruction_pointer: VirtualAddress::new(word(136)?),
        stack_pointer: VirtualAddress::new(word(56)?),
        flags: word(144)?,
        fs_base: VirtualAddress::new(word(SEGMENTS + 3 * SEGMENT + BASE)?),
        gs_base: VirtualAddress::new(word(SEGMENTS + 4 * SEGMENT + BASE)?),
        gdt_base: VirtualAddress::new(word(SEGMENTS + 8 * SEGMENT + BASE)?),
        idt_base: VirtualAddress::new(word(SEGMENTS + 9 * SEGMENT + BASE)?),
        cr0: word(CONTROL)?,
        cr3: PhysicalAddress::new(word(CONTROL + 24)?),
        cr4: word(CONTROL + 32)?,
        kernel_gs_base: if size >= QEMU_STATE_SIZE {
            Some(VirtualAddress::new(word(CONTROL + 40)?))
        } else {
            None
        },
    })
}

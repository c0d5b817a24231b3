//! The monitor's memory as root on its host has it: all of it, to write.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use secmon_guest::Guest;
use secmon_guest::linux::memory_area::{Area, AreaModel};
use secmon_guest::linux::task::leaders;
use secmon_guest::linux::user::UserMemory;
use secmon_memory::{AddressSpace, PhysicalAddress, PhysicalMemory, VirtualAddress};
use secmon_profile::{Cache, FindOptions};

/// `VM_WRITE` and `VM_EXEC`.
const VM_WRITE: u64 = 2;
const VM_EXEC: u64 = 4;
/// The name of the attacks' walks.
const TABLE: &str = "lifetime";

/// A monitor whose memory can be written.
pub struct Victim {
    guest: Guest,
    ram: File,
    configuration: Vec<u8>,
    /// What was written over, and where: the latest last.
    before: Vec<(u64, Vec<u8>)>,
}

impl Victim {
    /// The monitor with this memory, which `ram` holds from address 0 on.
    ///
    /// # Errors
    /// If there is no kernel in it.
    pub fn new(
        memory: &Arc<dyn PhysicalMemory>,
        ram: File,
        configuration: Vec<u8>,
    ) -> Result<Self> {
        let options = FindOptions {
            cache: Cache::Off,
            ..FindOptions::default()
        };
        Ok(Self {
            guest: Guest::new(secmon_profile::find(memory, &options)?),
            ram,
            configuration,
            before: Vec::new(),
        })
    }

    /// Where a symbol of the kernel is.
    ///
    /// # Errors
    /// If it has none of that name.
    pub fn symbol(&self, name: &'static str) -> Result<VirtualAddress> {
        self.guest.address(name).context(name)
    }

    /// Inverts bits of a byte of the kernel's memory.
    ///
    /// # Errors
    /// If the address is not mapped.
    pub fn flip(&mut self, address: VirtualAddress, bits: u8) -> Result<()> {
        let space = self.guest.space().clone();
        self.flip_in(&space, address, bits)
    }

    fn flip_in(&mut self, space: &AddressSpace, address: VirtualAddress, bits: u8) -> Result<()> {
        let at = space.translate(address)?.physical;
        let mut byte = [0];
        self.ram.read_exact_at(&mut byte, at.as_u64())?;
        self.write(at, &[byte[0] ^ bits])
    }

    /// Writes to physical memory.
    ///
    /// # Errors
    /// The system's.
    pub fn write(&mut self, at: PhysicalAddress, bytes: &[u8]) -> Result<()> {
        let mut before = vec![0; bytes.len()];
        self.ram.read_exact_at(&mut before, at.as_u64())?;
        self.ram.write_all_at(bytes, at.as_u64())?;
        self.before.push((at.as_u64(), before));
        Ok(())
    }

    /// Inverts bits of the page-table entry that maps an address of the kernel.
    ///
    /// # Errors
    /// If it is not mapped.
    pub fn flip_entry(&mut self, address: VirtualAddress, bits: u64) -> Result<()> {
        let (steps, end) = self.guest.space().trace(address);
        end?;
        let step = steps.last().context("an entry")?;
        let (at, entry) = (step.entry_address, step.entry ^ bits);
        self.write(at, &entry.to_le_bytes())
    }

    /// The areas and the memory of process 1.
    fn first(&self) -> Result<(Vec<Area>, UserMemory, std::ops::Range<u64>)> {
        let mut tasks = leaders(&self.guest, TABLE)?;
        let first = tasks.find(|task| task.tgid == 1).context("process 1")?;
        let model = AreaModel::new(&self.guest, TABLE)?;
        let mm = model.mm(&self.guest, first.mm)?;
        let (areas, _) = model.areas(&self.guest, TABLE, &mm)?;
        let memory = UserMemory::new(&self.guest, first.mm)?;
        Ok((areas, memory, mm.start_brk..mm.brk))
    }

    /// Inverts a bit of the last byte of the last page of the program's text
    /// that is in memory: nothing runs there.
    ///
    /// # Errors
    /// If there is none.
    pub fn flip_text(&mut self) -> Result<()> {
        let (areas, memory, _) = self.first()?;
        let text = areas
            .iter()
            .find(|area| area.flags & VM_EXEC != 0 && !area.file.is_null())
            .context("text")?;
        let pages = (text.start..text.end).step_by(4096);
        let present = pages
            .map(|page| VirtualAddress::new(page + 0xfff))
            .filter(|last| memory.space().translate(*last).is_ok())
            .last();
        self.flip_in(memory.space(), present.context("a page")?, 1)
    }

    /// Inverts a bit of the program's build id, a constant that nothing reads.
    ///
    /// # Errors
    /// If the page is not in memory.
    pub fn flip_constant(&mut self) -> Result<()> {
        const BUILD_ID: u64 = 0x2e0;
        let (areas, memory, _) = self.first()?;
        let start = areas
            .iter()
            .find(|area| area.page_offset == 0 && !area.file.is_null())
            .context("constants")?;
        let address = VirtualAddress::new(start.start + BUILD_ID);
        self.flip_in(memory.space(), address, 1)
    }

    /// Inverts a bit of the last word that process 1 relocated.
    ///
    /// # Errors
    /// If there is none.
    pub fn flip_relocated(&mut self) -> Result<()> {
        let (areas, memory, _) = self.first()?;
        let text = areas
            .iter()
            .position(|area| area.flags & VM_EXEC != 0 && !area.file.is_null());
        let relocated = areas
            .get(text.context("text")? + 1)
            .filter(|area| area.flags & (VM_WRITE | VM_EXEC) == 0)
            .context("relocated pages")?;
        let words = (relocated.start..relocated.end).step_by(8);
        let word = words
            .map(VirtualAddress::new)
            .filter(|word| memory.space().read_u64(*word).is_ok_and(|word| word != 0))
            .last();
        self.flip_in(memory.space(), word.context("a word")?, 1)
    }

    /// Changes a letter of the configuration that process 1 keeps, wherever it
    /// has a copy.
    ///
    /// # Errors
    /// If it has none.
    pub fn change_configuration(&mut self) -> Result<()> {
        let (_, memory, heap) = self.first()?;
        let length = usize::try_from(heap.end - heap.start)?;
        let mut bytes = vec![0; length];
        for (index, page) in bytes.chunks_mut(4096).enumerate() {
            let address = VirtualAddress::new(heap.start + index as u64 * 4096);
            let _ = memory.space().read(address, page);
        }
        let copies = bytes
            .windows(self.configuration.len())
            .enumerate()
            .filter(|(_, window)| *window == self.configuration)
            .map(|(at, _)| at);
        let copies: Vec<usize> = copies.collect();
        ensure!(!copies.is_empty(), "no copy of the configuration");
        for at in copies {
            let last = heap.start + (at + self.configuration.len() / 2) as u64;
            self.flip_in(memory.space(), VirtualAddress::new(last), 1)?;
        }
        Ok(())
    }

    /// Inverts a bit at the unused end of process 1's heap, as an example of
    /// data.
    ///
    /// # Errors
    /// If the page is not there.
    pub fn flip_data(&mut self) -> Result<()> {
        let (_, memory, heap) = self.first()?;
        let pages = (heap.start..heap.end).step_by(4096);
        let last = pages
            .map(|page| VirtualAddress::new(page + 0xff8))
            .filter(|at| memory.space().translate(*at).is_ok())
            .last();
        self.flip_in(memory.space(), last.context("a page")?, 1)
    }

    /// Puts everything back as it was.
    ///
    /// # Errors
    /// The system's.
    pub fn restore(&mut self) -> Result<()> {
        while let Some((at, bytes)) = self.before.pop() {
            self.ram.write_all_at(&bytes, at)?;
        }
        Ok(())
    }
}

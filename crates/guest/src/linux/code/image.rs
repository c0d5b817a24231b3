//! The sections of the kernel's own image, by the linker's symbols
//! (`arch/x86/kernel/vmlinux.lds.S`).

use std::ops::Range;

use secmon_memory::VirtualAddress;

use crate::{Guest, TableError};

/// Where the parts of the kernel image lie, at run time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSections {
    /// `_stext` to `_etext`: code that stays.
    pub text: Range<VirtualAddress>,
    /// `__start_rodata` to `__end_rodata`: constants, and what is written
    /// only while the kernel starts.
    pub rodata: Range<VirtualAddress>,
    /// `_sdata` to `_edata`.
    pub data: Range<VirtualAddress>,
    /// `__init_begin` to `__init_end`: freed once the kernel has started.
    pub init: Range<VirtualAddress>,
    /// `__bss_start` to `__bss_stop`: variables that start as zero.
    pub bss: Range<VirtualAddress>,
}

impl ImageSections {
    /// Looks the symbols up.
    ///
    /// # Errors
    /// [`TableError::Symbol`] for the first that the kernel lacks.
    pub fn of(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let range = |start, end| -> Result<Range<VirtualAddress>, TableError> {
            let start = guest.symbol(table, start)?;
            let end = guest.symbol(table, end)?;
            // Symbols are the guest's word: a range that runs backwards is
            // empty.
            Ok(start..end.max(start))
        };
        let mut bss = range("__bss_start", "__bss_stop")?;
        // The end is given away where memory need not be shared with a host.
        if let Some(shared) = guest.address("__start_bss_decrypted")
            && bss.contains(&shared)
        {
            bss.end = shared;
        }
        Ok(Self {
            text: range("_stext", "_etext")?,
            rodata: range("__start_rodata", "__end_rodata")?,
            data: range("_sdata", "_edata")?,
            init: range("__init_begin", "__init_end")?,
            bss,
        })
    }

    /// From the end of the text to the page before the constants: the text's
    /// last large page maps it executable, and the kernel gives its memory
    /// away (`mark_rodata_ro`).
    pub fn text_gap(&self) -> Range<VirtualAddress> {
        self.text.end..self.rodata.start.max(self.text.end)
    }
}

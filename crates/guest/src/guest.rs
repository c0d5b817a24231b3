//! One guest: its kernel, the layouts resolved so far, and what could not be
//! read.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, RwLock};

use secmon_memory::{AddressSpace, CpuRegisters, ReadError, VirtualAddress};
use secmon_profile::{Kernel, Member, Symbols, Types};
use secmon_reference::{Expected, KernelFile, ReferenceError};

use crate::linux::code::{RunningKernel, Sightings};
use crate::{Diagnostics, Layout, TableError};

/// A guest whose kernel has been found.
pub struct Guest {
    kernel: Kernel,
    layouts: RwLock<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
    /// Addresses of the symbols that were asked for.
    addresses: RwLock<HashMap<&'static str, Option<VirtualAddress>>>,
    diagnostics: Diagnostics,
    registers: Vec<CpuRegisters>,
    pub(crate) unowned_code: Sightings,
    /// The kernel's own file, if somebody gave it.
    reference: Option<Arc<KernelFile>>,
    /// What was there at the first look, if that is to be remembered.
    first_state: Option<Arc<OnceLock<Expected>>>,
    /// What follows from the file, worked out once.
    expected: OnceLock<Result<Expected, ReferenceError>>,
}

impl Guest {
    /// The guest of this kernel. Nothing is read yet. Of an image,
    /// translations are remembered, as they can't change.
    pub fn new(mut kernel: Kernel) -> Self {
        kernel.space = kernel.space.with_tlb();
        Self {
            kernel,
            layouts: RwLock::default(),
            addresses: RwLock::default(),
            diagnostics: Diagnostics::default(),
            registers: Vec::new(),
            unowned_code: Sightings::default(),
            reference: None,
            first_state: None,
            expected: OnceLock::new(),
        }
    }

    /// Lets the kernel's text and constants be compared with those in its own
    /// file. Whether it is this kernel's file is for the caller to see: by the
    /// build id.
    #[must_use]
    pub fn with_reference(mut self, file: Arc<KernelFile>) -> Self {
        self.reference = Some(file);
        self.expected = OnceLock::new();
        self
    }

    /// Lets the kernel's text and constants be compared with those of the first
    /// look at it, which this holds or will hold. It is for one boot of one
    /// kernel. The kernel's own file, if there is one, goes before.
    #[must_use]
    pub fn with_first_state(mut self, state: Arc<OnceLock<Expected>>) -> Self {
        self.first_state = Some(state);
        self
    }

    /// What was there at the first look, or is to be kept from it.
    pub fn first_state(&self) -> Option<&OnceLock<Expected>> {
        self.first_state.as_deref()
    }

    /// The kernel's own file, if one was given.
    pub fn reference(&self) -> Option<&Arc<KernelFile>> {
        self.reference.as_ref()
    }

    /// What the kernel's text and constants have to look like, by its own file;
    /// `None` without one. The first call works it out.
    ///
    /// # Errors
    /// [`TableError`] if the guest's types lack what is needed.
    pub fn expected_image(
        &self,
        table: &'static str,
    ) -> Result<Option<&Result<Expected, ReferenceError>>, TableError> {
        let Some(file) = &self.reference else {
            return Ok(None);
        };
        if let Some(known) = self.expected.get() {
            return Ok(Some(known));
        }
        let running = RunningKernel::of(self, table)?;
        let slide = self.kernel.image.slide;
        Ok(Some(
            self.expected
                .get_or_init(|| Expected::new(file, slide, &running)),
        ))
    }

    /// The same guest, of whose CPUs these registers are known.
    #[must_use]
    pub fn with_registers(mut self, registers: impl IntoIterator<Item = CpuRegisters>) -> Self {
        self.registers = registers.into_iter().collect();
        self
    }

    /// The registers of the CPUs, in the hypervisor's order; none if whoever
    /// opened the guest was not told them.
    pub fn registers(&self) -> &[CpuRegisters] {
        &self.registers
    }

    /// The kernel as it was found.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The kernel's address space.
    pub fn space(&self) -> &AddressSpace {
        &self.kernel.space
    }

    /// The kernel's symbols.
    pub fn symbols(&self) -> &Symbols {
        self.kernel.profile.symbols()
    }

    /// What could not be read so far.
    pub fn diagnostics(&self) -> &Diagnostics {
        &self.diagnostics
    }

    /// The kernel's types, for `table`.
    ///
    /// # Errors
    /// [`TableError::Profile`] if they are not known.
    pub fn types(&self, table: &'static str) -> Result<&Types, TableError> {
        self.kernel
            .profile
            .types()
            .map_err(|source| TableError::Profile { table, source })
    }

    /// The address of a kernel symbol that `table` starts from.
    ///
    /// # Errors
    /// [`TableError::Symbol`] if the kernel has none of that name.
    pub fn symbol(
        &self,
        table: &'static str,
        symbol: &'static str,
    ) -> Result<VirtualAddress, TableError> {
        self.address(symbol)
            .ok_or(TableError::Symbol { table, symbol })
    }

    /// The address of the first kernel symbol of that name, looked up once per
    /// guest.
    pub fn address(&self, symbol: &'static str) -> Option<VirtualAddress> {
        let known = self.addresses.read().ok();
        if let Some(known) = known.and_then(|map| map.get(symbol).copied()) {
            return known;
        }
        let address = self.symbols().address(symbol);
        if let Ok(mut map) = self.addresses.write() {
            map.insert(symbol, address);
        }
        address
    }

    /// A layout, resolved once per guest.
    ///
    /// # Errors
    /// [`TableError`] if the types are unknown or lack a member.
    pub fn layout<L: Layout>(&self, table: &'static str) -> Result<Arc<L>, TableError> {
        let known = self
            .layouts
            .read()
            .ok()
            .and_then(|map| map.get(&TypeId::of::<L>()).cloned());
        if let Some(layout) = known.and_then(|layout| layout.downcast::<L>().ok()) {
            return Ok(layout);
        }
        let layout = L::resolve(self.types(table)?)
            .map(Arc::new)
            .map_err(|source| TableError::Type { table, source })?;
        if let Ok(mut map) = self.layouts.write() {
            map.insert(TypeId::of::<L>(), layout.clone());
        }
        Ok(layout)
    }

    /// The member of the structure at `base` as a number: bit fields are cut
    /// out, signed ones sign-extended (take it `as i64`). Members of more than
    /// 8 bytes give their first 8.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn number(&self, base: VirtualAddress, member: &Member) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        let size = member.size.clamp(1, 8) as usize;
        self.space()
            .read(base.wrapping_add(member.offset), &mut bytes[..size])?;
        Ok(extract(member, u64::from_le_bytes(bytes)))
    }

    /// The member of the structure at `base` as a pointer.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn pointer(
        &self,
        base: VirtualAddress,
        member: &Member,
    ) -> Result<VirtualAddress, ReadError> {
        self.space().read_pointer(base.wrapping_add(member.offset))
    }
}

/// The member's value out of the little-endian integer that starts at its
/// offset: its own bits, sign-extended if it is signed.
pub fn extract(member: &Member, raw: u64) -> u64 {
    let (low, width) = match member.bit_size {
        0 => (0, u32::try_from(member.size.clamp(1, 8) * 8).unwrap_or(64)),
        bits => (u32::from(member.bit_offset), u32::from(bits)),
    };
    let unused = 64_u32.saturating_sub(width).min(63);
    let shifted = raw.checked_shr(low).unwrap_or(0) << unused;
    if member.signed {
        (shifted as i64 >> unused) as u64
    } else {
        shifted >> unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(size: u64, bit_offset: u8, bit_size: u8, signed: bool) -> Member {
        Member {
            offset: 0,
            size,
            bit_offset,
            bit_size,
            signed,
            count: None,
            type_name: String::new(),
            pointer: false,
        }
    }

    #[test]
    fn extracts_bit_fields_and_signs() {
        assert_eq!(extract(&member(4, 0, 0, false), 0x1_ffff_fffe), 0xffff_fffe);
        assert_eq!(extract(&member(4, 0, 0, true), 0xffff_fffe) as i64, -2);
        assert_eq!(extract(&member(8, 0, 0, true), u64::MAX) as i64, -1);
        assert_eq!(extract(&member(4, 3, 2, false), 0b11000), 0b11);
        assert_eq!(extract(&member(4, 3, 1, true), 0b1000) as i64, -1);
        assert_eq!(extract(&member(4, 200, 255, false), u64::MAX), 0);
    }
}

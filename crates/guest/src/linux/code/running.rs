//! What a running kernel says of itself, for the comparison with its own file.

use secmon_memory::VirtualAddress;
use secmon_reference::Running;

use crate::{Guest, TableError, layout};

layout! {
    /// `arch/x86/include/asm/processor.h`
    struct ProcessorLayout: "cpuinfo_x86" {
        features: "x86_capability",
    }
}

layout! {
    /// `arch/x86/include/asm/alternative.h`
    struct AlternativeLayout: "alt_instr" {
        length: "instrlen",
    }
}

/// A guest's kernel, as [`secmon_reference`] asks for it.
pub struct RunningKernel<'g> {
    guest: &'g Guest,
    /// `boot_cpu_data.x86_capability`.
    features: Vec<u8>,
    alternative_size: usize,
}

impl<'g> RunningKernel<'g> {
    /// Reads what the kernel knows of its processor.
    ///
    /// # Errors
    /// [`TableError`] if it can't be read.
    pub fn of(guest: &'g Guest, table: &'static str) -> Result<Self, TableError> {
        /// Words of features and faults: 32 times as many as any kernel has.
        const MOST: u64 = 4096;
        let layout = guest.layout::<ProcessorLayout>(table)?;
        let processor = guest.symbol(table, "boot_cpu_data")?;
        let mut features = vec![0; layout.features.size.min(MOST) as usize];
        guest
            .space()
            .read(
                processor.wrapping_add(layout.features.offset),
                &mut features,
            )
            .map_err(|source| TableError::Read {
                table,
                what: "boot_cpu_data",
                source,
            })?;
        let alternative = guest.layout::<AlternativeLayout>(table)?;
        Ok(Self {
            guest,
            features,
            alternative_size: usize::try_from(alternative.size).unwrap_or(0),
        })
    }
}

impl Running for RunningKernel<'_> {
    fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let address = VirtualAddress::new(address);
        self.guest.space().read(address, bytes).is_ok()
    }

    fn symbol(&self, name: &'static str) -> Option<u64> {
        self.guest.address(name).map(VirtualAddress::as_u64)
    }

    fn name_at(&self, address: u64) -> Option<&str> {
        let (symbol, distance) = self.guest.symbols().nearest(VirtualAddress::new(address))?;
        (distance == 0).then_some(symbol.name)
    }

    fn has_feature(&self, number: u16) -> bool {
        let byte = self.features.get(usize::from(number / 8));
        byte.is_some_and(|byte| byte >> (number % 8) & 1 == 1)
    }

    fn alternative_size(&self) -> usize {
        self.alternative_size
    }
}

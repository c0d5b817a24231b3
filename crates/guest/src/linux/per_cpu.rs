//! Per-CPU variables: which CPUs there are and where each one's copy lies
//! (`arch/x86/kernel/setup_percpu.c`, `kernel/cpu.c`).

use secmon_memory::VirtualAddress;

use crate::linux::list::is_kernel_address;
use crate::{Guest, TableError};

/// More CPUs than this are in no kernel: the largest `NR_CPUS` that x86-64's
/// configuration allows.
const MOST_CPUS: u64 = 8192;

/// The CPUs of a guest and their per-CPU areas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerCpu {
    /// `__per_cpu_offset` of each possible CPU, by CPU number; none for
    /// numbers in between that are no possible CPU's.
    offsets: Vec<Option<u64>>,
    online: Vec<u32>,
}

impl PerCpu {
    /// Reads the CPU masks and `__per_cpu_offset`.
    ///
    /// # Errors
    /// [`TableError`] if a symbol is missing or can't be read.
    pub fn read(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let error = |what| {
            move |source| TableError::Read {
                table,
                what,
                source,
            }
        };
        let space = guest.space();
        let table_address = guest.symbol(table, "__per_cpu_offset")?;
        // A kernel for one CPU only has it as a constant, not a variable.
        let count = match guest.address("nr_cpu_ids") {
            Some(address) => space.read_u32(address).map_err(error("nr_cpu_ids"))?,
            None => 1,
        };
        let count = u64::from(count).clamp(1, MOST_CPUS);
        let mask = |symbol| -> Result<Vec<u32>, TableError> {
            let mut bytes = vec![0; count.div_ceil(64) as usize * 8];
            space
                .read(guest.symbol(table, symbol)?, &mut bytes)
                .map_err(error(symbol))?;
            Ok(set_bits(&bytes, count))
        };
        let possible = mask("__cpu_possible_mask")?;
        let online = mask("__cpu_online_mask")?;
        let mut offsets = vec![None; count as usize];
        for cpu in possible {
            let offset = space
                .read_u64(table_address.wrapping_add(u64::from(cpu) * 8))
                .map_err(error("__per_cpu_offset"))?;
            if let Some(slot) = offsets.get_mut(cpu as usize) {
                *slot = Some(offset);
            }
        }
        Ok(Self { offsets, online })
    }

    /// The numbers of the CPUs that can ever come online, ascending.
    pub fn possible(&self) -> impl Iterator<Item = u32> + '_ {
        (0..)
            .zip(&self.offsets)
            .filter_map(|(cpu, offset)| offset.map(|_| cpu))
    }

    /// The numbers of the CPUs that are online, ascending.
    pub fn online(&self) -> &[u32] {
        &self.online
    }

    /// Where `cpu`'s copy of the variable at `symbol` lies: a static one by
    /// its symbol's address, one from `alloc_percpu` by the pointer that the
    /// kernel keeps.
    pub fn address(&self, symbol: VirtualAddress, cpu: u32) -> Option<VirtualAddress> {
        let offset = (*self.offsets.get(cpu as usize)?)?;
        Some(symbol.wrapping_add(offset))
    }

    /// As [`address`](Self::address), if that is a kernel address at all.
    pub fn checked_address(
        &self,
        guest: &Guest,
        symbol: VirtualAddress,
        cpu: u32,
    ) -> Option<VirtualAddress> {
        self.address(symbol, cpu)
            .filter(|address| is_kernel_address(guest.space(), *address))
    }
}

/// The numbers of the bits that are set, below `count`.
fn set_bits(bytes: &[u8], count: u64) -> Vec<u32> {
    let mut bits = Vec::new();
    for (index, byte) in (0_u32..).zip(bytes) {
        for bit in 0..8 {
            let number = index * 8 + bit;
            if byte >> bit & 1 == 1 && u64::from(number) < count {
                bits.push(number);
            }
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_a_mask() {
        assert_eq!(set_bits(&[0b1000_0101, 0b11], 9), [0, 2, 7, 8]);
        assert!(set_bits(&[], 4).is_empty());
    }

    #[test]
    fn addresses_of_possible_cpus_only() {
        let cpus = PerCpu {
            offsets: vec![Some(0x1000), None, Some(u64::MAX)],
            online: vec![0],
        };
        let symbol = VirtualAddress::new(0x20);
        assert_eq!(cpus.possible().collect::<Vec<_>>(), [0, 2]);
        assert_eq!(cpus.address(symbol, 0), Some(VirtualAddress::new(0x1020)));
        assert_eq!(cpus.address(symbol, 1), None);
        assert_eq!(cpus.address(symbol, 2), Some(VirtualAddress::new(0x1f)));
        assert_eq!(cpus.address(symbol, 3), None);
    }
}

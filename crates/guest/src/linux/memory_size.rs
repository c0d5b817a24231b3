//! How much memory a process has, and its executable (`struct mm_struct`,
//! `include/linux/mm_types.h`).

use secmon_memory::{PAGE_SIZE, ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use crate::linux::per_cpu::PerCpu;
use crate::linux::snapshot::Spans;
use crate::{Guest, Layout, layout};

/// How many counters of pages there are: of files, anonymous, swapped and
/// shared memory (`NR_MM_COUNTERS`, `include/linux/mm_types_task.h`).
const COUNTERS: usize = 4;
/// Which of them count pages in RAM.
const RESIDENT: [bool; COUNTERS] = [true, true, false, true];

layout! {
    /// `include/linux/mm_types.h`
    struct MmLayout: "mm_struct" {
        total: "total_vm",
        exe_file: "exe_file",
        rss: "rss_stat",
    }
}

layout! {
    /// `include/linux/percpu_counter.h`
    struct PercpuCounterLayout: "percpu_counter" {
        count: "count",
        counters: "counters",
    }
}

/// How a guest counts the pages of a process.
#[derive(Debug)]
enum RssModel {
    /// An array of `atomic_long_t` (`struct mm_rss_stat`, until 6.1).
    Plain,
    /// An array of `struct percpu_counter` (since 6.2).
    PerCpu(PercpuCounterLayout),
}

/// How memory descriptors of a guest are read.
#[derive(Debug)]
pub struct MmModel {
    layout: MmLayout,
    rss: RssModel,
    spans: Spans,
}

impl Layout for MmModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = MmLayout::resolve(types)?;
        let rss = if layout.rss.type_name.contains("percpu_counter") {
            RssModel::PerCpu(PercpuCounterLayout::resolve(types)?)
        } else {
            RssModel::Plain
        };
        let spans = Spans::covering([&layout.total, &layout.exe_file, &layout.rss]);
        Ok(Self { layout, rss, spans })
    }
}

/// Memory of a process, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// Address space (`VmSize`).
    pub virtual_size: u64,
    /// What of it is in RAM (`VmRSS`).
    pub resident: u64,
}

/// What is read of an `mm_struct`.
#[derive(Clone, Copy, Debug)]
pub struct Mm {
    /// The executable's `file`, null if there is none.
    pub exe_file: VirtualAddress,
    /// Pages of address space.
    total: u64,
    /// The counters.
    counts: [i64; COUNTERS],
    /// Where the parts are that each CPU counts for itself; none if CPUs count
    /// together.
    parts: Option<[VirtualAddress; COUNTERS]>,
}

impl Mm {
    /// Copies the `mm_struct` at `address`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn read(
        guest: &Guest,
        model: &MmModel,
        address: VirtualAddress,
    ) -> Result<Self, ReadError> {
        let layout = &model.layout;
        model.spans.with(guest.space(), address, |spans, copy| {
            let word = |index: usize, stride: u64, offset: u64| {
                let at = (index as u64).wrapping_mul(stride).wrapping_add(offset);
                spans.word(copy, layout.rss.offset.wrapping_add(at))
            };
            let (counts, parts) = match &model.rss {
                RssModel::Plain => (std::array::from_fn(|index| word(index, 8, 0) as i64), None),
                RssModel::PerCpu(counter) => {
                    let at = |index, offset| word(index, counter.size, offset);
                    (
                        std::array::from_fn(|index| at(index, counter.count.offset) as i64),
                        Some(std::array::from_fn(|index| {
                            VirtualAddress::new(at(index, counter.counters.offset))
                        })),
                    )
                }
            };
            Self {
                exe_file: spans.pointer(copy, &layout.exe_file),
                total: spans.number(copy, &layout.total),
                counts,
                parts,
            }
        })
    }

    /// How much memory that is. A counter that is below zero for a moment
    /// counts as zero.
    ///
    /// # Errors
    /// A text that says what could not be read.
    pub fn size(&self, guest: &Guest, cpus: Result<&PerCpu, String>) -> Result<MemorySize, String> {
        let mut sums = self.counts;
        if let Some(parts) = &self.parts {
            let cpus = cpus?;
            for cpu in cpus.online() {
                let counted = counted_by(guest, cpus, *cpu, parts)?;
                for (sum, part) in sums.iter_mut().zip(counted) {
                    *sum = sum.wrapping_add(i64::from(part));
                }
            }
        }
        let resident = sums.into_iter().zip(RESIDENT).filter(|(_, counts)| *counts);
        let resident = resident.fold(0_u64, |pages, (sum, _)| {
            pages.saturating_add(sum.max(0) as u64)
        });
        Ok(MemorySize {
            virtual_size: self.total.saturating_mul(PAGE_SIZE),
            resident: resident.saturating_mul(PAGE_SIZE),
        })
    }
}

/// What one CPU has counted for itself.
fn counted_by(
    guest: &Guest,
    cpus: &PerCpu,
    cpu: u32,
    parts: &[VirtualAddress; COUNTERS],
) -> Result<[i32; COUNTERS], String> {
    let read = |part: VirtualAddress, bytes: &mut [u8]| {
        let address = cpus
            .checked_address(guest, part, cpu)
            .ok_or_else(|| format!("percpu_counter.counters is {part}"))?;
        let read = guest.space().read(address, bytes);
        read.map_err(|error| error.to_string())
    };
    let mut bytes = [[0; 4]; COUNTERS];
    // They are allocated together since 6.6.
    let together = (0_u64..)
        .zip(parts)
        .all(|(index, part)| *part == parts[0].wrapping_add(index * 4));
    if together {
        read(parts[0], bytes.as_flattened_mut())?;
    } else {
        for (bytes, part) in bytes.iter_mut().zip(parts) {
            read(*part, bytes)?;
        }
    }
    Ok(bytes.map(i32::from_le_bytes))
}

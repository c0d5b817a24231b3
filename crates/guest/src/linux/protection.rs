//! What the kernel keeps of the processors' protection in memory: each CPU's
//! table of segments (`arch/x86/include/asm/segment.h`), its own account of CR4
//! (`arch/x86/include/asm/tlbflush.h`), and which bits it wants to be set
//! (`arch/x86/kernel/cpu/common.c`).

use secmon_memory::{ReadError, VirtualAddress};

use super::per_cpu::PerCpu;
use crate::{Guest, TableError, layout};

/// `GDT_ENTRIES` on x86-64.
pub const DESCRIPTORS: usize = 16;

layout! {
    /// `arch/x86/include/asm/desc.h`
    struct PageLayout: "gdt_page" {
        descriptors: "gdt",
    }
}

layout! {
    /// `arch/x86/include/asm/tlbflush.h`
    struct StateLayout: "tlb_state" {
        cr4: "cr4",
    }
}

layout! {
    /// `arch/x86/include/asm/processor.h`: words of features as CPUID tells
    /// them, without those that the kernel was told not to use.
    struct CpuLayout: "cpuinfo_x86" {
        /// CPUID 0x80000001, EDX.
        extended: "x86_capability[1]",
        /// CPUID 7, EBX.
        structured: "x86_capability[9]",
    }
}

layout! {
    /// `arch/x86/include/asm/processor.h`
    struct TaskStateLayout: "tss_struct" {
        hardware: "x86_tss",
    }
}

/// One CPU's table of segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentTable {
    /// The CPU's number.
    pub cpu: u32,
    /// Where the table lies.
    pub address: VirtualAddress,
    /// Its descriptors.
    pub descriptors: [u64; DESCRIPTORS],
    /// Where the CPU's task state lies, that a descriptor leads to.
    pub task_state: Option<VirtualAddress>,
}

/// The tables of segments of all CPUs that are online.
///
/// # Errors
/// [`TableError`] if the kernel lacks them or they can't be read.
pub fn segment_tables(guest: &Guest, table: &'static str) -> Result<Vec<SegmentTable>, TableError> {
    let cpus = PerCpu::read(guest, table)?;
    let page = guest.symbol(table, "gdt_page")?;
    let layout = guest.layout::<PageLayout>(table)?;
    let state = guest.layout::<TaskStateLayout>(table);
    let read = |cpu: u32| -> Option<Result<SegmentTable, ReadError>> {
        let own = |symbol| cpus.checked_address(guest, symbol, cpu);
        let address = own(page)?.wrapping_add(layout.descriptors.offset);
        let mut bytes = [[0; 8]; DESCRIPTORS];
        let task_state = guest.address("cpu_tss_rw").and_then(own);
        let read = guest.space().read(address, bytes.as_flattened_mut());
        Some(read.map(|()| {
            SegmentTable {
                cpu,
                address,
                descriptors: bytes.map(u64::from_le_bytes),
                task_state: state
                    .as_ref()
                    .ok()
                    .zip(task_state)
                    .map(|(layout, at)| at.wrapping_add(layout.hardware.offset)),
            }
        }))
    };
    cpus.online()
        .iter()
        .filter_map(|cpu| read(*cpu))
        .collect::<Result<_, _>>()
        .map_err(|source| TableError::Read {
            table,
            what: "gdt_page",
            source,
        })
}

/// What a CPU has in CR4 by the kernel's own account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cr4Account {
    /// The CPU's number.
    pub cpu: u32,
    /// Where the account lies.
    pub location: VirtualAddress,
    /// What it says.
    pub value: u64,
}

/// The accounts of all CPUs that are online.
///
/// # Errors
/// [`TableError`] if the kernel lacks them or they can't be read.
pub fn cr4_accounts(guest: &Guest, table: &'static str) -> Result<Vec<Cr4Account>, TableError> {
    let cpus = PerCpu::read(guest, table)?;
    let state = guest.symbol(table, "cpu_tlbstate")?;
    let layout = guest.layout::<StateLayout>(table)?;
    let mut accounts = Vec::new();
    for cpu in cpus.online() {
        let Some(state) = cpus.checked_address(guest, state, *cpu) else {
            continue;
        };
        let value = guest
            .number(state, &layout.cr4)
            .map_err(|source| TableError::Read {
                table,
                what: "cpu_tlbstate.cr4",
                source,
            })?;
        accounts.push(Cr4Account {
            cpu: *cpu,
            location: state.wrapping_add(layout.cr4.offset),
            value,
        });
    }
    Ok(accounts)
}

/// Protections of the processor that this kernel uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Protections {
    /// The kernel executes no memory of programs (SMEP).
    pub no_execution: bool,
    /// The kernel accesses memory of programs on purpose only (SMAP).
    pub no_access: bool,
    /// Pages can be marked as not executable (NX).
    pub no_execute_pages: bool,
    /// The bits of CR4 that the kernel never lets go.
    pub pinned: u64,
}

/// SMEP, SMAP in CPUID 7, EBX.
const SMEP: u64 = 1 << 7;
const SMAP: u64 = 1 << 20;
/// NX in CPUID 0x80000001, EDX.
const NX: u64 = 1 << 20;

/// What the kernel found at its start.
///
/// # Errors
/// [`TableError`] if it lacks its account of that, or that can't be read.
pub fn protections(guest: &Guest, table: &'static str) -> Result<Protections, TableError> {
    let cpu = guest.symbol(table, "boot_cpu_data")?;
    let layout = guest.layout::<CpuLayout>(table)?;
    let read = || -> Result<Protections, ReadError> {
        let structured = guest.number(cpu, &layout.structured)?;
        let pinned = match guest.address("cr4_pinned_bits") {
            Some(place) => guest.space().read_u64(place)?,
            None => 0,
        };
        Ok(Protections {
            no_execution: structured & SMEP != 0,
            no_access: structured & SMAP != 0,
            no_execute_pages: guest.number(cpu, &layout.extended)? & NX != 0,
            pinned,
        })
    };
    read().map_err(|source| TableError::Read {
        table,
        what: "boot_cpu_data",
        source,
    })
}

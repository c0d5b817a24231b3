//! Registers of a processor that are not in memory: how it translates addresses
//! and what protects its kernel.

use crate::VirtualAddress;

/// Registers of one virtual CPU at some moment, as a hypervisor or a dump tells
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuRegisters {
    /// Control register 0: bit 31 is paging.
    pub cr0: u64,
    /// Control register 3: the page-table root, and the PCID in bits 11 to 0.
    pub cr3: u64,
    /// Control register 4: bit 12 is 5-level paging.
    pub cr4: u64,
    /// The base of the table of segments (GDT).
    pub gdt_base: Option<VirtualAddress>,
    /// The base of the table of interrupts (IDT).
    pub idt_base: Option<VirtualAddress>,
    /// The MSR `EFER`.
    pub efer: Option<u64>,
}

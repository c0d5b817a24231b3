//! Code that the running kernel made for itself, by the kernel's own records:
//! BPF programs (`kernel/bpf/core.c`), trampolines of ftrace
//! (`kernel/trace/ftrace.c`), slots of kprobes (`kernel/kprobes.c`), and single
//! pages that some piece of the kernel keeps.

use std::ops::Range;

use secmon_memory::{PAGE_SIZE, ReadError, VirtualAddress};

use super::vmalloc::Area;
use super::{Claims, CodeOwner};
use crate::linux::list::{entries, is_kernel_address, is_object_address};
use crate::linux::xarray;
use crate::{Diagnostic, Guest, TableError, Text, layout};

/// More entries than this are read of no list here.
const MOST_ENTRIES: usize = 1 << 18;
/// No compiled program, trampoline or pack is longer.
const LONGEST_CODE: u64 = 64 << 20;
/// The longest name of a program (`KSYM_NAME_LEN`).
const LONGEST_NAME: usize = 512;
/// `PMD_SIZE`: a pack of BPF programs has that for each NUMA node.
const PACK_UNIT: u64 = 2 << 20;
/// More NUMA nodes than this has no kernel.
const MOST_NODES: u64 = 1 << 10;
/// `VSYSCALL_ADDR` (`arch/x86/include/uapi/asm/vsyscall.h`).
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;
/// More pages of thunks than this has no kernel or module.
const MOST_THUNK_PAGES: u64 = 1 << 12;

layout! {
    /// `include/linux/bpf.h`, since Linux 5.7.
    struct SymbolLayout: "bpf_ksym" {
        start: "start",
        end: "end",
        name: "name",
        list: "lnode",
    }
}

layout! {
    /// `include/linux/bpf.h`
    struct ProgramLayout: "bpf_prog" {
        entry: "bpf_func",
        bytes: "jited_len",
        jited: "jited",
        aux: "aux",
    }
}

layout! {
    /// `include/linux/bpf.h`
    struct ProgramAuxLayout: "bpf_prog_aux" {
        program: "prog",
    } optional {
        /// Until Linux 5.6.
        list: "ksym_lnode",
    }
}

layout! {
    /// `include/linux/bpf.h`
    struct MapLayout: "bpf_map" {
        kind: "map_type",
    }
}

layout! {
    /// `kernel/bpf/bpf_struct_ops.c`, from Linux 5.6 to 6.8.
    struct StructOperationsLayout: "bpf_struct_ops_map" {
        map: "map",
    } optional {
        image: "image",
    }
}

layout! {
    /// `kernel/bpf/core.c`, since Linux 5.18.
    struct PackLayout: "bpf_prog_pack" {
        list: "list",
        address: "ptr",
    }
}

layout! {
    /// `include/linux/ftrace.h`
    struct OpsLayout: "ftrace_ops" {
        next: "next",
        trampoline: "trampoline",
        trampoline_bytes: "trampoline_size",
    } optional {
        /// Since Linux 5.9.
        list: "list",
    }
}

layout! {
    /// `include/linux/kprobes.h`
    struct SlotCacheLayout: "kprobe_insn_cache" {
        pages: "pages",
    }
}

layout! {
    /// `kernel/kprobes.c`
    struct SlotPageLayout: "kprobe_insn_page" {
        list: "list",
        slots: "insns",
    }
}

layout! {
    /// `include/linux/kexec.h`
    struct KexecLayout: "kimage" {
        control: "control_code_page",
    }
}

layout! {
    /// `include/linux/mm_types.h`
    struct PageLayout: "page" {
        flags: "flags",
    }
}

layout! {
    /// `arch/x86/kernel/alternative.c`
    struct ThunkPagesLayout: "its_array" {
        pages: "pages",
        count: "num",
    }
}

/// Enters claims on all code that the kernel has a record of making.
///
/// # Errors
/// [`TableError`] if the kernel has such a record, and its type is not known.
pub fn claim(guest: &Guest, table: &'static str, claims: &mut Claims) -> Result<(), TableError> {
    bpf_symbols(guest, table, claims)?;
    ftrace_trampolines(guest, table, claims)?;
    kprobe_slots(guest, table, claims)?;
    bpf_packs(guest, table, claims)?;
    bpf_struct_operations(guest, table, claims)?;
    single_pages(guest, table, claims)
}

/// The page-aligned range of `length` bytes at `start`; none if no code of the
/// kernel can lie there.
fn code(guest: &Guest, start: VirtualAddress, length: u64) -> Option<Range<VirtualAddress>> {
    if !is_kernel_address(guest.space(), start) || length == 0 || length > LONGEST_CODE {
        return None;
    }
    Some(start..start.checked_add(length)?)
}

/// What is wrong becomes a diagnostic, the rest is claimed.
fn report(
    guest: &Guest,
    table: &'static str,
    subject: &'static str,
    address: VirtualAddress,
    outcome: Result<(), ReadError>,
) {
    if let Err(error) = outcome {
        guest.diagnostics().record(Diagnostic {
            table,
            subject: subject.to_owned(),
            address: Some(address),
            reason: error.to_string(),
        });
    }
}

/// Programs, trampolines and dispatchers that `/proc/kallsyms` shows.
fn bpf_symbols(guest: &Guest, table: &'static str, claims: &mut Claims) -> Result<(), TableError> {
    let Some(head) = guest.address("bpf_kallsyms") else {
        return Ok(());
    };
    let subject = "bpf_kallsyms";
    if guest.types(table)?.has_type("bpf_ksym") {
        let layout = guest.layout::<SymbolLayout>(table)?;
        for symbol in entries(guest, table, subject, head, layout.list.offset).take(MOST_ENTRIES) {
            let mut read = || -> Result<(), ReadError> {
                let start = guest.pointer(symbol, &layout.start)?;
                let end = guest.pointer(symbol, &layout.end)?;
                let length = end.as_u64().saturating_sub(start.as_u64());
                let name = symbol.wrapping_add(layout.name.offset);
                let limit = layout.name.size.min(LONGEST_NAME as u64) as usize;
                let name = Text::new(guest.space().read_c_string(name, limit)?);
                if let Some(range) = code(guest, start, length) {
                    claims.add(range, CodeOwner::Bpf { name });
                }
                Ok(())
            };
            let outcome = read();
            report(guest, table, subject, symbol, outcome);
        }
        return Ok(());
    }
    let aux = guest.layout::<ProgramAuxLayout>(table)?;
    let Some(list) = &aux.list else {
        return Ok(());
    };
    for entry in entries(guest, table, subject, head, list.offset).take(MOST_ENTRIES) {
        let program = guest.pointer(entry, &aux.program);
        let outcome = program.map(|program| {
            if let Some(range) = compiled(guest, table, program) {
                let name = Text::new([]);
                claims.add(range, CodeOwner::Bpf { name });
            }
        });
        report(guest, table, subject, entry, outcome);
    }
    Ok(())
}

/// The code of the `struct bpf_prog` at `program`; none if there is none.
fn compiled(
    guest: &Guest,
    table: &'static str,
    program: VirtualAddress,
) -> Option<Range<VirtualAddress>> {
    let layout = guest.layout::<ProgramLayout>(table).ok()?;
    let aux_layout = guest.layout::<ProgramAuxLayout>(table).ok()?;
    let jited = guest.number(program, &layout.jited).ok()?;
    let aux = guest.pointer(program, &layout.aux).ok()?;
    // The two halves of a program know each other.
    if jited == 0
        || !is_object_address(guest.space(), aux)
        || guest.pointer(aux, &aux_layout.program).ok()? != program
    {
        return None;
    }
    let entry = guest.pointer(program, &layout.entry).ok()?;
    let bytes = guest.number(program, &layout.bytes).ok()?;
    code(guest, entry, bytes)
}

/// Enters claims of programs that have no symbol: classic filters of sockets
/// and of seccomp. Each `struct bpf_prog` is a `vmalloc` area of its own.
pub fn claim_unnamed_programs(
    guest: &Guest,
    table: &'static str,
    areas: &[Area],
    claims: &mut Claims,
) {
    for area in areas {
        if let Some(range) = compiled(guest, table, area.start) {
            let name = Text::new([]);
            claims.add(range, CodeOwner::Bpf { name });
        }
    }
}

/// `bpf_prog_pack`: shared pages that programs are put into.
fn bpf_packs(guest: &Guest, table: &'static str, claims: &mut Claims) -> Result<(), TableError> {
    let Some(head) = guest.address("pack_list") else {
        return Ok(());
    };
    if !guest.types(table)?.has_type("bpf_prog_pack") {
        return Ok(());
    }
    let layout = guest.layout::<PackLayout>(table)?;
    // Without huge pages for it, a pack is one page; its area tells. What is
    // not mapped executable is no matter.
    let nodes = guest
        .address("nr_node_ids")
        .and_then(|address| guest.space().read_u32(address).ok())
        .map_or(1, u64::from)
        .clamp(1, MOST_NODES);
    let subject = "pack_list";
    for pack in entries(guest, table, subject, head, layout.list.offset).take(MOST_ENTRIES) {
        let outcome = guest.pointer(pack, &layout.address).map(|start| {
            let length = if start.is_aligned(PACK_UNIT) {
                PACK_UNIT.saturating_mul(nodes).min(LONGEST_CODE)
            } else {
                PAGE_SIZE
            };
            if let Some(range) = code(guest, start, length) {
                claims.add(range, CodeOwner::BpfPack);
            }
        });
        report(guest, table, subject, pack, outcome);
    }
    Ok(())
}

/// Pages of code through which the kernel calls BPF programs in place of its own
/// functions; later kernels list that code with the programs.
fn bpf_struct_operations(
    guest: &Guest,
    table: &'static str,
    claims: &mut Claims,
) -> Result<(), TableError> {
    let Some(idr) = guest.address("map_idr") else {
        return Ok(());
    };
    let (Ok(layout), Ok(map)) = (
        guest.layout::<StructOperationsLayout>(table),
        guest.layout::<MapLayout>(table),
    ) else {
        return Ok(());
    };
    let Some(image) = &layout.image else {
        return Ok(());
    };
    let types = guest.types(table)?;
    let Ok(wanted) = types.enumerator("bpf_map_type", "BPF_MAP_TYPE_STRUCT_OPS") else {
        return Ok(());
    };
    let maps = xarray::idr_entries(guest, table, idr, MOST_ENTRIES)?;
    for entry in maps.report(guest, table, "map_idr") {
        let address = VirtualAddress::new(entry.word);
        if !is_object_address(guest.space(), address) {
            continue;
        }
        let mut read = || -> Result<(), ReadError> {
            let kind = guest.number(address, &map.kind)? & 0xffff_ffff;
            if i64::try_from(kind) == Ok(wanted) {
                let whole = address.wrapping_sub(layout.map.offset);
                let start = guest.pointer(whole, image)?;
                if let Some(range) = code(guest, start, PAGE_SIZE) {
                    let name = Text::from("struct_ops");
                    claims.add(range, CodeOwner::Bpf { name });
                }
            }
            Ok(())
        };
        let outcome = read();
        report(guest, table, "bpf_struct_ops_map", address, outcome);
    }
    Ok(())
}

/// Trampolines that were made for one `ftrace_ops` each.
fn ftrace_trampolines(
    guest: &Guest,
    table: &'static str,
    claims: &mut Claims,
) -> Result<(), TableError> {
    let Some(first) = guest.address("ftrace_ops_list") else {
        return Ok(());
    };
    let layout = guest.layout::<OpsLayout>(table)?;
    let mut add = |ops: VirtualAddress| -> Result<(), ReadError> {
        let start = guest.pointer(ops, &layout.trampoline)?;
        let size = guest.number(ops, &layout.trampoline_bytes)?;
        if let Some(range) = code(guest, start, size) {
            claims.add(range, CodeOwner::FtraceTrampoline { ops });
        }
        Ok(())
    };
    if let (Some(head), Some(list)) = (guest.address("ftrace_ops_trampoline_list"), &layout.list) {
        let subject = "ftrace_ops_trampoline_list";
        for ops in entries(guest, table, subject, head, list.offset).take(MOST_ENTRIES) {
            let outcome = add(ops);
            report(guest, table, subject, ops, outcome);
        }
    }
    for ops in super::super::tracing::ftrace_ops(guest, table, first, layout.next.offset) {
        let outcome = add(ops);
        report(guest, table, "ftrace_ops_list", ops, outcome);
    }
    Ok(())
}

/// Pages of slots where kprobes run displaced instructions.
fn kprobe_slots(guest: &Guest, table: &'static str, claims: &mut Claims) -> Result<(), TableError> {
    for subject in ["kprobe_insn_slots", "kprobe_optinsn_slots"] {
        let Some(cache) = guest.address(subject) else {
            continue;
        };
        let layout = guest.layout::<SlotCacheLayout>(table)?;
        let page = guest.layout::<SlotPageLayout>(table)?;
        let head = cache.wrapping_add(layout.pages.offset);
        for entry in entries(guest, table, subject, head, page.list.offset).take(MOST_ENTRIES) {
            let outcome = guest.pointer(entry, &page.slots).map(|slots| {
                if let Some(range) = code(guest, slots, PAGE_SIZE) {
                    claims.add(range, CodeOwner::KprobeSlots);
                }
            });
            report(guest, table, subject, entry, outcome);
        }
    }
    Ok(())
}

/// Single pages and blocks, each behind a variable of its own.
fn single_pages(guest: &Guest, table: &'static str, claims: &mut Claims) -> Result<(), TableError> {
    let space = guest.space();
    let pointer = |symbol| -> Option<VirtualAddress> {
        let value = space.read_pointer(guest.address(symbol)?).ok()?;
        is_kernel_address(space, value).then_some(value)
    };
    if let (Some(header), Some(start), Some(end)) = (
        pointer("real_mode_header"),
        guest.address("real_mode_blob"),
        guest.address("real_mode_blob_end"),
    ) {
        let length = end.as_u64().saturating_sub(start.as_u64());
        if let Some(range) = code(guest, header, length) {
            claims.add(range, CodeOwner::RealModeTrampoline);
        }
    }
    if let Some(page) = pointer("hv_hypercall_pg")
        && let Some(range) = code(guest, page, PAGE_SIZE)
    {
        claims.add(range, CodeOwner::HypercallPage);
    }
    // The page belongs to the image, wherever else it is mapped.
    let vsyscall = VirtualAddress::new(VSYSCALL);
    if let Some(page) = guest.address("__vsyscall_page")
        && let (Ok(own), Ok(mapped)) = (space.translate(page), space.translate(vsyscall))
        && own.physical == mapped.physical
    {
        claims.add(
            vsyscall..vsyscall.wrapping_add(PAGE_SIZE),
            CodeOwner::Vsyscall,
        );
    }
    for symbol in ["kexec_image", "kexec_crash_image"] {
        let Some(image) = pointer(symbol) else {
            continue;
        };
        let layout = guest.layout::<KexecLayout>(table)?;
        let page = guest.layout::<PageLayout>(table)?;
        let outcome = guest.pointer(image, &layout.control).map(|control| {
            let kernel = guest.kernel();
            let offset = control.as_u64().wrapping_sub(kernel.vmemmap_base.as_u64());
            let frame = offset.checked_div(page.size).unwrap_or(0);
            let address = kernel
                .direct_map
                .wrapping_add(frame.wrapping_mul(PAGE_SIZE));
            // `KEXEC_CONTROL_PAGE_SIZE` is one page, a table may come before.
            if let Some(range) = code(guest, address, 2 * PAGE_SIZE) {
                claims.add(range, CodeOwner::KexecControl);
            }
        });
        report(guest, table, symbol, image, outcome);
    }
    if let Some(array) = guest.address("its_pages")
        && guest.types(table)?.has_type("its_array")
    {
        let layout = guest.layout::<ThunkPagesLayout>(table)?;
        let mut read = || -> Result<(), ReadError> {
            let pages = guest.pointer(array, &layout.pages)?;
            let count = guest.number(array, &layout.count)?;
            for number in 0..count.min(MOST_THUNK_PAGES) {
                let page = space.read_pointer(pages.wrapping_add(number * 8))?;
                if let Some(range) = code(guest, page, PAGE_SIZE) {
                    claims.add(range, CodeOwner::IndirectThunks);
                }
            }
            Ok(())
        };
        let outcome = read();
        report(guest, table, "its_pages", array, outcome);
    }
    Ok(())
}

/// Whether code of nobody can do nothing: traps only, as pages hold them that
/// are kept ready for code, or jumps through a register between traps, as the
/// thunks against indirect target selection do.
pub fn is_inert(code: &[u8]) -> bool {
    const TRAP: u8 = 0xcc;
    let mut rest = code;
    loop {
        rest = match rest {
            [] => return true,
            [TRAP, rest @ ..] => rest,
            [0x41, 0xff, 0xe0..=0xe7, TRAP, rest @ ..] | [0xff, 0xe0..=0xe7, TRAP, rest @ ..] => {
                rest
            }
            _ => return false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traps_and_thunks_are_inert() {
        assert!(is_inert(&[0xcc; 4096]));
        assert!(is_inert(&[0xcc, 0x41, 0xff, 0xe3, 0xcc, 0xff, 0xe0, 0xcc]));
        assert!(!is_inert(&[0xcc, 0x55, 0xcc]));
        assert!(!is_inert(&[0xcc, 0xff, 0xe8, 0xcc]));
        assert!(!is_inert(&[0xff, 0xe0]));
    }
}

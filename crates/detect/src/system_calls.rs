//! The detector `system_calls`: where the numbers of system calls lead.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};
use secmon_guest::Guest;
use secmon_guest::linux::code::{CodeMap, CodeOwner};
use secmon_guest::linux::system_call::{SystemCallTable, noted_names, tables};
use secmon_memory::VirtualAddress;

use crate::code;
use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "system_calls";
/// No function that dispatches system calls is longer.
const LONGEST_FUNCTION: u64 = 1 << 16;
/// Functions that choose the function of a system call in their code, since
/// Linux 6.9 and its backports.
const DISPATCHERS: [&str; 3] = ["x64_sys_call", "ia32_sys_call", "x32_sys_call"];
/// Functions that index a table of system calls.
const INDEXERS: [&str; 5] = [
    "do_syscall_64",
    "do_int80_syscall_32",
    "do_int80_emulation",
    "__do_fast_syscall_32",
    "do_fast_syscall_32",
];
/// What the names of functions behind system calls begin with.
const PREFIXES: [&str; 11] = [
    "__x64_sys_",
    "__ia32_sys_",
    "__x64_compat_sys_",
    "__ia32_compat_sys_",
    "__x32_compat_sys_",
    "__x32_sys_",
    "sys_ni_syscall",
    "__do_sys_",
    "__do_compat_sys_",
    "__se_compat_sys_",
    "__se_sys_",
];

/// Finds system calls that lead elsewhere than to their own functions.
pub struct SystemCalls;

impl Detector for SystemCalls {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Finds system calls, 64-bit and 32-bit, that lead elsewhere than to the kernel's \
         function of that call."
    }

    fn compares(&self) -> &'static str {
        "Each entry of sys_call_table, ia32_sys_call_table and x32_sys_call_table with the \
         kernel's text, with the names of functions of system calls, and with the names that \
         the kernel noted for each number at its start (syscalls_metadata); every jump and call \
         out of the dispatching code of Linux 6.9 and later with functions of system calls; and \
         the table that the entry code indexes with the kernel's own."
    }

    fn evaded_by(&self) -> &'static str {
        "Changes inside of the functions themselves (kernel_text and tracing look there), and \
         an exchange of two system calls in the dispatching code."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[Technique::ROOTKIT, Technique::new("T1056.004")];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "Some kilobytes of tables and code, the names of all kernel symbols once, and the map \
         of code."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let tables = tables(guest, NAME)?;
        if tables.is_empty() {
            return Err(DetectError::Missing {
                what: "sys_call_table",
            });
        }
        let map = code::map(guest, NAME)?;
        for table in &tables {
            let names = match table.symbol {
                "sys_call_table" => noted_names(guest, NAME, table.calls.len())?,
                _ => Vec::new(),
            };
            for (number, call) in table.calls.iter().enumerate() {
                let noted = names.get(number).and_then(Option::as_ref);
                let noted = noted.map(|name| name.to_display().into_owned());
                let Some(fault) = fault(guest, &map, *call, noted.as_deref()) else {
                    continue;
                };
                findings(entry(guest, &map, table, number, *call, fault));
            }
        }
        for dispatcher in DISPATCHERS {
            dispatch(guest, &map, dispatcher, findings)?;
        }
        for indexer in INDEXERS {
            index(guest, &map, indexer, &tables, findings)?;
        }
        Ok(())
    }
}

/// What is wrong with the function of a system call, if something is.
fn fault(
    guest: &Guest,
    map: &CodeMap,
    call: VirtualAddress,
    noted: Option<&str>,
) -> Option<&'static str> {
    // What follows the last call is padding; a call there would fault.
    if call.is_null() {
        return None;
    }
    if !map.image.text.contains(&call) {
        return Some("leads out of the kernel's text");
    }
    if let Some(noted) = noted {
        let own = format!("__x64_{noted}");
        let mut own = guest.symbols().addresses(&own).peekable();
        if own.peek().is_some() {
            return (!own.any(|address| address == call))
                .then_some("leads to another function than when the kernel started");
        }
    }
    (!is_function_of_call(guest, call)).then_some("leads to what is no function of a system call")
}

/// Whether a function of a system call starts at this address.
fn is_function_of_call(guest: &Guest, address: VirtualAddress) -> bool {
    guest
        .symbols()
        .nearest(address)
        .is_some_and(|(symbol, distance)| {
            distance == 0
                && PREFIXES
                    .iter()
                    .any(|prefix| symbol.name.starts_with(prefix))
        })
}

fn entry(
    guest: &Guest,
    map: &CodeMap,
    table: &SystemCallTable,
    number: usize,
    call: VirtualAddress,
    fault: &str,
) -> Finding {
    let location = table.address.wrapping_add(number as u64 * 8);
    let subject = Subject::KernelPointer {
        location,
        target: call,
        symbol: Some(format!("{}[{number}]", table.symbol)),
    };
    let summary = format!("System call {number} of {} {fault}: {call}", table.symbol);
    Finding::new(
        NAME,
        "system_call_entry",
        Class::Attack,
        Severity::Critical,
        subject,
        summary,
    )
    .technique(Technique::ROOTKIT)
    .evidence(
        Evidence::new(table.symbol, fault)
            .with("number", number as u64)
            .with("function", call),
    )
    .evidence(code::target_evidence(guest, map, call))
}

/// Looks at all jumps and calls out of dispatching code.
fn dispatch(
    guest: &Guest,
    map: &CodeMap,
    name: &'static str,
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    let Some(start) = guest.address(name) else {
        return Ok(());
    };
    for instruction in function(guest, name, start)? {
        let address = VirtualAddress::new(instruction.ip());
        let Some(target) = branch(&instruction) else {
            continue;
        };
        if belongs(guest, target, start) || is_known_target(guest, map, target) {
            continue;
        }
        let fault = "leads to what is no function of a system call";
        findings(code_finding(
            guest,
            map,
            "system_call_dispatch",
            address,
            target,
            format!("The code of {name} at {address} {fault}: {target}"),
        ));
    }
    Ok(())
}

/// Whether dispatching code may lead there: the function of a call, a thunk for
/// returns or indirect jumps, or what serves tracing.
fn is_known_target(guest: &Guest, map: &CodeMap, target: VirtualAddress) -> bool {
    if is_function_of_call(guest, target) {
        return true;
    }
    let code::Target::Owned(owner) = code::target(map, target) else {
        return false;
    };
    match owner {
        CodeOwner::Kernel => is_helper(guest, target),
        // Made by the kernel itself for tracing, or against a weakness of the
        // processor; the detector tracing looks at who is called there.
        CodeOwner::FtraceTrampoline { .. }
        | CodeOwner::Bpf { .. }
        | CodeOwner::BpfPack
        | CodeOwner::KprobeSlots
        | CodeOwner::IndirectThunks => true,
        _ => false,
    }
}

/// Whether the address is that of code which any function may lead to.
fn is_helper(guest: &Guest, target: VirtualAddress) -> bool {
    const HELPERS: [&str; 9] = [
        "__x86_return_thunk",
        "__x86_indirect_",
        "srso_",
        "retbleed_",
        "its_",
        "ftrace_",
        "__fentry__",
        "__sanitizer_",
        "write_ibpb",
    ];
    guest
        .symbols()
        .nearest(target)
        .is_some_and(|(symbol, _)| HELPERS.iter().any(|prefix| symbol.name.starts_with(prefix)))
}

/// Whether `address` lies in the function that starts at `start`.
fn belongs(guest: &Guest, address: VirtualAddress, start: VirtualAddress) -> bool {
    guest
        .symbols()
        .nearest(address)
        .is_some_and(|(symbol, distance)| symbol.address == start && distance < LONGEST_FUNCTION)
}

/// Looks at which tables the entry code indexes.
fn index(
    guest: &Guest,
    map: &CodeMap,
    name: &'static str,
    tables: &[SystemCallTable],
    findings: &mut dyn FnMut(Finding),
) -> Result<(), DetectError> {
    let Some(start) = guest.address(name) else {
        return Ok(());
    };
    for instruction in function(guest, name, start)? {
        let Some(table) = indexed(&instruction) else {
            continue;
        };
        let known = tables.iter().any(|known| known.address == table);
        // Other arrays of the kernel may be indexed as well.
        let foreign = !map.image.rodata.contains(&table)
            && !map.image.data.contains(&table)
            && !map.image.bss.contains(&table)
            && !map.image.init.contains(&table);
        if known || !foreign {
            continue;
        }
        let address = VirtualAddress::new(instruction.ip());
        findings(code_finding(
            guest,
            map,
            "system_call_table_moved",
            address,
            table,
            format!(
                "The code of {name} at {address} indexes a table at {table}, out of the kernel's image"
            ),
        ));
    }
    Ok(())
}

/// The table of pointers that an instruction indexes: `table(,%rax,8)`.
fn indexed(instruction: &Instruction) -> Option<VirtualAddress> {
    let memory =
        (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let scaled = instruction.memory_base() == Register::None
        && instruction.memory_index() != Register::None
        && instruction.memory_index_scale() == 8;
    let table = VirtualAddress::new(instruction.memory_displacement64());
    (memory && scaled && table.as_u64() >> 63 == 1).then_some(table)
}

fn code_finding(
    guest: &Guest,
    map: &CodeMap,
    name: &'static str,
    address: VirtualAddress,
    target: VirtualAddress,
    summary: String,
) -> Finding {
    let symbol = code::symbol(guest, map, address);
    let mut bytes = [0; 16];
    let code = match guest.space().read(address, &mut bytes) {
        Ok(()) => code::hex(&bytes),
        Err(error) => error.to_string(),
    };
    Finding::new(
        NAME,
        name,
        Class::Attack,
        Severity::Critical,
        Subject::KernelCode { address, symbol },
        summary,
    )
    .technique(Technique::ROOTKIT)
    .evidence(Evidence::new("kernel text", "the instruction").with("code", code))
    .evidence(code::target_evidence(guest, map, target))
}

/// Where an instruction leads, beside the next one, if it says so itself.
/// Kernels without retpolines may index a table of jumps.
fn branch(instruction: &Instruction) -> Option<VirtualAddress> {
    match instruction.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Some(VirtualAddress::new(instruction.near_branch_target()))
        }
        _ => None,
    }
}

/// The instructions of the function at `start`, up to the next symbol.
fn function(
    guest: &Guest,
    what: &'static str,
    start: VirtualAddress,
) -> Result<Vec<Instruction>, DetectError> {
    let symbols = guest.symbols();
    // The end of the function is the first address that another symbol has.
    let (mut low, mut high) = (0, LONGEST_FUNCTION);
    while low < high {
        let middle = low + (high - low) / 2;
        match symbols.nearest(start.wrapping_add(middle)) {
            Some((symbol, _)) if symbol.address == start => low = middle + 1,
            _ => high = middle,
        }
    }
    let mut bytes = vec![0; low as usize];
    guest
        .space()
        .read(start, &mut bytes)
        .map_err(|source| DetectError::Read {
            what,
            address: start,
            source,
        })?;
    let decoder = Decoder::with_ip(64, &bytes, start.as_u64(), DecoderOptions::NONE);
    Ok(decoder
        .into_iter()
        .filter(|instruction| instruction.code() != Code::INVALID)
        .collect())
}

//! Edits of a memory image as a rootkit makes them in a running kernel, and
//! what the detectors of the kernel's code say of each.
//!
//! Each edit is made in the image's file, which the detectors read through a
//! shared mapping, and taken back afterwards.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use secmon_detect::{Class, Confirmation, Detector, Finding, check, detectors};
use secmon_guest::Guest;
use secmon_guest::linux::module::knowledge::symbols_of;
use secmon_guest::linux::module::views::kobjects;
use secmon_guest::linux::module::{Module, modules};
use secmon_guest::linux::per_cpu::PerCpu;
use secmon_guest::linux::tracing::ftrace_sites;
use secmon_memory::VirtualAddress;
use secmon_profile::Kernel;

/// The detectors of the kernel's code.
const DETECTORS: &[&str] = &[
    "modules",
    "system_calls",
    "interrupts",
    "kernel_pointers",
    "kernel_text",
    "tracing",
];

/// Bytes that are written at an address.
type Write = (VirtualAddress, Vec<u8>);

/// One thing that a rootkit does.
pub struct Edit {
    /// In a few words.
    pub what: &'static str,
    writes: Vec<Write>,
    /// The detector and the name of the finding that must come of it.
    pub expected: (&'static str, &'static str),
    /// What the finding's subject must say.
    pub subject: String,
}

fn pointer(place: VirtualAddress, value: VirtualAddress) -> Write {
    (place, value.as_u64().to_le_bytes().to_vec())
}

/// Takes the node at `node` out of its `list_head` list.
fn unlink(guest: &Guest, node: VirtualAddress) -> Result<Vec<Write>> {
    let next = guest.space().read_pointer(node)?;
    let previous = guest.space().read_pointer(node.wrapping_add(8))?;
    Ok(vec![
        pointer(previous, next),
        pointer(next.wrapping_add(8), previous),
        pointer(node, node),
        pointer(node.wrapping_add(8), node),
    ])
}

/// The edits that fit this guest.
///
/// # Errors
/// If it lacks what each kernel has.
pub fn edits(guest: &Guest) -> Result<Vec<Edit>> {
    let types = guest.kernel().profile.types()?;
    let symbol = |name: &'static str| guest.address(name).with_context(|| format!("no {name}"));
    let offset = |structure, member| -> Result<u64> { Ok(types.member(structure, member)?.offset) };
    // One that nobody needs the symbols of, with text.
    let victim: Module = modules(guest, "edits")?
        .find(|module| module.size > 8192)
        .context("a module")?;
    let name = String::from_utf8_lossy(&victim.name).into_owned();
    let code = victim.base.wrapping_add(0x10);
    let listed = victim.address.wrapping_add(offset("module", "list")?);
    let kobject = offset("module", "mkobj")? + offset("module_kobject", "kobj.entry")?;
    let kobject = victim.address.wrapping_add(kobject);
    ensure!(
        kobjects(guest, "edits")?.contains(&victim.address),
        "{name} has no kobject"
    );
    let own = victim.address.wrapping_add(offset("module", "mkobj.mod")?);
    let everywhere = [unlink(guest, listed)?, unlink(guest, kobject)?].concat();
    let nowhere = [
        everywhere.clone(),
        vec![pointer(own, VirtualAddress::new(0))],
    ]
    .concat();
    let calls = symbol("sys_call_table")?;
    let idt = symbol("idt_table")?;
    let gate = |vector: u64, handler: VirtualAddress| -> Result<Write> {
        let place = idt.wrapping_add(vector * 16);
        let mut bytes = [0; 16];
        guest.space().read(place, &mut bytes)?;
        let handler = handler.as_u64().to_le_bytes();
        bytes[..2].copy_from_slice(&handler[..2]);
        bytes[6..12].copy_from_slice(&handler[2..]);
        Ok((place, bytes.to_vec()))
    };
    let edit = |what, writes, detector, name, subject: &str| Edit {
        what,
        writes,
        expected: (detector, name),
        subject: subject.to_owned(),
    };
    let mut edits = vec![
        edit(
            "a module out of the list",
            unlink(guest, listed)?,
            "modules",
            "hidden_module",
            &name,
        ),
        edit(
            "a module out of /sys/module",
            unlink(guest, kobject)?,
            "modules",
            "partly_hidden_module",
            &name,
        ),
        edit(
            "a module out of both",
            everywhere.clone(),
            "modules",
            "hidden_module",
            &name,
        ),
        edit(
            "the code of a module that is in no list",
            nowhere,
            "modules",
            "unowned_code",
            &victim.base.page().to_string(),
        ),
        edit(
            "a system call led into a module",
            vec![pointer(calls.wrapping_add(8), code)],
            "system_calls",
            "system_call_entry",
            "sys_call_table[1]",
        ),
        edit(
            "a system call led to another one",
            vec![pointer(
                calls.wrapping_add(8),
                guest.space().read_pointer(calls)?,
            )],
            "system_calls",
            "system_call_entry",
            "sys_call_table[1]",
        ),
        edit(
            "a system call led into the middle of a function",
            vec![pointer(
                calls.wrapping_add(16),
                guest.space().read_pointer(calls)?.wrapping_add(9),
            )],
            "system_calls",
            "system_call_entry",
            "sys_call_table[2]",
        ),
        edit(
            "the breakpoint's gate led into a module",
            vec![gate(3, code)?],
            "interrupts",
            "interrupt_gate",
            "idt_table[3]",
        ),
        edit(
            "the page fault's gate led to another exception",
            vec![gate(14, symbol("asm_exc_int3")?)?],
            "interrupts",
            "interrupt_gate",
            "idt_table[14]",
        ),
        edit(
            "a gate that programs may use",
            {
                let (place, mut bytes) = gate(13, symbol("asm_exc_general_protection")?)?;
                bytes[5] |= 0x60;
                vec![(place, bytes)]
            },
            "interrupts",
            "interrupt_gate_attributes",
            "idt_table[13]",
        ),
        edit(
            "the table of interrupts moved",
            vec![pointer(symbol("idt_descr")?.wrapping_add(2), calls)],
            "interrupts",
            "interrupt_table_moved",
            "idt_descr",
        ),
        edit(
            "the list of TCP sockets led into a module",
            vec![pointer(symbol("tcp4_seq_ops")?.wrapping_add(24), code)],
            "kernel_pointers",
            "constant_into_module",
            "tcp4_seq_ops+0x18",
        ),
        edit(
            "operations of /proc's root copied to the heap",
            vec![pointer(
                symbol("proc_root")?.wrapping_add(offset("proc_dir_entry", "proc_iops")?),
                guest.kernel().direct_map.wrapping_add(0x10_0000),
            )],
            "kernel_pointers",
            "operations_table_moved",
            "proc_root",
        ),
        edit(
            "a notifier in a module that is in no list",
            [
                everywhere.clone(),
                vec![pointer(
                    notifier(guest, offset("notifier_block", "notifier_call")?)?,
                    code,
                )],
            ]
            .concat(),
            "kernel_pointers",
            "callback_to_foreign_code",
            "",
        ),
    ];
    edits.extend(text_edits(guest, code)?);
    edits.extend(object_edits(guest, code, &everywhere)?);
    edits.push(edit(
        "a constant led to data of a module",
        vec![pointer(symbol("tcp4_seq_ops")?, victim.address)],
        "kernel_pointers",
        "constant_into_module",
        "tcp4_seq_ops",
    ));
    edits.extend(tracing_edits(guest, code, &everywhere)?);
    if let Some(dispatch) = guest.address("x64_sys_call") {
        edits.push(edit(
            "a branch of the dispatching code led into a module",
            vec![branch_into(guest, dispatch, code)?],
            "system_calls",
            "system_call_dispatch",
            "x64_sys_call",
        ));
    }
    // Symbols of the module serve as its proof of life.
    ensure!(symbols_of(guest, "edits", &victim)?.is_some());
    Ok(edits)
}

/// Edits of the kernel's text.
fn text_edits(guest: &Guest, code: VirtualAddress) -> Result<Vec<Edit>> {
    let symbol = |name: &'static str| guest.address(name).with_context(|| format!("no {name}"));
    let relative = |opcode: u8, at: VirtualAddress, target: VirtualAddress| {
        let distance = target.as_u64().wrapping_sub(at.as_u64() + 5) as u32;
        [&[opcode][..], &distance.to_le_bytes()].concat()
    };
    let absolute = [
        &[0x48, 0xb8][..],
        &code.as_u64().to_le_bytes(),
        &[0xff, 0xe0],
    ]
    .concat();
    let function = symbol("tcp4_seq_show")?;
    let site = ftrace_sites(guest, "edits")?
        .iter()
        .map(|site| site.address)
        .find(|site| (function..function.wrapping_add(32)).contains(site))
        .context("tcp4_seq_show is not traced")?;
    let edit = |what, writes, name, subject: &str| Edit {
        what,
        writes,
        expected: ("kernel_text", name),
        subject: subject.to_owned(),
    };
    // The last entry on the way to a constant says whether it can be written.
    let constants = symbol("tcp4_seq_ops")?;
    let (steps, _) = guest.space().trace(constants);
    let last = steps.last().context("a page table")?;
    let entry = guest
        .kernel()
        .direct_map
        .wrapping_add(last.entry_address.as_u64());
    Ok(vec![
        edit(
            "a jump to a module at the start of a function",
            vec![(site, relative(0xe9, site, code))],
            "code_detour",
            "tcp4_seq_show",
        ),
        edit(
            "another instruction where tracing has its place",
            vec![(site, relative(0xe9, site, code))],
            "traced_function",
            "tcp4_seq_show",
        ),
        edit(
            "a call for tracing led to another function of the kernel",
            vec![(site, relative(0xe8, site, symbol("commit_creds")?))],
            "traced_function",
            "tcp4_seq_show",
        ),
        edit(
            "a jump through a register in the middle of a function",
            vec![(site.wrapping_add(5), absolute)],
            "code_detour",
            "tcp4_seq_show",
        ),
        edit(
            "the entry of system calls led into a module",
            vec![{
                let entry = symbol("entry_SYSCALL_64")?;
                (entry, relative(0xe9, entry, code))
            }],
            "code_detour",
            "entry_SYSCALL_64",
        ),
        edit(
            "constants made writable",
            vec![(entry, vec![(last.entry | 2) as u8])],
            "writable_kernel_text",
            "",
        ),
    ])
}

/// Objects that call a module: a protocol of the kernel, and, of a hidden one,
/// a timer and a handler of packets. They are put where the kernel has nothing.
fn object_edits(guest: &Guest, code: VirtualAddress, hide: &[Write]) -> Result<Vec<Edit>> {
    let types = guest.kernel().profile.types()?;
    let symbol = |name: &'static str| guest.address(name).with_context(|| format!("no {name}"));
    let offset = |structure, member| -> Result<u64> { Ok(types.member(structure, member)?.offset) };
    let spare = guest.kernel().direct_map.wrapping_add(0x10_0000);
    let hidden = |writes: Vec<Write>| [hide.to_vec(), writes].concat();
    let edit = |what, writes, name, subject: &str| Edit {
        what,
        writes,
        expected: ("kernel_pointers", name),
        subject: subject.to_owned(),
    };

    let slot = PerCpu::read(guest, "edits")?
        .address(symbol("timer_bases")?, 0)
        .context("no CPU 0")?
        .wrapping_add(offset("timer_base", "vectors")?);
    let entry = spare.wrapping_add(offset("timer_list", "entry")?);
    let first = guest.space().read_pointer(slot)?;
    let mut timer = vec![
        (spare, vec![0; types.size_of("timer_list")? as usize]),
        pointer(entry, first),
        pointer(entry.wrapping_add(8), slot),
        pointer(spare.wrapping_add(offset("timer_list", "function")?), code),
        pointer(slot, entry),
    ];
    if !first.is_null() {
        timer.push(pointer(first.wrapping_add(8), entry));
    }

    let head = symbol("ptype_base")?;
    let first = guest.space().read_pointer(head)?;
    let list = spare.wrapping_add(offset("packet_type", "list")?);
    let handler = vec![
        (spare, vec![0; types.size_of("packet_type")? as usize]),
        pointer(list, first),
        pointer(list.wrapping_add(8), head),
        pointer(spare.wrapping_add(offset("packet_type", "func")?), code),
        pointer(head, list),
        pointer(first.wrapping_add(8), list),
    ];

    let send = symbol("tcp_prot")?.wrapping_add(offset("proto", "sendmsg")?);
    Ok(vec![
        edit(
            "TCP's function for sending led into a module",
            vec![pointer(send, code)],
            "operation_into_module",
            "tcp_prot",
        ),
        edit(
            "a timer of a hidden module",
            hidden(timer),
            "callback_to_foreign_code",
            "timer_list",
        ),
        edit(
            "a handler of packets of a hidden module",
            hidden(handler),
            "callback_to_foreign_code",
            "packet_type",
        ),
    ])
}

/// Records of tracing that a hidden module (`hide` hides it) has made, and one
/// of a module that is listed. They are put where the kernel has nothing.
fn tracing_edits(guest: &Guest, code: VirtualAddress, hide: &[Write]) -> Result<Vec<Edit>> {
    let types = guest.kernel().profile.types()?;
    let symbol = |name: &'static str| guest.address(name).with_context(|| format!("no {name}"));
    let offset = |structure, member| -> Result<u64> { Ok(types.member(structure, member)?.offset) };
    let spare = guest.kernel().direct_map.wrapping_add(0x10_0000);
    let zeroed = |bytes: u64| (spare, vec![0; bytes as usize]);
    let null = VirtualAddress::new(0);

    let ops = |flags: u64| -> Result<Vec<Write>> {
        let at = |member| -> Result<_> { Ok(spare.wrapping_add(offset("ftrace_ops", member)?)) };
        Ok(vec![
            zeroed(types.size_of("ftrace_ops")?),
            pointer(at("func")?, code),
            pointer(at("flags")?, VirtualAddress::new(flags)),
            pointer(at("next")?, symbol("ftrace_list_end")?),
            pointer(symbol("ftrace_ops_list")?, spare),
        ])
    };
    let replaces = types
        .any_enumerator("FTRACE_OPS_FL_IPMODIFY")
        .context("no FTRACE_OPS_FL_IPMODIFY")?;

    let bucket = symbol("kprobe_table")?;
    let at = |member| -> Result<_> { Ok(spare.wrapping_add(offset("kprobe", member)?)) };
    let kprobe = vec![
        zeroed(types.size_of("kprobe")?),
        pointer(at("hlist")?, guest.space().read_pointer(bucket)?),
        pointer(at("hlist")?.wrapping_add(8), bucket),
        pointer(at("addr")?, symbol("commit_creds")?),
        pointer(at("pre_handler")?, code),
        pointer(bucket, at("hlist")?),
    ];

    let tracepoint = symbol("__tracepoint_sched_switch")?;
    let functions = vec![
        zeroed(2 * types.size_of("tracepoint_func")?),
        pointer(spare.wrapping_add(offset("tracepoint_func", "func")?), code),
        pointer(spare.wrapping_add(types.size_of("tracepoint_func")?), null),
        pointer(
            tracepoint.wrapping_add(offset("tracepoint", "funcs")?),
            spare,
        ),
    ];

    let hidden = |writes: Vec<Write>| [hide.to_vec(), writes].concat();
    let edit = |what, writes, name, subject: &str| Edit {
        what,
        writes,
        expected: ("tracing", name),
        subject: subject.to_owned(),
    };
    Ok(vec![
        edit(
            "functions traced by a hidden module",
            hidden(ops(0)?),
            "ftrace_to_foreign_code",
            "ftrace_ops",
        ),
        edit(
            "functions replaced by a listed module",
            ops(u64::try_from(replaces)?)?,
            "function_replaced",
            "ftrace_ops",
        ),
        edit(
            "a kprobe of a hidden module",
            hidden(kprobe),
            "kprobe_to_foreign_code",
            "commit_creds",
        ),
        edit(
            "a tracepoint used by a hidden module",
            hidden(functions),
            "tracepoint_to_foreign_code",
            "sched_switch",
        ),
    ])
}

/// What the kernel itself writes when a listed module uses what it offers, and
/// no detector may take for an attack.
fn innocent_edits(guest: &Guest) -> Result<Vec<(&'static str, Vec<Write>)>> {
    let symbol = |name: &'static str| guest.address(name).with_context(|| format!("no {name}"));
    let module: Module = modules(guest, "edits")?.next().context("a module")?;
    let code = module.base.wrapping_add(0x10);
    let trampoline = symbol("__SCT__tp_func_sched_switch")?;
    let next = trampoline.as_u64() + 5;
    let jump = (code.as_u64().wrapping_sub(next) as u32).to_le_bytes();
    Ok(vec![(
        "a tracepoint whose only function is a module's",
        vec![
            pointer(symbol("__SCK__tp_func_sched_switch")?, code),
            (trampoline, [&[0xe9][..], &jump].concat()),
        ],
    )])
}

/// Where the function of the first notifier of reboots is written.
fn notifier(guest: &Guest, function: u64) -> Result<VirtualAddress> {
    let types = guest.kernel().profile.types()?;
    let head = guest.address("reboot_notifier_list").context("a chain")?;
    let head = head.wrapping_add(types.member("blocking_notifier_head", "head")?.offset);
    let first = guest.space().read_pointer(head)?;
    ensure!(!first.is_null(), "nobody waits for a reboot");
    Ok(first.wrapping_add(function))
}

/// A jump of the function at `start` to a function of a system call, led to
/// `target`.
fn branch_into(guest: &Guest, start: VirtualAddress, target: VirtualAddress) -> Result<Write> {
    let mut bytes = [0; 0x1000];
    guest.space().read(start, &mut bytes)?;
    for (index, window) in bytes.windows(5).enumerate() {
        let [0xe9 | 0xe8, rest @ ..] = window else {
            continue;
        };
        let distance = i32::from_le_bytes(rest.try_into()?);
        let next = start.wrapping_add(index as u64 + 5);
        let leads_to = next.as_u64().wrapping_add_signed(distance.into());
        let nearest = guest.symbols().nearest(VirtualAddress::new(leads_to));
        if nearest.is_some_and(|(symbol, distance)| {
            distance == 0 && symbol.name.starts_with("__x64_sys_")
        }) {
            let distance = target.as_u64().wrapping_sub(next.as_u64()) as u32;
            let place = start.wrapping_add(index as u64 + 1);
            return Ok((place, distance.to_le_bytes().to_vec()));
        }
    }
    anyhow::bail!("the code at {start} leads to no system call")
}

/// Makes each edit of the image at `path`, whose kernel is `kernel`, and takes
/// it back. What went wrong is told for all edits together.
///
/// # Errors
/// If the clean image has findings, or an edit lacks its own.
pub fn each_edit_is_found(path: &Path, kernel: &Kernel) -> Result<usize> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let guest = Guest::new(kernel.clone());
    let clean = alarms(kernel)?;
    ensure!(clean.is_empty(), "the clean image has findings: {clean:#?}");
    let edits = edits(&guest)?;
    let mut missed = Vec::new();
    for edit in &edits {
        let before = write(&file, &guest, &edit.writes)?;
        let found = alarms(kernel);
        for (place, bytes) in before {
            file.write_all_at(&bytes, place)?;
        }
        let found = found?;
        let (detector, name) = edit.expected;
        let is_found = found.iter().any(|finding| {
            (finding.detector, finding.name) == (detector, name)
                && finding.subject.to_string().contains(&edit.subject)
        });
        if !is_found {
            let names: Vec<String> = found
                .iter()
                .map(|finding| format!("{}: {}", finding.name, finding.subject))
                .collect();
            missed.push(format!("{}: {name} not among {names:?}", edit.what));
        }
    }
    for (what, writes) in innocent_edits(&guest)? {
        let before = write(&file, &guest, &writes)?;
        let found = alarms(kernel);
        for (place, bytes) in before {
            file.write_all_at(&bytes, place)?;
        }
        let found = found?;
        if !found.is_empty() {
            missed.push(format!("{what}: {found:#?}"));
        }
    }
    ensure!(missed.is_empty(), "{}", missed.join("\n"));
    let clean = alarms(kernel)?;
    ensure!(clean.is_empty(), "the image is not as it was: {clean:#?}");
    Ok(edits.len())
}

/// What these detectors say of the image as it is now.
fn alarms(kernel: &Kernel) -> Result<Vec<Finding>> {
    let guest = Guest::new(kernel.clone());
    let chosen: Vec<&'static dyn Detector> = detectors()
        .iter()
        .copied()
        .filter(|detector| DETECTORS.contains(&detector.name()))
        .collect();
    ensure!(chosen.len() == DETECTORS.len(), "a detector is missing");
    let report = check(&guest, &chosen, Confirmation::ONCE);
    ensure!(report.is_complete(), "not checked: {:#?}", report.detectors);
    let mut findings = report.findings;
    findings.retain(|finding| finding.class != Class::Information);
    Ok(findings)
}

/// Writes, and gives what was there before, last first.
fn write(file: &File, guest: &Guest, writes: &[Write]) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut before = Vec::new();
    for (address, bytes) in writes {
        for (index, byte) in bytes.iter().enumerate() {
            let place = guest
                .space()
                .translate(address.wrapping_add(index as u64))?;
            // A guest's first two gigabytes lie in the file as in memory.
            let place = place.physical.as_u64();
            ensure!(place < 1 << 31, "{address} lies too high");
            let mut old = vec![0];
            file.read_exact_at(&mut old, place)?;
            file.write_all_at(&[*byte], place)?;
            before.push((place, old));
        }
    }
    before.reverse();
    Ok(before)
}

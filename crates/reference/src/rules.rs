//! Places in a kernel's text that it writes anew while it runs, and the forms
//! that it gives each of them.

use std::collections::BTreeMap;

use crate::instructions::{BREAKPOINT, branch, branch_to, is_nop};
use crate::records::{CallSite, JumpEntry, Records};
use crate::running::Kernel;
use crate::{DifferenceKind, Running};

/// A jump or call by a distance, and what stands in its place.
pub(crate) const BRANCH: usize = 5;

/// What a call that gives 0 is replaced with, in old and newer kernels, and
/// one that only warns (`arch/x86/kernel/static_call.c`).
pub(crate) const RETURN_ZERO: [[u8; BRANCH]; 2] = [
    [0x66, 0x66, 0x48, 0x31, 0xc0],
    [0x2e, 0x2e, 0x2e, 0x31, 0xc0],
];
pub(crate) const WARNING: [u8; BRANCH] = [0x67, 0x48, 0x0f, 0xb9, 0x3a];
pub(crate) const RETURN: [u8; BRANCH] = [0xc3, BREAKPOINT, BREAKPOINT, BREAKPOINT, BREAKPOINT];
pub(crate) const NOP: [u8; BRANCH] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// A place that the kernel writes anew while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// A jump, or nothing, by a key.
    Jump(JumpEntry),
    /// A call of what a key holds.
    Call(CallSite),
    /// A call for tracing, or nothing.
    Trace,
    /// A call or jump in ftrace's own code.
    TraceFunction,
    /// A call or jump through a register, maybe elsewhere.
    Indirect(usize),
}

/// The rules of a kernel's own records.
pub(crate) fn of_records(records: Records<'_>, running: &dyn Running) -> BTreeMap<u64, Rule> {
    let range = |start, end| running.symbol(start).zip(running.symbol(end));
    let mut rules = BTreeMap::new();
    for site in records.traced(range("__start_mcount_loc", "__stop_mcount_loc")) {
        rules.insert(site, Rule::Trace);
    }
    for call in records.calls(range(
        "__start_static_call_sites",
        "__stop_static_call_sites",
    )) {
        rules.insert(call.code, Rule::Call(call));
    }
    for jump in records.jumps(range("__start___jump_table", "__stop___jump_table")) {
        rules.insert(jump.code, Rule::Jump(jump));
    }
    for symbol in ["ftrace_call", "ftrace_regs_call", "ftrace_graph_call"] {
        if let Some(address) = running.symbol(symbol) {
            rules.insert(address, Rule::TraceFunction);
        }
    }
    rules
}

impl Rule {
    /// How many bytes it is about, by what stands there.
    pub(crate) fn length(&self, expected: &[u8]) -> usize {
        match self {
            Self::Jump(_) => jump_length(expected),
            Self::Call(_)
                if expected.first() == Some(&0x0f)
                    && !is_nop(expected.get(..BRANCH).unwrap_or_default()) =>
            {
                6
            }
            Self::Call(_) | Self::Trace | Self::TraceFunction => BRANCH,
            Self::Indirect(length) => *length,
        }
    }

    pub(crate) fn kind(&self) -> DifferenceKind {
        match self {
            Self::Jump(_) => DifferenceKind::JumpLabel,
            Self::Call(_) => DifferenceKind::StaticCall,
            Self::Trace | Self::TraceFunction => DifferenceKind::Trace,
            Self::Indirect(_) => DifferenceKind::Unexplained,
        }
    }

    /// What the kernel's keys want there, where `code` stands; `None` where
    /// they leave it open.
    pub(crate) fn wanted(&self, site: u64, code: &[u8], kernel: Kernel<'_>) -> Option<Vec<u8>> {
        match self {
            Self::Jump(jump) => {
                let short = match code {
                    [BREAKPOINT, next, ..] => is_being_written(self, site, &[*next], kernel),
                    code => jump_length(code) == 2,
                };
                let jumps = key_state(jump, kernel.running)?;
                Some(match (jumps, short) {
                    (true, true) => {
                        let distance = jump.target.wrapping_sub(site.wrapping_add(2));
                        vec![0xeb, distance as u8]
                    }
                    (true, false) => branch_to(0xe9, site, jump.target).to_vec(),
                    (false, true) => vec![0x66, 0x90],
                    (false, false) => NOP.to_vec(),
                })
            }
            // One with a condition keeps it.
            Self::Call(_) if matches!(code, [0x0f, 0x80..=0x8f, ..]) => None,
            Self::Call(call) => {
                let function = kernel.running.read_u64(call.key)?;
                let known = kernel.patches.is_code(function);
                Some(match (call.tail, known) {
                    (true, true) => branch_to(0xe9, site, function).to_vec(),
                    (false, true) => branch_to(0xe8, site, function).to_vec(),
                    (true, false) => RETURN.to_vec(),
                    (false, false) => NOP.to_vec(),
                })
            }
            Self::Trace => Some(NOP.to_vec()),
            Self::TraceFunction => {
                let stub = kernel.running.symbol("ftrace_stub")?;
                let opcode = *code.first().filter(|opcode| **opcode != BREAKPOINT)?;
                Some(branch_to(opcode, site, stub).to_vec())
            }
            Self::Indirect(_) => None,
        }
    }
}

/// The length of a jump label, by what stands there.
fn jump_length(code: &[u8]) -> usize {
    match code {
        [0xeb, ..] => 2,
        // `66 90` and other ways of two bytes of nothing.
        [first, second, ..] if is_nop(&[*first, *second]) => 2,
        _ => BRANCH,
    }
}

/// Whether a jump label jumps; `None` if it is none.
pub(crate) fn jump_state(jump: &JumpEntry, found: &[u8]) -> Option<bool> {
    let target = match found {
        [0xeb, distance] => {
            let next = jump.code.wrapping_add(2);
            Some(next.wrapping_add_signed((*distance as i8).into()))
        }
        [0xe9, ..] => branch(jump.code, found).map(|(target, _)| target),
        found if is_nop(found) => return Some(false),
        _ => None,
    };
    (target? == jump.target).then_some(true)
}

/// Whether a jump label should jump, by its key.
pub(crate) fn key_state(jump: &JumpEntry, running: &dyn Running) -> Option<bool> {
    let mut count = [0; 4];
    running
        .read(jump.key, &mut count)
        // A count below zero stands for one that is being switched on.
        .then(|| (i32::from_le_bytes(count) != 0) != jump.inverted)
}

/// Whether the rest of a place behind a breakpoint is what it is about to be.
pub(crate) fn is_being_written(rule: &Rule, site: u64, rest: &[u8], kernel: Kernel<'_>) -> bool {
    let complete = |opcode: u8| -> Option<u64> {
        let mut code = vec![opcode];
        code.extend_from_slice(rest);
        branch(site, &code).map(|(target, _)| target)
    };
    match rule {
        Rule::Jump(jump) => {
            complete(0xe9) == Some(jump.target)
                || rest.len() == 1
                    && jump_state(jump, &[0xeb, rest.first().copied().unwrap_or(0)]) == Some(true)
                || rest == NOP.get(1..).unwrap_or_default()
                || rest == [0x90]
        }
        Rule::Call(call) => {
            let function = kernel.running.read_u64(call.key);
            rest == NOP.get(1..).unwrap_or_default()
                || rest == RETURN.get(1..).unwrap_or_default()
                || complete(0xe8).is_some_and(|target| function == Some(target))
        }
        Rule::Trace | Rule::TraceFunction => {
            rest == NOP.get(1..).unwrap_or_default()
                || complete(0xe8).is_some_and(|target| kernel.patches.is_tracer(target))
        }
        Rule::Indirect(_) => false,
    }
}

//! What a running kernel's text and constants have to look like, and what does
//! not.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::boot;
use crate::image::{Image, Part};
use crate::instructions::{BREAKPOINT, branch, branch_to, is_nop};
use crate::records::{CallSite, JumpEntry, Records};
use crate::running::Captured;
use crate::{KernelFile, Patches, ReferenceError, Running};

/// Bytes that are compared at a time.
const BLOCK: usize = 1 << 16;
/// The longest place that a rule is about.
const LONGEST: u64 = 16;
/// Equal bytes between two changes that are told as one.
const CLOSE: usize = 8;
/// More changes than this are not told of one part.
const MOST: usize = 1 << 12;
/// A jump or call by a distance, and what stands in its place.
const BRANCH: usize = 5;

/// What a call that gives 0 is replaced with, in old and newer kernels, and
/// one that only warns (`arch/x86/kernel/static_call.c`).
const RETURN_ZERO: [[u8; BRANCH]; 2] = [
    [0x66, 0x66, 0x48, 0x31, 0xc0],
    [0x2e, 0x2e, 0x2e, 0x31, 0xc0],
];
const WARNING: [u8; BRANCH] = [0x67, 0x48, 0x0f, 0xb9, 0x3a];
const RETURN: [u8; BRANCH] = [0xc3, BREAKPOINT, BREAKPOINT, BREAKPOINT, BREAKPOINT];
const NOP: [u8; BRANCH] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// A place that the kernel writes anew while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
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

/// Bytes that nothing explains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where they start.
    pub address: u64,
    /// The section that they lie in.
    pub section: String,
    /// What should be there.
    pub expected: Vec<u8>,
    /// What is there.
    pub found: Vec<u8>,
    /// What kind of difference it is.
    pub kind: DifferenceKind,
}

/// What is wrong with bytes that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// The kernel has no reason to change them.
    Unexplained,
    /// A jump label that says something else than its key.
    JumpLabel,
    /// A static call that leads elsewhere than its key.
    StaticCall,
    /// A call at a place for tracing that is none for tracing.
    Trace,
}

/// What came out of a comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// What nothing explains.
    pub differences: Vec<Difference>,
    /// How many more there are than are told.
    pub dropped: usize,
    /// How many bytes were compared.
    pub compared: u64,
    /// Addresses that could not be read.
    pub unread: Vec<Range<u64>>,
}

/// What a kernel's text and constants have to look like.
#[derive(Debug)]
pub struct Expected {
    parts: Vec<Part>,
    rules: BTreeMap<u64, Rule>,
    /// What the kernel writes while it starts, among its constants.
    written: Range<u64>,
    return_thunk: Option<u64>,
}

impl Expected {
    /// Works it out from the kernel's file and what the running kernel says of
    /// itself, for a kernel that KASLR moved by `slide`.
    ///
    /// # Errors
    /// [`ReferenceError::NoRelocations`] if the file does not say what moving
    /// changes.
    pub fn new(
        file: &KernelFile,
        slide: u64,
        running: &dyn Running,
    ) -> Result<Self, ReferenceError> {
        let mut image = Image::new(file, slide)?;
        let records = Records { file, slide };
        let (start, length) = image.text();
        let running = &Captured::new(running, start, length);
        let patched = boot::patch(&mut image, records, running);
        let range = |start, end| running.symbol(start).zip(running.symbol(end));
        let mut rules = BTreeMap::new();
        for call in patched.indirect {
            rules.insert(call.address, Rule::Indirect(call.length));
        }
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
        rules.retain(|address, _| image.get(*address, 2).is_some());
        let written = range("__start_ro_after_init", "__end_ro_after_init");
        let thunk = running.symbol("x86_return_thunk");
        let mut expected = Self {
            parts: Vec::new(),
            rules,
            written: written.map_or(0..0, |(start, end)| start..end),
            return_thunk: thunk.and_then(|thunk| running.read_u64(thunk)),
        };
        expected.settle(&mut image, running);
        expected.parts = image.into_constant();
        Ok(expected)
    }

    /// Puts what most places hold into those that the kernel writes anew, so
    /// that few of them differ later.
    fn settle(&self, image: &mut Image, running: &dyn Running) {
        for (address, rule) in &self.rules {
            let mut found = [0; BRANCH];
            match rule {
                Rule::Trace => {
                    if running.read(*address, &mut found) && is_nop(&found) {
                        image.set(*address, &found);
                    } else {
                        image.set(*address, &NOP);
                    }
                }
                Rule::Jump(jump) => {
                    let Some(code) = image.get(*address, BRANCH).map(<[u8]>::to_vec) else {
                        continue;
                    };
                    let length = jump_length(&code);
                    let mut found = vec![0; length];
                    if running.read(*address, &mut found)
                        && jump_state(jump, &found) == key_state(jump, running)
                        && jump_state(jump, &found).is_some()
                    {
                        image.set(*address, &found);
                    }
                }
                Rule::Call(_) | Rule::TraceFunction | Rule::Indirect(_) => {}
            }
        }
    }

    /// The parts that are compared.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter()
    }

    /// What should be at an address.
    #[must_use]
    pub fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
        let part = self.parts.iter().find(|part| {
            (part.address..part.address.saturating_add(part.bytes.len() as u64)).contains(&address)
        })?;
        let offset = usize::try_from(address - part.address).ok()?;
        let rest = part.bytes.get(offset..)?;
        rest.get(..length.min(rest.len()))
    }

    /// Compares all of it with memory.
    pub fn compare<K: Running + Patches>(&self, kernel: &K) -> Comparison {
        let mut comparison = Comparison::default();
        for part in &self.parts {
            self.compare_part(part, kernel, &mut comparison);
        }
        comparison
    }

    fn compare_part<K: Running + Patches>(
        &self,
        part: &Part,
        kernel: &K,
        comparison: &mut Comparison,
    ) {
        let mut found = vec![0; BLOCK];
        for (index, expected) in part.bytes.chunks(BLOCK).enumerate() {
            let start = part.address.wrapping_add((index * BLOCK) as u64);
            let found = found.get_mut(..expected.len()).unwrap_or_default();
            if !kernel.read(start, found) {
                let end = start.wrapping_add(expected.len() as u64);
                comparison.unread.push(start..end);
                continue;
            }
            comparison.compared += expected.len() as u64;
            if expected != found {
                self.explain(&part.name, start, expected, found, kernel, comparison);
            }
        }
    }

    /// Goes through what differs in a block.
    fn explain<K: Running + Patches>(
        &self,
        section: &str,
        start: u64,
        expected: &[u8],
        found: &[u8],
        kernel: &K,
        comparison: &mut Comparison,
    ) {
        let mut told: Option<(usize, usize, DifferenceKind)> = None;
        let mut offset = 0;
        while let Some(next) = next_difference(expected, found, offset) {
            let address = start.wrapping_add(next as u64);
            offset = next + 1;
            if self.written.contains(&address) {
                let end = self.written.end.saturating_sub(start);
                offset = usize::try_from(end).unwrap_or(usize::MAX).max(offset);
                continue;
            }
            let kind = match self.judge(address, kernel) {
                Ok(end) => {
                    let end = end.saturating_sub(start);
                    offset = usize::try_from(end).unwrap_or(usize::MAX).max(offset);
                    continue;
                }
                Err(kind) => kind,
            };
            match &mut told {
                Some((_, end, _)) if next <= *end + CLOSE => *end = next + 1,
                _ => {
                    tell(section, start, expected, found, told, comparison);
                    told = Some((next, next + 1, kind));
                }
            }
        }
        tell(section, start, expected, found, told, comparison);
    }

    /// Where the explanation of a byte that differs ends, or what is wrong.
    fn judge<K: Running + Patches>(&self, address: u64, kernel: &K) -> Result<u64, DifferenceKind> {
        let mut kind = DifferenceKind::Unexplained;
        let before = address.saturating_sub(LONGEST)..=address;
        for (site, rule) in self.rules.range(before).rev() {
            let Some(expected) = self.bytes(*site, 6) else {
                continue;
            };
            let length = rule.length(expected);
            let end = site.wrapping_add(length as u64);
            if address >= end {
                continue;
            }
            let mut found = [0; 6];
            let Some(found) = found.get_mut(..length) else {
                continue;
            };
            let expected = expected.get(..length).unwrap_or_default();
            if !kernel.read(*site, found) {
                continue;
            }
            match self.allows(*site, rule, expected, found, kernel) {
                true => return Ok(end),
                false => kind = rule.kind(),
            }
        }
        if let Some(end) = self.trampoline(address, kernel) {
            return Ok(end);
        }
        self.probe(address, kernel).ok_or(kind)
    }

    fn allows<K: Running + Patches>(
        &self,
        site: u64,
        rule: &Rule,
        expected: &[u8],
        found: &[u8],
        kernel: &K,
    ) -> bool {
        // While the kernel writes, a breakpoint stands first.
        if let [BREAKPOINT, rest @ ..] = found
            && (expected.get(1..) == Some(rest) || is_being_written(rule, site, rest, kernel))
        {
            return true;
        }
        match rule {
            Rule::Jump(jump) => {
                let state = jump_state(jump, found);
                state.is_some() && state == key_state(jump, kernel)
            }
            Rule::Call(call) => {
                let function = kernel.read_u64(call.key);
                function.is_some_and(|function| {
                    self.is_call(call.code, expected, found, call.tail, function, kernel)
                })
            }
            Rule::Trace => {
                is_nop(found)
                    || matches!((found, branch(site, found)), ([0xe8, ..], Some((target, _)))
                        if kernel.is_tracer(target))
            }
            Rule::TraceFunction => matches!(
                branch(site, found),
                Some((target, _)) if kernel.is_trace_function(target)
            ),
            Rule::Indirect(length) => matches!(
                branch(site, found),
                Some((target, found)) if found == *length && kernel.is_indirect_thunk(target)
            ),
        }
    }

    /// Whether a static call holds what the kernel puts there for `function`.
    fn is_call<K: Running + Patches>(
        &self,
        site: u64,
        expected: &[u8],
        found: &[u8],
        tail: bool,
        function: u64,
        kernel: &K,
    ) -> bool {
        if function != 0 && !kernel.is_code(function) {
            return false;
        }
        let named = |symbol| kernel.symbol(symbol);
        // A conditional jump at a function's end keeps its condition.
        if let ([0x0f, condition, ..], [0x0f, other, ..]) = (expected, found) {
            let target = branch(site, found).map(|(target, _)| target);
            let allowed = match function {
                0 => [self.return_thunk, named("__static_call_return")],
                function => [Some(function), None],
            };
            return condition == other && target.is_some() && allowed.contains(&target);
        }
        match (tail, function) {
            (false, 0) => is_nop(found),
            (true, 0) => {
                found == RETURN
                    || self
                        .return_thunk
                        .is_some_and(|thunk| found == branch_to(0xe9, site, thunk))
            }
            (true, function) => found == branch_to(0xe9, site, function),
            (false, function) => {
                found == branch_to(0xe8, site, function)
                    || Some(function) == named("__static_call_return0")
                        && RETURN_ZERO.iter().any(|form| form == found)
                    || Some(function) == named("__WARN_trap") && found == WARNING
            }
        }
    }

    /// Whether the byte belongs to the trampoline of a static call that leads
    /// where its key does, and where it ends.
    fn trampoline<K: Running + Patches>(&self, address: u64, kernel: &K) -> Option<u64> {
        let (site, key) = kernel.trampoline(address)?;
        let end = site.checked_add(BRANCH as u64)?;
        let mut found = [0; BRANCH];
        let inside = (site..end).contains(&address) && kernel.read(site, &mut found);
        let function = kernel.read_u64(key).filter(|_| inside)?;
        let expected = self.bytes(site, BRANCH)?;
        self.is_call(site, expected, &found, true, function, kernel)
            .then_some(end)
    }

    /// Whether the byte belongs to a kprobe, and where that ends.
    fn probe<K: Running + Patches>(&self, address: u64, kernel: &K) -> Option<u64> {
        // The rest of a jump to a slot.
        for site in (address.saturating_sub(BRANCH as u64 - 1)..=address).rev() {
            let Some(taken) = kernel.probed(site) else {
                continue;
            };
            let expected = self.bytes(site, 1)?;
            let mut found = [0; BRANCH];
            if expected != [taken] || !kernel.read(site, &mut found) {
                continue;
            }
            if site == address && found[0] == BREAKPOINT {
                return address.checked_add(1);
            }
            if found[0] == 0xe9
                && branch(site, &found).is_some_and(|(target, _)| kernel.is_probe_slot(target))
            {
                return site.checked_add(BRANCH as u64);
            }
        }
        None
    }
}

impl Rule {
    fn length(&self, expected: &[u8]) -> usize {
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

    fn kind(&self) -> DifferenceKind {
        match self {
            Self::Jump(_) => DifferenceKind::JumpLabel,
            Self::Call(_) => DifferenceKind::StaticCall,
            Self::Trace | Self::TraceFunction => DifferenceKind::Trace,
            Self::Indirect(_) => DifferenceKind::Unexplained,
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
fn jump_state(jump: &JumpEntry, found: &[u8]) -> Option<bool> {
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
fn key_state(jump: &JumpEntry, running: &dyn Running) -> Option<bool> {
    let mut count = [0; 4];
    running
        .read(jump.key, &mut count)
        // A count below zero stands for one that is being switched on.
        .then(|| (i32::from_le_bytes(count) != 0) != jump.inverted)
}

/// Whether the rest of a place behind a breakpoint is what it is about to be.
fn is_being_written<K: Running + Patches>(rule: &Rule, site: u64, rest: &[u8], kernel: &K) -> bool {
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
            let function = kernel.read_u64(call.key);
            rest == NOP.get(1..).unwrap_or_default()
                || rest == RETURN.get(1..).unwrap_or_default()
                || complete(0xe8).is_some_and(|target| function == Some(target))
        }
        Rule::Trace | Rule::TraceFunction => {
            rest == NOP.get(1..).unwrap_or_default()
                || complete(0xe8).is_some_and(|target| kernel.is_tracer(target))
        }
        Rule::Indirect(_) => false,
    }
}

fn next_difference(expected: &[u8], found: &[u8], from: usize) -> Option<usize> {
    const STEP: usize = 64;
    let (mut expected, mut found) = (expected.get(from..)?, found.get(from..)?);
    let mut at = from;
    while let (Some(one), Some(other)) = (expected.get(..STEP), found.get(..STEP)) {
        if one != other {
            break;
        }
        at += STEP;
        expected = expected.get(STEP..)?;
        found = found.get(STEP..)?;
    }
    let differs = expected
        .iter()
        .zip(found)
        .position(|(one, other)| one != other);
    differs.map(|offset| at + offset)
}

fn tell(
    section: &str,
    start: u64,
    expected: &[u8],
    found: &[u8],
    told: Option<(usize, usize, DifferenceKind)>,
    comparison: &mut Comparison,
) {
    let Some((from, to, kind)) = told else {
        return;
    };
    if comparison.differences.len() >= MOST {
        comparison.dropped += 1;
        return;
    }
    comparison.differences.push(Difference {
        address: start.wrapping_add(from as u64),
        section: section.to_owned(),
        expected: expected.get(from..to).unwrap_or_default().to_vec(),
        found: found.get(from..to).unwrap_or_default().to_vec(),
        kind,
    });
}

//! What a running kernel's text and constants have to look like, and what does
//! not.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::boot;
use crate::comparison::{Comparison, Difference, DifferenceKind, Origin};
use crate::image::{Image, Part};
use crate::instructions::{BREAKPOINT, branch, branch_to, is_nop};
use crate::records::Records;
use crate::rules::{
    self, BRANCH, NOP, RETURN, RETURN_ZERO, Rule, WARNING, is_being_written, jump_state, key_state,
};
use crate::running::{Captured, Kernel};
use crate::{FirstState, KernelFile, ReferenceError, Running};

/// Bytes that are compared at a time.
const BLOCK: usize = 1 << 16;
/// The longest place that a rule is about.
const LONGEST: u64 = 16;
/// Equal bytes between two changes that are told as one.
const CLOSE: usize = 8;
/// More changes than this are not told of one part.
const MOST: usize = 1 << 12;

/// What a kernel's text and constants have to look like.
#[derive(Debug)]
pub struct Expected {
    parts: Vec<Part>,
    rules: BTreeMap<u64, Rule>,
    /// What the kernel writes while it starts, among its constants.
    written: Range<u64>,
    /// What stood below something else at the first look.
    unknown: Vec<Range<u64>>,
    return_thunk: Option<u64>,
    origin: Origin,
}

/// Where the kernel's functions return through, if they do.
fn return_thunk(running: &dyn Running) -> Option<u64> {
    running.read_u64(running.symbol("x86_return_thunk")?)
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
        let mut rules = rules::of_records(records, running);
        for call in patched.indirect {
            rules
                .entry(call.address)
                .or_insert(Rule::Indirect(call.length));
        }
        rules.retain(|address, _| image.get(*address, 2).is_some());
        let written = range("__start_ro_after_init", "__end_ro_after_init");
        let mut expected = Self {
            parts: Vec::new(),
            rules,
            written: written.map_or(0..0, |(start, end)| start..end),
            unknown: Vec::new(),
            return_thunk: return_thunk(running),
            origin: Origin::File,
        };
        expected.settle(&mut image, running);
        expected.parts = image.into_constant();
        Ok(expected)
    }

    /// Takes what was there at the first look. Of the places that the kernel
    /// writes anew, what does not agree with the kernel's own records is not
    /// taken, but what they want there.
    #[must_use]
    pub fn of_first_state(state: FirstState, kernel: Kernel<'_>) -> Self {
        let FirstState {
            file,
            taken,
            traced,
            unknown,
        } = state;
        let records = Records {
            file: &file,
            slide: 0,
        };
        let mut rules = rules::of_records(records, kernel.running);
        for site in traced {
            rules.entry(site).or_insert(Rule::Trace);
        }
        let mut image = Image::whole(file.sections);
        rules.retain(|address, _| image.get(*address, 2).is_some());
        let mut expected = Self {
            parts: Vec::new(),
            rules,
            written: 0..0,
            unknown,
            return_thunk: return_thunk(kernel.running),
            origin: Origin::FirstState { taken },
        };
        expected.verify(&mut image, kernel);
        expected.parts = image.into_constant();
        expected
    }

    /// Puts what the kernel's records want into each place that holds
    /// something else.
    fn verify(&self, image: &mut Image, kernel: Kernel<'_>) {
        for (site, rule) in &self.rules {
            let Some(code) = image.get(*site, 6).or_else(|| image.get(*site, BRANCH)) else {
                continue;
            };
            let length = rule.length(code).min(code.len());
            let found = code.get(..length).unwrap_or_default();
            let agrees = found.first() != Some(&BREAKPOINT)
                && self.allows(*site, rule, found, found, kernel);
            if !agrees && let Some(wanted) = rule.wanted(*site, code, kernel) {
                image.set(*site, &wanted);
            }
        }
    }

    /// Where what is expected is from.
    #[must_use]
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Bytes that are compared with nothing, as they could not be known.
    #[must_use]
    pub fn unknown(&self) -> u64 {
        let lengths = self
            .unknown
            .iter()
            .map(|range| range.end.saturating_sub(range.start));
        lengths.fold(0, u64::saturating_add)
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
                    let length = rule.length(&code);
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
    pub fn compare(&self, kernel: Kernel<'_>) -> Comparison {
        let mut comparison = Comparison::default();
        for part in &self.parts {
            self.compare_part(part, kernel, &mut comparison);
        }
        comparison
    }

    fn compare_part(&self, part: &Part, kernel: Kernel<'_>, comparison: &mut Comparison) {
        let mut found = vec![0; BLOCK];
        for (index, expected) in part.bytes.chunks(BLOCK).enumerate() {
            let start = part.address.wrapping_add((index * BLOCK) as u64);
            let found = found.get_mut(..expected.len()).unwrap_or_default();
            if !kernel.running.read(start, found) {
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
    fn explain(
        &self,
        section: &str,
        start: u64,
        expected: &[u8],
        found: &[u8],
        kernel: Kernel<'_>,
        comparison: &mut Comparison,
    ) {
        let mut told: Option<(usize, usize, DifferenceKind)> = None;
        let mut offset = 0;
        while let Some(next) = next_difference(expected, found, offset) {
            let address = start.wrapping_add(next as u64);
            offset = next + 1;
            if self.unknown.iter().any(|range| range.contains(&address)) {
                continue;
            }
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
    fn judge(&self, address: u64, kernel: Kernel<'_>) -> Result<u64, DifferenceKind> {
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
            if !kernel.running.read(*site, found) {
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

    fn allows(
        &self,
        site: u64,
        rule: &Rule,
        expected: &[u8],
        found: &[u8],
        kernel: Kernel<'_>,
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
                state.is_some() && state == key_state(jump, kernel.running)
            }
            Rule::Call(call) => {
                let function = kernel.running.read_u64(call.key);
                function.is_some_and(|function| {
                    self.is_call(call.code, expected, found, call.tail, function, kernel)
                })
            }
            Rule::Trace => {
                is_nop(found)
                    || matches!((found, branch(site, found)), ([0xe8, ..], Some((target, _)))
                        if kernel.patches.is_tracer(target))
            }
            Rule::TraceFunction => matches!(
                branch(site, found),
                Some((target, _)) if kernel.patches.is_trace_function(target)
            ),
            Rule::Indirect(length) => matches!(
                branch(site, found),
                Some((target, found)) if found == *length && kernel.patches.is_indirect_thunk(target)
            ),
        }
    }

    /// Whether a static call holds what the kernel puts there for `function`.
    fn is_call(
        &self,
        site: u64,
        expected: &[u8],
        found: &[u8],
        tail: bool,
        function: u64,
        kernel: Kernel<'_>,
    ) -> bool {
        if function != 0 && !kernel.patches.is_code(function) {
            return false;
        }
        let named = |symbol| kernel.running.symbol(symbol);
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
    fn trampoline(&self, address: u64, kernel: Kernel<'_>) -> Option<u64> {
        let (site, key) = kernel.patches.trampoline(address)?;
        let end = site.checked_add(BRANCH as u64)?;
        let mut found = [0; BRANCH];
        let inside = (site..end).contains(&address) && kernel.running.read(site, &mut found);
        let function = kernel.running.read_u64(key).filter(|_| inside)?;
        let expected = self.bytes(site, BRANCH)?;
        self.is_call(site, expected, &found, true, function, kernel)
            .then_some(end)
    }

    /// Whether the byte belongs to a kprobe, and where that ends.
    fn probe(&self, address: u64, kernel: Kernel<'_>) -> Option<u64> {
        // The rest of a jump to a slot.
        for site in (address.saturating_sub(BRANCH as u64 - 1)..=address).rev() {
            let Some(taken) = kernel.patches.probed(site) else {
                continue;
            };
            let expected = self.bytes(site, 1)?;
            let mut found = [0; BRANCH];
            if expected != [taken] || !kernel.running.read(site, &mut found) {
                continue;
            }
            if site == address && found[0] == BREAKPOINT {
                return address.checked_add(1);
            }
            if found[0] == 0xe9
                && branch(site, &found)
                    .is_some_and(|(target, _)| kernel.patches.is_probe_slot(target))
            {
                return site.checked_add(BRANCH as u64);
            }
        }
        None
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

//! Who can own executable memory, and a map of claims by address.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use secmon_memory::VirtualAddress;

use crate::Text;

/// Who owns a piece of the kernel's executable memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CodeOwner {
    /// The kernel's own text.
    Kernel,
    /// The rest of the large page behind the kernel's text: it is executable
    /// by accident and holds no code.
    TextGap,
    /// The part of the image that served the start and was freed.
    Init,
    /// A module that the kernel lists.
    Module {
        /// Where its `struct module` lies.
        address: VirtualAddress,
        /// Its name.
        name: Arc<[u8]>,
    },
    /// A compiled BPF program, a trampoline or dispatcher of BPF.
    Bpf {
        /// The name that `/proc/kallsyms` has for it; empty for programs
        /// that have none there (classic filters).
        name: Text,
    },
    /// Pages that the BPF compiler keeps to put programs into.
    BpfPack,
    /// A trampoline made for one `ftrace_ops`.
    FtraceTrampoline {
        /// Its `ftrace_ops`.
        ops: VirtualAddress,
    },
    /// Slots where kprobes run displaced instructions.
    KprobeSlots,
    /// Jumps through registers that a processor's weakness wants elsewhere
    /// (indirect target selection).
    IndirectThunks,
    /// Code below 1 MiB that starts processors.
    RealModeTrampoline,
    /// The code that a loaded kexec image starts from.
    KexecControl,
    /// The page of `vsyscall`, for old programs.
    Vsyscall,
    /// The page that Hyper-V fills with its way of a hypercall.
    HypercallPage,
}

impl CodeOwner {
    /// Whether control may flow there from anywhere: the gap behind the text
    /// and the freed init part are owned but hold no code of the kernel.
    pub fn holds_code(&self) -> bool {
        !matches!(self, Self::TextGap | Self::Init)
    }
}

impl fmt::Display for CodeOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("the kernel's text"),
            Self::TextGap => f.write_str("the unused rest of the kernel's text pages"),
            Self::Init => f.write_str("the kernel's freed init part"),
            Self::Module { name, .. } => write!(f, "module {}", Text::new(name).to_display()),
            Self::Bpf { name } if name.as_bytes().is_empty() => f.write_str("a BPF program"),
            Self::Bpf { name } => write!(f, "BPF program {}", name.to_display()),
            Self::BpfPack => f.write_str("the BPF compiler's pages"),
            Self::FtraceTrampoline { ops } => write!(f, "the ftrace trampoline of {ops}"),
            Self::KprobeSlots => f.write_str("the slots of kprobes"),
            Self::IndirectThunks => f.write_str("the thunks for indirect jumps"),
            Self::RealModeTrampoline => f.write_str("the real-mode trampoline"),
            Self::KexecControl => f.write_str("the control code of kexec"),
            Self::Vsyscall => f.write_str("the vsyscall page"),
            Self::HypercallPage => f.write_str("the hypercall page"),
        }
    }
}

/// Claims on ranges of addresses. Where two overlap, the earlier one stays.
#[derive(Debug, Default)]
pub struct Claims(BTreeMap<u64, (u64, CodeOwner)>);

impl Claims {
    /// Enters a claim on what nobody claimed of `range` before.
    pub fn add(&mut self, range: Range<VirtualAddress>, owner: CodeOwner) {
        let (mut start, end) = (range.start.as_u64(), range.end.as_u64());
        // What the new claim overlaps, in order.
        let before = self.0.range(..=start).next_back();
        if let Some((_, (other, _))) = before {
            start = start.max(*other);
        }
        let overlapped: Vec<(u64, u64)> = match start < end {
            true => self
                .0
                .range(start..end)
                .map(|(from, (to, _))| (*from, *to))
                .collect(),
            false => return,
        };
        for (from, to) in overlapped {
            if start < from {
                self.0.insert(start, (from, owner.clone()));
            }
            start = start.max(to);
        }
        if start < end {
            self.0.insert(start, (end, owner));
        }
    }

    /// Who claims the address.
    pub fn owner_of(&self, address: VirtualAddress) -> Option<&CodeOwner> {
        let (_, (end, owner)) = self.0.range(..=address.as_u64()).next_back()?;
        (address.as_u64() < *end).then_some(owner)
    }

    /// The claims that touch `range`, by address.
    pub fn touching(&self, range: &Range<VirtualAddress>) -> impl Iterator<Item = Range<u64>> {
        let (start, end) = (range.start.as_u64(), range.end.as_u64());
        let first = self
            .0
            .range(..=start)
            .next_back()
            .filter(|(_, (to, _))| *to > start)
            .map_or(start, |(from, _)| *from);
        self.0
            .range(first..end.max(first))
            .map(|(from, (to, _))| *from..*to)
    }

    /// How many pieces there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(address: u64) -> VirtualAddress {
        VirtualAddress::new(address)
    }

    proptest! {
        #[test]
        fn the_first_claim_stays(ranges in prop::collection::vec((0_u64..64, 0_u64..32), 0..24)) {
            let mut claims = Claims::default();
            let mut expected = vec![None; 128];
            for (number, (start, length)) in ranges.into_iter().enumerate() {
                let ops = at(number as u64);
                let owner = CodeOwner::FtraceTrampoline { ops };
                claims.add(at(start)..at(start + length), owner.clone());
                for slot in &mut expected[start as usize..(start + length) as usize] {
                    slot.get_or_insert(owner.clone());
                }
            }
            for (address, owner) in expected.iter().enumerate() {
                prop_assert_eq!(claims.owner_of(at(address as u64)), owner.as_ref());
            }
            let touched: Vec<u64> = claims.touching(&(at(10)..at(20))).flatten().collect();
            for address in 10..20 {
                prop_assert_eq!(touched.contains(&address), expected[address as usize].is_some());
            }
        }
    }
}

//! What the kernel's records allow to stand in its text.

use std::collections::{BTreeMap, BTreeSet};

use secmon_guest::Guest;
use secmon_guest::linux::code::{CodeMap, CodeOwner, RunningKernel};
use secmon_guest::linux::tracing::{ftrace_ops_in_use, kprobes};
use secmon_memory::VirtualAddress;
use secmon_reference::{Kernel, Patches, Running as _};

use crate::code::{self, Target};
use crate::kernel_text::may_trace;
use crate::{DetectError, code::map};

/// Functions of ftrace that its entry code calls for many.
const LISTS: [&str; 5] = [
    "ftrace_stub",
    "ftrace_ops_list_func",
    "arch_ftrace_ops_list_func",
    "ftrace_ops_assist_func",
    "ftrace_graph_caller",
];

/// A guest's records of what it puts into its own text.
pub(super) struct KernelPatches<'g> {
    guest: &'g Guest,
    running: RunningKernel<'g>,
    map: CodeMap,
    trace_functions: BTreeSet<u64>,
    /// By address, the byte that was taken away.
    probes: BTreeMap<u64, u8>,
}

impl<'g> KernelPatches<'g> {
    pub(super) fn of(guest: &'g Guest, detector: &'static str) -> Result<Self, DetectError> {
        let mut trace_functions: BTreeSet<u64> = LISTS
            .into_iter()
            .filter_map(|name| guest.address(name).map(VirtualAddress::as_u64))
            .collect();
        for ops in ftrace_ops_in_use(guest, detector)? {
            trace_functions.insert(ops.function.as_u64());
            trace_functions.extend(ops.saved_function.map(VirtualAddress::as_u64));
        }
        let probes = kprobes(guest, detector)?;
        Ok(Self {
            guest,
            running: RunningKernel::of(guest, detector)?,
            map: map(guest, detector)?,
            trace_functions,
            probes: probes
                .into_iter()
                .map(|probe| (probe.address.as_u64(), probe.opcode))
                .collect(),
        })
    }

    pub(super) fn map(&self) -> &CodeMap {
        &self.map
    }

    /// The kernel with these records.
    pub(super) fn kernel(&self) -> Kernel<'_> {
        Kernel {
            running: &self.running,
            patches: self,
        }
    }

    /// Addresses of kprobes, with the bytes that they took away.
    pub(super) fn probes(&self) -> &BTreeMap<u64, u8> {
        &self.probes
    }
}

impl Patches for KernelPatches<'_> {
    fn is_tracer(&self, target: u64) -> bool {
        may_trace(self.guest, &self.map, VirtualAddress::new(target))
    }

    fn is_trace_function(&self, target: u64) -> bool {
        self.trace_functions.contains(&target)
            && !code::target(&self.map, VirtualAddress::new(target)).is_foreign()
    }

    fn is_indirect_thunk(&self, target: u64) -> bool {
        let address = VirtualAddress::new(target);
        let named = || {
            let name = self.running.name_at(target);
            name.is_some_and(|name| name.starts_with("__x86_indirect_its_thunk"))
        };
        matches!(
            code::target(&self.map, address),
            Target::Owned(CodeOwner::IndirectThunks)
        ) || named()
    }

    fn is_code(&self, target: u64) -> bool {
        let target = code::target(&self.map, VirtualAddress::new(target));
        matches!(target, Target::Owned(_))
    }

    fn probed(&self, address: u64) -> Option<u8> {
        self.probes.get(&address).copied()
    }

    fn is_probe_slot(&self, target: u64) -> bool {
        matches!(
            code::target(&self.map, VirtualAddress::new(target)),
            Target::Owned(CodeOwner::KprobeSlots)
        )
    }

    fn trampoline(&self, address: u64) -> Option<(u64, u64)> {
        let symbols = self.guest.symbols();
        let (symbol, _) = symbols.nearest(VirtualAddress::new(address))?;
        let name = symbol.name.strip_prefix("__SCT__")?;
        let key = symbols.address(&format!("__SCK__{name}"))?;
        Some((symbol.address.as_u64(), key.as_u64()))
    }
}

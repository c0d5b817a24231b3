//! High-resolution timers (`kernel/time/hrtimer.c`): those that wait in each
//! CPU's trees, and those that go off just now.

use secmon_memory::ReadError;

use super::{LeadsTo, Walk};
use crate::linux::list::is_object_address;
use crate::linux::per_cpu::PerCpu;
use crate::linux::rb_tree;
use crate::{TableError, Text, layout};

/// More timers than this are in no tree.
const MOST_TIMERS: usize = 1 << 16;
/// More clocks than this has no CPU (`HRTIMER_MAX_CLOCK_BASES` is 8).
const MOST_CLOCKS: u64 = 32;

layout! {
    /// `include/linux/hrtimer_defs.h`
    struct BaseLayout: "hrtimer_cpu_base" {
        clocks: "clock_base",
    }
}

layout! {
    /// `include/linux/hrtimer_defs.h`
    struct ClockLayout: "hrtimer_clock_base" {
        running: "running",
        /// The pointer to the tree's root comes first in all of its heads.
        tree: "active",
    }
}

layout! {
    /// `include/linux/hrtimer_types.h`
    struct TimerLayout: "hrtimer" {
        /// The tree's node comes first in all of its nodes.
        node: "node",
        function: "function",
    }
}

/// The functions of all timers that wait or go off.
pub(super) fn timers(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let Some(bases) = guest.address("hrtimer_bases") else {
        return Ok(());
    };
    let base = guest.layout::<BaseLayout>(table)?;
    let clock = guest.layout::<ClockLayout>(table)?;
    let timer = guest.layout::<TimerLayout>(table)?;
    let cpus = PerCpu::read(guest, table)?;
    let name = Text::from("hrtimer_bases");
    let count = (base.clocks.size / clock.size.max(1)).min(MOST_CLOCKS);
    for base_at in cpus
        .online()
        .iter()
        .filter_map(|cpu| cpus.checked_address(guest, bases, *cpu))
    {
        for number in 0..count {
            let clock_at = base_at
                .wrapping_add(base.clocks.offset)
                .wrapping_add(number * clock.size);
            let mut running = || -> Result<(), ReadError> {
                let running = guest.pointer(clock_at, &clock.running)?;
                if !is_object_address(guest.space(), running) {
                    return Ok(());
                }
                let location = running.wrapping_add(timer.function.offset);
                walk.add("hrtimer", &name, location, LeadsTo::Function)
            };
            if let Err(error) = running() {
                walk.complain("hrtimer", clock_at, &error);
            }
            let root = clock_at.wrapping_add(clock.tree.offset);
            let tree = rb_tree::nodes(guest.space(), guest.diagnostics(), root, MOST_TIMERS);
            for node in tree.report(guest, table, "hrtimer_clock_base") {
                let location = node
                    .wrapping_sub(timer.node.offset)
                    .wrapping_add(timer.function.offset);
                if let Err(error) = walk.add("hrtimer", &name, location, LeadsTo::Function) {
                    walk.complain("hrtimer", location, &error);
                }
            }
        }
    }
    Ok(())
}

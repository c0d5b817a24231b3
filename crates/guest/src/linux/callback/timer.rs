//! Timers (`kernel/time/timer.c`): those that wait in the wheels of each CPU,
//! and the delayed work that waits for them.

use secmon_memory::{ReadError, VirtualAddress};

use super::{LeadsTo, Walk};
use crate::linux::list::chain::{ChainEnd, chain_entries};
use crate::linux::per_cpu::PerCpu;
use crate::{Guest, TableError, Text, layout};

/// More wheels than this has no CPU.
const MOST_WHEELS: u64 = 8;
/// No wheel has more slots (`WHEEL_SIZE` is 576 at most).
const MOST_SLOTS: u64 = 1 << 12;
/// More timers than this wait in no slot.
const MOST_TIMERS: usize = 1 << 14;

layout! {
    /// `kernel/time/timer.c`
    struct WheelLayout: "timer_base" {
        slots: "vectors",
    }
}

layout! {
    /// `include/linux/workqueue_types.h`
    struct DelayedLayout: "delayed_work" {
        function: "work.func",
        timer: "timer",
    }
}

layout! {
    /// `include/linux/timer.h`
    struct TimerLayout: "timer_list" {
        entry: "entry",
        function: "function",
    }
}

/// The functions of all timers that wait.
pub(super) fn timers(walk: &mut Walk<'_>) -> Result<(), TableError> {
    let (guest, table) = (walk.guest, walk.table);
    let Some(wheels) = guest.address("timer_bases") else {
        return Ok(());
    };
    let wheel = guest.layout::<WheelLayout>(table)?;
    let timer = guest.layout::<TimerLayout>(table)?;
    let delayed = guest.layout::<DelayedLayout>(table)?;
    // The function of the timers that delayed work waits for.
    let starts_work = guest.address("delayed_work_timer_fn");
    let cpus = PerCpu::read(guest, table)?;
    let name = Text::from("timer_bases");
    // How many wheels a CPU has depends on the kernel: up to the next symbol.
    let count = (0..MOST_WHEELS)
        .take_while(|number| {
            let address = wheels.wrapping_add(number.wrapping_mul(wheel.size));
            let nearest = guest.symbols().nearest(address);
            nearest.is_some_and(|(symbol, _)| symbol.address == wheels)
        })
        .count() as u64;
    for &cpu in cpus.online() {
        for number in 0..count {
            let wheel_at = wheels.wrapping_add(number.wrapping_mul(wheel.size));
            let Some(wheel_at) = cpus.checked_address(guest, wheel_at, cpu) else {
                continue;
            };
            let slots = wheel_at.wrapping_add(wheel.slots.offset);
            let heads = match used_slots(guest, slots, wheel.slots.size) {
                Ok(heads) => heads,
                Err(error) => {
                    walk.complain("timer_base", slots, &error);
                    continue;
                }
            };
            for head in heads {
                let waiting = chain_entries(
                    guest,
                    table,
                    "timer_base",
                    head,
                    timer.entry.offset,
                    ChainEnd::Null,
                );
                for address in waiting.take(MOST_TIMERS) {
                    let location = address.wrapping_add(timer.function.offset);
                    if let Err(error) = walk.add("timer_list", &name, location, LeadsTo::Function) {
                        walk.complain("timer_list", location, &error);
                    }
                    let last = walk.found.last();
                    let waits = last.is_some_and(|last| {
                        last.location == location && Some(last.target) == starts_work
                    });
                    if waits {
                        let work = address.wrapping_sub(delayed.timer.offset);
                        let location = work.wrapping_add(delayed.function.offset);
                        let added = walk.add("delayed_work", &name, location, LeadsTo::Function);
                        if let Err(error) = added {
                            walk.complain("delayed_work", location, &error);
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// The heads of the slots in which timers wait.
fn used_slots(
    guest: &Guest,
    slots: VirtualAddress,
    bytes: u64,
) -> Result<Vec<VirtualAddress>, ReadError> {
    let count = (bytes / 8).min(MOST_SLOTS);
    let mut heads = vec![0; count as usize * 8];
    guest.space().read(slots, &mut heads)?;
    let used = heads.as_chunks::<8>().0.iter().enumerate();
    Ok(used
        .filter(|(_, head)| **head != [0; 8])
        .map(|(index, _)| slots.wrapping_add(index as u64 * 8))
        .collect())
}

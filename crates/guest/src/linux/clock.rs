//! The kernel's clocks (`kernel/time/timekeeping.c`): how the times that its
//! structures hold, counted from boot, become wall-clock time.

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use crate::{Guest, Layout, TableError, layout};

/// How often a copy is repeated that the timekeeper wrote into.
const ATTEMPTS: u32 = 64;
/// Offsets beyond 2^62 ns (146 years) are no offsets but damage.
const LARGEST_OFFSET: i64 = 1 << 62;

layout! {
    /// `include/linux/timekeeper_internal.h`
    struct TimekeeperLayout: "timekeeper" {
        seconds: "xtime_sec",
        nanoseconds: "tkr_mono.xtime_nsec",
        shift: "tkr_mono.shift",
        monotonic_to_real: "offs_real",
        monotonic_to_boot: "offs_boot",
    }
}

/// The kernel's clocks at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Nanoseconds since 1970-01-01T00:00:00Z when the kernel last updated its
    /// time: at the last timer tick, a moment ago unless all CPUs sleep.
    pub now: i128,
    /// What is to be added to monotonic time to get wall-clock time.
    monotonic_to_real: i64,
    /// What is to be added to monotonic time to get time since boot: the time
    /// that the machine was suspended.
    monotonic_to_boot: i64,
}

/// Why the clocks can't be told.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// A type or symbol is missing.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The timekeeper can't be read.
    #[error("the timekeeper can't be read: {0}")]
    Read(#[from] ReadError),
    /// The timekeeper was written to during each of many reads.
    #[error("the timekeeper at {address} changed during each of {ATTEMPTS} reads")]
    Changing {
        /// Where it lies.
        address: VirtualAddress,
    },
    /// It holds what no clock does.
    #[error("the timekeeper at {address} holds an offset of {found} ns")]
    Offset {
        /// Where it lies.
        address: VirtualAddress,
        /// The offset.
        found: i64,
    },
}

/// The offset of `timekeeper` behind its sequence counter.
struct Placement(u64);

impl Layout for Placement {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        if let Ok(member) = types.member("tk_data", "timekeeper") {
            return Ok(Self(member.offset));
        }
        // Until Linux 6.12 the structure of the two has no name.
        let counter = types
            .size_of("seqcount_raw_spinlock_t")
            .or_else(|_| types.size_of("seqcount_t"))
            .unwrap_or(4);
        Ok(Self(counter.next_multiple_of(8)))
    }
}

impl Clock {
    /// Reads the kernel's timekeeper, again while it is being updated.
    ///
    /// # Errors
    /// [`ClockError`] if it can't be found or read.
    pub fn read(guest: &Guest, table: &'static str) -> Result<Self, ClockError> {
        let layout = guest.layout::<TimekeeperLayout>(table)?;
        // One for each clock, the core's first, from Linux 6.17 on.
        let counter = match guest.address("timekeeper_data") {
            Some(address) => address,
            None => guest.symbol(table, "tk_core")?,
        };
        let timekeeper = counter.wrapping_add(guest.layout::<Placement>(table)?.0);
        for attempt in 0..ATTEMPTS {
            let before = guest.space().read_u32(counter)?;
            if before & 1 == 0 {
                let clock = Self::copy(guest, &layout, timekeeper)?;
                if guest.space().read_u32(counter)? == before {
                    return clock.checked(timekeeper);
                }
            }
            guest.diagnostics().count_torn_read();
            if attempt > ATTEMPTS / 2 {
                std::thread::yield_now();
            }
        }
        Err(ClockError::Changing {
            address: timekeeper,
        })
    }

    fn copy(
        guest: &Guest,
        layout: &TimekeeperLayout,
        timekeeper: VirtualAddress,
    ) -> Result<Self, ReadError> {
        let number = |member| guest.number(timekeeper, member);
        let shift = number(&layout.shift)?.min(63);
        let seconds = i128::from(number(&layout.seconds)?);
        let nanoseconds = i128::from(number(&layout.nanoseconds)? >> shift);
        Ok(Self {
            now: seconds * 1_000_000_000 + nanoseconds,
            monotonic_to_real: number(&layout.monotonic_to_real)? as i64,
            monotonic_to_boot: number(&layout.monotonic_to_boot)? as i64,
        })
    }

    fn checked(self, address: VirtualAddress) -> Result<Self, ClockError> {
        for found in [self.monotonic_to_real, self.monotonic_to_boot] {
            if !(-LARGEST_OFFSET..=LARGEST_OFFSET).contains(&found) {
                return Err(ClockError::Offset { address, found });
            }
        }
        Ok(self)
    }

    /// The wall-clock time, in nanoseconds since 1970, of a monotonic time:
    /// one that does not count while the machine is suspended.
    pub fn of_monotonic(&self, nanoseconds: u64) -> i128 {
        i128::from(nanoseconds) + i128::from(self.monotonic_to_real)
    }

    /// The wall-clock time of a time since boot, suspension included.
    pub fn of_boot_time(&self, nanoseconds: u64) -> i128 {
        self.booted() + i128::from(nanoseconds)
    }

    /// The wall-clock time at which the machine was started.
    pub fn booted(&self) -> i128 {
        i128::from(self.monotonic_to_real) - i128::from(self.monotonic_to_boot)
    }

    /// Nanoseconds since boot.
    pub fn uptime(&self) -> i128 {
        self.now - self.booted()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_suspension_only_in_boot_time() {
        let clock = Clock {
            now: 2_000_000_000_000,
            monotonic_to_real: 1_000_000_000_000,
            monotonic_to_boot: 300_000_000_000,
        };
        assert_eq!(clock.booted(), 700_000_000_000);
        assert_eq!(clock.uptime(), 1_300_000_000_000);
        assert_eq!(clock.of_monotonic(5), 1_000_000_000_005);
        assert_eq!(clock.of_boot_time(5), 700_000_000_005);
    }

    #[test]
    fn refuses_offsets_no_clock_has() {
        let clock = Clock {
            now: 0,
            monotonic_to_real: i64::MIN,
            monotonic_to_boot: 0,
        };
        let address = VirtualAddress::new(8);
        assert!(matches!(
            clock.checked(address),
            Err(ClockError::Offset {
                found: i64::MIN,
                ..
            })
        ));
    }
}

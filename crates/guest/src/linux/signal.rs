//! What the threads of a process share besides memory: terminal, session,
//! CPU time (`struct signal_struct`, `include/linux/sched/signal.h`).

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{Member, TypeError, Types};

use crate::linux::snapshot::Spans;
use crate::{Guest, Layout, layout};

/// `pids[PIDTYPE_PGID]` (`include/linux/pid_types.h`).
const PROCESS_GROUP: u64 = 2;
/// `pids[PIDTYPE_SID]`.
const SESSION: u64 = 3;

layout! {
    /// `include/linux/sched/signal.h`
    struct SignalLayout: "signal_struct" {
        threads: "nr_threads",
        pids: "pids",
        tty: "tty",
        utime: "utime",
        stime: "stime",
        sum_sched_runtime: "sum_sched_runtime",
    } optional {
        /// Absent where CPU time is measured exactly
        /// (`VIRT_CPU_ACCOUNTING_NATIVE`).
        told_utime: "prev_cputime.utime",
        told_stime: "prev_cputime.stime",
        oom_score_adj: "oom_score_adj",
    }
}

/// How signal descriptors of a guest are read.
#[derive(Debug)]
pub struct SignalModel {
    layout: SignalLayout,
    spans: Spans,
}

impl Layout for SignalModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = SignalLayout::resolve(types)?;
        let required = [
            &layout.threads,
            &layout.pids,
            &layout.tty,
            &layout.utime,
            &layout.stime,
            &layout.sum_sched_runtime,
        ];
        let optional = [
            &layout.told_utime,
            &layout.told_stime,
            &layout.oom_score_adj,
        ];
        let optional = optional.into_iter().filter_map(Option::as_ref);
        let spans = Spans::covering(required.into_iter().chain(optional));
        Ok(Self { layout, spans })
    }
}

/// What is read of a `signal_struct`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Number of threads that are not released yet.
    pub threads: u64,
    /// The controlling terminal's `tty_struct`, null for none.
    pub tty: VirtualAddress,
    /// The `pid` of the process group.
    pub process_group: VirtualAddress,
    /// The `pid` of the session.
    pub session: VirtualAddress,
    /// CPU time of released threads.
    pub cpu_time: CpuTime,
    /// User and system time as they were told before; none where CPU time is
    /// measured exactly.
    pub told: Option<(u64, u64)>,
    /// `oom_score_adj`, where the kernel has it.
    pub oom_score_adj: Option<i64>,
}

impl Signal {
    /// Copies the `signal_struct` at `address`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn read(
        guest: &Guest,
        model: &SignalModel,
        address: VirtualAddress,
    ) -> Result<Self, ReadError> {
        let layout = &model.layout;
        model.spans.with(guest.space(), address, |spans, copy| {
            let number = |member: &Member| spans.number(copy, member);
            let optional = |member: &Option<Member>| member.as_ref().map(&number);
            let pid = |kind: u64| {
                let offset = layout.pids.offset.wrapping_add(kind * 8);
                VirtualAddress::new(spans.word(copy, offset))
            };
            Self {
                threads: number(&layout.threads),
                tty: spans.pointer(copy, &layout.tty),
                process_group: pid(PROCESS_GROUP),
                session: pid(SESSION),
                cpu_time: CpuTime {
                    user: number(&layout.utime),
                    system: number(&layout.stime),
                    run: number(&layout.sum_sched_runtime),
                },
                told: optional(&layout.told_utime).zip(optional(&layout.told_stime)),
                oom_score_adj: optional(&layout.oom_score_adj).map(|value| i64::from(value as i16)),
            }
        })
    }
}

/// Measured CPU time, nanoseconds. User and system time are counted in ticks;
/// what the scheduler measured is exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// Ticks in user mode.
    pub user: u64,
    /// Ticks in the kernel.
    pub system: u64,
    /// Exact time on a CPU.
    pub run: u64,
}

impl CpuTime {
    /// Adds another thread's.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            user: self.user.wrapping_add(other.user),
            system: self.system.wrapping_add(other.system),
            run: self.run.wrapping_add(other.run),
        }
    }

    /// User and system time as `/proc` tells them: the exact time divided as
    /// the ticks are, never less than was `told` before (`cputime_adjust`,
    /// `kernel/sched/cputime.c`). The ticks themselves if nothing ever is
    /// (`VIRT_CPU_ACCOUNTING_NATIVE`).
    pub fn adjusted(self, told: Option<(u64, u64)>) -> (u64, u64) {
        let Some((told_user, told_system)) = told else {
            return (self.user, self.system);
        };
        if told_user.saturating_add(told_system) >= self.run {
            return (told_user, told_system);
        }
        let system = if self.system == 0 {
            0
        } else if self.user == 0 {
            self.run
        } else {
            let ticks = u128::from(self.user) + u128::from(self.system);
            let share = u128::from(self.system) * u128::from(self.run) / ticks;
            u64::try_from(share).unwrap_or(self.run)
        };
        let system = system.max(told_system);
        let user = self.run.saturating_sub(system);
        if user < told_user {
            return (told_user, self.run.saturating_sub(told_user));
        }
        (user, system)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn adjusts_cpu_time_as_the_kernel_does() {
        let time = |user, system, run| CpuTime { user, system, run };
        let adjusted = |time: CpuTime, user, system| time.adjusted(Some((user, system)));
        assert_eq!(adjusted(time(4, 0, 10), 0, 0), (10, 0));
        assert_eq!(adjusted(time(0, 4, 10), 0, 0), (0, 10));
        assert_eq!(adjusted(time(4, 4, 10), 0, 0), (5, 5));
        assert_eq!(adjusted(time(4, 4, 10), 7, 2), (7, 3));
        assert_eq!(adjusted(time(4, 4, 10), 2, 7), (3, 7));
        assert_eq!(adjusted(time(4, 4, 10), 6, 6), (6, 6));
        assert_eq!(time(4, 5, 10).adjusted(None), (4, 5));
    }

    proptest! {
        #[test]
        fn any_cpu_time(user: u64, system: u64, run: u64, told: (u64, u64)) {
            let adjusted = CpuTime { user, system, run }.adjusted(Some(told));
            if u128::from(told.0) + u128::from(told.1) < u128::from(run) {
                let sum = u128::from(adjusted.0) + u128::from(adjusted.1);
                prop_assert_eq!(sum, u128::from(run));
            } else {
                prop_assert_eq!(adjusted, told);
            }
        }
    }
}

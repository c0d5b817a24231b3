//! What a task is doing: from `task_struct.__state` and `exit_state` to the
//! letter and word of `/proc/PID/status` (`include/linux/sched.h`,
//! `fs/proc/array.c`). The bits have not moved since 5.4.

const TASK_UNINTERRUPTIBLE: u64 = 0x2;
const EXIT_DEAD: u64 = 0x10;
const EXIT_ZOMBIE: u64 = 0x20;
/// All bits that have a letter of their own.
const TASK_REPORT: u64 = 0x7f;
const TASK_NOLOAD: u64 = 0x400;
/// Waits for a lock that sleeps on real-time kernels only.
const TASK_RTLOCK_WAIT: u64 = 0x1000;
const TASK_FROZEN: u64 = 0x8000;
const TASK_IDLE: u64 = TASK_UNINTERRUPTIBLE | TASK_NOLOAD;

/// A task's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// As in `/proc/PID/stat`: `S`.
    pub letter: &'static str,
    /// As in `/proc/PID/status`: `sleeping`.
    pub word: &'static str,
}

/// The states by the highest bit that is set.
const STATES: [State; 9] = [
    state("R", "running"),
    state("S", "sleeping"),
    state("D", "disk sleep"),
    state("T", "stopped"),
    state("t", "tracing stop"),
    state("X", "dead"),
    state("Z", "zombie"),
    state("P", "parked"),
    state("I", "idle"),
];

const fn state(letter: &'static str, word: &'static str) -> State {
    State { letter, word }
}

impl State {
    /// The state that these two members say.
    pub fn of(state: u64, exit_state: u64) -> Self {
        let index = if state & (TASK_RTLOCK_WAIT | TASK_FROZEN) != 0 {
            2
        } else if state & TASK_IDLE == TASK_IDLE {
            8
        } else {
            let reported = (state | exit_state) & TASK_REPORT;
            (u64::BITS - reported.leading_zeros()) as usize
        };
        STATES.get(index).copied().unwrap_or(STATES[0])
    }
}

/// Whether the task has ended and waits for its parent or for nothing.
pub fn has_exited(exit_state: u64) -> bool {
    exit_state & (EXIT_DEAD | EXIT_ZOMBIE) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn letters_of_the_kernel() {
        let cases = [
            (0x0, 0x0, "R"),
            (0x1, 0x0, "S"),
            (0x2001, 0x0, "S"),
            (0x2, 0x0, "D"),
            (0x102, 0x0, "D"),
            (0x402, 0x0, "I"),
            (0x104, 0x0, "T"),
            (0x8, 0x0, "t"),
            (0x40, 0x0, "P"),
            (0x80, 0x20, "Z"),
            (0x80, 0x10, "X"),
            (0x8000, 0x0, "D"),
            (0x1000, 0x0, "D"),
            (0x200, 0x0, "R"),
        ];
        for (state, exit_state, letter) in cases {
            assert_eq!(State::of(state, exit_state).letter, letter, "{state:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_bits_have_a_letter(state: u64, exit_state: u64) {
            prop_assert!(STATES.contains(&State::of(state, exit_state)));
        }
    }
}

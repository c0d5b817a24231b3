//! What threads execute, and whose memory they have.

use std::collections::BTreeMap;

use secmon_guest::Guest;

use super::code::Areas;
use super::{Claims, Sort};
use crate::rows::{Fields, Parts, Rows};
use crate::{Class, Evidence, Severity};

const INJECTED_CODE: Sort = Sort {
    name: "injected_code",
    class: Class::Suspicion,
    severity: Severity::High,
    technique: super::code::INJECTION,
};
const INJECTED_THREAD: Sort = Sort {
    name: "injected_thread",
    class: Class::Suspicion,
    severity: Severity::High,
    technique: super::code::INJECTION,
};
const SHARED_MEMORY: Sort = Sort {
    name: "shared_memory",
    class: Class::Suspicion,
    severity: Severity::Medium,
    technique: super::code::INJECTION,
};

const COLUMNS: &[&str] = &[
    "pid",
    "tid",
    "kernel_thread",
    "user_instruction_pointer",
    "user_stack_pointer",
    "system_call",
    "thread_pointer",
    "memory",
    "borrows_memory",
    "address",
];

/// A thread with user mode.
struct Thread {
    pid: u32,
    instruction: Option<u64>,
    stack: Option<u64>,
    system_call: Option<u64>,
    /// Where its thread-local data is.
    local: u64,
    memory: u64,
    borrows: bool,
    evidence: Evidence,
}

impl Thread {
    fn of(row: &Fields<'_>) -> Option<Self> {
        if row.is_true("kernel_thread") {
            return None;
        }
        Some(Self {
            pid: row.id("pid")?,
            instruction: row.number("user_instruction_pointer"),
            stack: row.number("user_stack_pointer"),
            system_call: row.number("system_call"),
            local: row.number("thread_pointer").unwrap_or_default(),
            memory: row.number("memory")?,
            borrows: row.is_true("borrows_memory"),
            evidence: row.evidence("threads", "the thread"),
        })
    }
}

/// Looks at all threads.
pub(super) fn look(guest: &Guest, areas: &Areas, claims: &mut Claims, parts: &mut Parts) {
    let mut threads = Vec::new();
    let read = Rows::of("threads", COLUMNS)
        .and_then(|rows| rows.read(guest, |row| threads.extend(Thread::of(&row))));
    parts.note(read);
    judge(&threads, areas, claims);
}

/// Programs that make code as they run it call a library for each system call
/// and start threads through it, which gives each its own thread-local data:
/// code that was brought in does neither.
fn judge(threads: &[Thread], areas: &Areas, claims: &mut Claims) {
    let mut first: BTreeMap<u64, u32> = BTreeMap::new();
    let mut locals: BTreeMap<(u32, u64), u32> = BTreeMap::new();
    for thread in threads {
        *locals.entry((thread.pid, thread.local)).or_default() += 1;
    }
    for thread in threads {
        // In the order in which processes were started.
        let owner = *first.entry(thread.memory).or_insert(thread.pid);
        if owner != thread.pid && !thread.borrows {
            let summary = format!("it has the memory of process {owner}, beside that one");
            claims.add(
                thread.pid,
                &SHARED_MEMORY,
                &summary,
                thread.evidence.clone(),
            );
        }
        let Some(instruction) = thread.instruction else {
            continue;
        };
        if !areas.is_of_no_file(thread.pid, instruction) {
            continue;
        }
        if let Some(number) = thread.system_call {
            let summary =
                format!("a thread of it made system call {number} in code that belongs to no file");
            claims.add(
                thread.pid,
                &INJECTED_CODE,
                &summary,
                thread.evidence.clone(),
            );
        }
        let on_code = thread
            .stack
            .is_some_and(|stack| areas.is_executable(thread.pid, stack));
        let shared = locals
            .get(&(thread.pid, thread.local))
            .is_some_and(|count| *count > 1);
        if on_code || shared {
            let summary = match on_code {
                true => "a thread of it runs code of no file, with its stack in such memory",
                false => {
                    "a thread of it runs code of no file, and has the thread-local data of another"
                }
            };
            claims.add(
                thread.pid,
                &INJECTED_THREAD,
                summary,
                thread.evidence.clone(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 0x40_1000;
    const MADE: u64 = 0x7f00_0000_1000;
    const STACK: u64 = 0x7ffc_0000_0000;

    fn thread(pid: u32, instruction: u64) -> Thread {
        Thread {
            pid,
            instruction: Some(instruction),
            stack: Some(STACK),
            system_call: None,
            local: 0x7f10_0000_0000,
            memory: 0xffff_8880_0000_0000 + u64::from(pid),
            borrows: false,
            evidence: Evidence::new("threads", ""),
        }
    }

    fn found(threads: &[Thread]) -> Vec<(u32, &'static str)> {
        let mut areas = Areas::default();
        for pid in [7, 8] {
            areas.add(pid, FILE..FILE + 0x1000, true);
            areas.add(pid, MADE..MADE + 0x1000, false);
        }
        let mut claims = Claims::default();
        judge(threads, &areas, &mut claims);
        claims.by_process.into_keys().collect()
    }

    #[test]
    fn code_that_is_made_as_it_runs_is_left_alone() {
        let call = Thread {
            system_call: Some(0),
            local: 0x7f30_0000_0000,
            ..thread(7, FILE)
        };
        let other = Thread {
            local: 0x7f20_0000_0000,
            ..thread(7, MADE)
        };
        assert!(found(&[thread(7, MADE), other, call]).is_empty());
        // No thread-local data at all, as of a program without a library.
        let bare = Thread {
            local: 0,
            ..thread(7, MADE)
        };
        assert!(found(&[bare]).is_empty());
    }

    #[test]
    fn a_system_call_in_code_of_no_file_is_found() {
        let call = Thread {
            system_call: Some(34),
            ..thread(7, MADE)
        };
        assert_eq!(found(&[call]), [(7, "injected_code")]);
    }

    #[test]
    fn a_thread_that_no_library_started_is_found() {
        let threads = [thread(7, FILE), thread(7, MADE)];
        assert_eq!(found(&threads), [(7, "injected_thread")]);
        let on_code = Thread {
            stack: Some(MADE + 0x800),
            ..thread(7, MADE)
        };
        assert_eq!(found(&[on_code]), [(7, "injected_thread")]);
    }

    #[test]
    fn memory_is_shared_only_until_a_program_runs() {
        let shared = |pid, borrows| Thread {
            memory: 0xffff_8880_1234_0000,
            borrows,
            ..thread(pid, FILE)
        };
        assert!(found(&[shared(7, false), shared(8, true)]).is_empty());
        // A process that waits for its own child, in its turn.
        assert!(found(&[shared(7, false), shared(7, false)]).is_empty());
        assert_eq!(
            found(&[shared(7, false), shared(8, false)]),
            [(8, "shared_memory")]
        );
    }
}

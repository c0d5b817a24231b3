//! Whether the kernel is changing its own code: then what stands there is
//! neither what it was nor what it will be.
//!
//! A kernel that switches a jump label first changes its key, then each place,
//! in three steps with a breakpoint in between, and holds locks meanwhile.
//! Whoever sets such a lock for good to hide behind it keeps the kernel from
//! ever changing its code again, and the detector tells that it can't look.

use secmon_guest::Guest;
use secmon_memory::VirtualAddress;
use secmon_reference::{Comparison, Difference, DifferenceKind};

/// What the kernel holds while it changes places of these kinds.
const LOCKS: [&str; 4] = [
    "text_mutex",
    "jump_label_mutex",
    "static_call_mutex",
    "ftrace_lock",
];

/// Bits of a mutex's owner that are none of the owner's address
/// (`MUTEX_FLAGS`, `kernel/locking/mutex.h`).
const FLAGS: u64 = 7;

/// Whether it holds one of the locks for that. A kernel without such a lock
/// never does.
pub(super) fn changes_its_text(guest: &Guest) -> bool {
    let types = guest.kernel().profile.types().ok();
    let owner = types.and_then(|types| types.member("mutex", "owner").ok());
    let Some(owner) = owner else {
        return false;
    };
    LOCKS.into_iter().any(|name| {
        let lock = guest.address(name);
        lock.is_some_and(|lock| {
            guest
                .number(lock, &owner)
                .is_ok_and(|owner| owner & !FLAGS != 0)
        })
    })
}

/// Calls what differs in a static call's trampoline so: halfway through its
/// change it is neither call nor jump, and nothing that explains itself.
pub(super) fn name_trampolines(guest: &Guest, comparison: &mut Comparison) {
    for difference in &mut comparison.differences {
        let address = VirtualAddress::new(difference.address);
        let symbol = guest.symbols().nearest(address);
        if difference.kind == DifferenceKind::Unexplained
            && symbol.is_some_and(|(symbol, _)| symbol.name.starts_with("__SCT__"))
        {
            difference.kind = DifferenceKind::StaticCall;
        }
    }
}

/// Whether what should be there follows from records that a running kernel
/// changes.
pub(super) const fn is_by_records(difference: &Difference) -> bool {
    matches!(
        difference.kind,
        DifferenceKind::JumpLabel | DifferenceKind::StaticCall | DifferenceKind::Trace
    )
}

/// Leaves out what was not so in a second comparison, and, while the kernel is
/// changing its text, all that depends on records; gives how many places that
/// leaves undecided.
pub(super) fn settle(first: &mut Comparison, again: &Comparison, is_changing: bool) -> usize {
    let mut undecided = 0;
    first.differences.retain(|difference| {
        if !is_by_records(difference) {
            return true;
        }
        let stays = again.differences.contains(difference);
        undecided += usize::from(stays && is_changing);
        stays && !is_changing
    });
    undecided
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(address: u64, kind: DifferenceKind) -> Difference {
        Difference {
            address,
            section: ".text".to_owned(),
            expected: vec![0x0f, 0x1f, 0x44, 0, 0],
            found: vec![0xcc, 0x66, 0x66, 0x66, 0x90],
            kind,
        }
    }

    fn comparison(differences: Vec<Difference>) -> Comparison {
        Comparison {
            differences,
            ..Comparison::default()
        }
    }

    #[test]
    fn a_jump_label_that_is_being_switched_is_not_yet_a_change() {
        let jump = difference(0x1000, DifferenceKind::JumpLabel);
        let code = difference(0x2000, DifferenceKind::Unexplained);
        let both = || comparison(vec![jump.clone(), code.clone()]);

        let mut switching = both();
        assert_eq!(settle(&mut switching, &both(), true), 1);
        assert_eq!(switching.differences, std::slice::from_ref(&code));

        let mut switched = both();
        assert_eq!(settle(&mut switched, &comparison(Vec::new()), false), 0);
        assert_eq!(switched.differences, std::slice::from_ref(&code));

        let mut stays = both();
        assert_eq!(settle(&mut stays, &both(), false), 0);
        assert_eq!(stays.differences, [jump.clone(), code.clone()]);
    }
}

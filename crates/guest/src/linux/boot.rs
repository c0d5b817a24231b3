//! What tells one boot of a kernel from all others.

use crate::linux::task;
use crate::{Guest, TableError, layout};

layout! {
    /// `include/linux/sched.h`
    struct FirstTaskLayout: "task_struct" {} optional {
        /// Drawn by lot when the kernel starts (`boot_init_stack_canary`), if it
        /// was built to guard its stacks.
        stack_canary: "stack_canary",
    }
}

/// Numbers that another boot of the same kernel does not have: where KASLR put
/// it and its memory, what guards its first stack, and which task became process
/// 1, and when. All are the guest's own word.
///
/// # Errors
/// [`TableError`] if its tasks can't be read.
pub fn boot_identity(guest: &Guest, table: &'static str) -> Result<Vec<u64>, TableError> {
    let kernel = guest.kernel();
    let mut numbers = vec![kernel.image.slide, kernel.direct_map.as_u64()];
    let layout = guest.layout::<FirstTaskLayout>(table)?;
    if let (Some(first), Some(canary)) = (guest.address("init_task"), &layout.stack_canary) {
        numbers.extend(guest.number(first, canary));
    }
    if let Some(task) = task::leaders(guest, table)?.find(|task| task.tgid == 1) {
        let started = &task.model().layout.start_boottime;
        numbers.extend([task.address.as_u64(), task.number(started)]);
    }
    Ok(numbers)
}

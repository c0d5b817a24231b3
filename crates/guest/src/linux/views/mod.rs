//! Views of the guest's tasks: each place where the kernel keeps all of them,
//! or some, for its own purposes.
//!
//! A table walks one list and shows what is in it. A view only says which
//! tasks a place holds, by the address of their `task_struct`, and whether the
//! walk came to its end; what it means that one view has a task and another
//! has not is judged elsewhere.

pub mod address_spaces;
pub mod control_groups;
pub mod holdings;
pub mod pid_table;
pub mod run_queues;
pub mod slab;
pub mod task_lists;
pub mod task_record;

use std::collections::HashSet;
use std::fmt::Display;

use secmon_memory::{VirtualAddress, Volatility};

use crate::Guest;
use crate::linux::hash::Keyed;

/// How many reasons are kept why one view is not complete.
const MOST_ERRORS: usize = 8;
/// How often a walk of a running guest that met something wrong is repeated.
const ATTEMPTS: u32 = 16;

/// Addresses of tasks.
pub type Tasks = HashSet<VirtualAddress, Keyed>;

/// What one place holds.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Where the tasks lie.
    pub tasks: Tasks,
    /// What was met on the way that may have hidden others; bounded.
    pub errors: Vec<String>,
}

impl View {
    /// Whether the view holds this task.
    pub fn has(&self, task: VirtualAddress) -> bool {
        self.tasks.contains(&task)
    }

    /// Whether nothing was met that may have hidden tasks.
    pub fn is_complete(&self) -> bool {
        self.errors.is_empty()
    }

    /// Keeps a reason why the view is not complete.
    pub(crate) fn fail(&mut self, error: impl Display) {
        if self.errors.len() < MOST_ERRORS {
            self.errors.push(error.to_string());
        }
    }
}

/// Repeats a walk until it met nothing wrong; an image is walked once. What
/// was found in an incomplete walk counts, too: no guest can show a task by
/// changing under the walk that it does not have.
fn settled(guest: &Guest, mut walk: impl FnMut() -> View) -> View {
    let mut view = walk();
    if guest.space().memory().volatility() == Volatility::Static {
        return view;
    }
    for attempt in 1..ATTEMPTS {
        if view.is_complete() {
            break;
        }
        guest.diagnostics().count_torn_read();
        if attempt > 2 {
            std::thread::yield_now();
        }
        let again = walk();
        view.tasks.extend(again.tasks);
        view.errors = again.errors;
    }
    view
}

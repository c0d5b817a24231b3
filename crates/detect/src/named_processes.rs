//! Processes as subjects of findings, by their ids.

use std::collections::HashMap;

use secmon_guest::linux::task::leaders;
use secmon_guest::{Guest, TableError, Text};

use crate::Subject;

/// The processes in the list of tasks.
pub(crate) struct NamedProcesses {
    by_pid: HashMap<u32, Subject>,
}

impl NamedProcesses {
    /// Those that there are now, for `detector`.
    ///
    /// # Errors
    /// [`TableError`] if there is no list of processes.
    pub(crate) fn new(guest: &Guest, detector: &'static str) -> Result<Self, TableError> {
        let by_pid = leaders(guest, detector)?
            .map(|task| {
                let started = task.number(&task.model().layout.start_boottime);
                let subject = Subject::Process {
                    task: task.address,
                    pid: task.tgid,
                    started,
                    name: Text::new(task.comm()),
                };
                (task.tgid, subject)
            })
            .collect();
        Ok(Self { by_pid })
    }

    /// The process with this id, unless it ended meanwhile.
    pub(crate) fn subject(&self, pid: u32) -> Option<Subject> {
        self.by_pid.get(&pid).cloned()
    }
}

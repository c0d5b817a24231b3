//! Tasks that are kept out of where all of them are.

use super::rows::{ORDINARY, edit, edit_of_all, found, loaded, module};
use crate::specimens::{Edit, Need, Shown, Specimen};

/// The specimens.
pub(super) const ALL: &[Specimen] = &[
    module(
        "process-unlinked",
        "T1014",
        "takes a process out of the list of tasks",
        loaded("process_unlinked", ORDINARY),
        found("processes", "hidden_process"),
        Shown::NoTask,
    ),
    module(
        "process-without-pid",
        "T1014",
        "takes a process's number out of the map of numbers, and so the process out of /proc",
        loaded("process_without_pid", ORDINARY),
        found("processes", "hidden_process"),
        Shown::NoProcess,
    ),
    module(
        "process-in-no-list",
        "T1014",
        "takes a process out of the list of tasks, the map of numbers, its parent's children and \
         its cgroup's members",
        loaded("process_in_no_list", ORDINARY),
        found("processes", "hidden_process"),
        Shown::NeitherProcessNorTask,
    ),
    module(
        "thread-unlinked",
        "T1014",
        "takes a thread out of its process's list of threads",
        loaded("thread_unlinked", &[Need::Thread("threaded")]),
        found("processes", "hidden_thread"),
        Shown::NoThread,
    ),
    edit(
        "process-unlinked",
        "T1014",
        "takes a process out of the list of tasks",
        Edit::UnlinkTask,
        found("processes", "hidden_process"),
    ),
    edit_of_all(
        "process-disguised",
        "T1014",
        "takes a process out of the list of tasks and has it say that it has ended",
        Edit::DisguiseTask,
        found("processes", "disguised_process"),
    ),
];

//! The detector `processes`: tasks that live and are kept out of a list that
//! must have them.

mod evidence;
mod gathered;
mod holders;
mod judge;

use secmon_guest::Guest;
use secmon_guest::linux::views::View;

use crate::{DetectError, Detector, Finding, Technique};
use gathered::Gathered;

/// The detector.
pub static PROCESSES: Processes = Processes;

const NAME: &str = "processes";

/// Finds hidden processes and threads.
#[derive(Debug)]
pub struct Processes;

impl Detector for Processes {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Processes and threads that live but are missing from a place where the kernel keeps every \
         one of them, tasks that name another id than the kernel gave them, and open files and \
         directories in use whose owner says that it has ended, or is nowhere."
    }

    fn compares(&self) -> &'static str {
        "The list of processes, the lists of threads, the id tables of all pid namespaces, the \
         children of each task and the members of all control groups with each other, with what \
         the CPUs run and have queued (current, fair, real-time and deadline queues), with the \
         owners of all address spaces, and with all task_struct objects in memory, allocated or \
         not; all tables of open files and sockets, and all roots and directories on mounts, that \
         are in use with the tasks that have them."
    }

    fn evaded_by(&self) -> &'static str {
        "Code that runs without a task of its own (in an interrupt, a timer, another process's \
         thread). A sleeping task whose task_struct says that it has ended or is not yet made, is put \
         right only while it runs between two looks, and has neither open files nor directories of \
         its own. A task_struct outside of the kernel's cache for such, likewise. Whoever takes a process out of control groups and children alone, without \
         hiding it from ps, is reported as a suspicion only."
    }

    fn techniques(&self) -> &'static [Technique] {
        const TECHNIQUES: &[Technique] = &[Technique::ROOTKIT];
        TECHNIQUES
    }

    fn cost(&self) -> &'static str {
        "Reads some hundred bytes of each task, all lists, and 64 bytes for each page of the \
         guest's memory: grows with processes and with memory."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let gathered = Gathered::gather(guest, NAME)?;
        let suspects = judge::suspects(guest, &gathered);
        if !suspects.is_empty() {
            let confirmed = judge::confirm(guest, NAME, &gathered, suspects)?;
            for (index, missing) in confirmed.iter().enumerate() {
                findings(evidence::finding(guest, &gathered, missing, index));
            }
        }
        holders::look(guest, &gathered, findings)?;
        gathered.incomplete().map_or(Ok(()), Err)
    }
}

/// Why a view that must be complete is not.
fn incomplete(name: &'static str, view: &View) -> Option<DetectError> {
    view.errors.first().map(|reason| DetectError::Incomplete {
        view: name,
        reason: reason.clone(),
    })
}

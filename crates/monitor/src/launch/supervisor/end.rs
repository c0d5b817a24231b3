//! Notices that the VM ended or stands still, and what ended it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{BACK_OFF, Supervisor};
use crate::launch::files;
use crate::launch::process::ProcessRecord;
use crate::launch::run_directory::RunDirectoryError;
use crate::launch::state::Processes;
use crate::launch::target::RunningTarget;

/// A VM that ran this long has the first wait again.
const STEADY: Duration = Duration::from_secs(120);
/// A VM whose QEMU has not answered for so long is ended.
const SILENT: Duration = Duration::from_secs(120);

/// A target's RAM file as it was when it was plugged in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) process: ProcessRecord,
    pub(super) length: u64,
    /// When its length was last changed. Only a file in memory says so: one on a
    /// disk is modified by what the guest writes, too.
    pub(super) modified: Option<(i64, i64)>,
}

impl Supervisor {
    /// Notices a VM that ended.
    pub(super) fn reap(&mut self) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let (status, by_fault) = match &mut machine.child {
            Some(child) => match child.try_wait() {
                Ok(Some(status)) => {
                    let bus = status.signal() == Some(Signal::BUS.as_raw());
                    (status.to_string(), bus)
                }
                _ => return,
            },
            None if machine.process.is_alive() => return,
            None => ("of which nothing is known".to_owned(), false),
        };
        if let Some(console) = &mut machine.console {
            let _ = console.drain();
        }
        if machine.since.elapsed() > STEADY {
            self.back_off = BACK_OFF.0;
        }
        self.state.note(format!(
            "the monitoring VM ended ({status}); it is started again in {:?}",
            self.back_off
        ));
        self.look_for_changed_files(by_fault);
        self.machine_ended();
    }

    /// Notices a VM that stands still: QEMU stops it when the processor can't
    /// read memory that it maps, and when it answers no more.
    pub(super) fn check(&mut self) {
        let socket = self.directory.qmp_socket();
        let Some(machine) = &mut self.machine else {
            return;
        };
        let (why, by_fault) = match machine.plug.run_state() {
            Ok(state) if state.running => {
                machine.silent = None;
                return;
            }
            Ok(state) => {
                let fault = state.status == "internal-error";
                (format!("stands still ({})", state.status), fault)
            }
            Err(error) => {
                let since = *machine.silent.get_or_insert_with(Instant::now);
                if since.elapsed() < SILENT {
                    // What is wrong is noted if it stays so.
                    let _ = machine.plug.reconnect(&socket);
                    return;
                }
                (format!("does not answer ({error})"), false)
            }
        };
        self.state.note(format!(
            "the monitoring VM {why}; it is ended and started again in {:?}",
            self.back_off
        ));
        if !machine.process.end(Duration::from_secs(5)) {
            self.state.note("the monitoring VM can't be ended");
            return;
        }
        if let Some(child) = &mut machine.child {
            let _ = child.wait();
        }
        self.look_for_changed_files(by_fault);
        self.machine_ended();
    }

    /// After the VM's end: was it a RAM file that was shortened while the VM
    /// read it? The target's QEMU then is not watched any more, so that it can't
    /// end the VM again. `by_fault`: whether it ended as if so.
    fn look_for_changed_files(&mut self, by_fault: bool) {
        let mut shortened = Vec::new();
        let mut modified = Vec::new();
        for (mark, name) in self.marks.iter().zip(&self.settings.targets) {
            let Some(mark) = mark else {
                continue;
            };
            let Ok(target) = name.find() else {
                continue;
            };
            if target.process != mark.process {
                continue;
            }
            let Some(now) = mark_of(&target) else {
                continue;
            };
            if now.length < mark.length {
                shortened.push((name.to_string(), mark.process));
            } else if now != *mark {
                modified.push((name.to_string(), mark.process));
            }
        }
        let (blamed, what) = match (shortened.is_empty(), by_fault) {
            (false, _) => (shortened, "was shortened"),
            (true, true) => (modified, "was changed in length"),
            (true, false) => return,
        };
        for (name, process) in blamed {
            self.state.note(format!(
                "the RAM file of {name} {what} while the monitoring VM had it mapped: it is not watched until its QEMU is started anew"
            ));
            self.distrusted.push(process);
        }
    }

    pub(super) fn machine_ended(&mut self) {
        if let Err(error) = self.forget_machine() {
            self.state.note(error.to_string());
        }
        self.start_at = Instant::now() + self.back_off;
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
    }

    pub(super) fn forget_machine(&mut self) -> Result<(), RunDirectoryError> {
        self.machine = None;
        self.state.machine_since = None;
        self.state.targets = self.absent();
        let mut processes: Processes = self.directory.read(files::PROCESSES)?.unwrap_or_default();
        processes.machine = None;
        self.directory.write(files::PROCESSES, &processes)
    }
}

/// tmpfs, which memfds are of, and hugetlbfs (`linux/magic.h`).
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x9584_58f6];

/// A target's RAM file as it is now.
pub(super) fn mark_of(target: &RunningTarget) -> Option<Mark> {
    let metadata = fs::metadata(&target.ram.path).ok()?;
    let system = rustix::fs::statfs(&target.ram.path).ok()?;
    let in_memory = u64::try_from(system.f_type).is_ok_and(|kind| IN_MEMORY.contains(&kind));
    Some(Mark {
        process: target.process,
        length: metadata.len(),
        modified: in_memory.then(|| (metadata.mtime(), metadata.mtime_nsec())),
    })
}

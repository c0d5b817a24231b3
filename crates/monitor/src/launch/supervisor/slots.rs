//! Targets come and go: their memory is plugged into the VM and out of it, and
//! their gates are started and ended.

use std::time::{Duration, Instant};

use secmon_platform::qemu::RamFileKind;

use super::end::mark_of;
use super::{Running, Supervisor};
use crate::launch::gates::Place;
use crate::launch::hotplug::{Plug, PlugError};
use crate::launch::run_directory::RunDirectoryError;
use crate::launch::state::{Processes, TargetState};
use crate::launch::target::{RunningTarget, TargetError, TargetName, device_size};
use crate::launch::{files, read_access};

/// What is said of a target that ended the VM.
const DISTRUSTED: &str = "its RAM file was shortened while it was watched, which ended the monitoring VM: start its QEMU anew";

/// Why a VM has to be started anew for a target.
enum Misfit {
    Shape,
    Confinement,
    Memory,
}

impl Supervisor {
    /// Plugs a target in and says what it is now.
    pub(super) fn plug_in(
        &mut self,
        plug: &mut Plug,
        slot: usize,
        target: &RunningTarget,
    ) -> TargetState {
        let Some(name) = self.settings.targets.get(slot) else {
            return TargetState::Absent;
        };
        let refused = |reason: String| TargetState::Refused { reason };
        if self.distrusted.contains(&target.process) {
            return refused(DISTRUSTED.to_owned());
        }
        let (file, size) = match name.open_ram(target) {
            Ok(opened) => opened,
            Err(error) => return refused(error.to_string()),
        };
        if let Some(account) = self.settings.account
            && let Err(error) = read_access::allow_reading(&file, account)
        {
            let shown = target.ram.shown.display();
            return refused(format!(
                "giving the monitor's user reading of {shown}: {error}"
            ));
        }
        if self.marks.len() <= slot {
            self.marks.resize(slot + 1, None);
        }
        if let Some(mark) = self.marks.get_mut(slot) {
            *mark = mark_of(target);
        }
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        match plug.plug(slot, &file, size) {
            Ok(()) => TargetState::Watched {
                process: target.process,
                file: target.ram.shown.display().to_string(),
                ram_size: target.ram.ram_size,
            },
            Err(error) => refused(error.to_string()),
        }
    }

    pub(super) fn set(&mut self, slot: usize, state: TargetState) {
        let Some((name, old)) = self.state.targets.get_mut(slot) else {
            return;
        };
        if *old == state {
            return;
        }
        let text = match &state {
            TargetState::Watched { process, .. } => {
                format!("{name} is watched: process {}", process.pid)
            }
            TargetState::Absent => format!("{name} does not run"),
            TargetState::Refused { reason } => format!("{name} can't be watched: {reason}"),
        };
        *old = state;
        self.state.note(text);
    }

    /// Looks which targets came and went.
    pub(super) fn look(&mut self) {
        let Some(mut machine) = self.machine.take() else {
            return;
        };
        let mut misfit = None;
        for slot in 0..self.settings.targets.len() {
            let Some((_, current)) = self.state.targets.get(slot).cloned() else {
                continue;
            };
            if let TargetState::Watched { process, .. } = &current {
                if process.is_alive() {
                    continue;
                }
                let number = u32::try_from(slot).unwrap_or(u32::MAX);
                match machine.plug.unplug(number) {
                    Ok(()) => self.set(slot, TargetState::Absent),
                    // Tried again at the next look.
                    Err(PlugError::Held { .. }) => continue,
                    Err(error) => {
                        self.state.note(format!("slot {slot}: {error}"));
                        continue;
                    }
                }
            }
            let Some(found) = self.settings.targets.get(slot).map(TargetName::find) else {
                continue;
            };
            let state = match found {
                Err(error) => without(&error),
                Ok(target) if self.distrusted.contains(&target.process) => TargetState::Refused {
                    reason: DISTRUSTED.to_owned(),
                },
                Ok(target) => match fits(&machine, slot, &target, self.mapped()) {
                    Ok(()) => self.plug_in(&mut machine.plug, slot, &target),
                    Err(why) => {
                        misfit = Some((slot, why));
                        continue;
                    }
                },
            };
            self.set(slot, state);
        }
        self.machine = Some(machine);
        if let Some((slot, why)) = misfit {
            self.start_anew(slot, &why);
        }
    }

    /// How much of targets' RAM is plugged in.
    fn mapped(&self) -> u64 {
        let sizes = self.state.targets.iter().map(|(_, state)| match state {
            TargetState::Watched { ram_size, .. } => device_size(*ram_size),
            TargetState::Absent | TargetState::Refused { .. } => 0,
        });
        sizes.fold(0, u64::saturating_add)
    }

    /// Starts gates for targets that are there, ends those of targets that went,
    /// and writes down which run.
    pub(super) fn tend_gates(&mut self) -> Result<(), RunDirectoryError> {
        let before = self.gates.records();
        let slots = self.settings.gates.iter().zip(&self.settings.targets);
        let mut states = Vec::new();
        let mut notes = Vec::new();
        for ((settings, name), slot) in slots.zip(0_u32..) {
            let target = match self.state.targets.get(slot as usize) {
                Some((_, TargetState::Watched { process, .. })) => Some(*process),
                _ => None,
            };
            let place = Place {
                directory: &self.directory,
                settings,
                client: self.settings.account,
                slot,
                name,
            };
            let old = self.state.gates.get(slot as usize).cloned();
            let old = old.unwrap_or_default();
            let mut note = |text| notes.push(text);
            states.push(self.gates.tend(&place, target, &old, &mut note));
        }
        self.state.gates = states;
        for note in notes {
            self.state.note(note);
        }
        let records = self.gates.records();
        if records != before {
            let mut processes: Processes =
                self.directory.read(files::PROCESSES)?.unwrap_or_default();
            processes.gates = records;
            self.directory.write(files::PROCESSES, &processes)?;
        }
        Ok(())
    }

    /// Ends the VM, to start one that knows the target as it is now.
    fn start_anew(&mut self, slot: usize, why: &Misfit) {
        let name = self.settings.targets.get(slot).map(ToString::to_string);
        let name = name.unwrap_or_default();
        let why = match why {
            Misfit::Shape => "has RAM of another size or layout than the monitoring VM was told",
            Misfit::Confinement => "has a RAM file that the monitoring VM's QEMU may not open",
            Misfit::Memory => "has more RAM than the monitoring VM has memory to map",
        };
        self.state
            .note(format!("{name} {why}: the monitoring VM is started anew"));
        let Some(mut machine) = self.machine.take() else {
            return;
        };
        let _ = machine.plug.quit();
        if !machine.process.end(Duration::from_secs(5)) {
            self.state.note("the monitoring VM can't be ended");
        }
        if let Some(child) = &mut machine.child {
            let _ = child.wait();
        }
        if let Err(error) = self.forget_machine() {
            self.state.note(error.to_string());
        }
        self.start_at = Instant::now();
    }
}

pub(super) fn shape(target: &RunningTarget) -> (u64, Option<String>) {
    let layout = target.ram.layout.as_ref().map(ToString::to_string);
    (target.ram.ram_size, layout)
}

/// Whether the target's RAM is what the monitor takes a device's memory for
/// that it was told nothing of: all of it, in one piece from address 0 on.
fn fills_its_device(target: &RunningTarget) -> bool {
    let size = target.ram.ram_size;
    let whole = format!("0x0-{size:#x}@0x0");
    let layout = target.ram.layout.as_ref().map(ToString::to_string);
    device_size(size) == size && layout == Some(whole)
}

/// Whether the running VM can take the target as it is.
fn fits(machine: &Running, slot: usize, target: &RunningTarget, mapped: u64) -> Result<(), Misfit> {
    if mapped.saturating_add(device_size(target.ram.ram_size)) > machine.room {
        return Err(Misfit::Memory);
    }
    match machine.shapes.get(slot).cloned().flatten() {
        Some(known) if known == shape(target) => {}
        None if fills_its_device(target) => {}
        _ => return Err(Misfit::Shape),
    }
    if target.ram.kind == RamFileKind::Anonymous || machine.openable.contains(&target.ram.identity)
    {
        return Ok(());
    }
    Err(Misfit::Confinement)
}

pub(super) fn without(error: &TargetError) -> TargetState {
    use secmon_platform::qemu::QemuError;
    match error {
        TargetError::Qemu(QemuError::NotFound { .. } | QemuError::NotATarget { .. }) => {
            TargetState::Absent
        }
        error => TargetState::Refused {
            reason: error.to_string(),
        },
    }
}

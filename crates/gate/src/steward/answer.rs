//! What comes of each request, once the grant allows it.

use std::sync::PoisonError;
use std::time::Instant;

use super::{Outcome, SessionId, Steward};
use crate::protocol::{
    AddressKind, Answer, Breakpoint, BreakpointKind, Bytes, MAX_ALTER, MAX_READ, MAX_WRITE,
    Refusal, ReleaseReason, Request, Status, TargetState,
};
use crate::target::Target;

impl Steward {
    pub(super) fn answer(&mut self, id: SessionId, request: Request) -> Outcome {
        let stops = matches!(
            request,
            Request::Pause { .. }
                | Request::Registers { .. }
                | Request::ReadMemory { .. }
                | Request::SetBreakpoint(_)
                | Request::RemoveBreakpoint(_)
                | Request::Step { .. }
                | Request::WriteRegister { .. }
                | Request::WriteMemory { .. }
        );
        if stops && self.dump.is_some() {
            return Err(busy("a dump is being written"));
        }
        if stops {
            let session = self.session(id)?;
            if !session.stops.take() {
                return Err(Refusal::Limited {
                    what: "stops".to_owned(),
                    per_second: session.stops.per_second(),
                });
            }
        }
        match request {
            Request::Heartbeat => Ok(Answer::Done),
            Request::Status => self.status(id),
            Request::Layout => self.with_target(Target::layout).map(Answer::Layout),
            Request::Pause { lease_milliseconds } => {
                self.with_target(Target::stop)?;
                let session = self.session(id)?;
                let lease_milliseconds = session.lease(lease_milliseconds, Instant::now());
                Ok(Answer::Paused { lease_milliseconds })
            }
            Request::Extend { lease_milliseconds } => {
                let session = self.session(id)?;
                session.hold.ok_or(Refusal::NotHeld)?;
                let lease_milliseconds = session.lease(lease_milliseconds, Instant::now());
                Ok(Answer::Paused { lease_milliseconds })
            }
            Request::Resume => {
                let session = self.session(id)?;
                session.hold.take().ok_or(Refusal::NotHeld)?;
                if !self.is_held() {
                    self.with_target(Target::go)?;
                }
                Ok(Answer::Done)
            }
            Request::Registers { vcpu } => {
                let registers = self.with_target(|target| target.registers(vcpu))?;
                Ok(Answer::Registers(Box::new(registers)))
            }
            Request::ReadMemory {
                vcpu,
                kind,
                address,
                length,
            } => {
                if length > MAX_READ {
                    let reason = format!("{length} bytes; at most {MAX_READ} can be read at once");
                    return Err(Refusal::Invalid(reason));
                }
                let physical = kind == AddressKind::Physical;
                let bytes =
                    self.with_target(|target| target.read_memory(vcpu, physical, address, length))?;
                Ok(Answer::Memory(Bytes(bytes)))
            }
            Request::SetBreakpoint(breakpoint) => self.set_breakpoint(id, breakpoint),
            Request::RemoveBreakpoint(breakpoint) => {
                let session = self.session(id)?;
                if !session.breakpoints.remove(&breakpoint) {
                    let reason = "there is no such breakpoint of this monitor";
                    return Err(Refusal::Invalid(reason.to_owned()));
                }
                self.with_target(|target| target.remove_breakpoint(breakpoint))?;
                Ok(Answer::Done)
            }
            Request::Step { vcpu } => {
                if self.session(id)?.hold.is_none() || !self.target.is_stopped_by_gate() {
                    return Err(Refusal::NotHeld);
                }
                let registers = self.with_target(|target| target.step(vcpu))?;
                self.session(id)?.lease(u32::MAX, Instant::now());
                Ok(Answer::Registers(Box::new(registers)))
            }
            Request::Stop => {
                self.release(id, &ReleaseReason::SessionEnded);
                self.with_target(Target::stop_for_good)?;
                Ok(Answer::Done)
            }
            Request::Start => {
                if self.is_held() {
                    return Err(busy("a monitor holds the target stopped"));
                }
                self.with_target(Target::start)?;
                Ok(Answer::Done)
            }
            Request::NetworkDevices => {
                let devices = self.with_target(Target::network_devices)?;
                Ok(Answer::NetworkDevices(devices))
            }
            Request::Link { device, state } => {
                check_device(&device)?;
                self.with_target(|target| target.set_link(&device, state))?;
                Ok(Answer::Done)
            }
            Request::Reset => self.with_target(Target::reset).map(|()| Answer::Done),
            Request::Quit => self.with_target(Target::quit).map(|()| Answer::Done),
            Request::WriteRegister {
                vcpu,
                register,
                value,
            } => {
                self.with_target(|target| target.write_register(vcpu, register, value))?;
                Ok(Answer::Done)
            }
            Request::WriteMemory {
                vcpu,
                kind,
                address,
                bytes: Bytes(bytes),
            } => {
                if bytes.is_empty() || bytes.len() > MAX_WRITE {
                    let length = bytes.len();
                    let reason = format!("{length} bytes; 1 to {MAX_WRITE} can be written at once");
                    return Err(Refusal::Invalid(reason));
                }
                let physical = kind == AddressKind::Physical;
                self.with_target(|target| target.write_memory(vcpu, physical, address, bytes))?;
                Ok(Answer::Done)
            }
            Request::Alter {
                vcpu,
                at,
                memory,
                registers,
            } => {
                if self.session(id)?.hold.is_none() || !self.target.is_stopped_by_gate() {
                    return Err(Refusal::NotHeld);
                }
                let bytes: usize = memory.iter().map(|(_, bytes)| bytes.0.len()).sum();
                if memory.len().max(registers.len()) > MAX_ALTER || bytes > MAX_WRITE {
                    let reason =
                        format!("more than {MAX_ALTER} changes or {MAX_WRITE} bytes at once");
                    return Err(Refusal::Invalid(reason));
                }
                self.with_target(|target| target.alter(vcpu, at, memory, &registers))?;
                Ok(Answer::Done)
            }
            // It is begun elsewhere, as its answer comes later.
            Request::Dump { .. } => Err(Refusal::Invalid("a dump within a dump".to_owned())),
        }
    }

    fn set_breakpoint(&mut self, id: SessionId, breakpoint: Breakpoint) -> Outcome {
        let fits = match breakpoint.kind {
            BreakpointKind::Execute => breakpoint.length == 1,
            BreakpointKind::Write | BreakpointKind::Access => {
                matches!(breakpoint.length, 1 | 2 | 4 | 8)
            }
        };
        if !fits {
            let reason = "a breakpoint's length is 1, for data 1, 2, 4 or 8";
            return Err(Refusal::Invalid(reason.to_owned()));
        }
        let mut others = self.sessions.iter();
        if others.any(|(other, session)| *other != id && !session.breakpoints.is_empty()) {
            return Err(busy("another monitor traces the target"));
        }
        let session = self.session(id)?;
        if session.breakpoints.contains(&breakpoint) {
            return Ok(Answer::Done);
        }
        if session.breakpoints.len() >= session.limits.breakpoints as usize {
            let most = session.limits.breakpoints;
            return Err(Refusal::Invalid(format!("more than {most} breakpoints")));
        }
        self.with_target(|target| target.set_breakpoint(breakpoint))?;
        self.session(id)?.breakpoints.insert(breakpoint);
        Ok(Answer::Done)
    }

    /// The session's thread adds what it knows better.
    fn status(&mut self, id: SessionId) -> Outcome {
        let limits = self.session(id)?.limits;
        let state = self.with_target(Target::state).unwrap_or(TargetState::Gone);
        let (qemu, memory_bytes) = self.target.version().unzip();
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Answer::Status(Status {
            version: crate::protocol::VERSION,
            target: String::new(),
            state,
            qemu,
            memory_bytes,
            gdb: self.target.has_gdb(),
            rights: Vec::new(),
            limits,
            log_head: log.head().clone(),
        }))
    }
}

pub(super) fn busy(reason: &str) -> Refusal {
    Refusal::Busy(reason.to_owned())
}

/// A name that QEMU could have given to a device.
fn check_device(device: &str) -> Result<(), Refusal> {
    let fits = (1..=64).contains(&device.len())
        && device
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/#".contains(&byte));
    if fits {
        Ok(())
    } else {
        let reason = "a device's name is 1 to 64 of the characters a-z A-Z 0-9 - _ . : / #";
        Err(Refusal::Invalid(reason.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_are_no_more_than_names() {
        for name in ["", "a b", "a\"", "a\n", "a,b"] {
            assert!(check_device(name).is_err(), "{name:?}");
        }
        check_device("net0").expect("a device");
    }
}

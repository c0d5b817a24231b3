//! Ends a process by the guest's own kernel.
//!
//! A process ends soundly only by the kernel's own hand: memory, files and
//! locks that it shares are let go of in its exit. So its `task_struct` is not
//! edited; a processor of the guest is stopped at a place where its kernel may
//! call any function (see the module `place`) and made to call
//! `send_sig(SIGKILL, task, 1)`, which takes the locks that it needs, marks all
//! threads and wakes those that sleep. A thread that waits where no signal
//! wakes it (state D) ends when it wakes; until then it runs no instruction of
//! its program.
//!
//! That is as sound as the guest's kernel: one that somebody changed may ignore
//! the call, and then [`RespondError::Alive`] says so.

use std::time::{Duration, Instant};

use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{
    AddressKind, Answer, Breakpoint, BreakpointKind, Event, MAX_READ, Refusal, Registers, Request,
};
use secmon_guest::Guest;
use secmon_memory::PAGE_SIZE;

use crate::actions::{ANSWER, done, unexpected};
use crate::place::{Call, Functions, change};
use crate::victim::End;
use crate::{RespondError, Victim};

/// `SIGKILL`.
const SIGKILL: u64 = 9;
/// `SEND_SIG_PRIV`: from the kernel, to be taken even where signals are not.
const FROM_KERNEL: u64 = 1;
/// Between two signs of life, while a breakpoint is waited for: less than half
/// of the shortest silence that is the default.
const HEARTBEAT: Duration = Duration::from_millis(100);
/// Between two looks at a process that is to end.
const LOOK: Duration = Duration::from_millis(5);
/// Stops at places that do not suit, or too late, after which it is given up.
const ATTEMPTS: u32 = 50;

/// How long to wait for what the guest does.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until a processor of the guest waits for something.
    pub place: Duration,
    /// Until the process has ended.
    pub end: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            place: Duration::from_secs(10),
            end: Duration::from_secs(10),
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Killed {
    /// No instruction of it runs any more.
    Ended,
    /// So many of its threads wait in the kernel where no signal wakes them.
    /// They run no instruction of the program any more and end as they wake.
    WhenItWakes {
        /// How many.
        threads: u64,
    },
}

/// Ends a process. Needs the rights `trace` and `control`, and a gdbstub.
///
/// The guest stands still for a few milliseconds, once.
///
/// # Errors
/// [`RespondError`]. Only [`RespondError::Alive`] comes after something was
/// changed in the guest.
pub fn kill(
    client: &mut GateClient,
    guest: &Guest,
    victim: &Victim,
    patience: &Patience,
) -> Result<Killed, RespondError> {
    // An empty change shows whether `control` is granted, before the target is
    // stopped for anything.
    let empty = Request::Alter {
        vcpu: 0,
        at: 0,
        memory: Vec::new(),
        registers: Vec::new(),
    };
    match client.ask(empty, ANSWER) {
        Ok(_) | Err(ClientError::Refused(Refusal::NotHeld)) => {}
        Err(error) => return Err(error.into()),
    }
    victim.check(guest)?;
    let functions = Functions::of(guest).map_err(RespondError::Unsuited)?;
    let breakpoint = Breakpoint {
        address: functions.schedule.as_u64(),
        kind: BreakpointKind::Execute,
        length: 1,
    };
    done(client, Request::SetBreakpoint(breakpoint))?;
    let called = call_in_guest(client, guest, victim, &functions, patience.place);
    // Whether it was lost meanwhile or not: afterwards none is left, and the
    // target runs.
    let removed = client.ask(Request::RemoveBreakpoint(breakpoint), ANSWER);
    let resumed = client.ask(Request::Resume, ANSWER);
    called?;
    for outcome in [removed, resumed] {
        match outcome {
            // The gate took away what the lease's end took away already.
            Ok(_) | Err(ClientError::Refused(Refusal::NotHeld | Refusal::Invalid(_))) => {}
            Err(error) => return Err(error.into()),
        }
    }
    confirm(guest, victim, patience.end)
}

/// Waits for a processor that suits, and has it call `send_sig`.
fn call_in_guest(
    client: &mut GateClient,
    guest: &Guest,
    victim: &Victim,
    functions: &Functions,
    patience: Duration,
) -> Result<(), RespondError> {
    let deadline = Instant::now() + patience;
    let mut unsuited = "no processor of the guest waited for anything".to_owned();
    for _ in 0..ATTEMPTS {
        let Some((vcpu, registers)) = stopped(client, deadline)? else {
            break;
        };
        // The guest stands still: what is read now stays so until the change.
        same_target(client, guest, vcpu, victim)?;
        let task = victim.check(guest)?;
        let call = Call {
            function: functions.send_signal,
            arguments: [SIGKILL, task.as_u64(), FROM_KERNEL],
        };
        match change(guest, vcpu, &registers, functions, &call) {
            Err(reason) => unsuited = reason,
            Ok(change) => match client.ask(change.request(), ANSWER) {
                Ok(_) => {
                    let now = registers_of(client, vcpu)?;
                    return change.verify(guest, &now).map_err(|what| {
                        let pid = victim.pid;
                        RespondError::Alive { pid, what }
                    });
                }
                // The lease ended before: another stop will do.
                Err(ClientError::Refused(Refusal::NotHeld)) => {
                    unsuited = "the lease of its stop ended too early".to_owned();
                }
                Err(error) => return Err(error.into()),
            },
        }
        match client.ask(Request::Resume, ANSWER) {
            Ok(_) | Err(ClientError::Refused(Refusal::NotHeld)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(RespondError::Unsuited(unsuited))
}

/// That the gate's target is the one whose memory is read: what the scheduler
/// counts in the process's task, in nanoseconds, is the same in both.
fn same_target(
    client: &mut GateClient,
    guest: &Guest,
    vcpu: u32,
    victim: &Victim,
) -> Result<(), RespondError> {
    let place = guest.space().translate(victim.task);
    let place = place.map_err(|error| RespondError::Unsuited(error.to_string()))?;
    let address = place.physical.as_u64();
    let in_page = PAGE_SIZE - address % PAGE_SIZE;
    let length = u64::from(MAX_READ).min(in_page);
    let read = Request::ReadMemory {
        vcpu,
        kind: AddressKind::Physical,
        address,
        length: u32::try_from(length).unwrap_or(MAX_READ),
    };
    let theirs = match client.ask(read, ANSWER)? {
        Answer::Memory(bytes) => bytes.0,
        other => return Err(unexpected(&other)),
    };
    let mut ours = vec![0; theirs.len()];
    let read = guest.space().memory().read(place.physical, &mut ours);
    if read.is_ok() && ours == theirs {
        Ok(())
    } else {
        let reason = "the gate's target is another one than that whose memory is read";
        Err(RespondError::Unsuited(reason.to_owned()))
    }
}

fn registers_of(client: &mut GateClient, vcpu: u32) -> Result<Registers, RespondError> {
    match client.ask(Request::Registers { vcpu }, ANSWER)? {
        Answer::Registers(registers) => Ok(*registers),
        other => Err(unexpected(&other)),
    }
}

/// The processor that reached the breakpoint; none at the deadline.
fn stopped(
    client: &mut GateClient,
    deadline: Instant,
) -> Result<Option<(u32, Registers)>, RespondError> {
    while Instant::now() < deadline {
        match client.event(HEARTBEAT)? {
            Some(Event::Stopped {
                vcpu, registers, ..
            }) => return Ok(Some((vcpu, *registers))),
            Some(Event::Released(reason)) => {
                let reason = format!("the gate took the breakpoint away: {reason:?}");
                return Err(RespondError::Unsuited(reason));
            }
            Some(Event::TargetGone | Event::TargetReset) => {
                return Err(RespondError::Unsuited("it ended or was reset".to_owned()));
            }
            Some(Event::TargetHere | Event::Lost(_)) => {}
            None => done(client, Request::Heartbeat)?,
        }
    }
    Ok(None)
}

/// Sees that the process has ended.
fn confirm(guest: &Guest, victim: &Victim, patience: Duration) -> Result<Killed, RespondError> {
    let deadline = Instant::now() + patience;
    loop {
        let end = victim.end(guest)?;
        if end == End::Ended {
            return Ok(Killed::Ended);
        }
        if Instant::now() > deadline {
            return match end {
                End::Told { threads } => Ok(Killed::WhenItWakes { threads }),
                _ => Err(RespondError::Alive {
                    pid: victim.pid,
                    what: "its kernel has not marked it as ending".to_owned(),
                }),
            };
        }
        std::thread::sleep(LOOK);
    }
}

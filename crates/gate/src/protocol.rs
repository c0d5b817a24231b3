//! What a monitor may ask and what the gate answers, and the right that each
//! request needs.
//!
//! The types travel over an authenticated channel (crate `secmon-channel`).
//! They name operations, never bytes for QEMU: what is sent to QEMU for a
//! request is decided in the module `target` (QMP) and in [`crate::gdb`].

use std::fmt;

use secmon_channel::Role;
use serde::{Deserialize, Serialize};

/// The version of this protocol; a change that an older peer would
/// misunderstand raises it.
pub const VERSION: u16 = 1;

/// The channel's role between a monitor and a gate: two versions refuse each
/// other at the handshake.
pub const ROLE: Role = Role {
    name: "gate",
    version: VERSION,
};

/// The most bytes one [`Request::ReadMemory`] may ask for.
pub const MAX_READ: u32 = 1024;

/// The most bytes one [`Request::WriteMemory`] may carry.
pub const MAX_WRITE: usize = 1024;

/// The most places in memory, and the most registers, of one
/// [`Request::Alter`].
pub const MAX_ALTER: usize = 16;

/// A right over a target that a grant can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Right {
    /// Memory, read-only (which needs no gate), and the target's state.
    Observe,
    /// Stopping the target for moments.
    Pause,
    /// Breakpoints, single steps, reading registers.
    Trace,
    /// Stopping for good, cutting the network, dumping memory.
    Respond,
    /// Writing registers and memory.
    Control,
}

impl Right {
    /// All rights, weakest first.
    pub const ALL: [Self; 5] = [
        Self::Observe,
        Self::Pause,
        Self::Trace,
        Self::Respond,
        Self::Control,
    ];

    /// Its name in a grant file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Observe => "observe",
            Self::Pause => "pause",
            Self::Trace => "trace",
            Self::Respond => "respond",
            Self::Control => "control",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Bytes that people read as hexadecimal digits (in the log).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(&crate::hex::encode(&self.0))
        } else {
            serializer.serialize_bytes(&self.0)
        }
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            crate::hex::decode(text.as_bytes())
                .map(Self)
                .ok_or_else(|| serde::de::Error::custom("an even number of hexadecimal digits"))
        } else {
            Vec::<u8>::deserialize(deserializer).map(Self)
        }
    }
}

/// Which addresses a request means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressKind {
    /// Guest physical.
    Physical,
    /// Virtual, as the vCPU translates them at this moment.
    Virtual,
}

/// What a breakpoint waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakpointKind {
    /// Execution; the guest's memory is not changed.
    Execute,
    /// A write of up to 8 bytes.
    Write,
    /// A read or a write of up to 8 bytes.
    Access,
}

/// A breakpoint at a virtual address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Breakpoint {
    /// Where.
    pub address: u64,
    /// What for.
    pub kind: BreakpointKind,
    /// How many bytes from there, 1, 2, 4 or 8; 1 for [`BreakpointKind::Execute`].
    pub length: u8,
}

/// A register that [`Request::WriteRegister`] can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the processor's own names")]
pub enum Register {
    Rax,
    Rbx,
    Rcx,
    Rdx,
    Rsi,
    Rdi,
    Rbp,
    Rsp,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
    Rip,
    Eflags,
}

/// What a monitor asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// A sign of life. A monitor that holds something (a pause, a breakpoint)
    /// and is not heard of for [`Limits::silence_milliseconds`] loses it.
    Heartbeat,
    /// The target's state, this monitor's rights and limits, the log's head.
    Status,
    /// Where the target's RAM lies: runs of guest physical addresses.
    Layout,

    /// Stop the target for this long at most; the gate's own limit shortens it.
    Pause {
        /// The lease in milliseconds.
        lease_milliseconds: u32,
    },
    /// Begin the lease of this monitor's stop anew, if it has not lost it.
    Extend {
        /// The lease in milliseconds.
        lease_milliseconds: u32,
    },
    /// End this monitor's pause, or go on from its breakpoint.
    Resume,

    /// A vCPU's registers. A running target is stopped for the moment it takes.
    Registers {
        /// The vCPU, from 0.
        vcpu: u32,
    },
    /// Memory as the stopped vCPU sees it, up to [`MAX_READ`] bytes.
    ReadMemory {
        /// The vCPU, from 0.
        vcpu: u32,
        /// Which addresses are meant.
        kind: AddressKind,
        /// The first one.
        address: u64,
        /// How many bytes.
        length: u32,
    },
    /// Set a breakpoint; the target then stops there until [`Request::Resume`],
    /// [`Request::Step`] or the lease's end, with an [`Event::Stopped`].
    SetBreakpoint(Breakpoint),
    /// Take one away.
    RemoveBreakpoint(Breakpoint),
    /// Execute one instruction on one vCPU of the stopped target, the others
    /// standing still; it stays stopped, and the lease begins anew. Interrupts
    /// are held off: a vCPU that is halted stays so.
    Step {
        /// The vCPU, from 0.
        vcpu: u32,
    },

    /// Stop the target and leave it stopped, as an operator would: no lease,
    /// and not undone when the gate ends.
    Stop,
    /// Let it run after [`Request::Stop`].
    Start,
    /// The names of the target's network devices.
    NetworkDevices,
    /// Switch a network device's link.
    Link {
        /// QEMU's name of the device or its backend.
        device: String,
        /// The link's state.
        state: LinkState,
    },
    /// Write the target's memory as an ELF core into the gate's own folder. The
    /// target stands still until it is written.
    Dump {
        /// The file's name: letters, digits, `-`, `_` and `.`.
        name: String,
    },
    /// Reset the machine.
    Reset,
    /// End the target's QEMU.
    Quit,

    /// Change a register; a running target is stopped for the moment it takes.
    WriteRegister {
        /// The vCPU, from 0.
        vcpu: u32,
        /// Which one.
        register: Register,
        /// Its new value.
        value: u64,
    },
    /// Change memory, up to [`MAX_WRITE`] bytes.
    WriteMemory {
        /// The vCPU, from 0.
        vcpu: u32,
        /// Which addresses are meant.
        kind: AddressKind,
        /// The first one.
        address: u64,
        /// The new bytes.
        bytes: Bytes,
    },
    /// Change memory and registers of a vCPU that this monitor holds, as one:
    /// all of it while the vCPU stands at `at`, or nothing. Memory comes first,
    /// then registers, both in their order.
    Alter {
        /// The vCPU, from 0.
        vcpu: u32,
        /// What `rip` must be.
        at: u64,
        /// Guest physical addresses and their new bytes, up to [`MAX_ALTER`] of
        /// up to [`MAX_WRITE`] bytes in all.
        memory: Vec<(u64, Bytes)>,
        /// Registers and their new values, up to [`MAX_ALTER`].
        registers: Vec<(Register, u64)>,
    },
}

/// A network link's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// The cable is in.
    Up,
    /// The cable is out.
    Down,
}

impl Request {
    /// The right that it needs.
    pub fn right(&self) -> Right {
        match self {
            Self::Heartbeat | Self::Status | Self::Layout => Right::Observe,
            // These are part of every right to stop; that a monitor only has
            // a say in what it holds itself is seen to elsewhere.
            Self::Pause { .. } => Right::Pause,
            Self::Extend { .. } | Self::Resume => Right::Observe,
            Self::Registers { .. }
            | Self::ReadMemory { .. }
            | Self::SetBreakpoint(_)
            | Self::RemoveBreakpoint(_)
            | Self::Step { .. } => Right::Trace,
            Self::Stop
            | Self::Start
            | Self::NetworkDevices
            | Self::Link { .. }
            | Self::Dump { .. }
            | Self::Reset
            | Self::Quit => Right::Respond,
            Self::WriteRegister { .. } | Self::WriteMemory { .. } | Self::Alter { .. } => {
                Right::Control
            }
        }
    }

    /// Whether it changes nothing and is asked all the time: such requests are
    /// counted in the log, not each written down.
    pub fn is_routine(&self) -> bool {
        matches!(self, Self::Heartbeat | Self::Status)
    }
}

/// A request with the number that its answer will carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// The monitor's choice.
    pub id: u64,
    /// What is asked.
    pub request: Request,
}

/// What the gate sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The answer to a query.
    Answer {
        /// The query's number.
        id: u64,
        /// What came of it.
        result: Result<Answer, Refusal>,
    },
    /// Something that happened.
    Event(Event),
}

/// What an allowed request gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Layout`].
    Layout(Vec<RamRun>),
    /// To [`Request::Pause`] and [`Request::Extend`]: for how long.
    Paused {
        /// The lease that was given.
        lease_milliseconds: u32,
    },
    /// To [`Request::Registers`] and [`Request::Step`].
    Registers(Box<Registers>),
    /// To [`Request::ReadMemory`].
    Memory(Bytes),
    /// To [`Request::NetworkDevices`].
    NetworkDevices(Vec<String>),
    /// To [`Request::Dump`].
    Dumped {
        /// The file's name in the gate's folder.
        name: String,
        /// Its size in bytes.
        bytes: u64,
    },
}

/// A run of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRun {
    /// The first guest physical address.
    pub start: u64,
    /// How many bytes.
    pub length: u64,
    /// Where it begins in the RAM file.
    pub file_offset: u64,
}

/// A target's state as the gate knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetState {
    /// QEMU can't be reached.
    Gone,
    /// vCPUs run.
    Running,
    /// vCPUs stand still because a monitor holds them, in QEMU's word.
    Held(String),
    /// vCPUs stand still for another reason, in QEMU's word.
    Stopped(String),
}

/// The answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The protocol's version.
    pub version: u16,
    /// The target's name in the grant file.
    pub target: String,
    /// Its state.
    pub state: TargetState,
    /// QEMU's version, if it is there.
    pub qemu: Option<String>,
    /// The bytes of RAM, if QEMU is there.
    pub memory_bytes: Option<u64>,
    /// Whether registers and breakpoints are within reach: QEMU was started
    /// with a gdbstub, which the gate holds.
    pub gdb: bool,
    /// This monitor's rights.
    pub rights: Vec<Right>,
    /// This monitor's limits.
    pub limits: Limits,
    /// The log's last record: keep it elsewhere to notice a log cut short.
    pub log_head: LogHead,
}

/// The last record of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHead {
    /// Its sequence number.
    pub sequence: u64,
    /// Its hash, as hexadecimal digits.
    pub hash: String,
}

/// What bounds a monitor's use of its rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Requests a second, over some seconds.
    pub requests_per_second: u32,
    /// Stops (pauses, stops at breakpoints and for reading registers) a second.
    pub stops_per_second: u32,
    /// The longest lease of a pause, extended or not by another.
    pub lease_milliseconds: u32,
    /// The longest time that a target stands still by extended leases.
    pub longest_stop_milliseconds: u32,
    /// How long a monitor that holds something may be silent.
    pub silence_milliseconds: u32,
    /// Breakpoints at the same time.
    pub breakpoints: u32,
}

impl Limits {
    /// The longest lease that a grant can give: a target must not stand still
    /// for a second because nobody says that it should.
    pub const MAX_LEASE_MILLISECONDS: u32 = 800;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests_per_second: 1000,
            stops_per_second: 250,
            lease_milliseconds: 500,
            longest_stop_milliseconds: 10_000,
            silence_milliseconds: 800,
            breakpoints: 64,
        }
    }
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The grant lacks the right.
    #[error("the grant file does not give this monitor the right {0:?}")]
    Denied(Right),
    /// Too many requests.
    #[error("more than {per_second} {what} a second; wait a moment")]
    Limited {
        /// Of what.
        what: String,
        /// How many are allowed.
        per_second: u32,
    },
    /// An operand is out of bounds.
    #[error("{0}")]
    Invalid(String),
    /// The target's QEMU is not there.
    #[error("the target's QEMU is not running")]
    TargetGone,
    /// QEMU was started without a gdbstub, or the gate can't reach it.
    #[error(
        "no gdbstub: start the target with `-chardev socket,id=gdb,path=PATH,server=on,wait=off -gdb chardev:gdb` and the gate with `--gdb PATH`"
    )]
    NoGdb,
    /// Another monitor traces or holds the target, or a dump is being written.
    #[error("{0}")]
    Busy(String),
    /// It needs a target that this monitor has stopped.
    #[error("this monitor does not hold the target stopped")]
    NotHeld,
    /// The process that would let the target run again if the gate died is
    /// being replaced.
    #[error("the gate's keeper is being replaced; try again")]
    NoKeeper,
    /// The log can't be written, so nothing is done.
    #[error("the gate's log can't be written, so nothing is done: {0}")]
    NoLog(String),
    /// QEMU refused or failed.
    #[error("QEMU: {0}")]
    Failed(String),
}

/// Why a monitor lost what it held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseReason {
    /// The lease ended without an extension.
    LeaseEnded,
    /// The monitor was silent.
    Silence,
    /// Extended leases added up to the longest stop allowed.
    LongestStop,
    /// More stops at breakpoints than the grant allows.
    TooManyStops,
    /// The gate's keeper died.
    KeeperLost,
    /// Somebody else let the target run.
    ResumedByOthers,
    /// The target's QEMU ended.
    TargetGone,
    /// The monitor's session ended.
    SessionEnded,
}

/// Something that happened, sent to every monitor that it concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The target stopped at a breakpoint of this monitor.
    Stopped {
        /// The vCPU that reached it, from 0.
        vcpu: u32,
        /// That vCPU's registers.
        registers: Box<Registers>,
        /// The lease until it goes on by itself.
        lease_milliseconds: u32,
    },
    /// What this monitor held, pause and breakpoints, is gone.
    Released(ReleaseReason),
    /// QEMU ended or can't be reached.
    TargetGone,
    /// QEMU is there (again).
    TargetHere,
    /// QEMU reset the machine.
    TargetReset,
    /// The monitor took events too slowly: so many were left out here.
    Lost(u64),
}

/// A vCPU's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the processor's own names")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub eflags: u32,
    pub cs: u32,
    pub ss: u32,
    pub ds: u32,
    pub es: u32,
    pub fs: u32,
    pub gs: u32,
    pub fs_base: u64,
    pub gs_base: u64,
    pub kernel_gs_base: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_in_the_log_is_readable_and_complete() {
        let write = Request::WriteMemory {
            vcpu: 0,
            kind: AddressKind::Physical,
            address: 0x1000,
            bytes: Bytes(vec![0xde, 0xad]),
        };
        let text = serde_json::to_string(&write).expect("JSON");
        assert_eq!(
            text,
            r#"{"write_memory":{"vcpu":0,"kind":"physical","address":4096,"bytes":"dead"}}"#
        );
        assert_eq!(serde_json::from_str::<Request>(&text).expect("JSON"), write);
    }

    #[test]
    fn what_changes_a_target_is_not_within_observe() {
        assert_eq!(Request::Status.right(), Right::Observe);
        assert_eq!(Request::Quit.right(), Right::Respond);
        let step = Request::Step { vcpu: 0 };
        assert_eq!(step.right(), Right::Trace);
    }
}

//! What a monitor says.

use serde::{Deserialize, Serialize};

use secmon_gate::protocol::{LogHead, Right, TargetState as RunState};
use secmon_guest::TrustLevel;
use secmon_watch::TargetChange;

use super::{Cell, CheckFinding, DetectorResult};

/// A message from the monitor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Rows of a query: a cell for each column, in the order asked for.
    Rows {
        /// The query's number.
        id: u32,
        /// The rows.
        rows: Vec<Vec<Cell>>,
    },
    /// Bytes of memory, up to a page at a time where they may end early.
    Bytes {
        /// The request's number.
        id: u32,
        /// The address of the first.
        address: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// How one address is translated.
    Walk {
        /// The request's number.
        id: u32,
        /// The address.
        address: u64,
        /// The entries read, from the root on.
        entries: Vec<WalkEntry>,
        /// Where it led, or why nowhere.
        end: Result<WalkEnd, String>,
    },
    /// What could not be read for a query; before its end.
    Diagnostics {
        /// The query's number.
        id: u32,
        /// The first of them.
        entries: Vec<DiagnosticEntry>,
    },
    /// A request is done.
    End {
        /// The request's number.
        id: u32,
        /// How it ended.
        end: End,
    },
    /// A request was not begun.
    Refused {
        /// The request's number.
        id: u32,
        /// Why.
        refusal: Refusal,
    },
    /// The targets.
    Targets {
        /// The request's number.
        id: u32,
        /// One each, in the order of the configuration.
        targets: Vec<TargetReport>,
    },
    /// The tables.
    Tables {
        /// The request's number.
        id: u32,
        /// One each.
        tables: Vec<TableDescription>,
    },
    /// How the monitor is.
    Status {
        /// The request's number.
        id: u32,
        /// Its numbers.
        status: StatusReport,
    },
    /// Each second, unasked.
    Heartbeat(Heartbeat),
    /// Something to know, unasked, until it is acknowledged.
    Finding(Finding),
    /// What the detectors of a check did.
    Looked {
        /// The request's number.
        id: u32,
        /// One each.
        detectors: Vec<DetectorResult>,
    },
    /// Something that they found.
    Found {
        /// The request's number.
        id: u32,
        /// What.
        finding: Box<CheckFinding>,
    },
}

/// An entry of a page table on the way of a translation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkEntry {
    /// The table: 5 for the fifth level, down to 1.
    pub level: u8,
    /// Where the entry lies in physical memory.
    pub address: u64,
    /// The entry.
    pub entry: u64,
}

/// Where a translation led.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalkEnd {
    /// The physical address.
    pub physical: u64,
    /// The bytes of the page.
    pub page_size: u64,
    /// Whether all entries allow to write.
    pub writable: bool,
    /// Whether all entries allow user mode.
    pub user: bool,
    /// Whether no entry forbids to execute.
    pub executable: bool,
}

/// Something that could not be read, or did not agree with itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiagnosticEntry {
    /// The table that was being made.
    pub table: String,
    /// What was being read.
    pub subject: String,
    /// The address in question.
    pub address: Option<u64>,
    /// What happened.
    pub reason: String,
}

/// How a request ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// How many rows, bytes or walks were sent.
    pub sent: u64,
    /// Why it ended before its end.
    pub error: Option<String>,
    /// How many diagnostics there were, sent or not.
    pub diagnostics: u64,
    /// How many reads were made again because the guest changed what was read.
    pub torn_reads: u64,
}

/// Why a request was not begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// No target has this name.
    #[error("the monitor has no target {name:?}; it has {known}")]
    UnknownTarget {
        /// The name.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The target has no kernel that could be read now.
    #[error("target {name} can't be read now: {reason}")]
    TargetNotReady {
        /// The target.
        name: String,
        /// What is known of it.
        reason: String,
    },
    /// No table has this name.
    #[error("the monitor knows no table {name:?}")]
    UnknownTable {
        /// The name.
        name: String,
    },
    /// No detector has this name.
    #[error("the monitor knows no detector {name:?}")]
    UnknownDetector {
        /// The name.
        name: String,
    },
    /// A table has no such column.
    #[error("table {table} has no column {column:?}")]
    UnknownColumn {
        /// The table.
        table: String,
        /// The name.
        column: String,
    },
    /// As many requests as may run at once are running, or one has this
    /// number.
    #[error("the monitor is busy with {running} requests: wait for one to end")]
    Busy {
        /// How many are running.
        running: u32,
    },
    /// More was asked for than a request may have.
    #[error("the request asks for too much: {what}")]
    TooMuch {
        /// Of what, and the bound.
        what: String,
    },
    /// The target's gate does not let the monitor do that.
    #[error("monitor has no right {right:?} over target {name}: its grant file does not give it")]
    Denied {
        /// The target.
        name: String,
        /// The right's name.
        right: String,
    },
    /// The target can't be held still.
    #[error("target {name} can't be paused: {reason}")]
    NotPaused {
        /// The target.
        name: String,
        /// Why.
        reason: String,
    },
    /// A place in memory does not exist.
    #[error("{reason}")]
    NoPlace {
        /// Why.
        reason: String,
    },
}

/// A target as the monitor sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetReport {
    /// Its name.
    pub name: String,
    /// The PCI address of its memory, where the device is there.
    pub pci: Option<String>,
    /// The bytes of its RAM that can be read.
    pub ram_size: u64,
    /// What it is doing.
    pub state: TargetState,
    /// How well what is said about it was protected.
    pub trust_level: TrustLevel,
    /// How often its kernel has been found anew.
    pub boots: u64,
    /// What its gate says.
    pub gate: GateReport,
}

/// What a target's gate says, the last time that it was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum GateReport {
    /// The monitor was given none.
    #[default]
    None,
    /// It can't be reached now.
    Away {
        /// Why.
        reason: String,
    },
    /// It answers.
    Connected {
        /// What QEMU says of the target.
        state: RunState,
        /// What the monitor may do.
        rights: Vec<Right>,
        /// QEMU's version, if QEMU is there.
        qemu: Option<String>,
        /// The last record of the gate's log.
        log_head: LogHead,
    },
}

impl GateReport {
    /// Whether the target's vCPUs stand still.
    #[must_use]
    pub fn is_standing_still(&self) -> bool {
        let Self::Connected { state, .. } = self else {
            return false;
        };
        matches!(state, RunState::Held(_) | RunState::Stopped(_))
    }
}

/// What a target is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetState {
    /// Its memory can't be read.
    Unreachable {
        /// Why.
        reason: String,
    },
    /// Its memory is all zero: it has not started, or was switched off.
    Empty,
    /// There is something in its memory, but no kernel that is understood:
    /// firmware, a boot loader, a kernel that is just starting.
    NoKernel {
        /// What was missing.
        reason: String,
    },
    /// A kernel runs.
    Running {
        /// Its banner.
        banner: String,
        /// Its build id in hexadecimal, where it has one.
        build_id: Option<String>,
        /// What tells this boot from others.
        instance: u64,
    },
    /// A kernel is in memory, but its clock stands still.
    Stopped {
        /// Its banner.
        banner: String,
    },
}

/// A table that the monitor knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableDescription {
    /// Its name.
    pub name: String,
    /// What its rows are.
    pub meaning: String,
    /// Its columns.
    pub columns: Vec<ColumnDescription>,
}

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnDescription {
    /// Its name.
    pub name: String,
    /// The word for the type of its values.
    pub kind: String,
}

/// How the monitor is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The monitor's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The release of the kernel it runs on.
    pub kernel: String,
    /// The client that this is said to, by the name of its key.
    pub client: String,
    /// Its latest numbers.
    pub heartbeat: Heartbeat,
    /// What it could not put in force of its own confinement.
    pub weaknesses: Vec<String>,
}

/// That the monitor lives, and its numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// How many heartbeats were before.
    pub sequence: u64,
    /// Milliseconds since the monitor's kernel started.
    pub uptime_ms: u64,
    /// Milliseconds of processor time that the worker has used.
    pub cpu_ms: u64,
    /// KiB of memory that the monitor's VM uses.
    pub memory_used_kib: u64,
    /// KiB that it has.
    pub memory_total_kib: u64,
    /// Targets with a kernel that is understood.
    pub targets_running: u32,
    /// Targets.
    pub targets: u32,
    /// Targets whose vCPUs stand still, as their gates say.
    pub targets_standing_still: u32,
    /// Requests that are running.
    pub requests: u32,
    /// Findings that no client has taken.
    pub findings_kept: u64,
    /// Findings that were lost because nobody took them in time.
    pub findings_lost: u64,
    /// How often the worker was started again.
    pub restarts: u32,
}

/// Something to know about a target or the monitor itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Its number, from 1 on, without gaps but where some were lost.
    pub sequence: u64,
    /// Milliseconds since 1970-01-01T00:00:00Z by the monitor's clock.
    pub time_ms: u64,
    /// The target, unless it is about the monitor.
    pub target: Option<String>,
    /// How grave it is.
    pub severity: Severity,
    /// What happened.
    pub kind: FindingKind,
    /// In words.
    pub text: String,
    /// What the detectors that watch the target told: the JSON of a
    /// [`secmon_watch::Incident`].
    pub incident: Option<String>,
    /// How well the monitor that says so was protected.
    pub trust_level: TrustLevel,
}

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// To know.
    Information,
    /// To look at.
    Warning,
    /// To act on.
    Critical,
}

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FindingKind {
    /// A kernel was found where there was none.
    TargetStarted,
    /// Another boot of a kernel took the place of the one before.
    TargetRebooted,
    /// The kernel's clock stands still: paused, crashed or migrated away.
    TargetStopped,
    /// The kernel's clock goes on.
    TargetResumed,
    /// There is no kernel any more.
    TargetGone,
    /// The target's memory can't be read.
    TargetUnreachable,
    /// Memory contradicts what was believed about the kernel.
    KernelConflict,
    /// The monitor started.
    MonitorStarted,
    /// The monitor's worker died or hung, and was started again.
    WorkerRestarted,
    /// Findings were lost, as nobody took them.
    FindingsLost,
    /// Somebody tried to speak to the monitor and was not let in.
    ClientRefused,
    /// The target's gate was reached.
    GateConnected,
    /// The target's gate can't be reached any more.
    GateLost,
    /// The target's machine was reset, as its gate says.
    TargetReset,
    /// The target's QEMU ended or hangs, as its gate says.
    QemuEnded,
    /// The target's QEMU is there again, as its gate says.
    QemuStarted,
    /// The target was migrated away, as its gate says.
    TargetMigrated,
    /// The detectors that watch the target told something.
    Watch,
}

impl FindingKind {
    /// What it says of the target, if it says something.
    #[must_use]
    pub const fn target_change(self) -> Option<TargetChange> {
        Some(match self {
            Self::TargetStarted => TargetChange::Started,
            Self::TargetRebooted => TargetChange::Rebooted,
            Self::TargetStopped => TargetChange::Stopped,
            Self::TargetResumed => TargetChange::Resumed,
            Self::TargetGone | Self::TargetUnreachable | Self::TargetMigrated => TargetChange::Gone,
            Self::KernelConflict => TargetChange::Conflict,
            _ => return None,
        })
    }
}

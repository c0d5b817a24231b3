//! The target through the gate's eyes: its connections, and the few things
//! that are ever done through them.
//!
//! Stops go through QMP, going on through the gdbstub where there is one: a
//! stub reports the next breakpoint only to a client that let the machine run
//! itself. Before anything is done that would have to be undone if the gate
//! died, the keeper is told.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use secmon_platform::layout::RamLayout;
use secmon_platform::qemu::{QemuDescriptor, QmpClient, QmpError, RunState};
use serde_json::{Value, json};

use crate::gdb::{GdbClient, GdbError, StopReply};
use crate::keeper::{Keeper, Owed, REPEAT};
use crate::protocol::{
    Breakpoint, BreakpointKind, Bytes, LinkState, RamRun, Refusal, Register, Registers, TargetState,
};

/// How long QEMU may take for a command.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How long is waited until a target that was let run does so.
const RUNS_WITHIN: Duration = Duration::from_millis(300);

/// How long one instruction may take.
const STEPS_WITHIN: Duration = Duration::from_millis(200);

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TargetError {
    #[error("the target's QEMU is not running")]
    Gone,
    #[error("there is no keeper")]
    NoKeeper,
    #[error("the target has no gdbstub")]
    NoGdb,
    #[error("{0}")]
    Refused(String),
    /// The connection is of no more use.
    #[error("{0}")]
    Lost(String),
}

impl From<QmpError> for TargetError {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Refused { .. } => Self::Refused(error.to_string()),
            _ => Self::Lost(error.to_string()),
        }
    }
}

impl From<GdbError> for TargetError {
    fn from(error: GdbError) -> Self {
        match error {
            GdbError::Refused { .. } => Self::Refused(error.to_string()),
            _ => Self::Lost(error.to_string()),
        }
    }
}

impl From<TargetError> for Refusal {
    fn from(error: TargetError) -> Self {
        match error {
            TargetError::Gone => Self::TargetGone,
            TargetError::NoKeeper => Self::NoKeeper,
            TargetError::NoGdb => Self::NoGdb,
            TargetError::Refused(reason) | TargetError::Lost(reason) => Self::Failed(reason),
        }
    }
}

type Result<T, E = TargetError> = std::result::Result<T, E>;

/// Something that happened without the gate's doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Happening {
    /// A vCPU reached a breakpoint; the target stands still.
    Breakpoint { vcpu: u32 },
    /// Somebody let the target run that the gate had stopped.
    ResumedByOthers,
    /// The machine was reset.
    Reset,
    /// The dump is written, or has failed.
    DumpEnded,
}

/// QMP alone is there, or the stub too.
#[derive(Debug)]
struct Link {
    qmp: QmpClient,
    gdb: Option<GdbClient>,
    version: String,
    memory_bytes: u64,
    vcpus: Vec<u32>,
    /// The file of a dump that is being written.
    dump: Option<QemuDescriptor>,
}

#[derive(Debug)]
pub(crate) struct Target {
    qmp_path: PathBuf,
    gdb_path: Option<PathBuf>,
    link: Option<Link>,
    keeper: Option<Keeper>,
    told: Owed,
    told_at: Instant,
    /// The target stands still by the gate's doing.
    stopped: bool,
    /// The vCPU that stands at a breakpoint, which has to be stepped over.
    at: Option<u32>,
    breakpoints: BTreeSet<Breakpoint>,
    /// The connection broke while something was owed.
    in_debt: bool,
    happenings: Vec<Happening>,
    /// What could not be had of the stub, for the log.
    pub(crate) note: Option<String>,
}

impl Target {
    pub(crate) fn new(qmp_path: PathBuf, gdb_path: Option<PathBuf>, keeper: Keeper) -> Self {
        Self {
            qmp_path,
            gdb_path,
            link: None,
            keeper: Some(keeper),
            told: Owed::Nothing,
            told_at: Instant::now(),
            stopped: false,
            at: None,
            breakpoints: BTreeSet::new(),
            in_debt: false,
            happenings: Vec::new(),
            note: None,
        }
    }

    pub(crate) fn is_here(&self) -> bool {
        self.link.is_some()
    }

    pub(crate) fn has_gdb(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.gdb.is_some())
    }

    pub(crate) fn is_stopped_by_gate(&self) -> bool {
        self.stopped
    }

    pub(crate) fn version(&self) -> Option<(String, u64)> {
        let link = self.link.as_ref()?;
        Some((link.version.clone(), link.memory_bytes))
    }

    pub(crate) fn qmp_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(|link| link.qmp.as_fd())
    }

    pub(crate) fn gdb_descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.link.as_ref()?.gdb.as_ref()?.as_fd())
    }

    pub(crate) fn keeper_descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.keeper.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn take_happenings(&mut self) -> Vec<Happening> {
        std::mem::take(&mut self.happenings)
    }

    // The keeper.

    pub(crate) fn lose_keeper(&mut self) {
        self.keeper = None;
    }

    /// Takes a new keeper, which learns all that the one before knew.
    pub(crate) fn take_keeper(&mut self, keeper: Keeper) {
        self.keeper = Some(keeper);
        if let Some(link) = &self.link
            && let Some(keeper) = &self.keeper
        {
            let _ = keeper.qmp(link.qmp.as_fd());
            if let Some(gdb) = &link.gdb {
                let _ = keeper.gdb(gdb.as_fd());
            }
        }
        let _ = self.tell(self.told);
    }

    fn tell(&mut self, owed: Owed) -> Result<()> {
        self.told = owed;
        self.told_at = Instant::now();
        let result = self.keeper.as_ref().map(|keeper| keeper.owe(owed));
        match result {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) | None => {
                self.keeper = None;
                Err(TargetError::NoKeeper)
            }
        }
    }

    /// Repeats what the keeper was told, so that it knows the gate alive.
    /// Gives the time at which that is to be done again.
    pub(crate) fn remind_keeper(&mut self) -> Option<Instant> {
        if self.told == Owed::Nothing {
            return None;
        }
        if self.told_at.elapsed() >= REPEAT {
            let _ = self.tell(self.told);
        }
        Some(self.told_at + REPEAT)
    }

    /// Tells the keeper what is owed once nothing is under way.
    fn settle(&mut self) {
        let owed = if self.stopped {
            Owed::Stopped
        } else if self.breakpoints.is_empty() {
            Owed::Nothing
        } else {
            Owed::Breakpoints
        };
        // Less is owed than before: without a keeper nothing is lost.
        let _ = self.tell(owed);
    }

    // Connections.

    /// Connects; the target runs, or stands still, as before.
    pub(crate) fn connect(&mut self) -> Result<()> {
        let mut qmp = QmpClient::connect(&self.qmp_path, TIMEOUT)?;
        if let Some(keeper) = &self.keeper {
            let _ = keeper.qmp(qmp.as_fd());
        }
        let before = qmp.status()?;
        let version = qmp.execute("query-version", &json!({}))?;
        let number = |name| {
            let number = version.pointer(&format!("/qemu/{name}"));
            number.and_then(Value::as_u64).unwrap_or(0)
        };
        let version = format!(
            "{}.{}.{}",
            number("major"),
            number("minor"),
            number("micro")
        );
        let (base, plugged) = qmp.memory_size()?;
        let in_debt = std::mem::take(&mut self.in_debt);
        // The stub stops the target when it is connected to.
        let runs = before.running || (in_debt && matches!(&*before.status, "paused" | "debug"));
        if runs && self.gdb_path.is_some() {
            self.tell(Owed::Stopped)?;
        }
        self.note = None;
        let mut gdb = None;
        if let Some(path) = self.gdb_path.clone() {
            if in_debt && let Ok(mut left) = GdbClient::connect(&path, TIMEOUT) {
                // Breakpoints of the connection that broke.
                let _ = left.detach();
            }
            match self.attach(&path) {
                Ok(client) => gdb = Some(client),
                Err(error) => self.note = Some(error.to_string()),
            }
        }
        let (gdb, vcpus) = gdb.map_or((None, Vec::new()), |(gdb, vcpus)| (Some(gdb), vcpus));
        self.link = Some(Link {
            qmp,
            gdb,
            version,
            memory_bytes: base.saturating_add(plugged),
            vcpus,
            dump: None,
        });
        self.stopped = runs;
        self.at = None;
        self.breakpoints.clear();
        self.go()
    }

    fn attach(&mut self, path: &std::path::Path) -> Result<(GdbClient, Vec<u32>)> {
        let mut gdb = GdbClient::connect(path, TIMEOUT)?;
        if let Some(keeper) = &self.keeper {
            let _ = keeper.gdb(gdb.as_fd());
        }
        gdb.describe()?;
        let vcpus = gdb.vcpus()?;
        Ok((gdb, vcpus))
    }

    /// Gives up the connections. QEMU is gone, or does not answer; in that
    /// case what is owed is made good with the next connection.
    pub(crate) fn disconnect(&mut self) {
        self.in_debt |= self.stopped || !self.breakpoints.is_empty();
        self.link = None;
        self.stopped = false;
        self.at = None;
        self.breakpoints.clear();
        self.happenings.clear();
        self.told = Owed::Nothing;
        if let Some(keeper) = &self.keeper {
            let _ = keeper.gone();
        }
    }

    fn link(&mut self) -> Result<&mut Link> {
        self.link.as_mut().ok_or(TargetError::Gone)
    }

    fn gdb(&mut self) -> Result<&mut GdbClient> {
        self.link()?.gdb.as_mut().ok_or(TargetError::NoGdb)
    }

    fn vcpu(&mut self, vcpu: u32) -> Result<u32> {
        let known = self.link()?.vcpus.contains(&vcpu);
        if known {
            Ok(vcpu)
        } else {
            Err(TargetError::Refused(format!("there is no vCPU {vcpu}")))
        }
    }

    /// Takes in what came of itself.
    pub(crate) fn poll(&mut self) -> Result<()> {
        let armed = !self.breakpoints.is_empty();
        let link = self.link()?;
        link.qmp.receive_events()?;
        let stops = match &mut link.gdb {
            Some(gdb) => gdb.take_stops()?,
            None => Vec::new(),
        };
        let events = link.qmp.take_events();
        let has = |name: &str| events.iter().any(|event| event == name);
        if has("RESET") {
            self.happenings.push(Happening::Reset);
        }
        if has("DUMP_COMPLETED") {
            self.happenings.push(Happening::DumpEnded);
        }
        if has("SHUTDOWN") {
            // With its end the connections close, which is seen then.
            self.stopped = false;
        }
        if self.stopped {
            if has("RESUME") && self.run_state()?.running {
                self.stopped = false;
                self.at = None;
                self.settle();
                self.happenings.push(Happening::ResumedByOthers);
            }
        } else if armed && (has("STOP") || !stops.is_empty()) {
            let trap = stops.iter().find(|stop| stop.signal == StopReply::TRAP);
            if self.run_state()?.status == "debug" {
                let vcpu = trap.and_then(|stop| stop.vcpu).unwrap_or(0);
                self.stopped = true;
                self.at = Some(vcpu);
                self.settle();
                self.happenings.push(Happening::Breakpoint { vcpu });
            }
        }
        Ok(())
    }

    // Running and standing still.

    fn run_state(&mut self) -> Result<RunState> {
        Ok(self.link()?.qmp.status()?)
    }

    pub(crate) fn state(&mut self) -> Result<TargetState> {
        if self.link.is_none() {
            return Ok(TargetState::Gone);
        }
        let state = self.run_state()?;
        Ok(match (state.running, self.stopped) {
            (true, _) => TargetState::Running,
            (false, true) => TargetState::Held(state.status),
            (false, false) => TargetState::Stopped(state.status),
        })
    }

    /// Stops it, unless it stands still already, by whomever.
    pub(crate) fn stop(&mut self) -> Result<()> {
        if self.stopped {
            return Ok(());
        }
        self.link()?;
        self.tell(Owed::Stopped)?;
        let result = self.stop_running();
        self.settle();
        result
    }

    fn stop_running(&mut self) -> Result<()> {
        if self.run_state()?.running {
            // From here on it may have stopped, whatever the answer.
            self.stopped = true;
            self.link()?.qmp.stop()?;
            self.forget_own_events()?;
        }
        Ok(())
    }

    /// Lets it run, if the gate had stopped it.
    pub(crate) fn go(&mut self) -> Result<()> {
        if self.stopped {
            self.step_over()?;
            self.resume()?;
            self.stopped = false;
        }
        self.settle();
        Ok(())
    }

    /// A vCPU that stands at a breakpoint would reach it again at once.
    fn step_over(&mut self) -> Result<()> {
        let Some(vcpu) = self.at.take() else {
            return Ok(());
        };
        if self.breakpoints.is_empty() {
            return Ok(());
        }
        let here = self.registers_now(vcpu)?.rip;
        self.step_from(vcpu, here).map(drop)
    }

    /// One instruction, with a breakpoint at its address taken away meanwhile.
    ///
    /// A stub steps with interrupts held off, so an instruction that waits for
    /// one (`hlt`, in every idle kernel) never ends: the machine is then stopped
    /// as it is, after it.
    fn step_from(&mut self, vcpu: u32, address: u64) -> Result<Registers> {
        let at = |breakpoint: &&Breakpoint| {
            breakpoint.kind == BreakpointKind::Execute && breakpoint.address == address
        };
        let under = self.breakpoints.iter().find(at).copied();
        if let Some(breakpoint) = under {
            self.gdb()?.remove(breakpoint)?;
        }
        let stepped = self.step_within(vcpu);
        if let Some(breakpoint) = under {
            self.gdb()?.set(breakpoint)?;
        }
        stepped?;
        self.forget_own_events()?;
        self.registers_now(vcpu)
    }

    fn step_within(&mut self, vcpu: u32) -> Result<()> {
        if self.gdb()?.step(vcpu, STEPS_WITHIN)?.is_none() {
            self.link()?.qmp.stop()?;
            self.gdb()?.wait_for_stop(STEPS_WITHIN)?;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        let link = self.link()?;
        let Some(gdb) = &mut link.gdb else {
            link.qmp.resume()?;
            return self.forget_own_events();
        };
        gdb.run()?;
        let deadline = Instant::now() + RUNS_WITHIN;
        loop {
            let state = link.qmp.status()?;
            let resumed = link.qmp.take_events().iter().any(|event| event == "RESUME");
            if state.running || resumed {
                return Ok(());
            }
            if Instant::now() > deadline {
                link.qmp.resume()?;
                return self.forget_own_events();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Takes away the events of the gate's own stop or resume, and keeps the
    /// others' meaning.
    fn forget_own_events(&mut self) -> Result<()> {
        let link = self.link()?;
        link.qmp.receive_events()?;
        let events = link.qmp.take_events();
        if let Some(gdb) = &mut link.gdb {
            gdb.take_stops()?;
        }
        if events.iter().any(|event| event == "RESET") {
            self.happenings.push(Happening::Reset);
        }
        if events.iter().any(|event| event == "DUMP_COMPLETED") {
            self.happenings.push(Happening::DumpEnded);
        }
        Ok(())
    }

    /// Does something to a target that stands still, at least meanwhile.
    fn while_stopped<T>(&mut self, body: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.stopped || !self.run_state()?.running {
            return body(self);
        }
        self.stop()?;
        let result = body(self);
        self.go()?;
        result
    }

    // What is done to it.

    pub(crate) fn registers(&mut self, vcpu: u32) -> Result<Registers> {
        let vcpu = self.vcpu_with_gdb(vcpu)?;
        self.while_stopped(|target| target.registers_now(vcpu))
    }

    pub(crate) fn registers_now(&mut self, vcpu: u32) -> Result<Registers> {
        Ok(self.gdb()?.registers(vcpu)?)
    }

    fn vcpu_with_gdb(&mut self, vcpu: u32) -> Result<u32> {
        self.gdb()?;
        self.vcpu(vcpu)
    }

    pub(crate) fn step(&mut self, vcpu: u32) -> Result<Registers> {
        let vcpu = self.vcpu_with_gdb(vcpu)?;
        let here = self.registers_now(vcpu)?.rip;
        let registers = self.step_from(vcpu, here)?;
        self.at = Some(vcpu);
        Ok(registers)
    }

    pub(crate) fn read_memory(
        &mut self,
        vcpu: u32,
        physical: bool,
        address: u64,
        length: u32,
    ) -> Result<Vec<u8>> {
        let vcpu = self.vcpu_with_gdb(vcpu)?;
        self.while_stopped(|target| {
            Ok(target.gdb()?.read_memory(vcpu, physical, address, length)?)
        })
    }

    pub(crate) fn write_memory(
        &mut self,
        vcpu: u32,
        physical: bool,
        address: u64,
        bytes: Vec<u8>,
    ) -> Result<()> {
        let vcpu = self.vcpu_with_gdb(vcpu)?;
        self.while_stopped(|target| {
            Ok(target.gdb()?.write_memory(vcpu, physical, address, bytes)?)
        })
    }

    pub(crate) fn write_register(
        &mut self,
        vcpu: u32,
        register: Register,
        value: u64,
    ) -> Result<()> {
        let vcpu = self.vcpu_with_gdb(vcpu)?;
        self.while_stopped(|target| Ok(target.gdb()?.write_register(vcpu, register, value)?))
    }

    /// Changes memory and registers, if the vCPU of a target that stands still
    /// is where it is thought to be.
    pub(crate) fn alter(
        &mut self,
        vcpu: u32,
        at: u64,
        memory: Vec<(u64, Bytes)>,
        registers: &[(Register, u64)],
    ) -> Result<()> {
        let vcpu = self.vcpu_with_gdb(vcpu)?;
        let here = self.registers_now(vcpu)?.rip;
        if here != at {
            let reason = format!("vCPU {vcpu} stands at {here:#x}, not at {at:#x}");
            return Err(TargetError::Refused(reason));
        }
        let gdb = self.gdb()?;
        for (address, Bytes(bytes)) in memory {
            gdb.write_memory(vcpu, true, address, bytes)?;
        }
        for (register, value) in registers {
            gdb.write_register(vcpu, *register, *value)?;
        }
        Ok(())
    }

    pub(crate) fn set_breakpoint(&mut self, breakpoint: Breakpoint) -> Result<()> {
        self.gdb()?;
        self.while_stopped(|target| {
            target.gdb()?.set(breakpoint)?;
            target.breakpoints.insert(breakpoint);
            Ok(())
        })?;
        self.settle();
        Ok(())
    }

    pub(crate) fn remove_breakpoint(&mut self, breakpoint: Breakpoint) -> Result<()> {
        self.while_stopped(|target| {
            target.gdb()?.remove(breakpoint)?;
            target.breakpoints.remove(&breakpoint);
            Ok(())
        })?;
        self.settle();
        Ok(())
    }

    pub(crate) fn clear_breakpoints(&mut self) -> Result<()> {
        if self.breakpoints.is_empty() {
            return Ok(());
        }
        self.while_stopped(|target| {
            for breakpoint in std::mem::take(&mut target.breakpoints) {
                target.gdb()?.remove(breakpoint)?;
            }
            Ok(())
        })?;
        self.settle();
        Ok(())
    }

    /// Stops it for good: nobody's end undoes that.
    pub(crate) fn stop_for_good(&mut self) -> Result<()> {
        if self.run_state()?.running {
            self.link()?.qmp.stop()?;
            self.forget_own_events()?;
        }
        self.stopped = false;
        self.settle();
        Ok(())
    }

    /// Lets it run after that.
    pub(crate) fn start(&mut self) -> Result<()> {
        if !self.stopped && !self.run_state()?.running {
            self.resume()?;
        }
        Ok(())
    }

    pub(crate) fn network_devices(&mut self) -> Result<Vec<String>> {
        let text = self.link()?.qmp.monitor_command("info network")?;
        Ok(crate::network::devices(&text))
    }

    pub(crate) fn set_link(&mut self, device: &str, state: LinkState) -> Result<()> {
        let arguments = json!({"name": device, "up": state == LinkState::Up});
        self.link()?.qmp.execute("set_link", &arguments)?;
        Ok(())
    }

    pub(crate) fn reset(&mut self) -> Result<()> {
        self.link()?.qmp.execute("system_reset", &json!({}))?;
        Ok(())
    }

    pub(crate) fn quit(&mut self) -> Result<()> {
        self.link()?.qmp.execute("quit", &json!({}))?;
        Ok(())
    }

    /// Where RAM lies, from QEMU's own map of memory.
    pub(crate) fn layout(&mut self) -> Result<Vec<RamRun>> {
        let text = self.link()?.qmp.monitor_command("info mtree -f")?;
        let layout = RamLayout::from_mtree(&text)
            .map_err(|error| TargetError::Refused(error.to_string()))?;
        let runs = layout.entries().iter().map(|(region, offset)| RamRun {
            start: region.start.as_u64(),
            length: region.length,
            file_offset: *offset,
        });
        Ok(runs.collect())
    }

    /// Begins a dump into an open file. QEMU stops the target for it and lets
    /// it run again itself, whatever becomes of the gate.
    pub(crate) fn begin_dump(&mut self, file: BorrowedFd<'_>) -> Result<()> {
        let link = self.link()?;
        let descriptor = link.qmp.add_descriptor(file)?;
        let protocol = format!("file:/dev/fdset/{}", descriptor.set);
        let arguments = json!({"paging": false, "protocol": protocol, "detach": true});
        link.dump = Some(descriptor);
        let begun = link.qmp.execute("dump-guest-memory", &arguments);
        if begun.is_err() {
            self.end_dump()?;
        }
        begun?;
        Ok(())
    }

    /// Takes the file back from QEMU.
    fn end_dump(&mut self) -> Result<()> {
        let link = self.link()?;
        if let Some(descriptor) = link.dump.take() {
            link.qmp.remove_descriptor(descriptor)?;
        }
        Ok(())
    }

    /// Whether the dump is over: how it ended.
    pub(crate) fn dump_end(&mut self) -> Result<Option<Result<(), String>>> {
        let state = self.link()?.qmp.execute("query-dump", &json!({}))?;
        let status = state.get("status").and_then(Value::as_str);
        let end = match status.unwrap_or_default() {
            "active" => return Ok(None),
            "completed" => Ok(()),
            other => Err(format!("the dump ended as {other:?}")),
        };
        self.end_dump()?;
        Ok(Some(end))
    }
}

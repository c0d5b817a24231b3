//! Commands about a target that a monitor watches: the monitor is asked, and
//! what it says is shown as a local answer would be.
//!
//! The monitor parsed a hostile guest and may be hostile itself by now: what
//! it sends is bounded by the protocol, checked against what was asked, and
//! escaped like all text of a guest; and this process gives up its rights
//! before it listens.

use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use secmon_gate::protocol::TargetState as RunState;
use secmon_guest::{ColumnInfo, Kind, Request, Row, RowSink, Table, TrustLevel, Value};
use secmon_memory::TableLevel;
use secmon_monitor::launch;
use secmon_monitor::launch::connect::Connection;
use secmon_monitor::protocol::{
    self, Answer, ClientError, DiagnosticEntry, End, GateReport, Pause, READ_LIMIT, Refusal,
    TargetReport, TargetState,
};

use secmon_watch::Policy;

use super::{Address, connect_or_wait};
use crate::arguments::{BuiltIn, Common, Format, ReadArguments, RowOptions};
use crate::check::{CheckArguments, Checked};
use crate::command::Action;
use crate::findings::{self, Told};
use crate::inspect::{self, Asked, Place, Sink, Step, Walk, WalkEnd};
use crate::listing::{self, column};
use crate::location::Location;
use crate::query::Query;
use crate::report::{self, Advise, Reporter};
use secmon_sandbox::{Needs, Stage};

/// How long a monitor may take until it answers: it may be booting.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a target may take until the monitor has found its kernel. One that
/// does not run is told after it.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// How much of memory is asked for at once.
const CHUNK: u64 = 256 << 10;

/// The most diagnostics of a monitor that are kept.
const MAX_DIAGNOSTICS: usize = 10_000;

/// The most findings of a monitor that are kept.
const MAX_FINDINGS: usize = 100_000;

/// What became of a command.
pub enum Answered {
    /// It was done, with this exit status.
    Done(ExitCode),
    /// It is about no target.
    Not(Action),
}

/// Runs a command on a monitor's target, or gives it back if it is about no
/// target.
pub fn run(
    address: &Address,
    common: &Common,
    action: Action,
    reporter: Reporter,
) -> Result<Answered> {
    let format = common.format;
    let mut code = ExitCode::SUCCESS;
    match action {
        Action::Show(table, options) => {
            let query = Query::new(table, format, &options)?;
            let mut asked = Target::open_for_tables(address, common, reporter)?;
            asked.show(table, &query, &options, reporter)?;
        }
        Action::BuiltIn(command) => match *command {
            BuiltIn::Read(arguments) => {
                let sink = crate::sink(&arguments, format)?;
                let target = Target::open(address, common, reporter)?;
                target.read(&arguments, sink)?;
            }
            BuiltIn::Translate(arguments) => {
                let mut target = Target::open(address, common, reporter)?;
                target.translate(&arguments.locations, format)?;
            }
            BuiltIn::Targets => {
                refuse_options(common)?;
                let connection = connect_or_wait(&address.monitor, PATIENCE, reporter)?;
                confine(common, reporter);
                list_targets(connection, address, format)?;
            }
            BuiltIn::Check(arguments) if !arguments.list => {
                arguments.chosen()?;
                let policy = arguments.policy()?;
                let mut target = Target::open_for_tables(address, common, reporter)?;
                code = target.check(&arguments, policy.as_ref(), format, reporter)?;
            }
            BuiltIn::Dump(_) => bail!(
                "a monitor's target can't be dumped through it; `secmon -t qemu:NAME dump` on its host can"
            ),
            other => return Ok(Answered::Not(Action::BuiltIn(Box::new(other)))),
        },
    }
    Ok(Answered::Done(code))
}

/// What only a command that has the memory itself can do.
fn refuse_options(common: &Common) -> Result<()> {
    let given = [
        ("--layout", common.layout.is_some()),
        ("--image-format", common.image_format.is_some()),
        ("--isf", common.isf.is_some()),
        ("--thorough", common.thorough),
        ("--max-age", common.max_age.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((option, _)) => {
            bail!("{option} is for a target that is opened here; a monitor opens its own")
        }
        None => Ok(()),
    }
}

/// Gives up every right but talking on what is open.
pub fn confine(common: &Common, reporter: Reporter) {
    if common.no_sandbox {
        return;
    }
    for stage in [Stage::Opening, Stage::Reading] {
        for weakness in secmon_sandbox::confine(stage, &Needs::default()) {
            reporter.note(weakness);
        }
    }
}

/// A target behind a monitor, in a conversation.
pub struct Target {
    connection: Connection,
    name: String,
    pause: Pause,
    /// The grant files of the monitor's gates, by their targets' names.
    grants: Vec<(String, PathBuf)>,
}

impl Target {
    /// Begins a conversation about a target.
    pub fn open(address: &Address, common: &Common, reporter: Reporter) -> Result<Self> {
        if common.pause {
            bail!("a monitor pauses its target for tables only");
        }
        Self::open_for_tables(address, common, reporter)
    }

    /// Begins a conversation about a target, which may be paused.
    fn open_for_tables(address: &Address, common: &Common, reporter: Reporter) -> Result<Self> {
        refuse_options(common)?;
        // Afterwards no file can be read.
        let grants = launch::gates::grant_files(&address.monitor);
        let started = Instant::now();
        let connection = connect_or_wait(&address.monitor, PATIENCE, reporter)?;
        reporter.note(format_args!("connected in {:.1?}", started.elapsed()));
        confine(common, reporter);
        let mut target = Self::choose(connection, address)?;
        target.set_pause(common.pause);
        target.grants = grants;
        target.wait_until_seen()?;
        Ok(target)
    }

    /// Waits for a moment for a monitor that has not looked at its target yet:
    /// it has just been started, or the target has.
    fn wait_until_seen(&mut self) -> Result<()> {
        let deadline = Instant::now() + FIRST_LOOK;
        while Instant::now() < deadline {
            let targets = self.connection.client.targets()?;
            let own = targets.iter().find(|target| target.name == self.name);
            let ready = own.is_none_or(|target| {
                matches!(
                    target.state,
                    TargetState::Running { .. } | TargetState::Stopped { .. }
                )
            });
            if ready {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Whether the target stands still while rows are read from here on.
    pub fn set_pause(&mut self, pause: bool) {
        self.pause = if pause { Pause::WhileRead } else { Pause::None };
    }

    /// The target that is meant, or the only one.
    pub fn choose(mut connection: Connection, address: &Address) -> Result<Self> {
        let name = match &address.target {
            Some(name) => name.clone(),
            None => {
                let mut targets = connection.client.targets()?;
                match (targets.pop(), targets.len()) {
                    (Some(only), 0) => only.name,
                    (None, _) => bail!("monitor {} has no target", address.monitor),
                    (Some(last), _) => {
                        targets.push(last);
                        let names: Vec<String> = targets
                            .iter()
                            .map(|target| format!("monitor:{}/{}", address.monitor, target.name))
                            .collect();
                        return Err(anyhow!("monitor {} has several targets", address.monitor))
                            .advise(format!("name one: {}", names.join(", ")));
                    }
                }
            }
        };
        Ok(Self {
            connection,
            name,
            pause: Pause::None,
            grants: Vec::new(),
        })
    }

    /// The conversation itself.
    pub fn client(&mut self) -> &mut protocol::Client {
        &mut self.connection.client
    }

    /// The conversation, for another target.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    /// Shows a table.
    pub fn show(
        &mut self,
        table: &'static dyn Table,
        query: &Query,
        options: &RowOptions,
        reporter: Reporter,
    ) -> Result<()> {
        let mut told = Told::default();
        let mut source = |request: &Request, sink: &mut RowSink<'_>| {
            self.rows(table, request, query.enough(), sink, &mut told)
        };
        let started = Instant::now();
        let outcome = query.run_from(
            &mut source,
            listing::stdout()?,
            listing::style_of(TrustLevel::L1),
        )?;
        let rows = outcome.summary.rows;
        reporter.note(format_args!("{rows} rows in {:.1?}", started.elapsed()));
        findings::report(&told, query, outcome, options.strict, reporter)
    }

    /// Lets the monitor's detectors look, and shows what they found.
    pub fn check(
        &mut self,
        arguments: &CheckArguments,
        policy: Option<&Policy>,
        format: Format,
        reporter: Reporter,
    ) -> Result<ExitCode> {
        if format == Format::Markdown {
            bail!("--format markdown is for `secmon tables` only");
        }
        if arguments.reader.is_some() {
            bail!("--reader is for a target of this host, such as qemu:NAME");
        }
        if arguments.kernel.is_some() {
            bail!(
                "--kernel: a monitoring VM can't compare kernels with their files yet; check the \
                 target itself, with -t qemu:NAME"
            );
        }
        let asked = protocol::Check {
            target: self.name.clone(),
            detectors: match policy {
                _ if !arguments.detectors.is_empty() => Some(arguments.detectors.clone()),
                Some(policy) => {
                    let enabled = policy.enabled().into_iter();
                    Some(enabled.map(|detector| detector.name().to_owned()).collect())
                }
                None => None,
            },
            credit: 0,
            pause: self.pause,
        };
        let mut checked = Checked::default();
        let end = self.connection.client.check(asked, &mut |answer| {
            match answer {
                Answer::Looked(detectors) => checked.detectors = detectors,
                Answer::Found(finding) if checked.findings.len() < MAX_FINDINGS => {
                    checked.findings.push(*finding);
                }
                Answer::Found(_) => return ControlFlow::Break(()),
                _ => {}
            }
            ControlFlow::Continue(())
        });
        let end = end.map_err(|error| self.explain(error))?;
        let told: u64 = checked
            .detectors
            .iter()
            .map(|detector| detector.findings)
            .sum();
        let came = checked.findings.len() as u64;
        checked.apply(policy, reporter);
        let code = checked.show(arguments, format, TrustLevel::L1, reporter)?;
        if told > came {
            reporter.warn(format_args!(
                "{told} things were found, of which {came} came"
            ));
        }
        ended(end)?;
        if checked.detectors.is_empty() {
            bail!("the monitor does not say what its detectors did");
        }
        Ok(code)
    }

    fn rows(
        &mut self,
        table: &'static dyn Table,
        request: &Request,
        limit: Option<u64>,
        sink: &mut RowSink<'_>,
        told: &mut Told,
    ) -> Result<()> {
        let known = table.columns();
        let columns: Vec<ColumnInfo> = match &request.columns {
            None => known,
            Some(indices) => {
                let columns = indices
                    .iter()
                    .filter_map(|index| known.get(*index).copied());
                columns.collect()
            }
        };
        let names = columns.iter().map(|column| column.name.to_owned());
        let asked = protocol::Query {
            target: self.name.clone(),
            table: table.name().to_owned(),
            columns: Some(names.collect()),
            pids: request.selection.pids.clone(),
            all_namespaces: request.selection.all_namespaces,
            limit,
            credit: 0,
            pause: self.pause,
        };
        let mut malformed = None;
        let end = self.connection.client.query(asked, &mut |answer| {
            match answer {
                Answer::Rows(rows) => {
                    for cells in rows {
                        if cells.len() != columns.len() {
                            malformed = Some((cells.len(), columns.len()));
                            return ControlFlow::Break(());
                        }
                        let values = cells.into_iter().map(Value::from).collect();
                        sink(&mut Row { values })?;
                    }
                }
                Answer::Diagnostics(entries) => note(told, &entries),
                _ => {}
            }
            ControlFlow::Continue(())
        });
        let end = end.map_err(|error| self.explain(error))?;
        told.total = told.total.max(end.diagnostics);
        told.torn_reads = end.torn_reads;
        if let Some((found, expected)) = malformed {
            bail!("the monitor sent a row of {found} values where {expected} were asked for");
        }
        ended(end)
    }

    /// Adds what to do about a right that is missing.
    fn explain(&self, error: ClientError) -> anyhow::Error {
        let denied = matches!(error, ClientError::Refused(Refusal::Denied { .. }));
        let error = anyhow::Error::from(error);
        if !denied {
            return error;
        }
        let mut files = self.grants.iter();
        let file = files.find(|(target, _)| *target == self.name);
        let file = file.map_or_else(
            || "it has a grant file".to_owned(),
            |(_, file)| format!("its grant file is {}", file.display()),
        );
        report::advised(
            error,
            format!(
                "{file}; to grant more, `secmon monitor down` and `secmon monitor up --grants FILE`"
            ),
        )
    }

    fn read(self, arguments: &ReadArguments, sink: Sink) -> Result<()> {
        if arguments.length > READ_LIMIT {
            bail!("a monitor reads at most {READ_LIMIT:#x} bytes at a time");
        }
        let remote = RemoteMemory::find(self, &arguments.location, arguments.length)?;
        inspect::read(&Place::Asked(Box::new(remote)), arguments.length, sink)
    }

    /// As `secmon read`, keeping the conversation.
    pub fn read_with(
        target: Rc<RefCell<Self>>,
        arguments: &ReadArguments,
        sink: Sink,
    ) -> Result<()> {
        let remote = RemoteMemory::find_in(target, &arguments.location, arguments.length)?;
        inspect::read(&Place::Asked(Box::new(remote)), arguments.length, sink)
    }

    /// Shows how addresses are translated.
    pub fn translate(&mut self, locations: &[Location], format: Format) -> Result<()> {
        if let Some(location) = locations
            .iter()
            .find(|location| matches!(location, Location::Physical(_)))
        {
            bail!("{location} is a physical address already");
        }
        let places = locations.iter().map(place).collect();
        let mut walks = Vec::new();
        let end = self
            .connection
            .client
            .translate(&self.name, places, &mut |answer| {
                if let Answer::Walk {
                    address,
                    entries,
                    end,
                } = answer
                {
                    walks.push(walk(address, &entries, end));
                }
                if walks.len() >= locations.len() {
                    // More were not asked for.
                    walks.truncate(locations.len());
                }
                ControlFlow::Continue(())
            })?;
        inspect::translate(walks, format, TrustLevel::L1)?;
        ended(end)
    }

    /// Lists the monitor's targets.
    pub fn targets(&mut self, address: &Address, format: Format) -> Result<()> {
        show_targets(&self.connection.client.targets()?, address, format)
    }
}

fn list_targets(mut connection: Connection, address: &Address, format: Format) -> Result<()> {
    show_targets(&connection.client.targets()?, address, format)
}

fn show_targets(targets: &[TargetReport], address: &Address, format: Format) -> Result<()> {
    let columns = [
        column("target", Kind::Text, "What to give to -t"),
        column("name", Kind::Text, "What the monitor calls it"),
        column("ram", Kind::Unsigned, "Bytes of RAM"),
        column("state", Kind::Text, "What became of it"),
        column("boots", Kind::Unsigned, "How often it was seen to boot"),
        column("gate", Kind::Text, "What its gate says"),
        column(
            "trust_level",
            Kind::Text,
            "How far the monitor is protected",
        ),
    ];
    let rows = targets.iter().map(|target| {
        vec![
            Value::from(format!("monitor:{}/{}", address.monitor, target.name)),
            Value::from(target.name.as_str()),
            Value::from(target.ram_size),
            Value::from(state(target)),
            Value::from(target.boots),
            Value::from(gate(target)),
            Value::from(target.trust_level.name()),
        ]
    });
    Ok(listing::show(&columns, format, rows)?)
}

/// A target's state in words.
pub fn state(target: &TargetReport) -> String {
    match &target.state {
        TargetState::Unreachable { reason } => format!("unreachable: {reason}"),
        TargetState::Empty => "no memory there: it does not run".to_owned(),
        TargetState::NoKernel { reason } => format!("no kernel found: {reason}"),
        TargetState::Running { banner, .. } => format!("running: {}", banner.trim_end()),
        TargetState::Stopped { banner } => format!("stopped: {}", banner.trim_end()),
    }
}

/// What a target's gate says, in words.
pub fn gate(target: &TargetReport) -> String {
    match &target.gate {
        GateReport::None => "none".to_owned(),
        GateReport::Away { reason } => format!("not reached: {reason}"),
        GateReport::Connected {
            state,
            rights,
            qemu,
            ..
        } => {
            let state = match state {
                RunState::Gone => "gone".to_owned(),
                RunState::Running => "running".to_owned(),
                RunState::Held(word) => format!("held still by a monitor ({word})"),
                RunState::Stopped(word) => format!("standing still ({word})"),
            };
            let rights: Vec<&str> = rights.iter().map(|right| right.name()).collect();
            let qemu = qemu.as_deref().unwrap_or("not there");
            format!("QEMU {qemu}: {state}; granted: {}", rights.join(", "))
        }
    }
}

fn note(told: &mut Told, entries: &[DiagnosticEntry]) {
    let room = MAX_DIAGNOSTICS.saturating_sub(told.lines.len());
    let line = |entry: &DiagnosticEntry| match entry.address {
        Some(address) => format!(
            "{}: {} at {address:#x}: {}",
            entry.table, entry.subject, entry.reason
        ),
        None => format!("{}: {}: {}", entry.table, entry.subject, entry.reason),
    };
    told.lines.extend(entries.iter().take(room).map(line));
    told.total = told.total.max(told.lines.len() as u64);
}

fn ended(end: End) -> Result<()> {
    match end.error {
        Some(error) => Err(anyhow!(error)),
        None => Ok(()),
    }
}

fn place(location: &Location) -> protocol::Place {
    match location {
        Location::Symbol { name, offset } => protocol::Place::Symbol {
            name: name.clone(),
            offset: *offset,
        },
        Location::Kernel(address) => protocol::Place::Kernel(*address),
        Location::Process { pid, address } => protocol::Place::Process {
            pid: *pid,
            address: *address,
        },
        Location::Physical(address) => protocol::Place::Physical(*address),
    }
}

fn walk(
    address: u64,
    entries: &[protocol::WalkEntry],
    end: Result<protocol::WalkEnd, String>,
) -> Walk {
    let level = |number| match number {
        1 => Some(TableLevel::Pt),
        2 => Some(TableLevel::Pd),
        3 => Some(TableLevel::Pdpt),
        4 => Some(TableLevel::Pml4),
        5 => Some(TableLevel::Pml5),
        _ => None,
    };
    let steps = entries.iter().filter_map(|entry| {
        Some(Step {
            level: level(entry.level)?,
            entry_address: entry.address,
            entry: entry.entry,
        })
    });
    Walk {
        address,
        steps: steps.take(5).collect(),
        end: match end {
            Ok(end) => Ok(WalkEnd {
                physical: end.physical,
                page_size: end.page_size,
                writable: end.writable,
                user: end.user,
                executable: end.executable,
            }),
            Err(reason) => Err(anyhow!(reason)),
        },
    }
}

/// Memory that the monitor reads, asked for in chunks.
struct RemoteMemory {
    target: Rc<RefCell<Target>>,
    start: u64,
    /// How an address of the same memory is asked for.
    space: Space,
    end: u64,
    chunk: RefCell<Chunk>,
}

#[derive(Clone, Copy)]
enum Space {
    Kernel,
    Process(u64),
    Physical,
}

#[derive(Default)]
struct Chunk {
    address: u64,
    bytes: Vec<u8>,
    /// Why no more followed.
    error: Option<String>,
}

impl RemoteMemory {
    fn find(target: Target, location: &Location, length: u64) -> Result<Self> {
        Self::find_in(Rc::new(RefCell::new(target)), location, length)
    }

    fn find_in(target: Rc<RefCell<Target>>, location: &Location, length: u64) -> Result<Self> {
        let space = match location {
            Location::Symbol { .. } | Location::Kernel(_) => Space::Kernel,
            Location::Process { pid, .. } => Space::Process(*pid),
            Location::Physical(_) => Space::Physical,
        };
        let first = ask(&target, place(location), length.min(CHUNK))
            .with_context(|| format!("reading {location}"))?;
        let start = match location {
            Location::Kernel(address)
            | Location::Process { address, .. }
            | Location::Physical(address) => *address,
            Location::Symbol { .. } if !first.bytes.is_empty() => first.address,
            Location::Symbol { .. } => {
                let reason = first.error.unwrap_or_else(|| "no bytes came".to_owned());
                return Err(anyhow!(reason).context(format!("reading {location}")));
            }
        };
        Ok(Self {
            target,
            start,
            space,
            end: start.saturating_add(length),
            chunk: RefCell::new(Chunk {
                address: start,
                ..first
            }),
        })
    }
}

/// Asks for a chunk.
fn ask(
    target: &RefCell<Target>,
    place: protocol::Place,
    length: u64,
) -> Result<Chunk, ClientError> {
    let mut chunk = Chunk::default();
    let Target {
        connection, name, ..
    } = &mut *target.borrow_mut();
    let end = connection.client.read(name, place, length, &mut |answer| {
        if let Answer::Bytes(address, bytes) = answer {
            if chunk.bytes.is_empty() {
                chunk.address = address;
            }
            let wanted = length.saturating_sub(chunk.bytes.len() as u64);
            let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
            chunk.bytes.extend(bytes.iter().take(wanted));
            if bytes.len() > wanted {
                // More was not asked for: no more credit.
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    chunk.error = end.error;
    Ok(chunk)
}

impl Asked for RemoteMemory {
    fn start(&self) -> u64 {
        self.start
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), String> {
        let mut chunk = self.chunk.borrow_mut();
        let length = buffer.len();
        let inside = |chunk: &Chunk| -> Option<Vec<u8>> {
            let from = usize::try_from(address.checked_sub(chunk.address)?).ok()?;
            let bytes = chunk.bytes.get(from..from.checked_add(length)?)?;
            Some(bytes.to_vec())
        };
        if inside(&chunk).is_none() && chunk.error.is_none() {
            let place = match self.space {
                Space::Kernel => protocol::Place::Kernel(address),
                Space::Process(pid) => protocol::Place::Process { pid, address },
                Space::Physical => protocol::Place::Physical(address),
            };
            let length = self.end.saturating_sub(address).min(CHUNK);
            let next = ask(&self.target, place, length).map_err(|error| error.to_string())?;
            *chunk = Chunk { address, ..next };
        }
        match inside(&chunk) {
            Some(bytes) => {
                buffer.copy_from_slice(&bytes);
                Ok(())
            }
            None => Err(chunk.error.clone().unwrap_or_else(|| {
                "the monitor sent fewer bytes than it was asked for".to_owned()
            })),
        }
    }
}

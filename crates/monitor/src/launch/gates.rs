//! The gates of a monitor: one for each target that has a QMP socket, started
//! and ended with the target, and started again when it dies.
//!
//! The gate's own supervisor keeps gate and keeper alive; here only that one
//! is watched, and what it says of the others is noted. Like the monitoring VM,
//! gates outlive whoever started them and are known again by number and start
//! time.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use secmon_channel::{KeyError, KeyPair};
use secmon_gate::configuration::Configuration;
use secmon_gate::grants::Grants;
use secmon_gate::log::Bounds;
use secmon_gate::protocol::Right;
use secmon_gate::supervisor::Part;

use super::account::Account;
use super::command_line::GatePort;
use super::gate_starter::{GatePlan, forbid_connecting, give_to};
use super::process::ProcessRecord;
use super::run_directory::{RunDirectory, RunDirectoryError};
use super::state::{GateSettings, GateState, Processes, Settings};
use super::target::{RunningTarget, TargetName};
use super::{GATE_COMMAND, MonitorName, files};

/// How long a gate may take until it serves.
const START: Duration = Duration::from_secs(10);
/// The first and the longest wait before another attempt.
const BACK_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A gate that lived this long has the first wait again.
const STEADY: Duration = Duration::from_secs(5);
/// How long a gate's processes may take to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most bytes of what a gate's processes said.
const MESSAGES: u64 = 256 << 10;

/// The name of the virtio-serial port that leads to the gate of a slot.
#[must_use]
pub fn port_name(slot: u32) -> String {
    format!("org.secmon.gate.{slot}")
}

/// The gate's socket in the monitor's folder.
fn socket(directory: &RunDirectory, slot: u32) -> PathBuf {
    directory.file(&format!("gate-{slot}.sock"))
}

/// The ports that lead to the gates, whether those run or not.
#[must_use]
pub fn ports(directory: &RunDirectory, gates: &[GateSettings]) -> Vec<GatePort> {
    let slots = gates.iter().zip(0..);
    slots
        .map(|(_, number)| GatePort {
            number,
            socket: socket(directory, number),
        })
        .collect()
}

/// The folder of a gate's key and grants.
fn folder(directory: &RunDirectory, slot: u32) -> PathBuf {
    directory.file(&format!("gate-{slot}"))
}

fn messages(directory: &RunDirectory, slot: u32) -> PathBuf {
    directory.file(&format!("gate-{slot}.messages"))
}

/// Why a gate's files can't be made.
#[derive(Debug, thiserror::Error)]
pub enum GateFilesError {
    /// The system refused.
    #[error("{what} {path}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// On which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Its key.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// The folder of a monitor's logs, where none is named: they outlive the
/// monitor.
#[must_use]
pub fn default_logs(name: &MonitorName) -> Option<PathBuf> {
    let variable = |name| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let base = variable("XDG_STATE_HOME").or_else(|| {
        if rustix::process::geteuid().is_root() {
            return Some(PathBuf::from("/var/log"));
        }
        Some(variable("HOME")?.join(".local/state"))
    })?;
    Some(base.join("secmon").join("gates").join(name.as_str()))
}

/// Makes the files of the gate of a slot: its key, its grants, and the folder
/// of its log.
///
/// # Errors
/// [`GateFilesError`].
pub fn prepare(
    directory: &RunDirectory,
    slot: u32,
    grants: Grants,
    logs: &Path,
    account: Option<Account>,
) -> Result<GateSettings, GateFilesError> {
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| GateFilesError::Host { what, path, source }
    };
    let own = folder(directory, slot);
    make_folder(&own, 0o711).map_err(failed("making", &own))?;
    let key = KeyPair::generate()?;
    let key_file = own.join(files::GATE_KEY);
    key.write_new(&key_file)?;
    give_to(&key_file, account).map_err(failed("giving to the gate's user", &key_file))?;
    // The gate's user reads what is granted, and can't change it.
    let file = own.join(files::GATE_GRANTS);
    fs::write(&file, grants.to_text()).map_err(failed("writing", &file))?;
    let readable = fs::Permissions::from_mode(0o644);
    fs::set_permissions(&file, readable).map_err(failed("changing the mode of", &file))?;
    // Others may pass, to a folder that is the gate's alone.
    let mut log_folder = logs.to_owned();
    make_folder(&log_folder, 0o711).map_err(failed("making", &log_folder))?;
    log_folder.push(log_name(&grants.target));
    make_folder(&log_folder, 0o700).map_err(failed("making", &log_folder))?;
    let log = log_folder.join(files::GATE_LOG);
    let responds = |grant: &secmon_gate::grants::Grant| grant.allows(Right::Respond);
    let dumps = grants.monitors.iter().any(responds);
    let dumps = dumps.then(|| log_folder.join("dumps"));
    if let Some(dumps) = &dumps {
        make_folder(dumps, 0o700).map_err(failed("making", dumps))?;
        give_to(dumps, account).map_err(failed("giving to the gate's user", dumps))?;
    }
    // Of an earlier gate, which had a user of its own.
    let entries = fs::read_dir(&log_folder).map_err(failed("listing", &log_folder))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(files::GATE_LOG) {
            let path = entry.path();
            give_to(&path, account).map_err(failed("giving to the gate's user", &path))?;
        }
    }
    give_to(&log_folder, account).map_err(failed("giving to the gate's user", &log_folder))?;
    Ok(GateSettings {
        account,
        key: key.public(),
        grants,
        log,
        dumps,
    })
}

/// Makes a folder, with those above it, unless it is there.
fn make_folder(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        make_folder(above, mode | 0o011)?;
    }
    fs::DirBuilder::new().mode(mode).create(path)?;
    // Whatever the mask says.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// A target's name as that of a folder.
fn log_name(target: &str) -> String {
    if target.starts_with('.') {
        format!("_{target}")
    } else {
        target.to_owned()
    }
}

/// A running gate.
struct Running {
    /// Its supervisor.
    process: ProcessRecord,
    /// The target's QEMU that it is for.
    target: ProcessRecord,
    /// Of a gate that this process started.
    child: Option<Child>,
    since: Instant,
}

/// The gate of a slot, or what keeps it away.
#[derive(Default)]
struct Slot {
    running: Option<Running>,
    /// When the next attempt is due, and how long to wait after it.
    next: Option<(Instant, Duration)>,
}

impl Slot {
    fn wait(&mut self) {
        let wait = self.next.map_or(BACK_OFF.0, |(_, wait)| wait);
        let longer = (wait * 2).min(BACK_OFF.1);
        self.next = Some((Instant::now() + wait, longer));
    }

    fn is_due(&self) -> bool {
        self.next.is_none_or(|(due, _)| Instant::now() >= due)
    }
}

/// All gates of a monitor.
pub(super) struct Gates {
    slots: Vec<Slot>,
}

/// A gate that is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GateRecord {
    /// The target's slot.
    pub slot: u32,
    /// The gate's supervisor.
    pub process: ProcessRecord,
    /// The target's QEMU.
    pub target: ProcessRecord,
}

impl Gates {
    /// The gates of a monitor, those that run already among them.
    pub(super) fn adopt(settings: &Settings, records: &[GateRecord]) -> Self {
        let slots = (0..settings.gates.len()).map(|slot| {
            let record = records
                .iter()
                .find(|record| record.slot as usize == slot && record.process.is_alive());
            Slot {
                running: record.map(|record| Running {
                    process: record.process,
                    target: record.target,
                    child: None,
                    since: Instant::now(),
                }),
                next: None,
            }
        });
        Self {
            slots: slots.collect(),
        }
    }

    /// Those that run, to be written down.
    pub(super) fn records(&self) -> Vec<GateRecord> {
        let slots = self.slots.iter().zip(0..);
        slots
            .filter_map(|(slot, number)| {
                let running = slot.running.as_ref()?;
                Some(GateRecord {
                    slot: number,
                    process: running.process,
                    target: running.target,
                })
            })
            .collect()
    }

    /// Does what is due for a slot whose target is `target` now, if it is
    /// watched. `old` is what was known; gives what is known then, and tells
    /// what happened.
    pub(super) fn tend(
        &mut self,
        place: &Place<'_>,
        target: Option<ProcessRecord>,
        old: &GateState,
        note: &mut dyn FnMut(String),
    ) -> GateState {
        let Some(slot) = self.slots.get_mut(place.slot as usize) else {
            return GateState::Idle;
        };
        let mut restarts = old.restarts();
        if let Some(mut running) = slot.running.take() {
            let reaped = running
                .child
                .as_mut()
                .is_some_and(|child| !matches!(child.try_wait(), Ok(None)));
            let alive = !reaped && running.process.is_alive();
            // While the monitoring VM is started again no target is watched.
            let target_lives = target.is_none() && running.target.is_alive();
            if alive && (target == Some(running.target) || target_lives) {
                let state = look_at(&running, place, old, note);
                if running.since.elapsed() > STEADY {
                    slot.next = None;
                }
                slot.running = Some(running);
                return state;
            }
            if alive {
                // Another target has its name now, or none.
                note(format!("{}: the gate is ended with it", place.name));
                end(running.process);
                if let Some(child) = &mut running.child {
                    let _ = child.wait();
                }
                slot.next = None;
            } else {
                restarts += 1;
                note(format!(
                    "{}: the gate's supervisor ended{}; the gate is started again",
                    place.name,
                    said(place)
                ));
            }
        }
        let Some(target) = target else {
            return GateState::Idle;
        };
        if !slot.is_due() {
            return match old {
                GateState::Without { .. } => old.clone(),
                _ => GateState::Without {
                    reason: "it is being started again".to_owned(),
                    restarts,
                },
            };
        }
        slot.wait();
        let reason = match start(place, target) {
            Ok((running, qmp)) => {
                note(format!(
                    "{}: a gate was started: process {}",
                    place.name, running.process.pid
                ));
                let fresh = GateState::Running {
                    qmp,
                    gate: None,
                    keeper: None,
                    restarts,
                };
                let state = look_at(&running, place, &fresh, &mut |_| {});
                slot.running = Some(running);
                return state;
            }
            Err(reason) => reason,
        };
        let state = GateState::Without { reason, restarts };
        if state != *old
            && let GateState::Without { reason, .. } = &state
        {
            note(format!("{}: there is no gate: {reason}", place.name));
        }
        state
    }
}

/// What a gate is started with.
pub(super) struct Place<'a> {
    pub(super) directory: &'a RunDirectory,
    pub(super) settings: &'a GateSettings,
    /// The user of the monitor's QEMU.
    pub(super) client: Option<Account>,
    pub(super) slot: u32,
    pub(super) name: &'a TargetName,
}

/// Starts a gate and waits until it serves.
fn start(place: &Place<'_>, target: ProcessRecord) -> Result<(Running, String), String> {
    let found: RunningTarget = place.name.find().map_err(|error| error.to_string())?;
    if found.process != target {
        return Err("its QEMU is just being replaced".to_owned());
    }
    let qmp = found.control.free().map_err(|error| error.to_string())?;
    let own = folder(place.directory, place.slot);
    let bounds = Bounds::default();
    let plan = GatePlan {
        target,
        account: place.settings.account,
        client: place.client,
        configuration: Configuration {
            grants: own.join(files::GATE_GRANTS),
            key: own.join(files::GATE_KEY),
            qmp: qmp.to_owned(),
            gdb: found.control.gdb.clone(),
            socket: socket(place.directory, place.slot),
            log: place.settings.log.clone(),
            log_bytes: bounds.file_bytes,
            log_files: bounds.kept_files,
            dumps: place.settings.dumps.clone(),
            user: None,
        },
    };
    let file = format!("gate-{}.json", place.slot);
    let written = place.directory.write(&file, &plan);
    written.map_err(|error| error.to_string())?;
    let path = messages(place.directory, place.slot);
    let spawn = || -> io::Result<Child> {
        let said = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)?;
        said.set_len(0)?;
        Command::new(std::env::current_exe()?)
            .arg(GATE_COMMAND)
            .arg(place.directory.file(&file))
            .current_dir("/")
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn()
    };
    let mut child = spawn().map_err(|error| format!("starting it: {error}"))?;
    let failed = |child: &mut Child| {
        let _ = child.kill();
        let _ = child.wait();
        let said = said(place);
        match said.is_empty() {
            true => "it ended as soon as it was started".to_owned(),
            false => format!("it could not be started{said}"),
        }
    };
    let Some(process) = ProcessRecord::of(child.id()) else {
        return Err(failed(&mut child));
    };
    // Whoever comes after this process, if it is killed now, has to know it.
    let record = GateRecord {
        slot: place.slot,
        process,
        target,
    };
    if let Err(error) = write_down(place.directory, record) {
        let _ = failed(&mut child);
        return Err(error.to_string());
    }
    let deadline = Instant::now() + START;
    loop {
        if !matches!(child.try_wait(), Ok(None)) {
            return Err(failed(&mut child));
        }
        let parts = parts(process);
        if parts.gate.is_some_and(is_confined) {
            break;
        }
        if Instant::now() > deadline {
            return Err(failed(&mut child));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let running = Running {
        process,
        target,
        child: Some(child),
        since: Instant::now(),
    };
    Ok((running, qmp.display().to_string()))
}

/// Adds a gate to what is written down of the monitor's processes.
fn write_down(directory: &RunDirectory, record: GateRecord) -> Result<(), RunDirectoryError> {
    let mut processes: Processes = directory.read(files::PROCESSES)?.unwrap_or_default();
    processes.gates.retain(|other| other.slot != record.slot);
    processes.gates.push(record);
    directory.write(files::PROCESSES, &processes)
}

/// What a running gate is made of now.
fn look_at(
    running: &Running,
    place: &Place<'_>,
    old: &GateState,
    note: &mut dyn FnMut(String),
) -> GateState {
    let messages = messages(place.directory, place.slot);
    if fs::metadata(&messages).is_ok_and(|metadata| metadata.len() > MESSAGES) {
        // Opened for appending, it goes on at its start.
        let file = OpenOptions::new().write(true).open(&messages);
        let _ = file.and_then(|file| file.set_len(0));
    }
    let parts = parts(running.process);
    let (qmp, before, restarts) = match old {
        GateState::Running {
            qmp,
            gate,
            keeper,
            restarts,
        } => (qmp.clone(), (*gate, *keeper), *restarts),
        // After a take-over.
        _ => (String::new(), (None, None), old.restarts()),
    };
    let mut restarts = restarts;
    let mut changed = |what: &str, before: Option<u32>, now: Option<u32>| {
        if let (Some(before), Some(now)) = (before, now)
            && before != now
        {
            restarts += 1;
            note(format!(
                "{}: the {what} (process {before}) ended and was started again (process {now})",
                place.name
            ));
        }
    };
    changed("gate", before.0, parts.gate);
    // A keeper ends with its gate.
    if before.0 == parts.gate {
        changed("gate's keeper", before.1, parts.keeper);
    }
    GateState::Running {
        qmp,
        // While one is being started again, the one before is remembered.
        gate: parts.gate.or(before.0),
        keeper: parts.keeper.or(before.1),
        restarts,
    }
}

/// A gate's processes beside its supervisor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) gate: Option<u32>,
    pub(super) keeper: Option<u32>,
}

/// Finds them among the supervisor's children.
pub(super) fn parts(supervisor: ProcessRecord) -> Parts {
    let mut parts = Parts::default();
    if !supervisor.is_alive() {
        return parts;
    }
    let pid = supervisor.pid;
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    for child in children.unwrap_or_default().split_whitespace() {
        let arguments = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        let command = arguments.split(|byte| *byte == 0).nth(1);
        let is = |part: Part| command == Some(part.command().as_bytes());
        if is(Part::Gate) {
            parts.gate = child.parse().ok();
        } else if is(Part::Keeper) {
            parts.keeper = child.parse().ok();
        }
    }
    parts
}

/// Whether a gate has read its files and confined itself: it serves.
fn is_confined(gate: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{gate}/status")).unwrap_or_default();
    let mode = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() == "2")
}

/// Ends a gate's supervisor; gate and keeper let the target run and end by
/// themselves. Gives whether all are gone.
pub(super) fn end(supervisor: ProcessRecord) -> bool {
    let parts = parts(supervisor);
    let others: Vec<ProcessRecord> = [parts.gate, parts.keeper]
        .into_iter()
        .flatten()
        .filter_map(ProcessRecord::of)
        .collect();
    let ended = supervisor.end(PATIENCE);
    let deadline = Instant::now() + PATIENCE;
    while others.iter().any(|process| process.is_alive()) {
        if Instant::now() > deadline {
            // They are deaf to signals that ask; what is owed to the target
            // has been done long before.
            return others.iter().all(|process| process.end(PATIENCE)) && ended;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    ended
}

/// What a gate's processes said last, as a clause.
fn said(place: &Place<'_>) -> String {
    let text = fs::read(messages(place.directory, place.slot)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    let last: String = last
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(500)
        .collect();
    if last.is_empty() {
        String::new()
    } else {
        format!(": {last}")
    }
}

/// Takes back what the gates' users were allowed, as far as the targets still
/// run.
pub(super) fn forbid(settings: &Settings) {
    for (gate, target) in settings.gates.iter().zip(&settings.targets) {
        let Some(account) = gate.account else {
            continue;
        };
        if let Ok(found) = target.find() {
            let sockets = found.control.qmp.iter().map(|monitor| &monitor.path);
            for socket in sockets.chain(&found.control.gdb) {
                forbid_connecting(socket, account);
            }
        }
    }
}

/// The grant files of a monitor's gates, each with its target's name; none if
/// that can't be told.
#[must_use]
pub fn grant_files(monitor: &MonitorName) -> Vec<(String, PathBuf)> {
    let Ok(directory) = RunDirectory::of(monitor) else {
        return Vec::new();
    };
    let settings: Option<Settings> = directory.read(files::SETTINGS).ok().flatten();
    let settings = settings.iter().flat_map(|settings| {
        let gates = settings.gates.iter().zip(&settings.targets).zip(0..);
        gates.map(|((_, target), slot)| {
            let file = folder(&directory, slot).join(files::GATE_GRANTS);
            (target.short(), file)
        })
    });
    settings.collect()
}

/// What the monitor of this name may do through a gate, in words.
#[must_use]
pub fn rights(settings: &GateSettings, monitor: &MonitorName) -> String {
    let mut grants = settings.grants.monitors.iter();
    let Some(grant) = grants.find(|grant| grant.name == monitor.as_str()) else {
        return "nothing".to_owned();
    };
    let named = |allowed: bool| -> Vec<&str> {
        let all = Right::ALL.iter();
        all.filter(|right| grant.allows(**right) == allowed)
            .map(|right| right.name())
            .collect()
    };
    let mut text = named(true).join(", ");
    if grant.rights.len() == 1 {
        text.push_str(" alone (its state and where its RAM lies)");
    }
    let others = named(false);
    if !others.is_empty() {
        text.push_str("; not ");
        text.push_str(&others.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn settings(rights: &[Right]) -> GateSettings {
        let key = KeyPair::generate().expect("keys").public();
        let mut grants = Grants::observe_alone("web1", "m", key);
        grants.monitors[0].rights.extend(rights);
        GateSettings {
            account: None,
            key,
            grants,
            log: PathBuf::from("/x"),
            dumps: None,
        }
    }

    #[test]
    fn rights_are_told_with_those_that_are_missing() {
        let monitor: MonitorName = "m".parse().expect("a name");
        let said = rights(&settings(&[]), &monitor);
        assert!(said.starts_with("observe alone"), "{said}");
        assert!(
            said.ends_with("; not pause, trace, respond, control"),
            "{said}"
        );
        let said = rights(&settings(&[Right::Pause, Right::Respond]), &monitor);
        assert_eq!(said, "observe, pause, respond; not trace, control");
        assert_eq!(
            rights(&settings(&Right::ALL), &monitor)
                .matches("not")
                .count(),
            0
        );
        let other: MonitorName = "n".parse().expect("a name");
        assert_eq!(rights(&settings(&[]), &other), "nothing");
    }

    #[test]
    fn a_gates_files_are_there_and_closed_to_others() {
        let base = tempfile::tempdir().expect("a folder");
        let name: MonitorName = "m".parse().expect("a name");
        let directory = RunDirectory::in_base(base.path(), &name).expect("a folder");
        directory.make().expect("made");
        let grants = settings(&[Right::Respond]).grants;
        let logs = base.path().join("state/m");
        let made = prepare(&directory, 1, grants.clone(), &logs, None).expect("made");
        let mode = |path: &Path| path.metadata().expect("it is there").mode() & 0o777;
        let own = folder(&directory, 1);
        assert_eq!(mode(&own.join(files::GATE_KEY)), 0o600);
        let key = KeyPair::read(&own.join(files::GATE_KEY)).expect("a key");
        assert_eq!(key.public(), made.key);
        assert_eq!(
            Grants::read(&own.join(files::GATE_GRANTS)).expect("grants"),
            grants
        );
        assert_eq!(mode(&logs), 0o711);
        assert_eq!(mode(&logs.join("web1")), 0o700);
        assert_eq!(made.log, logs.join("web1/gate.log"));
        assert_eq!(made.dumps, Some(logs.join("web1/dumps")));
        // Again, beside the log of an earlier gate.
        fs::write(&made.log, "x").expect("a log");
        fs::remove_dir_all(&own).expect("removed");
        let observer = settings(&[]).grants;
        let made = prepare(&directory, 1, observer, &logs, None).expect("made");
        assert_eq!(made.dumps, None);
        assert_eq!(fs::read(&made.log).expect("a log"), b"x");
        assert_eq!(log_name(".."), "_..");
    }
}

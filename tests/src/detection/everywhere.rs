//! The same findings, wherever the guest's memory is read: from the running
//! machine, from its bare memory, from a dump, from inside a monitoring VM.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secmon_detect::{Confirmation, detectors};
use secmon_lab::qmp::{DumpFormat, Qmp};
use secmon_lab::specimens::{Active, How, Need, Specimen};
use secmon_lab::{Emulator, Guest, MonitorVm, Suite, appliance_image};
use secmon_monitor::protocol::{Answer, Check, CheckFinding, Client, Pause};
use serde::{Deserialize, Serialize};

use crate::open::{self, Opened};

/// How long a monitoring VM may take to know its target.
const PATIENCE: Duration = Duration::from_secs(240);

/// Detectors whose specimens change instructions, which can't stand beside
/// each other, or registers, which are not told everywhere.
const ALONE: &[&str] = &["kernel_text", "tracing", "system_calls", "registers"];

/// Whether a specimen can be found wherever the guest's memory is read: not if
/// the kernel's file is needed for it, which a monitoring VM has not.
#[must_use]
pub fn can_be_found(specimen: &Specimen) -> bool {
    specimen.expected.detector != "kernel_image"
}

/// What was found of many specimens at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Everywhere {
    /// The specimens that were there together.
    pub specimens: Vec<String>,
    /// How many findings there were.
    pub findings: usize,
    /// Where the same was found: `dump`, `monitor`.
    pub same: Vec<String>,
    /// Where it was not, and what differed.
    pub differences: Vec<String>,
}

/// What a check found, in an order that does not depend on who looked.
pub type Found = Vec<CheckFinding>;

fn sorted(mut found: Found) -> Found {
    found.sort_by(|a, b| {
        let key = |one: &CheckFinding| {
            (
                one.detector.clone(),
                one.name.clone(),
                format!("{:?}", one.subject_columns),
            )
        };
        key(a).cmp(&key(b))
    });
    found
}

/// What all detectors find in a guest that was opened here. As a monitoring VM
/// has no kernel's file, none is used here.
fn found_in(opened: &Opened) -> Found {
    let guest = secmon_guest::Guest::new(opened.kernel.clone());
    let report = secmon_detect::check(&guest, detectors(), Confirmation::default());
    sorted(report.findings.iter().map(Into::into).collect())
}

/// What all detectors find through a monitoring VM.
fn found_through(client: &mut Client, target: &str) -> Result<Found> {
    let check = Check {
        target: target.to_owned(),
        detectors: None,
        credit: 0,
        pause: Pause::None,
    };
    let mut found = Vec::new();
    let end = client.check(check, &mut |answer| {
        if let Answer::Found(finding) = answer {
            found.push(*finding);
        }
        ControlFlow::Continue(())
    })?;
    ensure!(end.error.is_none(), "{target}: {:?}", end.error);
    Ok(sorted(found))
}

/// Starts as many of the suite's specimens as can stand beside each other.
///
/// # Errors
/// If one can't be started.
pub fn start_many(guest: &Guest, suite: Suite) -> Result<Vec<Active<'_>>> {
    let mut taken: BTreeSet<&'static str> = BTreeSet::new();
    let mut active = Vec::new();
    for specimen in Specimen::of(suite) {
        let needs = resources(specimen);
        if needs.is_empty() || needs.iter().any(|need| taken.contains(need)) {
            continue;
        }
        taken.extend(needs);
        active.push(Active::start(guest, specimen)?);
    }
    Ok(active)
}

/// What only one specimen at a time can have; nothing for one that stands
/// alone.
fn resources(specimen: &Specimen) -> Vec<&'static str> {
    if ALONE.contains(&specimen.expected.detector) || specimen.expected.finding.is_none() {
        return Vec::new();
    }
    let of_module = |needs: &'static [Need], file| {
        let mut all = vec![file];
        all.extend(needs.iter().filter_map(|need| match need {
            Need::Process(role) | Need::Thread(role) => Some(*role),
            Need::Resident => Some("resident"),
            Need::Symbol(_) | Need::SymbolIfThere(_) | Need::Set(_) => None,
        }));
        all
    };
    match specimen.how {
        How::Module(module) => of_module(module.needs, module.file),
        How::HiddenModule(module) => {
            let mut all = of_module(module.needs, module.file);
            all.push("module_unlinked");
            all
        }
        How::Program(role) => vec![role],
        How::Setting { path, .. } => vec![path],
        How::MemoryEdit(_) => Vec::new(),
    }
}

/// Looks from everywhere at a guest that stands still.
///
/// # Errors
/// If a dump can't be made or opened, or the monitoring VM does not come up.
pub fn look(
    guest: &Guest,
    qmp: &mut Qmp,
    opened: &Opened,
    specimens: Vec<String>,
    monitor: Option<&MonitorVm>,
) -> Result<Everywhere> {
    let live = found_in(opened);
    let mut result = Everywhere {
        specimens,
        findings: live.len(),
        same: Vec::new(),
        differences: Vec::new(),
    };
    let path = guest.folder().join("dump");
    qmp.dump(&path, DumpFormat::Elf)?;
    let dump = open::image(&path)?;
    result.note("dump", &live, &found_in(&dump));
    drop(dump);
    std::fs::remove_file(&path)?;
    if let Some(monitor) = monitor {
        let mut client = connect(monitor, guest.name())?;
        let found = found_through(&mut client, guest.name())?;
        result.note("monitor", &live, &found);
    }
    Ok(result)
}

/// A client of the monitoring VM, once that knows its target.
fn connect(monitor: &MonitorVm, target: &str) -> Result<Client> {
    let mut client = monitor.connect()?;
    let start = Instant::now();
    while let Err(error) = crate::monitored::pids(&mut client, target) {
        ensure!(start.elapsed() < PATIENCE, "{error:#}");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(client)
}

/// Starts a monitoring VM that watches the guest.
///
/// # Errors
/// If it can't be built or started.
pub fn monitor(guest: &Guest) -> Result<MonitorVm> {
    let image = appliance_image(Suite::Bookworm)?;
    MonitorVm::start(Emulator::Installed, &image, &[guest]).context("a monitoring VM")
}

impl Everywhere {
    fn note(&mut self, place: &str, live: &Found, there: &Found) {
        if live == there {
            self.same.push(place.to_owned());
            return;
        }
        let lacking = live.iter().filter(|one| !there.contains(one));
        let more = there.iter().filter(|one| !live.contains(one));
        let brief = |what: &str, one: &CheckFinding| {
            format!("{place}: {what} {}/{}: {one:?}", one.detector, one.name)
        };
        self.differences
            .extend(lacking.map(|one| brief("lacks", one)));
        self.differences.extend(more.map(|one| brief("has", one)));
    }
}

//! What the detectors say of a guest that is clean, and of each specimen in
//! it.

pub mod blinking;
pub mod clean;
pub mod everywhere;
mod loads;
pub mod plan;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use secmon_detect::{Class, Confirmation, Detector, Outcome, Report, detectors};
use secmon_guest::Guest as Watched;
use secmon_lab::specimens::{self, Active, Edit, How, Specimen, Verdict};
use secmon_lab::{Guest, Kernel, MonitorVm, Suite};
use serde::{Deserialize, Serialize};

use crate::memory_edits::Edited;
use crate::open::{self, Opened};
use blinking::Blinking;
use clean::{Clean, check_under};
use everywhere::Everywhere;
use loads::LOADS;

/// The detector that needs something to compare the kernel with.
const REFERRING: &str = "kernel_image";
/// What it says where that is no file.
const FIRST_STATE: &str = "kernel_image/first_state";

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Checks of the clean guest under each load.
    pub clean_checks: u32,
    /// Whether all detectors look at each specimen, to learn what else finds
    /// it, or only the one that is said to.
    pub look_for_unexpected: bool,
    /// Whether a monitoring VM looks at the guest as well.
    pub monitor: bool,
}

/// What was measured at one kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The kernel's series.
    pub kernel: String,
    /// Checks of the clean guest under each load.
    pub clean: Vec<Clean>,
    /// One for each specimen that was tried.
    pub specimens: Vec<Tried>,
    /// A look of each detector at the clean guest, in milliseconds.
    pub detectors: Vec<(String, f64)>,
    /// Detectors that could not work here, and why.
    pub not_checked: Vec<String>,
    /// Many specimens at once, looked at from everywhere.
    #[serde(default)]
    pub everywhere: Vec<Everywhere>,
    /// What hides and shows itself by turns.
    #[serde(default)]
    pub blinking: Vec<Blinking>,
    /// What is not as it has to be.
    #[serde(skip)]
    pub complaints: Vec<String>,
}

impl Measured {
    /// Nothing yet.
    #[must_use]
    pub fn new(kernel: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            clean: Vec::new(),
            specimens: Vec::new(),
            detectors: Vec::new(),
            not_checked: Vec::new(),
            everywhere: Vec::new(),
            blinking: Vec::new(),
            complaints: Vec::new(),
        }
    }

    /// Forgets loads that are no more, and brings the others into their order.
    pub fn sort_clean(&mut self) {
        let place = |clean: &Clean| LOADS.iter().position(|load| load.name == clean.load);
        self.clean.retain(|clean| place(clean).is_some());
        self.clean.sort_by_key(|clean| (clean.vcpus, place(clean)));
    }
}

/// One specimen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// Its name.
    pub name: String,
    /// What it was found as (`detector/finding`), and what a look of that
    /// detector took in milliseconds.
    pub found: Option<(String, f64)>,
    /// What else was found, `detector/finding`.
    pub besides: Vec<String>,
    /// Whether the same was found in an image of the guest's memory.
    #[serde(default)]
    pub same_in_image: bool,
}

/// Boots a guest of the suite and tries everything.
///
/// # Errors
/// If the guest does not boot, can't be opened, or a specimen does not do what
/// it says. What detectors do not find, or find where nothing is, is among the
/// complaints.
pub fn measure(suite: Suite, effort: Effort) -> Result<Measured> {
    let kernel = Kernel::fetch(suite)?;
    let mut builder = Guest::builder(suite)
        .kernel(kernel.clone())
        .vcpus(1)
        .tools();
    if Specimen::of(suite).any(Specimen::needs_modules) {
        builder = builder.specimens(specimens::modules(suite, &kernel)?);
    }
    let lab = builder.boot()?;
    let file = open::kernel_file(&kernel.image())?;
    let opened = open::target(&format!("qemu:{}", lab.pid()))?.with_reference(&file);
    let mut bench = Bench {
        lab: &lab,
        effort,
        measured: Measured::new(suite.series()),
    };
    bench.clean(&opened)?;
    let image = open::image(&lab.ram_file().context("a RAM file")?)?
        .with_reference(&file)
        .with_first_state_of(&opened);
    let monitor = effort.monitor.then(|| everywhere::monitor(&lab));
    let monitor = monitor.transpose()?;
    let places = Places {
        live: &opened,
        image: &image,
        monitor: monitor.as_ref(),
    };
    for specimen in Specimen::of(suite) {
        if !matches!(specimen.how, How::MemoryEdit(_)) {
            bench
                .try_one(places, specimen)
                .with_context(|| format!("{suite}, the specimen {}", specimen.name))?;
        }
    }
    bench.try_many(suite, places)?;
    bench.try_edits(suite, places)?;
    Ok(bench.measured)
}

/// Whether a detector is there that is said to find the specimen.
#[must_use]
pub fn has_detector(specimen: &Specimen) -> bool {
    specimen.expected.finding.is_some()
        && secmon_detect::detector(specimen.expected.detector).is_some()
}

fn check(guest: &Watched, detectors: &[&'static dyn Detector]) -> Report {
    secmon_detect::check(guest, detectors, Confirmation::default())
}

/// `detector/finding` of each finding, once.
fn names(report: &Report, only_alarms: bool) -> BTreeSet<String> {
    let findings = report.findings.iter();
    let counted = findings.filter(|finding| !only_alarms || finding.class.is_alarm());
    counted
        .map(|finding| format!("{}/{}", finding.detector, finding.name))
        .collect()
}

/// Each finding with what it is about.
fn subjects(report: &Report) -> BTreeSet<(&'static str, &'static str, String)> {
    let findings = report.findings.iter();
    findings
        .map(|finding| (finding.detector, finding.name, finding.subject.key()))
        .collect()
}

/// Where the guest's memory is read.
#[derive(Clone, Copy)]
struct Places<'a> {
    /// The machine as it is.
    live: &'a Opened,
    /// The file of its memory, taken for an image.
    image: &'a Opened,
    /// A monitoring VM beside it.
    monitor: Option<&'a MonitorVm>,
}

struct Bench<'a> {
    lab: &'a Guest,
    effort: Effort,
    measured: Measured,
}

impl Bench<'_> {
    fn clean(&mut self, opened: &Opened) -> Result<()> {
        let first = check(&opened.guest(), detectors());
        for detector in &first.detectors {
            let time = detector.time / detector.looks.max(1);
            let name = detector.detector.to_owned();
            self.measured.detectors.push((name, milliseconds(time)));
            if let Outcome::NotChecked(why) = &detector.outcome {
                let text = format!("{}: {why}", detector.detector);
                self.measured.not_checked.push(text);
            }
        }
        self.first_state(opened, "at first");
        for load in LOADS {
            let mut clean = Clean::new(load.name, 1);
            let goal = self.effort.clean_checks;
            let mut wrong = Vec::new();
            let mut flow = |_: &Clean, found: Vec<String>| {
                wrong.extend(found);
                ControlFlow::Continue(())
            };
            check_under(load, self.lab.truth(), opened, goal, &mut clean, &mut flow)?;
            for finding in wrong {
                self.complain(&format!("clean guest, {}: {finding}", load.name));
            }
            if clean.incomplete > 0 {
                println!("{}, {clean:?}", self.measured.kernel);
            }
            if goal > 0 {
                self.measured.clean.push(clean);
            }
            self.first_state(opened, load.name);
        }
        Ok(())
    }

    /// The kernel beside its state at the first look, which was taken before all
    /// loads.
    fn first_state(&mut self, opened: &Opened, load: &str) {
        let report = check(&opened.guest_by_first_state(), &by_reference());
        let found = names(&report, false);
        // It may be changing its code just now.
        let told = !report.is_complete() || found.contains(FIRST_STATE);
        if !told || found.iter().any(|name| name != FIRST_STATE) {
            self.complain(&format!("first state, {load}: {report:?}"));
        }
    }

    /// Notes what is wrong, not without end.
    fn complain(&mut self, text: &str) {
        const MOST: usize = 40;
        if self.measured.complaints.len() < MOST {
            let start: String = text.chars().take(1500).collect();
            // It may be long until all are told.
            eprintln!("{}: WRONG: {start}", self.measured.kernel);
            self.measured.complaints.push(start);
        }
    }

    fn try_one(&mut self, places: Places<'_>, specimen: &Specimen) -> Result<()> {
        let mut active = Active::start(self.lab, specimen)?;
        active.check_shown(true)?;
        let looking = self.looking(specimen);
        if specimen.expected.detector == "registers" {
            let report = self.check_registers(specimen, &looking)?;
            self.judge(specimen, &report, false);
        } else if !looking.is_empty() {
            let report = check(&places.live.guest(), &looking);
            let lab = self.lab;
            // The machine and its bare memory, at the same moment.
            let (live, image) = lab.while_stopped(|_| {
                let live = subjects(&check(&places.live.guest(), &looking));
                Ok((live, subjects(&check(&places.image.guest(), &looking))))
            })?;
            if live != image {
                self.complain(&format!(
                    "{}: the machine has {live:?}, its image {image:?}",
                    specimen.name
                ));
            }
            self.judge(specimen, &report, live == image);
        }
        active.take_back()?;
        if matches!(specimen.how, How::Module(_)) {
            active.check_shown(false)?;
        }
        active.end()?;
        self.silent_after(&places.live.guest(), specimen);
        Ok(())
    }

    /// Many specimens at once, looked at from everywhere.
    fn try_many(&mut self, suite: Suite, places: Places<'_>) -> Result<()> {
        let active = everywhere::start_many(self.lab, suite)?;
        let names = active.iter().map(|one| one.name().to_owned()).collect();
        let lab = self.lab;
        let everywhere = lab
            .while_stopped(|qmp| everywhere::look(lab, qmp, places.live, names, places.monitor))?;
        for one in active.into_iter().rev() {
            one.end()?;
        }
        self.note_everywhere(everywhere);
        Ok(())
    }

    fn note_everywhere(&mut self, everywhere: Everywhere) {
        for difference in &everywhere.differences {
            self.complain(difference);
        }
        if everywhere.findings < everywhere.specimens.len() {
            self.complain(&format!("too few findings: {everywhere:?}"));
        }
        self.measured.everywhere.push(everywhere);
    }

    /// A check of registers: they are those of the moment when a guest is
    /// opened, and bare memory has none. In between the kernel may have written
    /// one as it should be, so that one look in a few must see it.
    fn check_registers(
        &self,
        specimen: &Specimen,
        looking: &[&'static dyn Detector],
    ) -> Result<Report> {
        const LOOKS: u32 = 5;
        let mut look = 1;
        loop {
            let report = check(&self.open_anew()?.guest(), looking);
            let mut findings = report.findings.iter();
            let seen = findings.any(|finding| Some(finding.name) == specimen.expected.finding);
            if seen || look == LOOKS {
                return Ok(report);
            }
            println!("{}: not in look {look}", specimen.name);
            look += 1;
        }
    }

    fn open_anew(&self) -> Result<Opened> {
        let opened = open::target(&format!("qemu:{}", self.lab.pid()))?;
        ensure!(
            !opened.guest().registers().is_empty(),
            "QEMU does not tell the registers"
        );
        Ok(opened)
    }

    /// The detectors that look at a specimen.
    fn looking(&self, specimen: &Specimen) -> Vec<&'static dyn Detector> {
        if self.effort.look_for_unexpected {
            return detectors().to_vec();
        }
        let expected = secmon_detect::detector(specimen.expected.detector);
        expected
            .filter(|_| has_detector(specimen))
            .into_iter()
            .collect()
    }

    /// What was changed since the first look is found without the kernel's file.
    fn by_first_state(&mut self, places: Places<'_>, specimen: &Specimen) {
        for place in [places.live, places.image] {
            let found = names(
                &check(&place.guest_by_first_state(), &by_reference()),
                false,
            );
            let expected = specimen.expected.finding.unwrap_or_default();
            if !found.contains(&format!("{REFERRING}/{expected}")) {
                self.complain(&format!("{}: first state: {found:?}", specimen.name));
            }
        }
    }

    fn silent_after(&mut self, guest: &Watched, specimen: &Specimen) {
        for name in names(&check(guest, &self.looking(specimen)), true) {
            self.complain(&format!("{name} stays after {}", specimen.name));
        }
    }

    fn judge(&mut self, specimen: &Specimen, report: &Report, same_in_image: bool) {
        let expected = &specimen.expected;
        let mut besides = names(report, false);
        let mut found = None;
        if has_detector(specimen)
            && let Some(name) = expected.finding
        {
            let full = format!("{}/{name}", expected.detector);
            besides.remove(&full);
            let fits = |class: Class| class.is_alarm() == (expected.verdict == Verdict::Alarm);
            let mut findings = report.findings.iter();
            let hit = findings.any(|finding| {
                finding.detector == expected.detector && finding.name == name && fits(finding.class)
            });
            if hit {
                let mut reports = report.detectors.iter();
                let time = reports.find(|one| one.detector == expected.detector);
                let time = time.map(|one| milliseconds(one.time / one.looks.max(1)));
                found = Some((full, time.unwrap_or_default()));
            } else {
                self.complain(&format!(
                    "{} is not found as {full}; found: {besides:?}",
                    specimen.name
                ));
            }
        }
        if expected.verdict == Verdict::Information {
            for name in names(report, true) {
                self.complain(&format!("{} is no reason for {name}", specimen.name));
            }
        }
        self.measured.specimens.push(Tried {
            name: specimen.name.to_owned(),
            found,
            besides: besides.into_iter().collect(),
            same_in_image,
        });
    }

    /// All edits, while the guest stands still: it never sees one.
    fn try_edits(&mut self, suite: Suite, places: Places<'_>) -> Result<()> {
        let edits: Vec<(&Specimen, Edit)> = Specimen::of(suite)
            .filter_map(|specimen| match specimen.how {
                How::MemoryEdit(edit) => Some((specimen, edit)),
                _ => None,
            })
            .collect();
        if edits.is_empty() {
            return Ok(());
        }
        let threads = self.lab.truth().start_role("ordinary")?;
        let pid = *threads.first().context("a process")?;
        let ram = self.lab.ram_file().context("a RAM file")?;
        let lab = self.lab;
        lab.while_stopped(|qmp| {
            for (specimen, edit) in &edits {
                self.try_edit(places, &ram, specimen, *edit, pid)
                    .with_context(|| format!("{suite}, the edit {}", specimen.name))?;
            }
            let together = edits.iter().filter(|(specimen, edit)| {
                stands_with_others(*edit) && everywhere::can_be_found(specimen)
            });
            let mut edited = Vec::new();
            let mut names = Vec::new();
            for (specimen, edit) in together {
                edited.push(Edited::make(places.image, &ram, *edit, pid)?);
                names.push(specimen.name.to_owned());
            }
            if names.is_empty() {
                return Ok(());
            }
            let everywhere = everywhere::look(lab, qmp, places.live, names, places.monitor)?;
            // What was written last is taken back first.
            while edited.pop().is_some() {}
            self.note_everywhere(everywhere);
            Ok(())
        })?;
        self.lab.truth().stop_role("ordinary")
    }

    fn try_edit(
        &mut self,
        places: Places<'_>,
        ram: &Path,
        specimen: &Specimen,
        edit: Edit,
        pid: i32,
    ) -> Result<()> {
        let edited = Edited::make(places.image, ram, edit, pid)?;
        let looking = self.looking(specimen);
        if !looking.is_empty() {
            let report = check(&places.image.guest(), &looking);
            let (image, live) = (subjects(&report), check(&places.live.guest(), &looking));
            let live = subjects(&live);
            if live != image {
                self.complain(&format!(
                    "{}: the machine has {live:?}, its image {image:?}",
                    specimen.name
                ));
            }
            self.judge(specimen, &report, live == image);
            if specimen.expected.detector == REFERRING {
                self.by_first_state(places, specimen);
            }
        }
        drop(edited);
        self.silent_after(&places.image.guest(), specimen);
        if specimen.expected.detector == REFERRING {
            self.first_state(places.image, specimen.name);
        }
        Ok(())
    }
}

/// The detectors that need something to compare the kernel with.
fn by_reference() -> Vec<&'static dyn Detector> {
    secmon_detect::detector(REFERRING).into_iter().collect()
}

/// Whether an edit can stand beside all others of the same guest: not one that
/// keeps the lab from finding what others are made to, nor one of credentials
/// that are then another process's.
fn stands_with_others(edit: Edit) -> bool {
    !matches!(
        edit,
        Edit::UnlinkTask | Edit::DisguiseTask | Edit::UnlinkModule | Edit::ShareCredentials
    )
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

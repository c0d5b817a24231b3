//! What is found of something that hides and shows itself by turns, in guests
//! with one processor and with several, at rest and busy; and that nothing
//! else is found there.

use anyhow::{Context as _, Result};
use secmon_detect::{Detector, Finding, detectors};
use secmon_lab::specimens::{self, Active, BLINKING, Specimen};
use secmon_lab::{Guest, Kernel, Suite};
use serde::{Deserialize, Serialize};

use super::check;
use crate::open::{self, Opened};

/// How one of them fared in one guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Blinking {
    /// Its name.
    pub name: String,
    /// How many processors the guest has.
    pub vcpus: u32,
    /// Whether its processes came and went.
    pub busy: bool,
    /// How often the guest was checked.
    pub checks: u32,
    /// In how many checks it was reported.
    pub found: u32,
    /// In how many it was at least seen, and perhaps not reported.
    pub seen: u32,
    /// What else was reported that is more than information, though nothing
    /// was there.
    pub wrong: Vec<String>,
}

/// Boots a guest and lets each of them hide and show itself, at rest and busy.
///
/// # Errors
/// If the guest does not boot or a specimen can't be started.
pub fn measure(suite: Suite, vcpus: u32, checks: u32) -> Result<Vec<Blinking>> {
    let kernel = Kernel::fetch(suite)?;
    let lab = Guest::builder(suite)
        .kernel(kernel.clone())
        .vcpus(vcpus)
        .specimens(specimens::modules(suite, &kernel)?)
        .boot()?;
    let opened = open::target(&format!("qemu:{}", lab.pid()))?;
    let mut all = Vec::new();
    for busy in [false, true] {
        if busy {
            lab.truth().resume_busy()?;
        }
        for specimen in BLINKING.iter().filter(|one| one.suites.contains(&suite)) {
            let active = Active::start(&lab, specimen)?;
            all.push(look(&opened, specimen, (vcpus, busy), checks));
            active.end()?;
        }
        if busy {
            lab.truth().pause_busy().context("ending the busy mode")?;
        }
    }
    Ok(all)
}

/// Checks a guest in which the specimen hides and shows itself.
pub fn look(
    opened: &Opened,
    specimen: &Specimen,
    (vcpus, busy): (u32, bool),
    checks: u32,
) -> Blinking {
    let expected = &specimen.expected;
    let is_it = |finding: &Finding| {
        finding.detector == expected.detector && Some(finding.name) == expected.finding
    };
    let mut result = Blinking {
        name: specimen.name.to_owned(),
        vcpus,
        busy,
        checks,
        found: 0,
        seen: 0,
        wrong: Vec::new(),
    };
    let looking: &[&'static dyn Detector] = detectors();
    for _ in 0..checks {
        let report = check(&opened.guest(), looking);
        let found = report.findings.iter().any(&is_it);
        let mut unconfirmed = report.detectors.iter().flat_map(|one| &one.unconfirmed);
        result.found += u32::from(found);
        result.seen += u32::from(found || unconfirmed.any(is_it));
        let others = report
            .findings
            .iter()
            .filter(|finding| finding.class.is_alarm() && finding.detector != expected.detector);
        result
            .wrong
            .extend(others.map(|other| format!("{other:?}")));
    }
    result
}

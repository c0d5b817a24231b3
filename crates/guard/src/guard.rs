//! The rounds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_detect::{Confirmation, Outcome, detectors};
use secmon_guest::{Guest, TableError};
use secmon_memory::{PhysicalMemory, VirtualAddress};
use secmon_profile::{BuildId, Cache, FindError, FindOptions};

use crate::kernel::Copies;
use crate::pages::KernelPages;
use crate::processes::{self, Processes};
use crate::{Change, Finding, Kind, Ledger, Reference, settings};

/// The pauses before what was found is looked at again: what is not there each
/// time was just being changed.
const AGAIN: [Duration; 3] = [
    Duration::from_millis(10),
    Duration::from_millis(40),
    Duration::from_millis(120),
];
/// The source of what is found by comparing.
const MEMORY: &str = "memory";

/// Why nothing can be guarded.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// There is no kernel in the memory (yet).
    #[error("no kernel was found in the monitor's memory: {0}")]
    NoKernel(#[from] FindError),
    /// Another one than the image's.
    #[error("the kernel that runs has build id {}, the image's {expected}", found.as_ref().map_or("none".to_owned(), ToString::to_string))]
    OtherKernel {
        /// The image's.
        expected: String,
        /// The one that runs.
        found: Option<BuildId>,
    },
    /// The monitor still starts.
    #[error("the monitor has no process 1 with a worker yet")]
    Starting,
    /// The kernel lacks what is needed.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What one round did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Round {
    /// What appeared and what went.
    pub changes: Vec<Change>,
    /// How long it took, waits left out.
    pub busy: Duration,
}

/// A monitoring VM that is looked at.
pub struct Guard {
    guest: Guest,
    reference: Arc<Reference>,
    copies: Copies,
    pages: KernelPages,
    processes: Processes,
    ledger: Ledger,
    /// The detector whose turn it is.
    next: usize,
}

impl Guard {
    /// Finds the kernel and takes what rounds compare with.
    ///
    /// # Errors
    /// [`GuardError`]; a VM that still starts may be tried again.
    pub fn new(
        memory: &Arc<dyn PhysicalMemory>,
        reference: Arc<Reference>,
    ) -> Result<Self, GuardError> {
        let options = FindOptions {
            cache: Cache::Off,
            ..FindOptions::default()
        };
        let kernel = secmon_profile::find(memory, &options)?;
        let found = kernel.profile.build_id().cloned();
        let expected = &reference.kernel.build_id;
        if expected.is_some() && *expected != found {
            let expected = expected
                .as_ref()
                .map_or("none".to_owned(), ToString::to_string);
            return Err(GuardError::OtherKernel { expected, found });
        }
        let guest = Guest::new(kernel).with_reference(Arc::clone(&reference.kernel));
        if !processes::has_started(&guest)? {
            return Err(GuardError::Starting);
        }
        let copies = Copies::take(&guest)?;
        Ok(Self {
            guest,
            reference,
            copies,
            pages: KernelPages::default(),
            processes: Processes::new(),
            ledger: Ledger::default(),
            next: 0,
        })
    }

    /// How many findings there are now.
    #[must_use]
    pub fn open(&self) -> usize {
        self.ledger.len()
    }

    /// Looks with every detector, which rounds do by turns.
    pub fn look_with_all(&mut self) -> Vec<Change> {
        let all = 0..detectors().len();
        all.flat_map(|_| self.detector()).collect()
    }

    /// Looks once.
    pub fn round(&mut self) -> Round {
        let started = Instant::now();
        let mut waited = Duration::ZERO;
        let mut found = self.look();
        for pause in AGAIN {
            if found.iter().all(|finding| self.ledger.has(finding)) {
                break;
            }
            std::thread::sleep(pause);
            waited += pause;
            let again = self.look();
            found.retain(|finding| again.iter().any(|again| again.is_same(finding)));
        }
        let mut changes = self.ledger.update(MEMORY, found);
        changes.extend(self.detector());
        Round {
            changes,
            busy: started.elapsed().saturating_sub(waited),
        }
    }

    /// All that is compared, once.
    fn look(&mut self) -> Vec<Finding> {
        let mut findings = Vec::new();
        self.copies.look(&self.guest, &mut findings);
        let processes = self
            .processes
            .look(&self.guest, &self.reference, &mut findings);
        if let Err(error) = processes {
            let text = error.to_string();
            findings.push(Finding::new(Kind::Unreadable, "the processes", "all", text));
        }
        let worker = self.processes.worker();
        self.pages
            .look(&self.guest, &self.reference, worker, &mut findings);
        settings::look(&self.guest, &mut findings);
        findings
    }

    /// Lets the detector look whose turn it is.
    fn detector(&mut self) -> Vec<Change> {
        let all = detectors();
        let Some(detector) = all.get(self.next % all.len().max(1)) else {
            return Vec::new();
        };
        self.next = self.next.wrapping_add(1);
        let report = secmon_detect::check(&self.guest, &[*detector], Confirmation::default());
        let outcomes = report.detectors.iter().map(|report| &report.outcome);
        for outcome in outcomes {
            // It looks again in its next turn.
            if let Outcome::NotChecked(_) = outcome {
                return Vec::new();
            }
        }
        let found = report
            .findings
            .iter()
            .filter(|finding| finding.class.is_alarm())
            .map(|finding| Finding {
                kind: Kind::Detector,
                place: format!("{}/{}: {}", finding.detector, finding.name, finding.subject),
                address: finding.subject.address().map(VirtualAddress::as_u64),
                expected: "nothing".to_owned(),
                seen: finding.summary.clone(),
            });
        let found = found.collect();
        self.ledger.update(detector.name(), found)
    }

    /// The kernel's own words about itself.
    #[must_use]
    pub fn banner(&self) -> &str {
        self.guest.kernel().profile.banner()
    }
}

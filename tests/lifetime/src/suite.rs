//! A real monitor, a guard, and the attacks one after the other.

use std::fs::{File, OpenOptions};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use secmon_guard::{Change, Finding, Guard, Kind, Reference};
use secmon_lab::{Emulator, MonitorVm, Suite as Kernel, WatchedRam, appliance_image};
use secmon_memory::PhysicalMemory;
use secmon_platform::qemu::QmpUse;
use secmon_platform::target::{OpenOptions as TargetOptions, Target};

use crate::Victim;
use crate::attacks::{ATTACKS, Attack, Outcome};

/// From the start of one round to that of the next.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long anything may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(180);
/// Rounds in which what is not covered must not be told.
const QUIET: u32 = 2;

/// What came of an attack.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The attack's name.
    pub name: &'static str,
    /// How long it took until it was told; `None` if it is not covered.
    pub time: Option<Duration>,
}

/// A monitor that is guarded and attacked.
pub struct Suite {
    guard: Guard,
    victim: Victim,
    _vm: MonitorVm,
    _folder: tempfile::TempDir,
}

impl Suite {
    /// Starts one.
    ///
    /// # Errors
    /// If it does not start.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (own, target) = (folder.path().join("own"), folder.path().join("target"));
        File::create(&target)?.set_len(16 << 20)?;
        let image = appliance_image(Kernel::Bookworm)?;
        let watched = WatchedRam {
            name: "target".to_owned(),
            file: target,
            bytes: 16 << 20,
        };
        let vm = MonitorVm::start_with(Emulator::Installed, &image, &[watched], Some(&own))?;
        vm.connect()?.status()?;
        let target: Target = format!("qemu:{}", vm.pid()).parse()?;
        let options = TargetOptions {
            qmp: QmpUse::Never,
            ..TargetOptions::default()
        };
        let memory: Arc<dyn PhysicalMemory> = target.open(&options)?.memory;
        let configuration = vm.configuration()?;
        let reference = Reference::of_image(
            &std::fs::read(image.kernel())?,
            &std::fs::read(image.initramfs())?,
        )?
        .with_configuration(configuration.clone());
        let guard = Guard::new(&memory, Arc::new(reference))?;
        let ram = OpenOptions::new().read(true).write(true).open(&own)?;
        Ok(Self {
            guard,
            victim: Victim::new(&memory, ram, configuration)?,
            _vm: vm,
            _folder: folder,
        })
    }

    /// So many rounds, one directly after the other, in which nothing may be
    /// found.
    ///
    /// # Errors
    /// What was found.
    pub fn clean(&mut self, rounds: u32) -> Result<()> {
        let mut changes = self.guard.look_with_all();
        for _ in 0..rounds {
            changes.extend(self.guard.round().changes);
        }
        ensure!(changes.is_empty(), "found in a clean monitor: {changes:#?}");
        Ok(())
    }

    /// Makes all attacks.
    ///
    /// # Errors
    /// The first that had another outcome.
    pub fn run(&mut self) -> Result<Vec<Measured>> {
        ATTACKS.iter().map(|attack| self.attack(attack)).collect()
    }

    fn attack(&mut self, attack: &Attack) -> Result<Measured> {
        let began = Instant::now();
        (attack.attempt)(&mut self.victim)?;
        let outcome = match attack.outcome {
            Outcome::Detected(kind) => self.until(kind).map(|()| Some(began.elapsed())),
            Outcome::NotCovered(_) => self.quiet().map(|()| None),
        };
        self.victim.restore()?;
        let time = outcome.map_err(|error| error.context(attack.name))?;
        self.until_gone(attack)?;
        Ok(Measured {
            name: attack.name,
            time,
        })
    }

    fn appeared(&mut self) -> Vec<Finding> {
        let changes = self.guard.round().changes.into_iter();
        let appeared = changes.filter_map(|change| match change {
            Change::Appeared { finding, .. } => Some(finding),
            Change::Gone { .. } => None,
        });
        appeared.collect()
    }

    /// Looks each second until such a finding is told.
    fn until(&mut self, kind: Kind) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut others = Vec::new();
        loop {
            let began = Instant::now();
            let appeared = self.appeared();
            if appeared.iter().any(|finding| finding.kind == kind) {
                return Ok(());
            }
            others.extend(appeared);
            if Instant::now() > deadline {
                bail!("no {kind} in {PATIENCE:?}; found was {others:#?}");
            }
            std::thread::sleep(INTERVAL.saturating_sub(began.elapsed()));
        }
    }

    fn quiet(&mut self) -> Result<()> {
        for _ in 0..QUIET {
            let appeared = self.appeared();
            ensure!(appeared.is_empty(), "it is covered: {appeared:#?}");
        }
        Ok(())
    }

    /// What was put back is found no more. What a detector found is looked at
    /// again in its next turn.
    fn until_gone(&mut self, attack: &Attack) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.guard.open() > 0 {
            self.guard.round();
            ensure!(Instant::now() < deadline, "{}: it stays", attack.name);
        }
        Ok(())
    }
}

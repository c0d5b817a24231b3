//! Follows what one target does, by looking at its memory now and then: not
//! started, a kernel, the same kernel, another boot of one, standing still,
//! gone.
//!
//! A machine's reset leaves its memory as it was: an old kernel's pages may
//! stay readable for long. What tells that they are dead is that their clock
//! stands still, so that then the kernel is looked for anew.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError, Weak};
use std::time::{Duration, Instant};

use secmon_guest::{Guest, member_of};
use secmon_memory::{PhysicalAddress, PhysicalMemory, VirtualAddress};
use secmon_profile::{Cache, FindError, FindOptions, Kernel, KernelImage, Profile};
use serde::{Deserialize, Serialize};

use super::TRUST_LEVEL;
use super::gate::Gate;
use super::health::Pulse;
use crate::protocol::{FindingKind, GateReport, Severity, TargetReport, TargetState};

/// A clock that stands still for this long makes the kernel be looked for
/// anew: an idle kernel's moves at least every few seconds.
const SUSPECT: Duration = Duration::from_secs(3);
/// A clock that stands still for this long makes the target a stopped one.
const STOPPED: Duration = Duration::from_secs(15);
/// The longest pause between two searches where there is no kernel: each may
/// look at all of memory.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How much of memory is looked at from its start to see whether it is empty.
const LOW: u64 = 1 << 20;
/// And then one page of each so many bytes.
const STRIDE: u64 = 4 << 20;
/// How many earlier kernels of a target are remembered.
const MAX_DEAD: usize = 8;
/// The most pages of those.
const MAX_SAMPLES: usize = 4096;

/// What is watched.
pub(super) struct Target {
    /// Its name.
    pub(super) name: String,
    /// Where its memory's device is.
    pub(super) pci: Option<String>,
    /// Its memory, or why there is none.
    pub(super) memory: Result<Arc<dyn PhysicalMemory>, String>,
    /// Its gate, if it has one.
    pub(super) gate: Option<Arc<Gate>>,
    /// That its watcher goes on.
    pub(super) pulse: Pulse,
    view: RwLock<View>,
}

/// What is known of it now.
struct View {
    state: TargetState,
    kernel: Option<Arc<Kernel>>,
    boots: u64,
}

/// Which boot of a target is followed; the worker leaves it to the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Boot {
    /// What tells it from others; `None` while there is no kernel.
    pub(super) instance: Option<u64>,
    /// How many were seen.
    pub(super) count: u64,
}

/// What is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) severity: Severity,
    pub(super) kind: FindingKind,
    pub(super) text: String,
}

impl Target {
    pub(super) fn new(
        name: String,
        pci: Option<String>,
        memory: Result<Arc<dyn PhysicalMemory>, String>,
        gate: Option<Arc<Gate>>,
    ) -> Self {
        let state = match &memory {
            Ok(_) => TargetState::NoKernel {
                reason: "it has not been looked at yet".to_owned(),
            },
            Err(reason) => TargetState::Unreachable {
                reason: reason.clone(),
            },
        };
        Self {
            name,
            pci,
            memory,
            gate,
            pulse: Pulse::new(),
            view: RwLock::new(View {
                state,
                kernel: None,
                boots: 0,
            }),
        }
    }

    fn set(&self, state: TargetState, kernel: Option<Arc<Kernel>>) {
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        view.state = state;
        view.kernel = kernel;
    }

    /// The kernel to read now, or why there is none.
    pub(super) fn kernel(&self) -> Result<Arc<Kernel>, String> {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        match (&view.kernel, &view.state) {
            (Some(kernel), _) => Ok(Arc::clone(kernel)),
            (None, TargetState::Empty) => Err("its memory is empty: it has not started".to_owned()),
            (None, TargetState::NoKernel { reason } | TargetState::Unreachable { reason }) => {
                Err(reason.clone())
            }
            (None, _) => Err("its kernel is just changing".to_owned()),
        }
    }

    /// What it is doing.
    pub(super) fn report(&self) -> TargetReport {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        TargetReport {
            name: self.name.clone(),
            pci: self.pci.clone(),
            ram_size: self.memory.as_ref().map_or(0, |memory| memory.size()),
            state: view.state.clone(),
            trust_level: TRUST_LEVEL,
            boots: view.boots,
            gate: match &self.gate {
                Some(gate) => gate.report(),
                None => GateReport::None,
            },
        }
    }

    /// How often a kernel was found that was not there before.
    pub(super) fn boots(&self) -> u64 {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        view.boots
    }

    /// Whether a kernel runs in it.
    pub(super) fn is_running(&self) -> bool {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        matches!(view.state, TargetState::Running { .. })
    }
}

/// The watcher's memory between two looks.
pub(super) struct Watcher {
    target: Arc<Target>,
    known: Option<Known>,
    /// The boot whose kernel went away from memory that was not cleared since:
    /// a kernel that is found next came by a reset of the same machine.
    left: Option<u64>,
    /// What the worker before this one followed. If that is still there,
    /// nothing has happened to the target.
    before: Option<Boot>,
    /// Kernels that run no more, the latest last.
    dead: VecDeque<Dead>,
    /// How long to wait before the next search.
    pause: Duration,
    searched: Option<Instant>,
    /// How a kernel is looked for.
    options: FindOptions,
}

/// A kernel that a reset ended, and whose remains may be found in memory.
struct Dead {
    instance: u64,
    image: KernelImage,
    /// Where its clock stood.
    clock: Option<u64>,
}

/// The kernel that is followed.
struct Known {
    kernel: Arc<Kernel>,
    instance: u64,
    clock: Option<u64>,
    moved: Instant,
    searched: Instant,
    stopped: bool,
}

impl Watcher {
    /// A watcher of a target; `before` is what the worker before this one
    /// followed.
    pub(super) fn new(target: Arc<Target>, before: Option<Boot>) -> Self {
        if let Some(boot) = before {
            let view = target.view.write();
            view.unwrap_or_else(PoisonError::into_inner).boots = boot.count;
        }
        Self {
            // Without its memory it has gone, whatever comes next.
            before: before.filter(|_| target.memory.is_ok()),
            target,
            known: None,
            left: None,
            dead: VecDeque::new(),
            pause: Duration::ZERO,
            searched: None,
            options: FindOptions {
                cache: Cache::Off,
                ..FindOptions::default()
            },
        }
    }

    /// Has kernels looked for in this way.
    pub(super) fn with_options(mut self, options: FindOptions) -> Self {
        self.options = options;
        self
    }

    /// Which boot is followed now.
    pub(super) fn boot(&self) -> Boot {
        let view = self.target.view.read();
        let known = self.known.as_ref().map(|known| known.instance);
        // Until the first kernel is found nothing is known against the one before.
        let before = self.before.and_then(|boot| boot.instance);
        Boot {
            instance: known.or(self.left).or(before),
            count: view.unwrap_or_else(PoisonError::into_inner).boots,
        }
    }

    /// Looks at the target once; says what is new.
    pub(super) fn look(&mut self) -> Vec<Told> {
        self.target.pulse.beat();
        let Ok(memory) = self.target.memory.clone() else {
            return Vec::new();
        };
        match self.known.take() {
            Some(known) => self.follow(&memory, known),
            None => self.search(&memory),
        }
    }

    /// There was a kernel: is it still there, and the same?
    fn follow(&mut self, memory: &Arc<dyn PhysicalMemory>, mut known: Known) -> Vec<Told> {
        let now = Instant::now();
        if instance(&known.kernel) != Some(known.instance) {
            // Gone or changed: whatever is there now is looked for at once.
            return self.replace(memory, &known);
        }
        let clock = clock(&known.kernel);
        if clock != known.clock {
            known.clock = clock;
            known.moved = now;
            let mut told = Vec::new();
            if known.stopped {
                known.stopped = false;
                told.push(information(
                    FindingKind::TargetResumed,
                    "its clock goes on".to_owned(),
                ));
                self.target
                    .set(running(&known), Some(Arc::clone(&known.kernel)));
            }
            self.known = Some(known);
            return told;
        }
        let still = now.saturating_duration_since(known.moved);
        let mut told = Vec::new();
        if still >= SUSPECT && now.saturating_duration_since(known.searched) >= SUSPECT {
            known.searched = now;
            if let Ok(kernel) = find(memory, &self.options, &self.target.pulse)
                && instance(&kernel).is_some_and(|other| other != known.instance)
                && self.not_up(&kernel).is_none()
            {
                self.leave(&known);
                return self.adopt(kernel);
            }
        }
        if still >= STOPPED && !known.stopped {
            known.stopped = true;
            told.push(information(
                FindingKind::TargetStopped,
                format!(
                    "its clock has not moved for {} s: paused, crashed, reset or moved away",
                    still.as_secs()
                ),
            ));
            let banner = known.kernel.profile.banner().to_owned();
            let state = TargetState::Stopped { banner };
            self.target.set(state, Some(Arc::clone(&known.kernel)));
        }
        self.known = Some(known);
        told
    }

    /// The kernel that was there is not any more.
    fn replace(&mut self, memory: &Arc<dyn PhysicalMemory>, old: &Known) -> Vec<Told> {
        let found = find(memory, &self.options, &self.target.pulse);
        if let Ok(kernel) = &found
            && instance(kernel) == Some(old.instance)
        {
            // The first look met a moment of change.
            self.adopt_same(kernel.clone(), old.instance);
            return Vec::new();
        }
        self.leave(old);
        let (state, text) = match found {
            Ok(kernel) => {
                let Some(reason) = self.not_up(&kernel) else {
                    return self.adopt(kernel);
                };
                let text = format!("its kernel is gone: there is {reason}");
                let reason = reason.to_owned();
                (TargetState::NoKernel { reason }, text)
            }
            Err(error) => match without_kernel(&**memory, &error) {
                TargetState::Empty => {
                    self.forget();
                    let text = "its memory is empty: it was switched off".to_owned();
                    (TargetState::Empty, text)
                }
                state => (state, format!("its kernel is gone: {error}")),
            },
        };
        self.target.set(state, None);
        self.pause = Duration::ZERO;
        vec![information(FindingKind::TargetGone, text)]
    }

    /// There was no kernel: is there one now?
    fn search(&mut self, memory: &Arc<dyn PhysicalMemory>) -> Vec<Told> {
        let now = Instant::now();
        let early = self
            .searched
            .is_some_and(|last| now.saturating_duration_since(last) < self.pause);
        if early {
            return Vec::new();
        }
        if is_empty(&**memory) {
            self.target.set(TargetState::Empty, None);
            self.pause = Duration::ZERO;
            self.before = None;
            self.forget();
            return Vec::new();
        }
        let found = find(memory, &self.options, &self.target.pulse);
        self.searched = Some(Instant::now());
        let reason = match found {
            Ok(kernel) => {
                let Some(reason) = self.not_up(&kernel) else {
                    return self.adopt(kernel);
                };
                // That takes it a moment.
                self.pause = Duration::ZERO;
                reason.to_owned()
            }
            Err(error) => {
                let longer = self.pause.max(Duration::from_millis(250)).saturating_mul(2);
                self.pause = longer.min(LONGEST_PAUSE);
                error.to_string()
            }
        };
        self.target.set(TargetState::NoKernel { reason }, None);
        Vec::new()
    }

    /// A kernel of this target runs no more.
    fn leave(&mut self, known: &Known) {
        self.left = Some(known.instance);
        if self.dead.len() == MAX_DEAD {
            self.dead.pop_front();
        }
        self.dead.push_back(Dead {
            instance: known.instance,
            image: known.kernel.image,
            // It may have moved since the last look.
            clock: clock(&known.kernel).or(known.clock),
        });
        self.options.left_behind = self.dead.iter().map(|dead| dead.image).collect();
    }

    /// Memory was cleared: nothing is left of any kernel.
    fn forget(&mut self) {
        self.left = None;
        self.dead.clear();
        self.options.left_behind.clear();
    }

    /// Why a kernel that was found is not taken for the one that runs.
    fn not_up(&self, kernel: &Kernel) -> Option<&'static str> {
        if is_starting(kernel) {
            return Some("a kernel that is just starting");
        }
        let instance = instance(kernel);
        // The latest may come back: its memory was changed for a while.
        let mut dead = self
            .dead
            .iter()
            .filter(|dead| Some(dead.instance) != self.left);
        // If its clock has moved, its machine's state was loaded again.
        dead.any(|dead| Some(dead.instance) == instance && dead.clock == clock(kernel))
            .then_some("what an earlier boot left behind")
    }

    fn adopt_same(&mut self, kernel: Kernel, instance: u64) {
        let now = Instant::now();
        let kernel = Arc::new(kernel);
        // It may stand where an earlier one stood.
        self.dead.retain(|dead| {
            let (old, new) = (&dead.image, &kernel.image);
            let same =
                (old.virtual_base, old.physical_base) == (new.virtual_base, new.physical_base);
            !same && dead.instance != instance
        });
        self.options.left_behind = self.dead.iter().map(|dead| dead.image).collect();
        let known = Known {
            clock: clock(&kernel),
            kernel,
            instance,
            moved: now,
            searched: now,
            stopped: false,
        };
        self.target
            .set(running(&known), Some(Arc::clone(&known.kernel)));
        self.known = Some(known);
    }

    /// Follows a kernel from here on; says how it came.
    fn adopt(&mut self, kernel: Kernel) -> Vec<Told> {
        let Some(instance) = instance(&kernel) else {
            // It vanished between two reads.
            let reason = "a kernel that could not be read again".to_owned();
            self.target.set(TargetState::NoKernel { reason }, None);
            self.pause = Duration::ZERO;
            return Vec::new();
        };
        let before = self.before.take().and_then(|boot| boot.instance);
        if self.left.is_none() && before == Some(instance) {
            self.adopt_same(kernel, instance);
            return Vec::new();
        }
        let (kind, text) = came(
            self.left.take().or(before),
            instance,
            kernel.profile.banner(),
        );
        let mut told = vec![information(kind, text)];
        for conflict in &kernel.conflicts {
            told.push(Told {
                severity: Severity::Warning,
                kind: FindingKind::KernelConflict,
                text: conflict.to_string(),
            });
        }
        self.adopt_same(kernel, instance);
        if kind == FindingKind::TargetResumed {
            return told;
        }
        let mut view = self
            .target
            .view
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        view.boots = view.boots.saturating_add(1);
        told
    }
}

/// How a kernel came: what was there before it, if memory was not cleared
/// since.
fn came(left: Option<u64>, instance: u64, banner: &str) -> (FindingKind, String) {
    match left {
        None => (FindingKind::TargetStarted, banner.to_owned()),
        Some(left) if left == instance => (
            FindingKind::TargetResumed,
            "the kernel that was gone is there again".to_owned(),
        ),
        Some(_) => (
            FindingKind::TargetRebooted,
            format!("another boot: {banner}"),
        ),
    }
}

/// Whether the kernel has not come to its scheduler yet: what
/// [tells boots apart](instance) is still to be made.
fn is_starting(kernel: &Kernel) -> bool {
    /// `SYSTEM_BOOTING` of `enum system_states`, the first since 2.6.
    const BOOTING: u32 = 0;
    let at = kernel.profile.symbols().address("system_state");
    // A kernel that does not say is taken as it is.
    at.is_some_and(|at| {
        kernel
            .space
            .read_u32(at)
            .is_ok_and(|state| state == BOOTING)
    })
}

fn information(kind: FindingKind, text: String) -> Told {
    Told {
        severity: Severity::Information,
        kind,
        text,
    }
}

fn running(known: &Known) -> TargetState {
    let profile = &known.kernel.profile;
    TargetState::Running {
        banner: profile.banner().to_owned(),
        build_id: profile.build_id().map(ToString::to_string),
        instance: known.instance,
    }
}

/// Looks for the kernel, one target after the other: the memory that it takes
/// for a moment is several times what is kept. Targets with the same kernel keep
/// its names and types once.
fn find(
    memory: &Arc<dyn PhysicalMemory>,
    options: &FindOptions,
    pulse: &Pulse,
) -> Result<Kernel, FindError> {
    static PROFILES: Mutex<Vec<Weak<Profile>>> = Mutex::new(Vec::new());
    let mut profiles = loop {
        match PROFILES.try_lock() {
            Ok(profiles) => break profiles,
            Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
            // Whoever waits is well; whoever is waited for has a pulse, too.
            Err(TryLockError::WouldBlock) => {
                pulse.beat();
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    };
    let mut kernel = secmon_profile::find(memory, options)?;
    profiles.retain(|profile| profile.strong_count() > 0);
    if let Some(profile) = Arc::get_mut(&mut kernel.profile) {
        for known in profiles.iter().filter_map(Weak::upgrade) {
            profile.share(&known);
        }
    }
    profiles.push(Arc::downgrade(&kernel.profile));
    Ok(kernel)
}

fn without_kernel(memory: &dyn PhysicalMemory, error: &FindError) -> TargetState {
    if is_empty(memory) {
        TargetState::Empty
    } else {
        TargetState::NoKernel {
            reason: error.to_string(),
        }
    }
}

/// What tells this boot from others: where randomization put the kernel, its
/// banner as it stands in memory now, and the random stack canary of its
/// first task. `None` if the kernel can't be read (any more).
fn instance(kernel: &Kernel) -> Option<u64> {
    let profile = &kernel.profile;
    let symbol = |name| profile.symbols().address(name);
    let mut hash = DefaultHasher::new();
    kernel.image.virtual_base.as_u64().hash(&mut hash);
    kernel.image.physical_base.as_u64().hash(&mut hash);
    kernel.direct_map.as_u64().hash(&mut hash);
    let mut banner = [0; 64];
    kernel
        .space
        .read(symbol("linux_banner")?, &mut banner)
        .ok()?;
    let known = profile.banner().as_bytes();
    let same = known.iter().zip(&banner).all(|(a, b)| a == b);
    if !same {
        return None;
    }
    banner.hash(&mut hash);
    let canary = profile
        .types()
        .ok()
        .and_then(|types| member_of(types, "task_struct", &["stack_canary"]).ok());
    if let (Some(member), Some(task)) = (canary, symbol("init_task")) {
        let at: VirtualAddress = task.wrapping_add(member.offset);
        kernel.space.read_u64(at).ok()?.hash(&mut hash);
    }
    Some(hash.finish())
}

/// A number that grows while the kernel runs.
fn clock(kernel: &Kernel) -> Option<u64> {
    let symbols = kernel.profile.symbols();
    let at = symbols
        .address("jiffies_64")
        .or_else(|| symbols.address("jiffies"))?;
    kernel.space.read_u64(at).ok()
}

/// Whether memory is all zero where it is looked at.
fn is_empty(memory: &dyn PhysicalMemory) -> bool {
    const PAGE: u64 = 4096;
    let mut page = [0; PAGE as usize];
    let mut is_zero = |address: u64| {
        // What can't be read holds nothing either.
        memory
            .read(PhysicalAddress::new(address), &mut page)
            .is_err()
            || page.iter().all(|byte| *byte == 0)
    };
    let low = (0..LOW).step_by(PAGE as usize);
    let regions: Vec<(u64, u64)> = memory
        .regions()
        .iter()
        .map(|region| (region.start.as_u64(), region.length))
        .collect();
    let samples = regions
        .iter()
        .flat_map(|(start, length)| {
            let end = start.saturating_add(*length);
            (*start..end).step_by(STRIDE as usize)
        })
        .take(MAX_SAMPLES);
    low.chain(samples).all(&mut is_zero)
}

/// A guest of the target's kernel for one request: its diagnostics are those
/// of that request alone.
pub(super) fn guest(kernel: &Kernel) -> Guest {
    Guest::new(kernel.clone())
}

#[cfg(test)]
mod tests {
    use secmon_memory::{MemoryRegion, PhysicalReadError};

    use super::*;

    /// Memory with one byte that is not zero.
    struct OneByte(u64);

    impl PhysicalMemory for OneByte {
        fn regions(&self) -> &[MemoryRegion] {
            static REGIONS: std::sync::LazyLock<[MemoryRegion; 1]> =
                std::sync::LazyLock::new(|| {
                    [MemoryRegion {
                        start: PhysicalAddress::new(0),
                        length: 64 << 20,
                    }]
                });
            &*REGIONS
        }

        fn read(
            &self,
            address: PhysicalAddress,
            buffer: &mut [u8],
        ) -> Result<(), PhysicalReadError> {
            for (index, byte) in buffer.iter_mut().enumerate() {
                *byte = u8::from(address.as_u64() + index as u64 == self.0);
            }
            Ok(())
        }

        fn volatility(&self) -> secmon_memory::Volatility {
            secmon_memory::Volatility::Live
        }
    }

    #[test]
    fn empty_memory_is_told_from_memory_without_a_kernel() {
        let look = |byte| {
            let memory: Arc<dyn PhysicalMemory> = Arc::new(OneByte(byte));
            let target = Arc::new(Target::new("web1".to_owned(), None, Ok(memory), None));
            let mut watcher = Watcher::new(Arc::clone(&target), None);
            assert!(watcher.look().is_empty());
            assert!(target.kernel().is_err());
            target.report().state
        };
        assert_eq!(look(u64::MAX), TargetState::Empty);
        assert!(matches!(look(0x500), TargetState::NoKernel { .. }));
        assert!(matches!(
            look(5 * STRIDE + 17),
            TargetState::NoKernel { .. }
        ));
    }

    #[test]
    fn a_kernel_after_another_one_is_a_reboot_however_long_there_was_none() {
        let kind = |left| came(left, 7, "Linux version 6").0;
        assert_eq!(kind(None), FindingKind::TargetStarted);
        assert_eq!(kind(Some(6)), FindingKind::TargetRebooted);
        assert_eq!(kind(Some(7)), FindingKind::TargetResumed);
    }

    #[test]
    fn memory_that_was_cleared_belongs_to_another_start() {
        let memory: Arc<dyn PhysicalMemory> = Arc::new(OneByte(u64::MAX));
        let target = Arc::new(Target::new("web1".to_owned(), None, Ok(memory), None));
        let before = Boot {
            instance: Some(5),
            count: 3,
        };
        let mut watcher = Watcher::new(target, Some(before));
        assert_eq!(watcher.boot(), before);
        watcher.left = Some(6);
        watcher.look();
        assert_eq!(watcher.left, None);
        let instance = None;
        assert_eq!(watcher.boot(), Boot { instance, count: 3 });
    }

    #[test]
    fn a_target_without_memory_says_why() {
        let target = Arc::new(Target::new(
            "web1".to_owned(),
            None,
            Err("no device".to_owned()),
            None,
        ));
        assert!(Watcher::new(Arc::clone(&target), None).look().is_empty());
        assert_eq!(target.kernel().err().as_deref(), Some("no device"));
        assert!(!target.is_running());
    }
}

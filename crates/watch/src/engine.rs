//! Lets detectors look at a target, again and again, and tells what is new.
//!
//! Two threads look, so that a detector that waits for the guest (for code that
//! nobody owns yet, up to two seconds) keeps only others that wait. What a look
//! costs is processor time, measured on its own thread; waiting is free. A
//! finding is confirmed by further looks as `check` does it, and while their
//! pauses pass the other detectors look.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use secmon_detect::{Detector, Outcome, Round};
use secmon_guest::{Guest, TableError};

use crate::changes::Changes;
use crate::coverage::Coverage;
use crate::policy::{Day, DetectorPolicy, Policy};
use crate::schedule::{Account, Chance, Cost, interval};
use crate::{Incident, Tally};

/// The longest time between two looks at what is to be done.
const LONGEST_NAP: Duration = Duration::from_millis(200);
/// A look that waits longer than this beside its processor time is one that
/// waits.
const WAITS: Duration = Duration::from_millis(100);
/// In how many rounds of looks a detector must fail to be told as blind.
const BLIND: u32 = 3;
/// What is missing is looked for again after this time at most.
const MISSING: Duration = Duration::from_secs(1);
/// The shortest time between two looks at the tasks, and the part of the
/// budget that they may use.
const TASKS: Duration = Duration::from_millis(250);
const TASKS_SHARE: f64 = 0.1;
/// A guest whose diagnostics are more than this is taken anew: they are kept.
const DIAGNOSTICS: u64 = 2000;
/// What of a longest interval may pass without being told.
const LATE: u32 = 3;

/// What is watched.
pub trait Watched: Sync {
    /// The guest as it is now and the number of its boot, or why there is none
    /// to look at.
    ///
    /// # Errors
    /// Why not, in words.
    fn guest(&self) -> Result<(Guest, u64), String>;

    /// The number of the boot that there is now.
    fn boot(&self) -> Option<u64>;
}

/// Ends a watch.
#[derive(Debug, Default)]
pub struct Stop(AtomicBool);

impl Stop {
    /// Nothing ends yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// The watch ends after the looks under way.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it is to end.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Watches until it is stopped, on this thread and one more; gives what was
/// done. Everything is handed to `tell`, in order, from either thread.
pub fn watch(
    watched: &dyn Watched,
    policy: &Policy,
    stop: &Stop,
    tell: &(dyn Fn(Incident) + Sync),
) -> Tally {
    let engine = Engine {
        watched,
        policy,
        stop,
        tell,
        state: Mutex::new(State::new(policy)),
        changed: Condvar::new(),
    };
    engine.start();
    thread::scope(|scope| {
        let patient = || engine.run(Lane::Patient);
        let second = thread::Builder::new()
            .name("patient looks".to_owned())
            .spawn_scoped(scope, patient);
        // Without a second thread one does all, and what waits delays others.
        engine.run(if second.is_ok() {
            Lane::Quick
        } else {
            Lane::All
        });
    });
    let mut state = engine.lock();
    if let Some(incident) = state.coverage.tell(Instant::now()) {
        tell(incident);
    }
    state.tally()
}

/// Which looks a thread makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    /// Those that do not wait for the guest.
    Quick,
    /// Those that do.
    Patient,
    /// Both.
    All,
}

struct Engine<'a> {
    watched: &'a dyn Watched,
    policy: &'a Policy,
    stop: &'a Stop,
    tell: &'a (dyn Fn(Incident) + Sync),
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    jobs: Vec<Job>,
    tasks: TasksJob,
    coverage: Coverage,
    changes: Changes,
    account: Account,
    chance: Chance,
    started: Instant,
    cpu: Duration,
    looks: u64,
    unconfirmed: u64,
    boot: Option<u64>,
}

/// A detector and its looks.
struct Job {
    detector: &'static dyn Detector,
    policy: DetectorPolicy,
    /// When it looks next.
    due: Instant,
    cost: Cost,
    /// Whether its looks wait for the guest.
    waits: bool,
    busy: bool,
    /// Looks that are to be confirmed.
    round: Option<Round>,
    /// What it looks at, and whose boot that is.
    guest: Option<(u64, Guest)>,
    /// When its last round began.
    looked: Instant,
    failed: u32,
    told_blind: bool,
    told_behind: bool,
}

/// The looks at the lists of tasks.
struct TasksJob {
    due: Instant,
    cost: Cost,
    busy: bool,
    guest: Option<(u64, Guest)>,
    tell_at: Instant,
}

/// What a thread does next.
enum Next {
    Look(usize),
    Tasks,
    Wait(Duration),
}

impl State {
    fn new(policy: &Policy) -> Self {
        let now = Instant::now();
        let mut chance = Chance::new();
        let jobs = policy
            .enabled()
            .into_iter()
            .map(|detector| Job {
                detector,
                policy: policy.detector(detector.name()),
                due: now + chance.around(Duration::from_millis(100)),
                cost: Cost::default(),
                waits: false,
                busy: false,
                round: None,
                guest: None,
                looked: now,
                failed: 0,
                told_blind: false,
                told_behind: false,
            })
            .collect();
        Self {
            jobs,
            tasks: TasksJob {
                due: now,
                cost: Cost::default(),
                busy: false,
                guest: None,
                tell_at: now + policy.coverage_interval,
            },
            coverage: Coverage::default(),
            changes: Changes::default(),
            account: Account::new(policy.budget, now),
            chance,
            started: now,
            cpu: Duration::ZERO,
            looks: 0,
            unconfirmed: 0,
            boot: None,
        }
    }

    fn tally(&self) -> Tally {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (alarms, open_alarms) = self.changes.alarms();
        let (tasks_created, tasks_seen) = self.coverage.totals();
        Tally {
            ran_ms: milliseconds(self.started.elapsed()),
            cpu_ms: milliseconds(self.cpu),
            looks: self.looks,
            alarms,
            open_alarms,
            unconfirmed: self.unconfirmed,
            tasks_created,
            tasks_seen,
        }
    }

    /// What a thread does now.
    fn next(&self, lane: Lane, now: Instant) -> Next {
        let mut nap = LONGEST_NAP;
        let (regular, confirming) = (self.account.wait(), self.account.wait_to_confirm());
        let mut chosen: Option<(bool, Instant, usize)> = None;
        for (index, job) in self.jobs.iter().enumerate() {
            let fits = match lane {
                Lane::Quick => !job.waits,
                Lane::Patient => job.waits,
                Lane::All => true,
            };
            if job.busy || !fits {
                continue;
            }
            let confirms = job.round.is_some();
            let wait = if confirms { confirming } else { regular };
            let wait = wait.max(job.due.saturating_duration_since(now));
            if !wait.is_zero() {
                nap = nap.min(wait);
                continue;
            }
            // What confirms first, then what waits longest.
            let better = chosen.is_none_or(|(other, due, _)| {
                (confirms, std::cmp::Reverse(job.due)) > (other, std::cmp::Reverse(due))
            });
            if better {
                chosen = Some((confirms, job.due, index));
            }
        }
        if lane != Lane::Patient && !self.tasks.busy && !chosen.is_some_and(|chosen| chosen.0) {
            let wait = regular.max(self.tasks.due.saturating_duration_since(now));
            if wait.is_zero() {
                return Next::Tasks;
            }
            nap = nap.min(wait);
        }
        match chosen {
            Some((_, _, index)) => Next::Look(index),
            None => Next::Wait(nap.max(Duration::from_millis(1))),
        }
    }

    /// When a detector looks after the round that it has ended.
    fn plan(&mut self, index: usize, policy: &Policy, now: Instant) {
        let costs: Vec<Cost> = self.jobs.iter().map(|job| job.cost).collect();
        let Some(job) = self.jobs.get_mut(index) else {
            return;
        };
        let mean = interval(job.cost, costs.into_iter(), policy.budget, &job.policy);
        let mut pause = self.chance.around(mean);
        if let Some(longest) = job.policy.longest_interval {
            pause = pause.min(longest);
        }
        if self.changes.misses(job.detector.name()) {
            pause = pause.min(MISSING);
        }
        job.due = now + pause;
    }
}

impl Engine<'_> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self) {
        let state = self.lock();
        (self.tell)(Incident::Started {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            detectors: state
                .jobs
                .iter()
                .map(|job| job.detector.name().to_owned())
                .collect(),
            budget_percent: self.policy.budget.percent(),
        });
    }

    /// Looks until the watch ends.
    fn run(&self, lane: Lane) {
        while !self.stop.is_stopped() {
            let mut state = self.lock();
            let now = Instant::now();
            state.account.update(now, Duration::ZERO);
            if lane != Lane::Patient {
                self.each_time(&mut state, now);
            }
            match state.next(lane, now) {
                Next::Look(index) => self.look(state, index),
                Next::Tasks => self.look_at_tasks(state),
                Next::Wait(time) => {
                    drop(
                        self.changed
                            .wait_timeout(state, time)
                            .unwrap_or_else(PoisonError::into_inner),
                    );
                }
            }
        }
        self.changed.notify_all();
    }

    /// What does not depend on a look.
    fn each_time(&self, state: &mut State, now: Instant) {
        if let Some(boot) = self.watched.boot()
            && state.boot != Some(boot)
        {
            if state.boot.replace(boot).is_some() {
                state.changes.another_boot().into_iter().for_each(self.tell);
            }
            state.coverage = Coverage::default();
            for job in &mut state.jobs {
                job.round = None;
            }
        }
        let today = Day::today();
        let expired = state.changes.expired(self.policy, today);
        expired.into_iter().for_each(self.tell);
        if now >= state.tasks.tell_at {
            state.tasks.tell_at = now + self.policy.coverage_interval;
            state.coverage.tell(now).into_iter().for_each(self.tell);
        }
    }

    /// One look of a detector.
    fn look(&self, mut state: MutexGuard<'_, State>, index: usize) {
        let Some(job) = state.jobs.get_mut(index) else {
            return;
        };
        job.busy = true;
        let detector = job.detector;
        let (kept, round) = (job.guest.take(), job.round.take());
        let confirmation = job.policy.confirmation;
        drop(state);

        let (began, cpu) = (Instant::now(), thread_time());
        let taken = self.take(kept);
        let looked = taken.map(|(boot, guest)| {
            let mut round = round.unwrap_or_else(|| Round::new(detector, confirmation));
            round.look(&guest);
            (boot, guest, round)
        });
        let used = thread_time().saturating_sub(cpu);
        // A busy machine delays a look by some times what it uses; one that
        // waits uses nearly nothing meanwhile.
        let waited = began.elapsed().saturating_sub(used) > WAITS.max(used.saturating_mul(4));

        let mut state = self.lock();
        let now = Instant::now();
        state.account.update(now, used);
        state.cpu = state.cpu.saturating_add(used);
        state.looks = state.looks.saturating_add(u64::from(looked.is_ok()));
        if let Some(job) = state.jobs.get_mut(index) {
            job.busy = false;
            job.cost.note(used);
            job.waits |= waited;
        }
        match looked {
            Err(_) => {
                // There is no kernel to look at: the target's own events say so.
                if let Some(job) = state.jobs.get_mut(index) {
                    job.due = now + LONGEST_NAP;
                }
            }
            Ok((boot, guest, round)) => {
                if self.watched.boot() != Some(boot) {
                    // What was seen is of a boot that is over.
                    if let Some(job) = state.jobs.get_mut(index) {
                        job.due = now;
                    }
                } else {
                    self.settle(&mut state, index, (boot, guest), round, now);
                }
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The guest of an earlier look, or a new one.
    fn take(&self, kept: Option<(u64, Guest)>) -> Result<(u64, Guest), String> {
        let boot = self.watched.boot();
        match kept {
            Some((of, guest))
                if Some(of) == boot && guest.diagnostics().recorded() < DIAGNOSTICS =>
            {
                Ok((of, guest))
            }
            _ => self.watched.guest().map(|(guest, boot)| (boot, guest)),
        }
    }

    /// Takes what a look found.
    fn settle(
        &self,
        state: &mut State,
        index: usize,
        guest: (u64, Guest),
        mut round: Round,
        now: Instant,
    ) {
        let State { jobs, changes, .. } = state;
        let Some(job) = jobs.get_mut(index) else {
            return;
        };
        job.guest = Some(guest);
        if let Some(pause) = round.wants_more(&|finding| changes.knows(finding)) {
            job.round = Some(round);
            job.due = now + pause;
            return;
        }
        let (findings, report) = round.finish(&|finding| changes.knows(finding));
        let whole = report.outcome == Outcome::Checked;
        let incidents = changes.settle(
            job.detector.name(),
            &findings,
            whole && report.dropped == 0,
            self.policy,
            now,
            Day::today(),
        );
        incidents.into_iter().for_each(self.tell);
        self.tell_sight(job, &report.outcome, now);
        let unconfirmed = report.unconfirmed.len() as u64;
        state.unconfirmed = state.unconfirmed.saturating_add(unconfirmed);
        if report.dropped > 0 {
            (self.tell)(Incident::Lost {
                sink: "the watch".to_owned(),
                events: report.dropped,
                reason: format!("{} found more than is kept", report.detector),
            });
        }
        state.plan(index, self.policy, now);
    }

    /// Tells when a detector can't look, can again, or looks too seldom.
    fn tell_sight(&self, job: &mut Job, outcome: &Outcome, now: Instant) {
        let name = || job.detector.name().to_owned();
        match outcome {
            Outcome::Checked => {
                if job.told_blind {
                    (self.tell)(Incident::Sighted { detector: name() });
                }
                (job.failed, job.told_blind) = (0, false);
            }
            Outcome::NotChecked(reason) => {
                job.failed = job.failed.saturating_add(1);
                if job.failed >= BLIND && !job.told_blind {
                    (self.tell)(Incident::Blind {
                        detector: name(),
                        reason: reason.clone(),
                    });
                    job.told_blind = true;
                }
            }
        }
        let passed = now.saturating_duration_since(job.looked);
        job.looked = now;
        let Some(longest) = job.policy.longest_interval else {
            return;
        };
        let late = passed > longest.saturating_mul(LATE);
        if late && !job.told_behind {
            (self.tell)(Incident::Behind {
                detector: name(),
                reason: format!(
                    "{:.1} s passed between two looks, the policy wants at most {:.1} s; give a \
                     larger budget or longer intervals",
                    passed.as_secs_f64(),
                    longest.as_secs_f64()
                ),
            });
        }
        job.told_behind = late;
    }

    /// One look at the lists of tasks.
    fn look_at_tasks(&self, mut state: MutexGuard<'_, State>) {
        state.tasks.busy = true;
        let kept = state.tasks.guest.take();
        let boot = state.boot;
        let mut coverage = std::mem::take(&mut state.coverage);
        drop(state);

        let cpu = thread_time();
        let looked = self.take(kept).map(|(boot, guest)| {
            let result: Result<(), TableError> = coverage.look(&guest, Instant::now());
            (boot, guest, result)
        });
        let used = thread_time().saturating_sub(cpu);

        let mut state = self.lock();
        let now = Instant::now();
        state.account.update(now, used);
        state.cpu = state.cpu.saturating_add(used);
        state.tasks.busy = false;
        state.tasks.cost.note(used);
        let own = self.policy.budget.share() * TASKS_SHARE;
        let pause = Duration::try_from_secs_f64(state.tasks.cost.seconds() / own)
            .unwrap_or(MISSING)
            .clamp(TASKS, Duration::from_secs(60));
        state.tasks.due = now + state.chance.around(pause);
        if state.boot == boot {
            state.coverage = coverage;
        }
        if let Ok((boot, guest, Ok(()))) = looked {
            state.tasks.guest = Some((boot, guest));
        }
    }
}

/// Processor time that this thread has used.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State::new(&Policy::default())
    }

    #[test]
    fn what_waits_keeps_only_others_that_wait() {
        let mut state = state();
        let later = Instant::now() + Duration::from_secs(1);
        state.tasks.busy = true;
        state.jobs[3].waits = true;
        assert!(matches!(state.next(Lane::Patient, later), Next::Look(3)));
        state.jobs[3].busy = true;
        assert!(matches!(state.next(Lane::Patient, later), Next::Wait(_)));
        assert!(matches!(state.next(Lane::Quick, later), Next::Look(index) if index != 3));
    }

    #[test]
    fn what_confirms_comes_first_and_may_use_budget_ahead() {
        let mut state = state();
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        state.account.update(now, Duration::from_millis(300));
        assert!(matches!(state.next(Lane::All, later), Next::Wait(_)));
        let job = &mut state.jobs[5];
        job.round = Some(Round::new(job.detector, job.policy.confirmation));
        assert!(matches!(state.next(Lane::All, later), Next::Look(5)));
    }

    #[test]
    fn a_thread_naps_until_something_is_due() {
        let mut state = state();
        let now = Instant::now();
        for job in &mut state.jobs {
            job.due = now + Duration::from_millis(70);
        }
        state.tasks.due = now + Duration::from_millis(90);
        match state.next(Lane::All, now) {
            Next::Wait(nap) => assert_eq!(nap.as_millis(), 70),
            _ => panic!("nothing is due"),
        }
        state.tasks.due = now;
        assert!(matches!(state.next(Lane::All, now), Next::Tasks));
    }

    /// A target without a kernel.
    struct Empty;

    impl Watched for Empty {
        fn guest(&self) -> Result<(Guest, u64), String> {
            Err("nothing runs".to_owned())
        }

        fn boot(&self) -> Option<u64> {
            None
        }
    }

    #[test]
    fn a_watch_begins_and_ends_also_without_a_kernel() {
        let stop = Stop::new();
        let told = Mutex::new(Vec::new());
        let tell = |incident: Incident| {
            told.lock().expect("told").push(incident.name());
            stop.stop();
        };
        let tally = watch(&Empty, &Policy::default(), &stop, &tell);
        assert_eq!((tally.looks, tally.alarms), (0, 0));
        assert_eq!(*told.lock().expect("told"), ["started"]);
    }
}

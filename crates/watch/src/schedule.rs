//! When each detector looks: by its measured cost, within a budget of
//! processor time, at times that nobody can know beforehand.
//!
//! The mean wait until something is seen is least, for a given use of the
//! processor, if the pauses between two looks of a detector are as the square
//! roots of the costs of a look. Around that mean each pause is drawn anew,
//! from half of it to one and a half: a guest that hides when it expects a look
//! must not know when to.

use std::hash::{BuildHasher as _, RandomState};
use std::time::{Duration, Instant};

use crate::policy::{Budget, DetectorPolicy};

/// The part of the budget that regular looks use; what is left serves looks
/// that confirm.
const REGULAR: f64 = 0.8;
/// For how much time unused budget is kept.
const SAVED: f64 = 2.0;
/// For how much time budget may be used ahead by looks that confirm.
const AHEAD: f64 = 20.0;
/// What a look is taken to cost before it was measured, in seconds.
const UNKNOWN: f64 = 0.005;

/// Processor time that may be used.
#[derive(Debug)]
pub struct Account {
    share: f64,
    /// Seconds of processor time that may be used now; negative: that were
    /// used ahead.
    credit: f64,
    updated: Instant,
}

impl Account {
    /// Nothing is saved and nothing used.
    pub fn new(budget: Budget, now: Instant) -> Self {
        Self {
            share: budget.share(),
            credit: 0.0,
            updated: now,
        }
    }

    /// Notes that time has passed, and `used` of processor time with it.
    pub fn update(&mut self, now: Instant, used: Duration) {
        let passed = now.saturating_duration_since(self.updated);
        self.updated = now;
        let credit = self.credit + passed.as_secs_f64() * self.share - used.as_secs_f64();
        self.credit = credit.min(self.share * SAVED);
    }

    /// How long a regular look has to wait.
    pub fn wait(&self) -> Duration {
        self.until(0.0)
    }

    /// How long a look that confirms has to wait.
    pub fn wait_to_confirm(&self) -> Duration {
        self.until(-self.share * AHEAD)
    }

    fn until(&self, least: f64) -> Duration {
        let lacking = (least - self.credit) / self.share;
        Duration::try_from_secs_f64(lacking.max(0.0)).unwrap_or(Duration::from_secs(3600))
    }
}

/// What a look costs, as measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost(Option<f64>);

impl Cost {
    /// Notes what a look has cost.
    pub fn note(&mut self, used: Duration) {
        let used = used.as_secs_f64().max(1e-6);
        // Recent looks count most, and no single one decides.
        self.0 = Some(self.0.map_or(used, |mean| mean.mul_add(0.7, used * 0.3)));
    }

    /// Seconds of processor time.
    pub fn seconds(self) -> f64 {
        self.0.unwrap_or(UNKNOWN)
    }
}

/// The mean pause between two looks of a detector that costs `own`, beside
/// others.
pub fn interval(
    own: Cost,
    all: impl Iterator<Item = Cost>,
    budget: Budget,
    policy: &DetectorPolicy,
) -> Duration {
    let roots: f64 = all.map(|cost| cost.seconds().sqrt()).sum();
    let mean = own.seconds().sqrt() * roots / (budget.share() * REGULAR);
    let mean = Duration::try_from_secs_f64(mean).unwrap_or(Duration::from_secs(3600));
    let mean = mean.max(policy.shortest_interval);
    policy
        .longest_interval
        .map_or(mean, |longest| mean.min(longest))
}

/// Numbers that nobody outside can foresee.
#[derive(Debug)]
pub struct Chance {
    keys: RandomState,
    drawn: u64,
}

impl Chance {
    /// With keys of its own, from the system.
    pub fn new() -> Self {
        Self {
            keys: RandomState::new(),
            drawn: 0,
        }
    }

    /// From 0 to 1.
    fn fraction(&mut self) -> f64 {
        self.drawn = self.drawn.wrapping_add(1);
        (self.keys.hash_one(self.drawn) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// A time from half to one and a half of `mean`.
    pub fn around(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(0.5 + self.fraction())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(milliseconds: u64) -> Cost {
        let mut cost = Cost::default();
        cost.note(Duration::from_millis(milliseconds));
        cost
    }

    #[test]
    fn intervals_use_the_budget_and_no_more() {
        let costs: Vec<Cost> = [1, 4, 16, 25].map(cost).into();
        let policy = DetectorPolicy {
            shortest_interval: Duration::ZERO,
            ..DetectorPolicy::default()
        };
        let budget = Budget::default();
        let used: f64 = costs
            .iter()
            .map(|own| {
                let pause = interval(*own, costs.iter().copied(), budget, &policy);
                own.seconds() / pause.as_secs_f64()
            })
            .sum();
        assert!((used - 0.05 * REGULAR).abs() < 1e-3, "{used}");
        let limited = DetectorPolicy {
            shortest_interval: Duration::from_secs(60),
            longest_interval: Some(Duration::from_secs(90)),
            ..policy
        };
        let pause = |own| interval(cost(own), costs.iter().copied(), budget, &limited);
        assert_eq!(pause(1), Duration::from_secs(60));
        assert_eq!(pause(10_000_000), Duration::from_secs(90));
    }

    #[test]
    fn what_was_used_has_to_be_waited_for() {
        let start = Instant::now();
        let mut account = Account::new(Budget::default(), start);
        assert_eq!(account.wait(), Duration::ZERO);
        account.update(start, Duration::from_millis(50));
        assert_eq!(account.wait().as_millis(), 1000);
        assert_eq!(account.wait_to_confirm(), Duration::ZERO);
        account.update(start, Duration::from_millis(1000));
        assert!(account.wait_to_confirm() >= Duration::from_millis(900));
        account.update(start + Duration::from_secs(21), Duration::ZERO);
        assert_eq!(account.wait(), Duration::ZERO);
        // A long rest is no right to a burst.
        let later = start + Duration::from_secs(3600);
        account.update(later, Duration::ZERO);
        account.update(later, Duration::from_millis(150));
        assert!(account.wait() > Duration::ZERO);
    }

    #[test]
    fn times_are_drawn_around_their_mean() {
        let mut chance = Chance::new();
        let mean = Duration::from_secs(1);
        let drawn: Vec<Duration> = (0..1000).map(|_| chance.around(mean)).collect();
        assert!(
            drawn
                .iter()
                .all(|time| *time >= mean / 2 && *time <= mean * 3 / 2)
        );
        let sum: Duration = drawn.iter().sum();
        assert!((900..1100).contains(&sum.as_secs()), "{sum:?}");
        assert!(drawn.iter().any(|time| *time < mean * 6 / 10));
        assert!(drawn.iter().any(|time| *time > mean * 14 / 10));
    }
}

//! How often something may happen.

use std::time::Instant;

/// A bucket that holds as much as may happen in one second, and fills again
/// while time passes.
#[derive(Clone, Debug)]
pub struct Rate {
    per_second: u32,
    left: f64,
    at: Instant,
}

impl Rate {
    /// So many a second, all of which may come at once.
    pub fn new(per_second: u32) -> Self {
        Self {
            per_second,
            left: f64::from(per_second),
            at: Instant::now(),
        }
    }

    /// The number a second.
    pub fn per_second(&self) -> u32 {
        self.per_second
    }

    /// Takes one; `false` if there is none left.
    pub fn take(&mut self) -> bool {
        self.take_at(Instant::now())
    }

    fn take_at(&mut self, now: Instant) -> bool {
        let most = f64::from(self.per_second);
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * most).min(most);
        self.at = now;
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_second_gives_what_it_says_and_no_more() {
        let mut rate = Rate::new(4);
        let start = rate.at;
        let taken = |rate: &mut Rate, at| (0..100).filter(|_| rate.take_at(at)).count();
        assert_eq!(taken(&mut rate, start), 4);
        assert_eq!(taken(&mut rate, start + Duration::from_millis(500)), 2);
        assert_eq!(taken(&mut rate, start + Duration::from_secs(3600)), 4);
    }
}

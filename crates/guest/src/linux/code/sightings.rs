//! Since when ranges of a running guest's memory have been seen in a state that
//! may pass.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use secmon_memory::VirtualAddress;

/// Ranges, and when each was first seen; what was not seen once is forgotten.
#[derive(Debug, Default)]
pub(crate) struct Sightings(Mutex<Vec<(Range<VirtualAddress>, Instant)>>);

impl Sightings {
    /// Takes note of all that is seen now, and tells for how long each has been
    /// seen, in the same order.
    pub(crate) fn note(&self, seen: &[Range<VirtualAddress>], now: Instant) -> Vec<Duration> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(range, _)| seen.contains(range));
        seen.iter()
            .map(|range| {
                let since = match known.iter().find(|(other, _)| other == range) {
                    Some((_, since)) => *since,
                    None => {
                        known.push((range.clone(), now));
                        now
                    }
                };
                now.saturating_duration_since(since)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_starts_anew_for_what_was_gone() {
        let range = |start| VirtualAddress::new(start)..VirtualAddress::new(start + 1);
        let sightings = Sightings::default();
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let note = |seen: &[u64], now| -> Vec<u128> {
            let seen: Vec<_> = seen.iter().copied().map(range).collect();
            let times = sightings.note(&seen, at(now));
            times.iter().map(Duration::as_millis).collect()
        };
        assert!(note(&[], 0).is_empty());
        assert_eq!(note(&[1], 5), [0]);
        assert_eq!(note(&[9, 1], 15), [0, 10]);
        assert_eq!(note(&[1, 9], 25), [20, 10]);
        assert_eq!(note(&[1], 35), [30]);
        assert_eq!(note(&[1, 9], 45), [40, 0]);
    }
}

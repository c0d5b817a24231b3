//! The monitor's own numbers.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::protocol::Heartbeat;

/// Reads what the machine says of itself, from files opened before the
/// worker confined itself.
pub(super) struct Health {
    memory: Option<File>,
    beats: AtomicU64,
}

impl Health {
    pub(super) fn open() -> Self {
        Self {
            memory: File::open(Path::new("/proc/meminfo")).ok(),
            beats: AtomicU64::new(0),
        }
    }

    /// The machine's part of a heartbeat.
    pub(super) fn beat(&self) -> Heartbeat {
        let (total, available) = self.memory();
        Heartbeat {
            sequence: self.beats.fetch_add(1, Ordering::Relaxed),
            uptime_ms: milliseconds(ClockId::Boottime),
            cpu_ms: milliseconds(ClockId::ProcessCPUTime),
            memory_used_kib: total.saturating_sub(available),
            memory_total_kib: total,
            ..Heartbeat::default()
        }
    }

    /// KiB in all, and available.
    fn memory(&self) -> (u64, u64) {
        let mut bytes = [0; 1024];
        let length = self
            .memory
            .as_ref()
            .and_then(|file| file.read_at(&mut bytes, 0).ok())
            .unwrap_or(0);
        let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned();
        (
            field(&text, "MemTotal:").unwrap_or(0),
            field(&text, "MemAvailable:").unwrap_or(0),
        )
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

fn milliseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u64::try_from(time.tv_nsec).unwrap_or(0) / 1_000_000;
    seconds.saturating_mul(1000).saturating_add(rest)
}

/// When a thread was last seen to go on.
#[derive(Debug)]
pub(super) struct Pulse {
    origin: Instant,
    last_ms: AtomicU64,
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self {
            origin: Instant::now(),
            last_ms: AtomicU64::new(0),
        }
    }

    /// The thread goes on.
    pub(super) fn beat(&self) {
        let since = self.origin.elapsed().as_millis();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        self.last_ms.store(since, Ordering::Relaxed);
    }

    /// How long ago it last did.
    pub(super) fn age(&self) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        self.origin.elapsed().saturating_sub(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read() {
        let health = Health::open();
        let first = health.beat();
        let second = health.beat();
        assert_eq!((first.sequence, second.sequence), (0, 1));
        assert!(first.memory_used_kib > 0 && first.memory_used_kib < first.memory_total_kib);
        assert!(second.uptime_ms >= first.uptime_ms && first.uptime_ms > 0);
        assert_eq!(field("A: 1 kB\nB:   23 kB\n", "B:"), Some(23));
        assert_eq!(field("B: x\n", "B:"), None);
    }

    #[test]
    fn a_pulse_ages() {
        let pulse = Pulse::new();
        std::thread::sleep(Duration::from_millis(30));
        assert!(pulse.age() >= Duration::from_millis(30));
        let before = pulse.age();
        pulse.beat();
        assert!(pulse.age() < before);
    }
}

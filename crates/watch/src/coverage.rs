//! What polling has seen of what there was: of the tasks that the kernel made,
//! those that a look at the lists of tasks met.

use std::collections::HashSet;
use std::time::Instant;

use secmon_guest::linux::task;
use secmon_guest::{Guest, TableError};

use crate::Incident;

/// More tasks than this are not followed.
const MOST: usize = 1 << 20;
const NAME: &str = "coverage";

/// The tasks of a boot, as the last look met them.
#[derive(Debug, Default)]
pub struct Coverage {
    /// By thread id and start time, which no other task of a boot has both.
    alive: HashSet<(u32, u64)>,
    /// `total_forks` at the first look.
    first: Option<u64>,
    created: u64,
    seen: u64,
    told: Option<Told>,
}

#[derive(Debug)]
struct Told {
    at: Instant,
    created: u64,
    seen: u64,
}

impl Coverage {
    /// Looks at all tasks once.
    ///
    /// # Errors
    /// [`TableError`] if the lists can't be found.
    pub fn look(&mut self, guest: &Guest, now: Instant) -> Result<(), TableError> {
        let before = guest.diagnostics().recorded();
        let mut alive = HashSet::new();
        for leader in task::leaders(guest, NAME)? {
            let start = leader.model().layout.start_boottime.clone();
            for thread in task::threads(guest, NAME, &leader)? {
                if alive.len() < MOST {
                    alive.insert((thread.pid, thread.number(&start)));
                }
            }
        }
        // Read last: what was made during the walk and not met is met by the
        // next one, and never counted as seen before it was counted as made.
        let forks = total_forks(guest);
        let first = self.first.is_none();
        if first {
            self.first = forks;
            self.told = Some(Told {
                at: now,
                created: 0,
                seen: 0,
            });
        } else {
            let new = alive.difference(&self.alive).count() as u64;
            self.seen = self.seen.saturating_add(new);
            if let (Some(forks), Some(first)) = (forks, self.first) {
                self.created = self.created.max(forks.saturating_sub(first));
            }
        }
        if guest.diagnostics().recorded() == before || first {
            self.alive = alive;
        } else {
            // The walk may have lacked tasks: they are not new the next time.
            self.alive.extend(alive);
            if self.alive.len() > MOST {
                self.alive.clear();
            }
        }
        Ok(())
    }

    /// Tasks that the kernel made and that were seen, since the first look.
    pub fn totals(&self) -> (u64, u64) {
        (self.created, self.seen.min(self.created))
    }

    /// What was seen since this was last told.
    pub fn tell(&mut self, now: Instant) -> Option<Incident> {
        let told = self.told.as_mut()?;
        let (created, seen) = (self.created, self.seen.min(self.created));
        let interval = now.saturating_duration_since(told.at);
        let incident = Incident::Coverage {
            what: "tasks".to_owned(),
            created: created.saturating_sub(told.created),
            seen: seen.saturating_sub(told.seen),
            interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
            note: if self.first.is_none() {
                "this kernel does not say how many it made".to_owned()
            } else {
                String::new()
            },
        };
        *told = Told {
            at: now,
            created,
            seen,
        };
        Some(incident)
    }
}

/// How many tasks the kernel has made since it started (`kernel/fork.c`).
fn total_forks(guest: &Guest) -> Option<u64> {
    let address = guest.address("total_forks")?;
    guest.space().read_u64(address).ok()
}

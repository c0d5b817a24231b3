//! What a session holds of the target, and until when.

use std::collections::BTreeSet;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, Instant};

use crate::protocol::{Breakpoint, Event, Limits, Message, ReleaseReason};
use crate::rate::Rate;

/// What a session holds.
pub(super) struct Session {
    pub(super) limits: Limits,
    pub(super) events: SyncSender<Message>,
    pub(super) lost_events: u64,
    pub(super) heard: Instant,
    pub(super) stops: Rate,
    pub(super) hold: Option<Hold>,
    pub(super) breakpoints: BTreeSet<Breakpoint>,
}

/// A target held still.
#[derive(Clone, Copy)]
pub(super) struct Hold {
    pub(super) since: Instant,
    pub(super) until: Instant,
}

impl Session {
    pub(super) fn holds_something(&self) -> bool {
        self.hold.is_some() || !self.breakpoints.is_empty()
    }

    /// A lease from now on.
    pub(super) fn lease(&mut self, wanted: u32, now: Instant) -> u32 {
        let milliseconds = wanted.min(self.limits.lease_milliseconds);
        let since = self.hold.map_or(now, |hold| hold.since);
        let until = now + Duration::from_millis(milliseconds.into());
        self.hold = Some(Hold { since, until });
        milliseconds
    }

    /// When and why the session loses what it holds, as things are.
    pub(super) fn ends(&self) -> Option<(Instant, ReleaseReason)> {
        let milliseconds = |count: u32| Duration::from_millis(count.into());
        let silence = self
            .holds_something()
            .then(|| self.heard + milliseconds(self.limits.silence_milliseconds));
        let lease = self.hold.map(|hold| hold.until);
        let longest = self
            .hold
            .map(|hold| hold.since + milliseconds(self.limits.longest_stop_milliseconds));
        [
            (lease, ReleaseReason::LeaseEnded),
            (longest, ReleaseReason::LongestStop),
            (silence, ReleaseReason::Silence),
        ]
        .into_iter()
        .filter_map(|(at, reason)| Some((at?, reason)))
        .min_by_key(|(at, _)| *at)
    }

    pub(super) fn tell(&mut self, event: Event) {
        if self.lost_events > 0 {
            let lost = Message::Event(Event::Lost(self.lost_events));
            if self.events.try_send(lost).is_ok() {
                self.lost_events = 0;
            }
        }
        if let Err(TrySendError::Full(_)) = self.events.try_send(Message::Event(event)) {
            self.lost_events += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::sync_channel;

    fn session(limits: Limits) -> Session {
        Session {
            limits,
            events: sync_channel(2).0,
            lost_events: 0,
            heard: Instant::now(),
            stops: Rate::new(1),
            hold: None,
            breakpoints: BTreeSet::new(),
        }
    }

    #[test]
    fn leases_are_cut_extended_and_end_after_the_longest_stop() {
        let limits = Limits {
            lease_milliseconds: 300,
            longest_stop_milliseconds: 1000,
            silence_milliseconds: 900,
            ..Limits::default()
        };
        let mut session = session(limits);
        let start = session.heard;
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        assert_eq!(session.ends(), None);
        assert_eq!(session.lease(200, start), 200);
        assert_eq!(session.ends(), Some((at(200), ReleaseReason::LeaseEnded)));
        assert_eq!(session.lease(5000, at(100)), 300);
        assert_eq!(session.ends(), Some((at(400), ReleaseReason::LeaseEnded)));
        session.lease(5000, at(800));
        assert_eq!(session.ends(), Some((at(900), ReleaseReason::Silence)));
        session.heard = at(800);
        assert_eq!(session.ends(), Some((at(1000), ReleaseReason::LongestStop)));
    }

    #[test]
    fn events_that_do_not_fit_are_counted() {
        let (events, queue) = sync_channel(1);
        let mut session = session(Limits::default());
        session.events = events;
        for _ in 0..4 {
            session.tell(Event::TargetReset);
        }
        assert_eq!(queue.recv(), Ok(Message::Event(Event::TargetReset)));
        session.tell(Event::TargetGone);
        assert_eq!(queue.recv(), Ok(Message::Event(Event::Lost(3))));
    }
}

//! Lets detectors look at a target all the time, by the policy of the
//! configuration, puts what they tell into the outbox, and has done through the
//! target's gate what the policy wants.

use std::sync::Arc;

use secmon_guest::Guest;
use secmon_respond::GateResponder;
use secmon_watch::{Incident, Policy, Reactions, Responder, Stop, Watched};

use super::follow::FollowedGuest;
use super::gate::GateLine;
use super::watcher::{self, Target};
use super::worker::Shared;

struct View<'a>(&'a Target);

impl Watched for View<'_> {
    fn guest(&self) -> Result<(Guest, u64), String> {
        let (kernel, boot) = FollowedGuest(self.0).kernel()?;
        Ok((watcher::guest(&kernel), boot))
    }

    fn boot(&self) -> Option<u64> {
        FollowedGuest(self.0).boot()
    }
}

/// Watches a target for ever.
pub(super) fn watch(shared: &Arc<Shared>, target: &Arc<Target>, policy: &Policy) {
    let name = target.name.clone();
    let telling = Arc::clone(shared);
    let tell: secmon_watch::Tell =
        Arc::new(move |incident: Incident| telling.tell_incident(&name, &incident));
    let responder = target.gate.as_ref().map(|gate| -> Box<dyn Responder> {
        let followed = Arc::clone(target);
        let current = move || {
            let kernel = followed.kernel().ok()?;
            Some(Arc::new(watcher::guest(&kernel)))
        };
        let line = GateLine(Arc::clone(gate));
        Box::new(GateResponder::new(line, Box::new(current)))
    });
    let reactions = std::sync::Mutex::new(Reactions::new(policy, responder, Arc::clone(&tell)));
    // Nobody ends it: it ends with the worker.
    let stop = Stop::new();
    secmon_watch::watch(&View(target), policy, &stop, &|incident| {
        tell(incident.clone());
        let mut reactions = reactions
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        reactions.react(&incident, policy, std::time::Instant::now());
    });
}

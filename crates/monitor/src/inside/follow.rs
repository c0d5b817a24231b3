//! Follows a target of this host as a monitor follows its own: what it does,
//! and the kernel to look at now.

use std::sync::{Arc, Mutex, PoisonError};

use secmon_memory::PhysicalMemory;
use secmon_profile::{FindOptions, Kernel};
use secmon_watch::TargetChange;

use super::watcher::{Target, Watcher};

/// Follows one target.
pub struct Follower {
    target: Arc<Target>,
    watcher: Mutex<Watcher>,
}

/// The kernel of a target that is followed.
#[derive(Clone, Copy)]
pub struct FollowedGuest<'a>(pub(super) &'a Target);

impl Follower {
    /// Follows what runs in this memory, and looks for kernels in this way.
    /// Nothing is read yet.
    pub fn new(memory: Arc<dyn PhysicalMemory>, options: FindOptions) -> Self {
        let target = Arc::new(Target::new(String::new(), None, Ok(memory), None));
        let watcher = Watcher::new(Arc::clone(&target), None).with_options(options);
        Self {
            target,
            watcher: Mutex::new(watcher),
        }
    }

    /// Looks at the target once; says what it did, in words.
    pub fn look(&self) -> Vec<(TargetChange, String)> {
        let mut watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        let told = watcher.look().into_iter();
        told.filter_map(|told| Some((told.kind.target_change()?, told.text)))
            .collect()
    }

    /// The kernel that was found.
    pub fn guest(&self) -> FollowedGuest<'_> {
        FollowedGuest(&self.target)
    }
}

impl FollowedGuest<'_> {
    /// The kernel that runs now, and the number of its boot.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub fn kernel(self) -> Result<(Kernel, u64), String> {
        let boot = self.0.boots();
        let kernel = self.0.kernel()?;
        Ok((Kernel::clone(&kernel), boot))
    }

    /// The number of the boot that is followed, once there was one.
    pub fn boot(self) -> Option<u64> {
        Some(self.0.boots()).filter(|boots| *boots > 0)
    }
}

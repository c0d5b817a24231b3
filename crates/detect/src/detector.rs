//! What a detector is, and why one could not do its work.

use secmon_guest::{Guest, TableError};
use secmon_memory::{ReadError, VirtualAddress};

use crate::{Finding, Technique};

/// Compares views of a guest that must agree.
///
/// All texts are sentences for `docs/detection.md`.
pub trait Detector: Sync {
    /// Its name in `snake_case`, stable: `processes`.
    fn name(&self) -> &'static str;
    /// What it finds.
    fn meaning(&self) -> &'static str;
    /// Which views it compares with which.
    fn compares(&self) -> &'static str;
    /// How an attacker who knows it stays unseen.
    fn evaded_by(&self) -> &'static str;
    /// The techniques of ATT&CK whose traces it finds.
    fn techniques(&self) -> &'static [Technique];
    /// What it reads, and how that grows.
    fn cost(&self) -> &'static str;

    /// What it can't look at in this guest, whatever it does, without its full
    /// stop; none if nothing.
    fn limits(&self, _guest: &Guest) -> Option<&'static str> {
        None
    }

    /// Looks at the guest once and hands out what it finds.
    ///
    /// A running guest changes between two views. So what differs is read
    /// again, the views in the opposite order, before it is claimed.
    ///
    /// # Errors
    /// [`DetectError`] if it can't be done on this guest, or not to the end;
    /// what was handed out before counts.
    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError>;
}

/// Why a detector could not do its work, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// The kernel's symbols or types lack what it starts from.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The kernel has not what is to be compared.
    #[error("the kernel has no {what}")]
    Missing {
        /// What, by its kernel name.
        what: &'static str,
    },
    /// The memory where it starts can't be read.
    #[error("reading {what} at {address}: {source}")]
    Read {
        /// The object, by its kernel name.
        what: &'static str,
        /// Where it lies.
        address: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
    /// The file that was given as the kernel's own can't be compared with it.
    #[error("the kernel's file can't be compared with it: {reason}")]
    Reference {
        /// Why not.
        reason: String,
    },
    /// A view ended early, so that what it lacks proves nothing. On a running
    /// guest this may pass.
    #[error("{view} could not be read to its end: {reason}")]
    Incomplete {
        /// The view.
        view: &'static str,
        /// Why.
        reason: String,
    },
}

impl DetectError {
    /// Whether another look at a running guest may fare better.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        matches!(self, Self::Incomplete { .. } | Self::Read { .. })
    }
}

/// Whether all of `view` was read since `before` diagnostics had been recorded:
/// what was not may be what is looked for.
pub(crate) fn whole(guest: &Guest, before: u64, view: &'static str) -> Result<(), DetectError> {
    let lacking = guest.diagnostics().recorded().saturating_sub(before);
    if lacking == 0 {
        return Ok(());
    }
    let first = usize::try_from(before)
        .ok()
        .and_then(|before| guest.diagnostics().list().into_iter().nth(before))
        .map_or_else(String::new, |first| {
            format!(", first {}: {}", first.subject, first.reason)
        });
    Err(DetectError::Incomplete {
        view,
        reason: format!("{lacking} things could not be read{first}"),
    })
}

//! What hides in a guest, and what was changed in its kernel.
//!
//! A [`Detector`] compares views of one thing that must agree and hands out a
//! [`Finding`] where they do not. The views are walked by `secmon-guest`, which
//! knows no verdict; nothing here knows where the guest's bytes come from.
//! [`check()`] runs detectors, and on a running guest reports only what was
//! found again and again.
#![forbid(unsafe_code)]

mod check;
mod code;
mod credentials;
mod detector;
mod finding;
mod interrupts;
mod kernel_image;
mod kernel_pointers;
mod kernel_text;
pub mod lies;
mod modules;
mod named_processes;
mod network;
mod process_integrity;
pub mod processes;
mod registers;
mod rows;
mod subject;
mod system_calls;
mod tracing;
mod usermode_helpers;

pub use check::{Confirmation, DetectorReport, Outcome, Report, Round, check};
pub use detector::{DetectError, Detector};
pub use finding::{Class, Evidence, Finding, Severity, Technique};
pub use kernel_image::{expected_of_first_state, first_state};
pub use subject::Subject;

/// All detectors, in the order in which they run and are documented.
pub fn detectors() -> &'static [&'static dyn Detector] {
    static DETECTORS: &[&dyn Detector] = &[
        &processes::PROCESSES,
        &modules::Modules,
        &system_calls::SystemCalls,
        &interrupts::Interrupts,
        &registers::Registers,
        &kernel_pointers::KernelPointers,
        &kernel_text::KernelText,
        &kernel_image::KernelImage,
        &tracing::Tracing,
        &credentials::Credentials,
        &process_integrity::ProcessIntegrity,
        &network::Network,
        &usermode_helpers::UsermodeHelpers,
    ];
    DETECTORS
}

/// All detectors and those that take more than the guest's memory, which
/// [`check()`] is handed besides: for documents.
pub fn described() -> impl Iterator<Item = &'static dyn Detector> {
    let more: [&'static dyn Detector; 1] = [&lies::UNASKED];
    detectors().iter().copied().chain(more)
}

/// The detector of this name.
pub fn detector(name: &str) -> Option<&'static dyn Detector> {
    detectors()
        .iter()
        .copied()
        .find(|detector| detector.name() == name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn detectors_are_named_and_described() {
        let mut names = BTreeSet::new();
        for detector in described() {
            let name = detector.name();
            assert!(names.insert(name), "{name} is there twice");
            assert!(
                !name.is_empty() && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_')),
                "{name} is not in snake_case"
            );
            for text in [
                detector.meaning(),
                detector.compares(),
                detector.evaded_by(),
                detector.cost(),
            ] {
                assert!(text.ends_with('.'), "{name}: {text:?} is no sentence");
            }
            assert!(!detector.techniques().is_empty(), "{name} has no technique");
        }
    }
}

//! The specimens, as data: a file a subject.

mod credentials;
mod entries;
mod kernel_code;
mod pointers;
mod processes;
mod programs;
mod rows;
mod system;
mod tracing;

use super::Specimen;

/// By subject.
const SUBJECTS: &[&[Specimen]] = &[
    processes::ALL,
    kernel_code::ALL,
    entries::ALL,
    pointers::ALL,
    tracing::ALL,
    credentials::ALL,
    programs::ALL,
    system::ALL,
];

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Specimen> {
    SUBJECTS.iter().copied().flatten()
}

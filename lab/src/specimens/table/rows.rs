//! What rows of the table have in common.

use crate::specimens::{Edit, Expected, How, Module, Need, Shown, Specimen, Verdict};
use crate::suite::Suite;

/// The kernels that modules are built for.
pub(super) const MODULES: &[Suite] = &[Suite::Bookworm, Suite::Trixie];
/// The kernels for which memory is edited instead.
pub(super) const EDITED: &[Suite] = &[Suite::Bullseye, Suite::Sid];

/// Found as an attack or a suspicion.
pub(super) const fn found(detector: &'static str, finding: &'static str) -> Expected {
    Expected {
        detector,
        finding: Some(finding),
        verdict: Verdict::Alarm,
    }
}

/// As [`found`], for what is legitimate.
pub(super) const fn found_information(detector: &'static str, finding: &'static str) -> Expected {
    Expected {
        verdict: Verdict::Information,
        ..found(detector, finding)
    }
}

pub(super) const fn module(
    name: &'static str,
    technique: &'static str,
    does: &'static str,
    how: How,
    expected: Expected,
    shown: Shown,
) -> Specimen {
    Specimen {
        name,
        technique,
        does,
        suites: MODULES,
        how,
        expected,
        shown,
    }
}

pub(super) const fn loaded(file: &'static str, needs: &'static [Need]) -> How {
    How::Module(Module { file, needs })
}

/// A module without needs, hidden.
pub(super) const fn hidden(file: &'static str) -> How {
    How::HiddenModule(Module { file, needs: &[] })
}

pub(super) const fn program(
    role: &'static str,
    technique: &'static str,
    does: &'static str,
    expected: Expected,
) -> Specimen {
    Specimen {
        name: role,
        technique,
        does,
        suites: &Suite::ALL,
        how: How::Program(role),
        expected,
        shown: Shown::Stands,
    }
}

pub(super) const fn edit(
    name: &'static str,
    technique: &'static str,
    does: &'static str,
    edit: Edit,
    expected: Expected,
) -> Specimen {
    Specimen {
        name,
        technique,
        does,
        suites: EDITED,
        how: How::MemoryEdit(edit),
        expected,
        shown: Shown::Stands,
    }
}

/// An edit for all kernels.
pub(super) const fn edit_of_all(
    name: &'static str,
    technique: &'static str,
    does: &'static str,
    change: Edit,
    expected: Expected,
) -> Specimen {
    Specimen {
        suites: &Suite::ALL,
        ..edit(name, technique, does, change, expected)
    }
}

/// An edit of the kernel's text or constants, for all kernels: no module is
/// needed to tell it from what modules do.
pub(super) const fn anywhere(
    name: &'static str,
    does: &'static str,
    edit: Edit,
    finding: &'static str,
) -> Specimen {
    Specimen {
        name,
        technique: "T1014",
        does,
        suites: &Suite::ALL,
        how: How::MemoryEdit(edit),
        expected: found("kernel_image", finding),
        shown: Shown::Stands,
    }
}

/// A process of an ordinary user, that others change.
pub(super) const ORDINARY: &[Need] = &[Need::Process("ordinary")];

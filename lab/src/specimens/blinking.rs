//! Specimens that hide something and show it again, by turns: whether they are
//! found is a question of how often and how long one looks. So they are apart
//! from [`super::all`], of which each check has to find each.

use super::{Expected, How, Module, Need, Shown, Specimen, Verdict};
use crate::suite::Suite;

const SUITES: &[Suite] = &[Suite::Bookworm, Suite::Trixie];

const fn blinking(
    name: &'static str,
    does: &'static str,
    module: Module,
    expected: (&'static str, &'static str),
) -> Specimen {
    Specimen {
        name,
        technique: "T1014",
        does,
        suites: SUITES,
        how: How::Module(module),
        expected: Expected {
            detector: expected.0,
            finding: Some(expected.1),
            verdict: Verdict::Alarm,
        },
        shown: Shown::Stands,
    }
}

const fn process(name: &'static str, does: &'static str, needs: &'static [Need]) -> Specimen {
    let module = Module {
        file: "process_blinking",
        needs,
    };
    blinking(name, does, module, ("processes", "hidden_process"))
}

const fn module(name: &'static str, does: &'static str, needs: &'static [Need]) -> Specimen {
    let module = Module {
        file: "module_blinking",
        needs,
    };
    blinking(name, does, module, ("modules", "hidden_module"))
}

/// All of them.
pub static BLINKING: &[Specimen] = &[
    process(
        "process-blinking",
        "a process is out of the list of tasks for 20 of every 40 ms",
        &[
            Need::Process("ordinary"),
            Need::Symbol("tasklist_lock"),
            Need::Set("hidden_us=20000 shown_us=20000"),
        ],
    ),
    process(
        "process-blinking-fast",
        "a process is out of the list of tasks for 2 of every 4 ms",
        &[
            Need::Process("ordinary"),
            Need::Symbol("tasklist_lock"),
            Need::Set("hidden_us=2000 shown_us=2000"),
        ],
    ),
    process(
        "process-mostly-hidden",
        "a process is out of the list of tasks for 450 of every 500 ms",
        &[
            Need::Process("ordinary"),
            Need::Symbol("tasklist_lock"),
            Need::Set("hidden_us=450000 shown_us=50000"),
        ],
    ),
    module(
        "module-blinking",
        "a module is out of the list of modules for 20 of every 40 ms",
        &[
            Need::Resident,
            Need::Symbol("module_mutex"),
            Need::Set("hidden_us=20000 shown_us=20000"),
        ],
    ),
    module(
        "module-mostly-hidden",
        "a module is out of the list of modules for 450 of every 500 ms",
        &[
            Need::Resident,
            Need::Symbol("module_mutex"),
            Need::Set("hidden_us=450000 shown_us=50000"),
        ],
    ),
];

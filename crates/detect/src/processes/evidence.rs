//! What is told of a task that is missing somewhere.

use secmon_guest::linux::{processes, threads};
use secmon_guest::{Guest, Text, Value};

use super::NAME;
use super::gathered::{Gathered, Place};
use super::judge::Missing;
use crate::{Class, Evidence, Finding, Severity, Subject, Technique};

/// Of how many tasks of one look the rows are read; what hides hides seldom in
/// hundreds, and each row costs.
const MOST_ROWS: usize = 64;

/// The finding about the `index`th task.
pub(super) fn finding(
    guest: &Guest,
    gathered: &Gathered,
    missing: &Missing,
    index: usize,
) -> Finding {
    let record = &missing.record;
    let name = record.name.clone().unwrap_or_default();
    let shown = shows(gathered, missing);
    let subject = subject(missing, name.clone());
    let (finding, class, severity) = kind(missing);
    let summary = summary(missing, &subject, &shown);
    let mut finding = Finding::new(NAME, finding, class, severity, subject, summary)
        .technique(Technique::ROOTKIT);
    if index < MOST_ROWS {
        finding = finding.evidence(row(guest, missing));
    }
    for place in shown {
        let evidence = Evidence::new(place.name(), format!("it is in {}", place.meaning()));
        finding = finding.evidence(evidence.with("task", record.address));
    }
    for place in &missing.places {
        let what = format!("it is not in {}", place.meaning());
        finding = finding.evidence(Evidence::new(place.name(), what));
    }
    if let Some(true_pid) = missing.true_pid {
        let what = format!("the kernel gave it the id {true_pid}");
        let evidence = Evidence::new("pid", what)
            .with("pid", record.thread_pid)
            .with("number", true_pid);
        finding = finding.evidence(evidence);
    }
    if let Some((namespace, number)) = missing.namespace {
        let what = "its id there is not in the table of its pid namespace";
        let evidence = Evidence::new("pid_namespace", what)
            .with("namespace", namespace)
            .with("number", number);
        finding = finding.evidence(evidence);
    }
    finding
}

/// The places that have the task.
fn shows(gathered: &Gathered, missing: &Missing) -> Vec<Place> {
    let has = |place: &Place| {
        !missing.places.contains(place)
            && gathered
                .view(*place)
                .is_some_and(|view| view.has(missing.record.address))
    };
    Place::ALL.into_iter().filter(has).collect()
}

fn subject(missing: &Missing, name: Text) -> Subject {
    let record = &missing.record;
    if record.is_leader() {
        Subject::Process {
            task: record.address,
            pid: record.tgid,
            started: record.started,
            name,
        }
    } else {
        Subject::Thread {
            task: record.address,
            tid: record.pid,
            pid: record.tgid,
            started: record.started,
            name,
        }
    }
}

fn kind(missing: &Missing) -> (&'static str, Class, Severity) {
    let leads = missing.record.is_leader();
    if missing.is_hidden() {
        let name = if leads {
            "hidden_process"
        } else {
            "hidden_thread"
        };
        (name, Class::Attack, Severity::High)
    } else if missing.true_pid.is_some() {
        ("forged_pid", Class::Attack, Severity::High)
    } else if missing.namespace.is_some() {
        ("hidden_in_namespace", Class::Attack, Severity::Medium)
    } else {
        let name = if leads {
            "unlisted_process"
        } else {
            "unlisted_thread"
        };
        (name, Class::Suspicion, Severity::Medium)
    }
}

fn summary(missing: &Missing, subject: &Subject, shown: &[Place]) -> String {
    if let (false, Some(true_pid)) = (missing.is_hidden(), missing.true_pid) {
        return format!("{subject} names an id that is not its own: the kernel gave it {true_pid}");
    }
    if let (true, Some((_, number))) = (missing.places.is_empty(), missing.namespace) {
        return format!("{subject} is hidden inside its pid namespace, where its id is {number}");
    }
    let hidden = if missing.is_hidden() {
        "is hidden"
    } else {
        "is not listed everywhere"
    };
    format!(
        "{subject} {hidden}: missing from {}, shown by {}",
        listed(&missing.places),
        listed(shown)
    )
}

fn listed(places: &[Place]) -> String {
    let names: Vec<&str> = places.iter().map(|place| place.meaning()).collect();
    match names.split_last() {
        None => "nothing else".into(),
        Some((last, [])) => (*last).into(),
        Some((last, before)) => format!("{} and {last}", before.join(", ")),
    }
}

/// Its row in the table `processes` or `threads`.
fn row(guest: &Guest, missing: &Missing) -> Evidence {
    let record = &missing.record;
    let (view, row) = if record.is_leader() {
        ("processes", processes::row_at(guest, record.address))
    } else {
        ("threads", threads::row_at(guest, record.address))
    };
    match row {
        Ok(row) => Evidence::new(view, "its row, as if it were listed").with_row(row),
        Err(reason) => Evidence::new(view, format!("its row can't be read: {reason}"))
            .with("address", Value::from(record.address)),
    }
}

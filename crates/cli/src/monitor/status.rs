//! `secmon monitor status`.

use std::time::Duration;

use anyhow::Result;
use secmon_guest::{Kind, Value};
use secmon_monitor::launch::MonitorName;
use secmon_monitor::launch::run_directory::RunDirectory;
use secmon_monitor::launch::status::{self, GateStatus, Status};
use secmon_monitor::protocol::{GateReport, StatusReport, TargetReport};

use super::{connect_or_wait, remote};
use crate::arguments::{Common, Format};
use crate::listing::{self, column};
use crate::output::escape;
use crate::report::Reporter;

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a monitor itself says.
struct Inside {
    report: StatusReport,
    targets: Vec<TargetReport>,
}

/// Shows one monitor, or all.
pub fn status(name: Option<&MonitorName>, common: &Common, reporter: Reporter) -> Result<()> {
    let names = match name {
        Some(name) => vec![name.clone()],
        None => RunDirectory::names()?,
    };
    if names.is_empty() {
        reporter
            .warn("no monitor runs here; start one with `secmon monitor up --target qemu:NAME`");
    }
    let mut all = Vec::new();
    for name in &names {
        let status = status::read(name)?;
        let inside = if status.machine.is_running() {
            ask(name, reporter).map_err(|error| error.to_string())
        } else {
            Err("its VM does not run".to_owned())
        };
        all.push((status, inside));
    }
    if common.format == Format::Table {
        for (status, inside) in &all {
            print(status, inside);
        }
        return Ok(());
    }
    let columns = [
        column("monitor", Kind::Text, "Its name"),
        column("supervisor", Kind::Text, "Whether its supervisor runs"),
        column("machine", Kind::Text, "Whether its VM runs"),
        column(
            "restarts",
            Kind::Unsigned,
            "How often its VM was started again",
        ),
        column(
            "uptime_ms",
            Kind::Unsigned,
            "How long the monitor inside has run",
        ),
        column("cpu_ms", Kind::Unsigned, "The processor time it used"),
        column("memory_used_kib", Kind::Unsigned, "The memory it uses"),
        column(
            "findings_kept",
            Kind::Unsigned,
            "Findings that nobody took yet",
        ),
        column(
            "findings_lost",
            Kind::Unsigned,
            "Findings that were dropped for lack of room",
        ),
        column("target", Kind::Text, "A target"),
        column("host_state", Kind::Text, "What the host sees of it"),
        column("state", Kind::Text, "What the monitor sees of it"),
        column("gate", Kind::Text, "How its gate is"),
        column(
            "rights",
            Kind::Text,
            "What the monitor may do through the gate",
        ),
        column(
            "gate_log",
            Kind::Text,
            "Where the gate writes every use down",
        ),
        column(
            "run_state",
            Kind::Text,
            "What the gate says of the target to the monitor",
        ),
        column(
            "gate_head",
            Kind::Text,
            "The last record of the gate's log, for `secmon gate verify-log --head`",
        ),
        column(
            "trust_level",
            Kind::Text,
            "How far the monitor is protected",
        ),
    ];
    let mut rows = Vec::new();
    for (status, inside) in &all {
        for (slot, (target, host)) in status.state.targets.iter().enumerate() {
            let unknown = |reason: &String| Value::unreadable(reason);
            let of = |value: fn(&StatusReport) -> u64| match inside {
                Ok(inside) => Value::from(value(&inside.report)),
                Err(reason) => unknown(reason),
            };
            let seen = match inside {
                Ok(inside) => inside.targets.get(slot).map(|target| {
                    let head = match &target.gate {
                        GateReport::Connected { log_head, .. } => {
                            Value::from(format!("{}:{}", log_head.sequence, log_head.hash))
                        }
                        _ => Value::Null,
                    };
                    let texts = [remote::state(target), remote::gate(target)];
                    (texts, head, target.trust_level.name())
                }),
                Err(_) => None,
            };
            let [state, run_state, head, trust] = match (seen, inside) {
                (Some(([state, run_state], head, trust)), _) => [
                    Value::from(state),
                    Value::from(run_state),
                    head,
                    Value::from(trust),
                ],
                (None, Err(reason)) => [(); 4].map(|()| unknown(reason)),
                (None, Ok(_)) => [(); 4].map(|()| Value::Null),
            };
            let gate = status.gates.get(slot);
            let of_gate = |text: fn(&GateStatus) -> String| {
                gate.map_or(Value::Null, |gate| Value::from(text(gate)))
            };
            rows.push(vec![
                Value::from(status.name.as_str()),
                Value::from(status.supervisor.to_string()),
                Value::from(status.machine.to_string()),
                Value::from(status.state.restarts),
                of(|report| report.heartbeat.uptime_ms),
                of(|report| report.heartbeat.cpu_ms),
                of(|report| report.heartbeat.memory_used_kib),
                of(|report| report.heartbeat.findings_kept),
                of(|report| report.heartbeat.findings_lost),
                Value::from(target.as_str()),
                Value::from(host.to_string()),
                state,
                of_gate(ToString::to_string),
                of_gate(|gate| gate.rights.clone()),
                of_gate(|gate| gate.log.display().to_string()),
                run_state,
                head,
                trust,
            ]);
        }
    }
    Ok(listing::show(&columns, common.format, rows)?)
}

fn ask(name: &MonitorName, reporter: Reporter) -> Result<Inside> {
    let mut connection = connect_or_wait(name, PATIENCE, reporter)?;
    Ok(Inside {
        report: connection.client.status()?,
        targets: connection.client.targets()?,
    })
}

fn print(status: &Status, inside: &Result<Inside, String>) {
    let shown = |text: &str| escape::message(text).into_owned();
    println!("Monitor {}", status.name);
    println!("  supervisor: {}", status.supervisor);
    println!(
        "  VM: {}, started again {} times",
        status.machine, status.state.restarts
    );
    match inside {
        Ok(Inside { report, .. }) => {
            let beat = &report.heartbeat;
            println!(
                "  inside: secmon {} on Linux {}, up {} s, {} of {} MiB used, {:.1} s of processor time",
                shown(&report.version),
                shown(&report.kernel),
                beat.uptime_ms / 1000,
                beat.memory_used_kib / 1024,
                beat.memory_total_kib / 1024,
                Duration::from_millis(beat.cpu_ms).as_secs_f64(),
            );
            println!(
                "  findings: {} kept, {} lost; targets running: {} of {}, standing still by their gates: {}",
                beat.findings_kept,
                beat.findings_lost,
                beat.targets_running,
                beat.targets,
                beat.targets_standing_still
            );
            for weakness in &report.weaknesses {
                println!("  weakness: {}", shown(weakness));
            }
        }
        Err(reason) => println!("  inside: not known: {}", shown(reason)),
    }
    for (slot, (target, host)) in status.state.targets.iter().enumerate() {
        println!("  {target}: {}", shown(&host.to_string()));
        if let Some(gate) = status.gates.get(slot) {
            println!("    gate: {}", shown(&gate.to_string()));
            println!(
                "      grants {}; log {}",
                gate.rights,
                shown(&gate.log.display().to_string())
            );
        }
        if let Ok(inside) = inside
            && let Some(report) = inside.targets.get(slot)
        {
            println!(
                "    as {}, trust level {}: {}",
                shown(&report.name),
                report.trust_level,
                shown(&remote::state(report))
            );
            println!("    through its gate: {}", shown(&remote::gate(report)));
        }
    }
    const SHOWN: usize = 8;
    let events = &status.state.events;
    let start = events.len().saturating_sub(SHOWN);
    for event in events.iter().skip(start) {
        let ago = secmon_monitor::launch::state::now().saturating_sub(event.time);
        println!("  {ago} s ago: {}", shown(&event.text));
    }
}

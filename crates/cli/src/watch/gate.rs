//! What a policy wants done at a target of this host: `secmon respond`, a
//! process each time. It reaches the gate, and looks at the guest where it has
//! to; so neither the process that looks nor this one has a gate's rights open.

use std::ffi::OsString;
use std::process::{Command, Stdio};

use anyhow::Result;
use secmon_watch::{Action, Done, FindingRecord, Refused, Responder};
use serde::Deserialize;

use crate::respond::GateOptions;

/// The responder of these options, if a gate was named.
///
/// # Errors
/// If something that belongs to a gate is missing or can't be read.
pub fn responder(options: &GateOptions, target: &str) -> Result<Option<Box<dyn Responder>>> {
    if options.gate.is_none() && options.gate_key.is_none() && options.key.is_none() {
        return Ok(None);
    }
    // Said at the start, not when it is needed.
    drop(options.connect()?);
    let mut arguments: Vec<OsString> = Vec::new();
    if let Some(gate) = &options.gate {
        arguments.extend(["--gate".into(), gate.into()]);
    }
    if let Some(key) = &options.gate_key {
        arguments.extend(["--gate-key".into(), key.into()]);
    }
    if let Some(key) = &options.key {
        arguments.extend(["--key".into(), key.into()]);
    }
    Ok(Some(Box::new(OwnProgram {
        gate: arguments,
        target: target.to_owned(),
    })))
}

struct OwnProgram {
    gate: Vec<OsString>,
    target: String,
}

/// What `secmon respond` says it has done.
#[derive(Deserialize)]
struct Said {
    done: String,
}

impl Responder for OwnProgram {
    fn respond(&mut self, action: Action, finding: &FindingRecord) -> Result<Done, Refused> {
        let refused = |reason: String| Refused { reason };
        let words: Vec<String> = match action {
            Action::Log | Action::Alert => Vec::new(),
            Action::Pause => vec!["pause".to_owned()],
            Action::DisconnectNetwork => vec!["disconnect".to_owned()],
            Action::DumpMemory => vec!["dump".to_owned()],
            Action::KillProcess => {
                let Some(process) = finding.process() else {
                    let about = &finding.about;
                    return Err(refused(format!(
                        "{about} is no process that could be ended"
                    )));
                };
                let task = format!("{:#x}", process.task.as_u64());
                let (pid, started) = (process.pid.to_string(), process.started.to_string());
                ["kill", &pid, "--task", &task, "--started", &started]
                    .map(str::to_owned)
                    .to_vec()
            }
        };
        if words.is_empty() {
            let what = "nothing is done at the target".to_owned();
            return Ok(Done { what });
        }
        let program = std::env::current_exe()
            .map_err(|error| refused(format!("finding this program's own file: {error}")))?;
        let output = Command::new(program)
            .args(["--target", &self.target, "--format", "json", "respond"])
            .args(&self.gate)
            .args(words)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| refused(format!("starting secmon respond: {error}")))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim().trim_start_matches("secmon: error: ");
            return Err(refused(said.to_owned()));
        }
        let said: Said = serde_json::from_slice(&output.stdout)
            .map_err(|error| refused(format!("secmon respond said something else: {error}")))?;
        Ok(Done { what: said.done })
    }
}

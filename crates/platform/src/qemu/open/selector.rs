//! Which QEMU is meant, and finding it among those that run.

use std::fmt;
use std::str::FromStr;

use super::QemuError;
use crate::qemu::discovery::{self, Inspection, QemuProcess};
use crate::qemu::process::ProcessId;

/// Which QEMU is meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    /// The guest's name (`-name`); digits alone are a process id if there is
    /// such a QEMU.
    Name(String),
    /// The process.
    Pid(u32),
}

impl FromStr for Selector {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        Ok(match text.parse() {
            Ok(pid) if digits => Self::Pid(pid),
            _ => Self::Name(text.to_owned()),
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Pid(pid) => write!(f, "{pid}"),
        }
    }
}

/// Finds the running QEMU that is meant.
///
/// # Errors
/// [`QemuError::NotFound`], [`QemuError::Ambiguous`],
/// [`QemuError::NotATarget`].
pub fn find(selector: &Selector) -> Result<QemuProcess, QemuError> {
    if let Selector::Pid(pid) = selector {
        match discovery::inspect(*pid) {
            Ok(Inspection::Guest(process)) => return Ok(*process),
            Ok(Inspection::NoGuest(_, reason)) => {
                let reason = reason.to_string();
                return Err(QemuError::NotATarget { pid: *pid, reason });
            }
            // A guest's name may be a number, too.
            Ok(Inspection::NotQemu) | Err(_) => {}
        }
    }
    let name = selector.to_string();
    let discovery = discovery::discover().map_err(|source| QemuError::Host {
        pid: 0,
        what: "listing processes",
        source,
    })?;
    let (mut named, others): (Vec<_>, Vec<_>) = discovery
        .processes
        .into_iter()
        .partition(|process| process.command_line.name.as_deref() == Some(&name));
    if named.len() > 1 {
        let pids: Vec<String> = named.iter().map(|p| p.id.pid.to_string()).collect();
        return Err(QemuError::Ambiguous {
            name,
            count: pids.len(),
            pids: pids.join(", "),
        });
    }
    named.pop().ok_or_else(|| {
        if let Selector::Pid(pid) = selector
            && ProcessId::of(*pid).is_ok()
        {
            return QemuError::NotATarget {
                pid: *pid,
                reason: "it is not a QEMU system emulator".to_owned(),
            };
        }
        let running: Vec<String> = others
            .iter()
            .map(|process| match &process.command_line.name {
                Some(name) => format!("{name} (process {})", process.id.pid),
                None => format!("process {}", process.id.pid),
            })
            .collect();
        QemuError::NotFound {
            selector: name,
            running: if running.is_empty() {
                "none runs here".to_owned()
            } else {
                format!("running: {}", running.join(", "))
            },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_is_a_number_or_a_name() {
        let parse = |text: &str| {
            let Ok(selector) = text.parse::<Selector>();
            selector
        };
        assert_eq!(parse("12"), Selector::Pid(12));
        for name in ["", "+12", "-1", "12a", "99999999999", "web 1"] {
            assert_eq!(parse(name), Selector::Name(name.to_owned()));
        }
    }
}

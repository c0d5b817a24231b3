//! The workload: what PID 1 makes before it says it is ready.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;

use secmon_truth::Workload;

use super::sys;

/// What was made.
pub struct Made {
    roles: BTreeMap<String, i32>,
}

impl Made {
    /// Role to pid.
    pub fn roles(&self) -> &BTreeMap<String, i32> {
        &self.roles
    }

    pub fn resume_busy(&mut self) -> io::Result<()> {
        Ok(())
    }

    pub fn pause_busy(&mut self) -> io::Result<()> {
        Ok(())
    }

    pub fn refresh_sockets(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The role in the arguments.
pub fn role(_arguments: &[OsString]) -> Option<&OsString> {
    None
}

/// Plays a role for ever.
pub fn play(_role: &OsString) -> ! {
    sys::rest()
}

/// Makes everything.
pub fn all(workload: &Workload, _failures: &mut Vec<String>) -> io::Result<Made> {
    for number in 0..workload.processes {
        sys::fork(|| sys::set_name(format!("plain-{number}").as_bytes()))?;
    }
    Ok(Made {
        roles: BTreeMap::new(),
    })
}

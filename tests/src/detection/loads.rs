//! What a guest that hides nothing does while it is checked.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use secmon_lab::TruthChannel;

/// How long a load may take until it works.
const PATIENCE: Duration = Duration::from_secs(240);
/// Files of the kernel's tracing.
const TRACING: &str = "/sys/kernel/tracing";
/// What is traced: a function that hardly anything calls.
const TRACED: &str = "__x64_sys_getpgid";

/// A load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// What it is, for the document.
    pub name: &'static str,
    work: Work,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Nothing,
    /// The busy mode of the lab's agent.
    Busy,
    /// A role of the agent.
    Role(&'static str),
    /// Roles of the agent, beside what is switched on in tracefs.
    Tracing(&'static [&'static str]),
}

/// All of them, in the order in which a guest is put under them.
pub const LOADS: &[Load] = &[
    Load {
        name: "idle",
        work: Work::Nothing,
    },
    Load {
        name: "processes, threads, files and sockets come and go",
        work: Work::Busy,
    },
    Load {
        name: "programs are compiled, packages are installed and removed",
        work: Work::Role("building"),
    },
    Load {
        name: "containers come and go",
        work: Work::Role("containers"),
    },
    Load {
        name: "a module is loaded and unloaded",
        work: Work::Role("module-loop"),
    },
    Load {
        name: "ftrace, a kprobe and an eBPF program are in use",
        work: Work::Tracing(&["filter-program"]),
    },
    Load {
        name: "jump labels are patched",
        work: Work::Role("jump-labels"),
    },
];

impl Load {
    /// Puts a guest under it; back when it works.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn begin(&self, truth: &TruthChannel) -> Result<()> {
        match self.work {
            Work::Nothing => Ok(()),
            Work::Busy => truth.resume_busy(),
            Work::Role(role) => {
                truth.start_role(role)?;
                if role == "building" {
                    wait_for(truth, "/run/built")?;
                    wait_for(truth, "/run/packaged")?;
                }
                Ok(())
            }
            Work::Tracing(roles) => {
                let write =
                    |file: &str, text: &str| truth.write_file(&format!("{TRACING}/{file}"), text);
                write("set_ftrace_filter", TRACED)?;
                write("current_tracer", "function")?;
                write("kprobe_events", &format!("p:lab/lab_probe {TRACED}"))?;
                write("events/lab/lab_probe/enable", "1")?;
                roles
                    .iter()
                    .try_for_each(|role| truth.start_role(role).map(drop))
            }
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// If the guest can't.
    pub fn end(&self, truth: &TruthChannel) -> Result<()> {
        match self.work {
            Work::Nothing => Ok(()),
            Work::Busy => {
                let rounds = truth.pause_busy()?;
                ensure!(rounds > 0, "the guest was not busy");
                Ok(())
            }
            Work::Role(role) => truth.stop_role(role),
            Work::Tracing(roles) => {
                let write =
                    |file: &str, text: &str| truth.write_file(&format!("{TRACING}/{file}"), text);
                write("current_tracer", "nop")?;
                write("events/lab/lab_probe/enable", "0")?;
                write("kprobe_events", "-:lab/lab_probe")?;
                roles.iter().try_for_each(|role| truth.stop_role(role))
            }
        }
    }
}

/// Waits until the guest has a file.
fn wait_for(truth: &TruthChannel, path: &str) -> Result<()> {
    let start = Instant::now();
    while !truth.exists(path)? {
        if start.elapsed() > PATIENCE {
            let said = truth.read_file("/run/installed")?;
            bail!("the guest makes no {path}; of its installation: {said}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

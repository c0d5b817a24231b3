//! The agent: set-up, then a loop over requests.

mod boot;
mod make;
mod memory;
mod netlink;
mod serve;
mod sys;
mod tell;
mod work;

use std::io::Write as _;

use secmon_truth::{READY_MARK, Workload};

/// Runs as process 1, or as a role that process 1 executed.
pub fn run() {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(role) = make::role(&arguments) {
        make::play(&role);
    }
    if std::process::id() != 1 {
        eprintln!("secmon-truth is process 1 of a lab guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    if let Err(error) = guest() {
        console(&format!("secmon-truth: failed: {error:#}"));
    }
    sys::power_off();
}

fn guest() -> std::io::Result<()> {
    boot::switch_root()?;
    boot::mount_basics()?;
    let workload = workload()?;
    let mut failures = boot::load_modules(&workload)?;
    boot::set_switches();
    let made = make::all(&workload, &mut failures)?;
    let port = boot::open_port()?;
    console(READY_MARK);
    serve::requests(port, made, &failures)
}

fn workload() -> std::io::Result<Workload> {
    let text = std::fs::read("/etc/workload.json")?;
    serde_json::from_slice(&text).map_err(std::io::Error::from)
}

/// Writes a line to the console, which the host keeps as the serial log.
fn console(line: &str) {
    match std::fs::OpenOptions::new().write(true).open("/dev/console") {
        Ok(mut console) => {
            let _ = writeln!(console, "{line}");
        }
        // Before the devices are there: what the kernel opened for us.
        Err(_) => println!("{line}"),
    }
}

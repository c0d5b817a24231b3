//! What becomes of targets while a monitoring VM watches them: one starts late,
//! is reset, is migrated away, is switched off; each is told, told as what it
//! is, and followed from there.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secmon_lab::{
    Backing, Emulator, Guest, MonitorVm, Suite, WatchedRam, Workload, appliance_image,
};
use secmon_monitor::protocol::{Client, Finding, FindingKind, Notice, TargetState};
use secmon_tests::monitored::pids;
use serde_json::json;

const MEMORY_MIB: u32 = 256;
/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// A client, and the findings that it was told so far.
struct Listener {
    client: Client,
    told: Vec<Finding>,
}

impl Listener {
    /// Takes notices until there are so many findings of this kind about the
    /// target.
    fn wait(&mut self, target: &str, kind: FindingKind, times: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.count(target, kind) < times {
            let notice = self.client.notice(Some(deadline));
            let notice = notice.with_context(|| {
                format!("not {times} times {kind:?} of {target}: {:#?}", self.told)
            })?;
            if let Notice::Finding(finding) = notice {
                println!("{:?} {:?}: {}", finding.target, finding.kind, finding.text);
                self.told.push(finding);
            }
        }
        Ok(())
    }

    fn count(&self, target: &str, kind: FindingKind) -> usize {
        let of =
            |finding: &&Finding| finding.kind == kind && finding.target.as_deref() == Some(target);
        self.told.iter().filter(of).count()
    }

    fn state(&mut self, target: &str) -> Result<(TargetState, u64)> {
        let targets = self.client.targets()?;
        let found = targets.into_iter().find(|found| found.name == target);
        found
            .map(|found| (found.state, found.boots))
            .context("no such target")
    }

    fn wait_until_empty(&mut self, target: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.state(target)?.0 != TargetState::Empty {
            ensure!(Instant::now() < deadline, "{:?}", self.state(target)?);
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Whether process 1 is listed.
    fn has_init(&mut self, target: &str) -> Result<bool> {
        Ok(pids(&mut self.client, target)?.contains(&1))
    }
}

#[test]
fn what_becomes_of_targets_is_told() -> Result<()> {
    let guest = Guest::builder(Suite::Bookworm)
        .memory_mib(MEMORY_MIB)
        .backing(Backing::File)
        .workload(Workload::small())
        // What the lab denies its guests otherwise.
        .qemu_argument("-action")
        .qemu_argument("reboot=reset")
        .boot()?;
    let file = guest.ram_file().context("a RAM file")?;
    let folder = tempfile::tempdir()?;
    let late = folder.path().join("late");
    let bytes = u64::from(MEMORY_MIB) << 20;
    File::create(&late)?.set_len(bytes)?;
    let ram = |name: &str, file: &Path| WatchedRam {
        name: name.to_owned(),
        file: file.to_owned(),
        bytes,
    };
    let watched = [ram("web", &file), ram("late", &late)];
    let image = appliance_image(Suite::Bookworm)?;
    let vm = MonitorVm::start_with(Emulator::Installed, &image, &watched, None)?;
    let outcome = live(&vm, &guest, &file, &late);
    outcome.with_context(|| format!("the monitor's console:\n{}", vm.console()))
}

fn live(vm: &MonitorVm, guest: &Guest, file: &Path, late: &Path) -> Result<()> {
    let mut listener = Listener {
        client: vm.connect()?,
        told: Vec::new(),
    };
    listener.wait("web", FindingKind::TargetStarted, 1)?;
    listener.wait_until_empty("late")?;

    // A machine starts where there was none: into the file that the monitor
    // has, which must not get shorter.
    guest.while_stopped(|_| {
        let mut late = File::options().write(true).open(late)?;
        Ok(late.write_all(&fs::read(file)?)?)
    })?;
    listener.wait("late", FindingKind::TargetStarted, 1)?;
    ensure!(listener.has_init("late")?);

    // A reset: another boot, however long there is no kernel between.
    for reboots in 1..=2 {
        guest.control().execute("system_reset", &json!({}))?;
        listener.wait("web", FindingKind::TargetRebooted, reboots)?;
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Process 1 is not the first thing that a kernel makes.
        if listener.has_init("web").unwrap_or(false) {
            break;
        }
        ensure!(Instant::now() < deadline, "{:?}", listener.state("web")?);
        std::thread::sleep(Duration::from_millis(200));
    }
    let (state, boots) = listener.state("web")?;
    ensure!(
        matches!(state, TargetState::Running { .. }) && boots == 3,
        "{boots} {state:?}"
    );
    ensure!(listener.count("web", FindingKind::TargetStarted) == 1);

    // The copy has no processor: it was stopped, not switched off.
    listener.wait("late", FindingKind::TargetStopped, 1)?;
    ensure!(listener.count("late", FindingKind::TargetGone) == 0);

    // Migrated away: what is left behind stands still and is still readable.
    let uri = json!({"uri": "exec:cat > /dev/null"});
    guest.control().execute("migrate", &uri)?;
    listener.wait("web", FindingKind::TargetStopped, 1)?;
    ensure!(guest.control().status()? == "postmigrate");
    ensure!(listener.has_init("web")?);
    // It fails at the other end, and goes on here.
    guest.control().resume()?;
    listener.wait("web", FindingKind::TargetResumed, 1)?;

    // Switched off: no kernel, and the next one is another start.
    let zeros = || -> Result<()> {
        let late = File::options().write(true).open(late)?;
        let zeros = vec![0; 1 << 20];
        for _ in 0..MEMORY_MIB {
            (&late).write_all(&zeros)?;
        }
        Ok(())
    };
    zeros()?;
    listener.wait("late", FindingKind::TargetGone, 1)?;
    listener.wait_until_empty("late")?;
    let status = listener.client.status()?;
    println!("{:?}", status.heartbeat);
    ensure!(status.heartbeat.findings_lost == 0 && status.heartbeat.restarts == 0);
    ensure!(listener.count("web", FindingKind::TargetRebooted) == 2);
    ensure!(listener.count("late", FindingKind::TargetRebooted) == 0);
    Ok(())
}

//! A monitoring VM with nine targets at once: each is found by itself, all of
//! them fit into its memory, and one that has not started is said to be empty.
//! Another one with four targets of four kernels.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secmon_lab::{
    Backing, Emulator, Guest, MonitorVm, Suite, WatchedRam, Workload, appliance_image,
};
use secmon_monitor::protocol::{Client, TargetReport, TargetState};
use secmon_tests::monitored::pids;

/// Targets that run; the ninth has not started.
const RUNNING: usize = 8;
const MEMORY_MIB: u32 = 256;
/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// The VM's bound of memory in KiB.
const MEMORY_KIB: u64 = 128 << 10;

fn wait_for(client: &mut Client, what: &str, fits: impl Fn(&[TargetReport]) -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let targets = client.targets()?;
        if fits(&targets) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{what}: still {targets:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn is_running(target: &TargetReport) -> bool {
    matches!(target.state, TargetState::Running { .. })
}

#[test]
fn nine_targets_at_once() -> Result<()> {
    // One machine's memory is shown as eight devices: to the monitor these are
    // eight machines.
    let guest = Guest::builder(Suite::Bookworm)
        .memory_mib(MEMORY_MIB)
        .backing(Backing::File)
        .workload(Workload::small())
        .boot()?;
    let file = guest.ram_file().context("a RAM file")?;
    let folder = tempfile::tempdir()?;
    let late = folder.path().join("late");
    let bytes = u64::from(MEMORY_MIB) << 20;
    File::create(&late)?.set_len(bytes)?;
    let names: Vec<String> = (0..RUNNING).map(|number| format!("web{number}")).collect();
    let mut watched: Vec<WatchedRam> = names
        .iter()
        .map(|name| WatchedRam {
            name: name.clone(),
            file: file.clone(),
            bytes,
        })
        .collect();
    watched.push(WatchedRam {
        name: "late".to_owned(),
        file: late,
        bytes,
    });
    let image = appliance_image(Suite::Bookworm)?;
    let vm = MonitorVm::start_with(Emulator::Installed, &image, &watched, None)?;
    let outcome = watch(&vm, &guest, &names);
    outcome.with_context(|| format!("the monitor's console:\n{}", vm.console()))
}

#[test]
fn four_kernels_at_once() -> Result<()> {
    let boot = |suite: Suite| {
        Guest::builder(suite)
            .memory_mib(MEMORY_MIB)
            .backing(Backing::File)
            .workload(Workload::small())
            .boot()
    };
    let guests: Vec<Guest> = Suite::ALL.into_iter().map(boot).collect::<Result<_>>()?;
    let guests: Vec<&Guest> = guests.iter().collect();
    let image = appliance_image(Suite::Bookworm)?;
    let vm = MonitorVm::start(Emulator::Installed, &image, &guests)?;
    let all = |client: &mut Client| {
        wait_for(client, "four run", |targets| targets.iter().all(is_running))?;
        for guest in &guests {
            compare(client, guest, guest.name())?;
        }
        within_bounds(client)
    };
    let outcome = vm.connect().and_then(|mut client| all(&mut client));
    outcome.with_context(|| format!("the monitor's console:\n{}", vm.console()))
}

fn watch(vm: &MonitorVm, guest: &Guest, names: &[String]) -> Result<()> {
    let mut client = vm.connect()?;
    wait_for(&mut client, "eight run, one is empty", |targets| {
        let (running, others): (Vec<_>, Vec<_>) = targets.iter().partition(|t| is_running(t));
        running.len() == RUNNING
            && matches!(&others[..], [other] if other.state == TargetState::Empty)
    })?;
    println!(
        "all found {:.1} s after QEMU's start",
        vm.started.elapsed().as_secs_f32()
    );
    for name in names {
        compare(&mut client, guest, name)?;
    }
    within_bounds(&mut client)
}

/// What the monitor lists of a target is what the guest says.
fn compare(client: &mut Client, guest: &Guest, name: &str) -> Result<()> {
    let truth = guest.truth().processes()?;
    let mut found = pids(client, name)?;
    let mut expected: Vec<u64> = truth.iter().map(|process| process.pid as u64).collect();
    // Kernel workers come and go.
    found.retain(|pid| expected.contains(pid));
    expected.retain(|pid| found.contains(pid));
    ensure!(
        found.len() * 10 >= truth.len() * 9,
        "{name}: {} processes",
        found.len()
    );
    Ok(())
}

fn within_bounds(client: &mut Client) -> Result<()> {
    let status = client.status()?;
    println!("{:?}", status.heartbeat);
    ensure!(status.heartbeat.memory_total_kib <= MEMORY_KIB);
    ensure!(status.heartbeat.findings_lost == 0 && status.heartbeat.restarts == 0);
    Ok(())
}

//! What a monitoring VM costs its target and its host: `cargo xtask costs` runs
//! this and writes `docs/costs.md`.
//!
//! A guest with its RAM in a file and a monitoring VM beside it. The guest
//! works, computing or calling its kernel, for a while with the monitor asked
//! for all processes ten times a second, and for a while with the monitor's
//! QEMU stopped, so that nothing of it runs. Each two such whiles are a pair, in
//! turns the one or the other first; the loss is the median over the pairs.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use secmon_benches::process::processor;
use secmon_guest::{Guest as Tables, Request, Selection};
use secmon_lab::{
    Acceleration, Backing, Emulator, Guest, MonitorVm, Suite, Work, Workload, appliance_image,
};
use secmon_memory::{PhysicalAddress, PhysicalMemory};
use secmon_monitor::protocol::{Answer, Client, Pause, Query, TargetState};
use secmon_platform::target::{OpenOptions, Target};
use secmon_profile::{Cache, FindOptions};

/// Pairs of each kind of work.
const PAIRS: usize = 15;
/// How long the guest works in each half of a pair.
const HALF: Duration = Duration::from_secs(2);
/// Between the beginnings of two listings.
const INTERVAL: Duration = Duration::from_millis(100);
/// How much is read to measure the speed of reading, in MiB.
const SPAN: u32 = 64;
/// Where guest physical memory is free of holes.
const FIRST: u64 = 16 << 20;
/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(240);
/// Clock ticks of `/proc` in a second (`USER_HZ`).
const TICKS: f64 = 100.0;

/// What one half of a pair with the monitor showed.
#[derive(Default)]
struct Polled {
    wall: Duration,
    processor: f64,
    listings: u32,
    rows: u64,
}

/// The seconds that a process ran on a processor so far.
fn processor_time(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || -> Result<f64> { Ok(fields.next().context("a field")?.parse()?) };
    Ok((ticks()? + ticks()?) / TICKS)
}

fn signal(vm: &MonitorVm, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(vm.pid() as i32).context("a process id")?;
    Ok(kill_process(pid, signal)?)
}

fn list(client: &mut Client, target: &str) -> Result<u64> {
    let query = Query {
        target: target.to_owned(),
        table: "processes".to_owned(),
        columns: None,
        pids: None,
        all_namespaces: false,
        limit: None,
        credit: 0,
        pause: Pause::None,
    };
    let mut rows = 0;
    let end = client.query(query, &mut |answer| {
        if let Answer::Rows(some) = answer {
            rows += some.len() as u64;
        }
        ControlFlow::Continue(())
    })?;
    ensure!(end.error.is_none(), "the listing failed: {:?}", end.error);
    Ok(rows)
}

/// Lets the guest work while the monitor is asked ten times a second.
fn with_monitor(
    guest: &Guest,
    vm: &MonitorVm,
    client: &mut Client,
    work: Work,
    polled: &mut Polled,
) -> Result<u64> {
    let over = AtomicBool::new(false);
    let target = guest.name().to_owned();
    std::thread::scope(|scope| {
        let before = processor_time(vm.pid())?;
        let started = Instant::now();
        let poller = scope.spawn(|| -> Result<(u32, u64)> {
            let (mut listings, mut rows) = (0, 0);
            let mut next = Instant::now();
            while !over.load(Ordering::Relaxed) {
                rows += list(client, &target)?;
                listings += 1;
                next = (next + INTERVAL).max(Instant::now());
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            Ok((listings, rows))
        });
        let count = guest.truth().work(work, HALF.as_millis() as u32);
        let wall = started.elapsed();
        let used = processor_time(vm.pid())? - before;
        over.store(true, Ordering::Relaxed);
        let (listings, rows) = poller
            .join()
            .map_err(|_| anyhow::anyhow!("the poller panicked"))??;
        polled.wall += wall;
        polled.processor += used;
        polled.listings += listings;
        polled.rows += rows;
        count
    })
}

fn without_monitor(guest: &Guest, vm: &MonitorVm, work: Work) -> Result<u64> {
    signal(vm, Signal::STOP)?;
    let count = guest.truth().work(work, HALF.as_millis() as u32);
    signal(vm, Signal::CONT)?;
    count
}

/// The losses of all pairs, in hundredths, smallest first.
fn losses(
    guest: &Guest,
    vm: &MonitorVm,
    client: &mut Client,
    work: Work,
    polled: &mut Polled,
) -> Result<Vec<f64>> {
    let mut losses = Vec::new();
    for pair in 0..PAIRS {
        let (with, without) = if pair % 2 == 0 {
            let with = with_monitor(guest, vm, client, work, polled)?;
            (with, without_monitor(guest, vm, work)?)
        } else {
            let without = without_monitor(guest, vm, work)?;
            (with_monitor(guest, vm, client, work, polled)?, without)
        };
        losses.push((1.0 - with as f64 / without as f64) * 100.0);
    }
    losses.sort_by(f64::total_cmp);
    Ok(losses)
}

/// Seconds of a processor that one listing takes on this host, out of the same
/// RAM file.
fn listing_on_host(file: &Path) -> Result<f64> {
    const LISTINGS: u32 = 50;
    let opened = open(file)?;
    let options = FindOptions {
        cache: Cache::Off,
        ..FindOptions::default()
    };
    let kernel = secmon_profile::find(&opened, &options).context("the guest's kernel")?;
    let tables = Tables::new(kernel);
    let table = secmon_guest::table("processes").context("the table")?;
    let request = Request {
        columns: None,
        selection: Selection::default(),
    };
    let read = || table.read(&tables, &request, &mut |_| ControlFlow::Continue(()));
    read()?;
    let now = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let before = now();
    for _ in 0..LISTINGS {
        read()?;
    }
    Ok((now() - before) / f64::from(LISTINGS))
}

fn open(file: &Path) -> Result<std::sync::Arc<dyn PhysicalMemory>> {
    let target: Target = format!("file:{}", file.display()).parse()?;
    Ok(target.open(&OpenOptions::default())?.memory)
}

/// Bytes a second that this host reads of the file.
fn speed_on_host(file: &Path) -> Result<f64> {
    let memory = open(file)?;
    let mut buffer = vec![0; 64 << 10];
    let mut fastest = f64::MAX;
    for round in 0..6 {
        let started = Instant::now();
        for offset in (0..u64::from(SPAN) << 20).step_by(buffer.len()) {
            memory.read(PhysicalAddress::new(FIRST + offset), &mut buffer)?;
            std::hint::black_box(&buffer);
        }
        if round > 0 {
            fastest = fastest.min(started.elapsed().as_secs_f64());
        }
    }
    Ok(f64::from(SPAN) * f64::from(1 << 20) / fastest)
}

/// Bytes a second that a guest reads of the file as a device's memory, and of
/// its own memory.
fn speed_in_guest(file: &Path, mebibytes: u32) -> Result<(f64, f64)> {
    let reader = Guest::builder(Suite::Bookworm)
        .workload(Workload::small())
        .qemu_argument("-object")
        .qemu_argument(format!(
            "memory-backend-file,id=seen,size={mebibytes}M,mem-path={},share=on,readonly=on",
            file.display()
        ))
        .qemu_argument("-device")
        .qemu_argument("ivshmem-plain,memdev=seen,addr=0x10")
        .boot()
        .context("a guest that reads")?;
    let device = "/sys/bus/pci/devices/0000:00:10.0/resource2_wc";
    let bytes = f64::from(SPAN) * f64::from(1 << 20);
    let speed = |path| -> Result<f64> {
        let nanoseconds = reader.truth().read_through(path, SPAN, 5)?;
        Ok(bytes * 1e9 / nanoseconds as f64)
    };
    Ok((speed(Some(device))?, speed(None)?))
}

fn main() -> Result<()> {
    let guest = Guest::builder(Suite::Bookworm)
        .backing(Backing::File)
        .workload(Workload::small())
        .boot()?;
    let file: PathBuf = guest.ram_file().context("a RAM file")?;
    let image = appliance_image(Suite::Bookworm)?;
    let vm = MonitorVm::start(Emulator::Installed, &image, &[&guest])?;
    let mut client = vm.connect()?;
    let deadline = Instant::now() + PATIENCE;
    while !matches!(
        client.targets()?.first().map(|target| &target.state),
        Some(TargetState::Running { .. })
    ) {
        ensure!(Instant::now() < deadline, "{}", vm.console());
        std::thread::sleep(Duration::from_millis(100));
    }
    list(&mut client, guest.name())?;

    let mut polled = Polled::default();
    let computing = losses(&guest, &vm, &mut client, Work::Compute, &mut polled)?;
    let calling = losses(&guest, &vm, &mut client, Work::SystemCalls, &mut polled)?;
    drop((client, vm));
    let native = listing_on_host(&file)?;
    let on_host = speed_on_host(&file)?;
    let (device, own) = speed_in_guest(&file, guest.memory_mib())?;

    let text = report(&Measured {
        acceleration: guest.acceleration(),
        computing,
        calling,
        polled,
        native,
        on_host,
        device,
        own,
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/costs.md");
    std::fs::write(&path, &text).with_context(|| path.display().to_string())?;
    print!("{text}");
    Ok(())
}

struct Measured {
    acceleration: Acceleration,
    computing: Vec<f64>,
    calling: Vec<f64>,
    polled: Polled,
    native: f64,
    on_host: f64,
    device: f64,
    own: f64,
}

fn report(measured: &Measured) -> String {
    let Measured {
        acceleration,
        computing,
        calling,
        polled,
        native,
        on_host,
        device,
        own,
    } = measured;
    let mut text = String::from(
        "# What a monitoring VM costs\n\nWritten by `cargo xtask costs`; do not edit. A guest of \
         Linux 6.1 with one vCPU works, and a monitoring VM beside it is asked for all columns of \
         `processes` ten times a second. ",
    );
    let name = acceleration.name();
    let _ = writeln!(
        text,
        "{PAIRS} pairs of {} s with and {} s without the monitor (its QEMU stopped), in turns the \
         one or the other first; the loss is the median of the pairs' losses, beside it the \
         quartiles. Both VMs ran under `{name}`.\n\nMachine: {}.\n",
        HALF.as_secs(),
        HALF.as_secs(),
        processor()
    );
    text.push_str("| what | measured | limit |\n|---|---:|---:|\n");
    for (what, losses) in [("computing", computing), ("system calls", calling)] {
        let at = |part: usize| {
            losses
                .get(losses.len() * part / 4)
                .copied()
                .unwrap_or(f64::NAN)
        };
        let _ = writeln!(
            text,
            "| the guest's loss, {what} | {:.2} % ({:.2} to {:.2}) | 2 % |",
            at(2),
            at(1),
            at(3)
        );
    }
    let wall = polled.wall.as_secs_f64();
    let _ = writeln!(
        text,
        "| listings a second ({} rows each) | {:.1} | 10 |",
        polled.rows / u64::from(polled.listings.max(1)),
        f64::from(polled.listings) / wall
    );
    let _ = writeln!(
        text,
        "| the monitor's QEMU, part of a core | {:.1} % | 3 % |",
        polled.processor / wall * 100.0
    );
    let _ = writeln!(
        text,
        "| the same listings on the host itself, part of a core | {:.2} % | |",
        native * 10.0 * 100.0
    );
    let gib = |speed: f64| speed / f64::from(1 << 30);
    let _ = writeln!(
        text,
        "| reading the RAM file on the host | {:.2} GiB/s | |",
        gib(*on_host)
    );
    let _ = writeln!(
        text,
        "| reading it in a VM as a device's memory | {:.2} GiB/s, {:.0} % | 80 % |",
        gib(*device),
        device / on_host * 100.0
    );
    let _ = writeln!(
        text,
        "| reading that VM's own memory | {:.2} GiB/s | |",
        gib(*own)
    );
    let _ = writeln!(
        text,
        "| the device's memory beside the VM's own | {:.0} % | |",
        device / own * 100.0
    );
    if *acceleration == Acceleration::Tcg {
        text.push_str(
            "\nTCG emulates every instruction of the monitor, which makes its work some tens of times \
             slower than the host's; so two limits can't be judged on this machine: the part of a \
             core, and the speed beside the host's. What can be judged is the guest's loss, and that \
             a device's memory is read as fast as the VM's own.\n",
        );
    }
    text
}

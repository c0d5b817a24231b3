//! Targets that lie to the monitor, change under its eyes, or are as it is
//! itself: it answers in bounded time and memory, goes on, and says the truth
//! again once the target does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secmon_guest::{Cost, Selection, Value};
use secmon_isolation::attempts::{self, Setting};
use secmon_isolation::lies::{LIES, Liar};
use secmon_lab::{
    Backing, Emulator, Guest, MONITOR_MEMORY_MIB, MonitorVm, Suite, WatchedRam, Workload,
    appliance_image,
};
use secmon_monitor::protocol::{Answer, Client, ClientError, Pause, Query};

/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long one table may take, whatever the target says.
const LONGEST: Duration = Duration::from_secs(120);
/// The tables that walk what the lies are about.
const TABLES: &[&str] = &[
    "ps", "threads", "files", "maps", "modules", "mounts", "sockets", "kmsg", "env", "info",
];
/// The targets' names.
const LIAR: &str = "liar";
const TWIN: &str = "twin";

/// What a table gave.
#[derive(Debug, Default)]
struct Listing {
    rows: Vec<Vec<String>>,
    partial: bool,
    elapsed: Duration,
}

/// Asks for a table; a monitor that refuses says why, which is an answer.
fn list(client: &mut Client, target: &str, table: &str) -> Result<Listing> {
    let selection = Selection::default();
    let columns = secmon_guest::table(table).context("the table")?.columns();
    let query = Query {
        target: target.to_owned(),
        table: table.to_owned(),
        columns: None,
        pids: selection.pids,
        all_namespaces: selection.all_namespaces,
        limit: None,
        credit: 0,
        pause: Pause::None,
    };
    let mut listing = Listing::default();
    let started = Instant::now();
    let end = client.query(query, &mut |answer| {
        if let Answer::Rows(rows) = answer {
            for row in rows {
                let cells: Vec<Value> = row.into_iter().map(Value::from).collect();
                // What is in user memory may be swapped out.
                listing.partial |= columns.iter().zip(&cells).any(|(column, value)| {
                    column.cost == Cost::Kernel && matches!(value, Value::Unreadable(_))
                });
                listing
                    .rows
                    .push(cells.iter().map(ToString::to_string).collect());
            }
        }
        ControlFlow::Continue(())
    });
    listing.elapsed = started.elapsed();
    match end {
        Ok(end) => listing.partial |= end.error.is_some() || end.diagnostics > 0,
        Err(ClientError::Refused(_)) => listing.partial = true,
        Err(error) => return Err(error).with_context(|| format!("{table} of {target}")),
    }
    Ok(listing)
}

/// The columns of processes that do not change while nothing happens.
fn processes(client: &mut Client, target: &str) -> Result<BTreeSet<Vec<String>>> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let listing = list(client, target, "ps")?;
        if !listing.partial && !listing.rows.is_empty() {
            return Ok(listing.rows.into_iter().collect());
        }
        ensure!(
            Instant::now() < deadline,
            "no whole list of {target}'s processes: {:?}",
            client.targets()?
        );
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// The monitor lives, has not had to start its worker again, and is no larger
/// than it may be.
fn assert_well(client: &mut Client, what: &str) -> Result<()> {
    let beat = client.status()?.heartbeat;
    ensure!(
        beat.restarts == 0,
        "{what}: the worker was started again: {beat:?}"
    );
    ensure!(beat.findings_lost == 0, "{what}: {beat:?}");
    let total = u64::from(MONITOR_MEMORY_MIB) << 10;
    ensure!(beat.memory_total_kib <= total && beat.memory_used_kib < total);
    Ok(())
}

fn image(folder: &Path) -> Result<std::path::PathBuf> {
    let workload = Workload {
        processes: 20,
        ..Workload::rich()
    };
    let guest = Guest::builder(Suite::Bookworm)
        .memory_mib(256)
        .backing(Backing::File)
        .workload(workload)
        .boot()?;
    let pristine = folder.join("pristine");
    let ram = guest.ram_file().context("a RAM file")?;
    guest.while_stopped(|_| Ok(std::fs::copy(&ram, &pristine)?))?;
    Ok(pristine)
}

#[test]
fn hostile_targets_get_nowhere() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let place = |name: &str| folder.path().join(name);
    let mut liar = Liar::new(&image(folder.path())?, &place("liar"))?;
    let appliance = appliance_image(Suite::Bookworm)?;
    let own = u64::from(MONITOR_MEMORY_MIB) << 20;
    let watched = |name: &str, file: &str, bytes| WatchedRam {
        name: name.to_owned(),
        file: place(file),
        bytes,
    };
    for file in ["first", "second"] {
        File::create(place(file))?.set_len(own)?;
    }
    // Two monitors of one image that watch each other; nothing but a word on
    // their kernels' command lines tells them apart.
    let marked = |name: &str| {
        let mut image = appliance.clone();
        let arguments = &mut image.manifest.kernel_arguments;
        *arguments = format!("{arguments} {}", mark(name));
        image
    };
    let first = MonitorVm::start_with(
        Emulator::Installed,
        &marked("first"),
        &[
            watched(LIAR, "liar", liar.size()),
            watched(TWIN, "second", own),
        ],
        Some(&place("first")),
    )?;
    let second = MonitorVm::start_with(
        Emulator::Installed,
        &marked("second"),
        &[watched(TWIN, "first", own)],
        Some(&place("second")),
    )?;
    let made = (|| -> Result<BTreeSet<&str>> {
        let mut made = BTreeSet::new();
        let mut client = first.connect()?;
        let truth = processes(&mut client, LIAR)?;
        told_lies(&mut client, &mut liar, &truth, &mut made)?;
        rewritten(&mut client, &mut liar, &truth)?;
        made.insert("rewritten_ram");
        twins(&mut client, &mut second.connect()?)?;
        made.insert("twin");
        Ok(made)
    })();
    let made = made.with_context(|| format!("the monitor's console:\n{}", first.console()))?;
    let listed: BTreeSet<&str> = attempts::of(Setting::Target)
        .map(|attempt| attempt.name)
        .collect();
    ensure!(made == listed, "tried {made:?}, listed {listed:?}");
    Ok(())
}

/// Each lie is told, every table asked for, and the truth told again.
fn told_lies(
    client: &mut Client,
    liar: &mut Liar,
    truth: &BTreeSet<Vec<String>>,
    made: &mut BTreeSet<&str>,
) -> Result<()> {
    for lie in LIES {
        (lie.tell)(liar).with_context(|| lie.name)?;
        let mut seen = BTreeMap::new();
        let mut partial = 0;
        for table in TABLES {
            let listing = list(client, LIAR, table)?;
            ensure!(
                listing.elapsed < LONGEST,
                "{}: {table} took {:?}",
                lie.name,
                listing.elapsed
            );
            partial += u32::from(listing.partial);
            seen.insert(
                *table,
                (
                    listing.rows.len(),
                    listing.partial,
                    listing.elapsed.as_millis(),
                ),
            );
        }
        println!("{}: {seen:?}", lie.name);
        // What is wrong with the memory is said somewhere.
        ensure!(partial > 0, "{}: nothing is said of it: {seen:?}", lie.name);
        assert_well(client, lie.name)?;
        liar.restore()?;
        let again = processes(client, LIAR)?;
        ensure!(again == *truth, "{}: other processes afterwards", lie.name);
        made.insert(lie.name);
    }
    Ok(())
}

/// Another writer changes pages, and changes them back, as fast as it can while
/// tables are read.
fn rewritten(client: &mut Client, liar: &mut Liar, truth: &BTreeSet<Vec<String>>) -> Result<()> {
    let stop = AtomicBool::new(false);
    let copy = liar.copy()?;
    let places: Vec<(u64, u64)> = (0..50_000)
        .map(|_| (liar.random() % (liar.size() - 8), liar.random()))
        .collect();
    std::thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| -> std::io::Result<u64> {
            let mut writes = 0;
            // Whole pages and single words; each stays for a moment.
            for (at, value) in places.iter().copied().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let length = if value % 4 == 0 { 4096 } else { 8 };
                let at = if length == 8 { at } else { at & !4095 };
                let mut before = vec![0; length];
                copy.read_exact_at(&mut before, at)?;
                let bytes: Vec<u8> = value
                    .to_le_bytes()
                    .into_iter()
                    .cycle()
                    .take(length)
                    .collect();
                copy.write_all_at(&bytes, at)?;
                std::thread::yield_now();
                copy.write_all_at(&before, at)?;
                writes += 1;
            }
            Ok(writes)
        });
        let asked = (|| -> Result<()> {
            for table in TABLES.iter().chain(TABLES) {
                let listing = list(client, LIAR, table)?;
                ensure!(
                    listing.elapsed < LONGEST,
                    "{table} took {:?}",
                    listing.elapsed
                );
            }
            assert_well(client, "RAM rewritten during reads")
        })();
        stop.store(true, Ordering::Relaxed);
        let writes = writer.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        println!(
            "rewritten_ram: {writes} writes during {} tables",
            2 * TABLES.len()
        );
        ensure!(writes > 0);
        asked
    })?;
    liar.restore()?;
    ensure!(
        processes(client, LIAR)? == *truth,
        "other processes afterwards"
    );
    Ok(())
}

/// What a monitor of the twins finds on its kernel's command line.
fn mark(name: &str) -> String {
    format!("secmon.twin={name}")
}

/// Each of two monitors of the same image, size and shape sees the other one,
/// and not itself.
fn twins(first: &mut Client, second: &mut Client) -> Result<()> {
    for (client, is, is_not) in [(first, "second", "first"), (second, "first", "second")] {
        processes(client, TWIN)?;
        let listing = list(client, TWIN, "info")?;
        let shows = |name: &str| {
            let mark = mark(name);
            let mut cells = listing.rows.iter().flatten();
            cells.any(|cell| cell.contains(&mark))
        };
        ensure!(
            shows(is) && !shows(is_not),
            "the {is_not} monitor shows of its twin: {:#?}",
            listing.rows
        );
        assert_well(client, "a twin")?;
    }
    Ok(())
}

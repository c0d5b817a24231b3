//! A guest that forks, executes and exits all the time while it is read: no
//! process that stays is missing, none is invented or doubled, and each row
//! was true at some moment.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secmon_guest::{Guest, Selection, Value};
use secmon_lab::{Backing, Suite, Workload};
use secmon_tests::open;
use secmon_tests::rows::{TableRow, read_table};

/// How long each guest is read.
const DURATION: Duration = Duration::from_secs(10);
/// Fewer listings than this in that time would prove little.
const LISTINGS: usize = 20;

fn unsigned(row: &TableRow, column: &str) -> Option<u64> {
    match row.get(column) {
        Some(Value::Unsigned(value)) => Some(*value),
        _ => None,
    }
}

fn text<'r>(row: &'r TableRow, column: &str) -> Option<&'r [u8]> {
    match row.get(column) {
        Some(Value::Text(text)) => Some(text.as_bytes()),
        _ => None,
    }
}

/// What is known of the processes that stay.
struct Staying {
    /// Name of each process by id.
    processes: BTreeMap<u64, Vec<u8>>,
    /// Ids of all their threads.
    threads: BTreeSet<u64>,
    /// The executable of all that is brief, before it executes another one.
    init: Vec<u8>,
}

/// Whether a process of this name is called so: rescuers of workqueues show
/// what they work on behind it.
fn is_name(comm: &[u8], name: &[u8]) -> bool {
    comm == name || (name.starts_with(b"kworker/R-") && comm.starts_with(b"kworker/R-"))
}

/// Whether a process that does not stay can have been like this. It is a
/// child that has its parent's name or its own, then may execute busybox; on
/// the way the kernel exchanges the executable before the name, and a process
/// that ends gives its memory back before it is a zombie. New kernel workers
/// come as well.
fn was_possible(row: &TableRow, staying: &Staying) -> Result<()> {
    if row.get("kernel_thread") == Some(&Value::Boolean(true)) {
        ensure!(
            unsigned(row, "ppid") == Some(2),
            "a kernel thread that kthreadd did not make"
        );
        return Ok(());
    }
    let parent = unsigned(row, "ppid").context("a parent")?;
    ensure!(
        staying.processes.contains_key(&parent),
        "its parent does not stay"
    );
    ensure!(
        unsigned(row, "uid") == Some(0) && unsigned(row, "euid") == Some(0),
        "its user"
    );
    let comm = text(row, "comm").context("a name")?;
    let exe = text(row, "exe");
    let is_brief = comm.starts_with(b"brief-");
    let is_parents = staying
        .processes
        .get(&parent)
        .is_some_and(|name| name == comm);
    let possible = match exe {
        _ if comm == b"busybox" || comm == b"sleep" => exe.is_none_or(|exe| exe == b"/bin/busybox"),
        Some(exe) if exe == b"/bin/busybox" => is_brief,
        Some(exe) => exe == staying.init && (is_brief || is_parents),
        None => is_brief || is_parents,
    };
    ensure!(possible, "its name and executable");
    Ok(())
}

fn check(guest: &Guest, staying: &Staying) -> Result<usize> {
    let rows = read_table(guest, "processes", Selection::default())?;
    let mut found = HashSet::new();
    let mut brief = 0;
    for row in &rows {
        let pid = unsigned(row, "pid").context("a row without a pid")?;
        ensure!(found.insert(pid), "process {pid} is there twice: {row:?}");
        match staying.processes.get(&pid) {
            Some(name) => {
                ensure!(
                    text(row, "comm").is_some_and(|comm| is_name(comm, name)),
                    "process {pid} should be {name:?}: {row:?}"
                );
            }
            None => {
                brief += 1;
                was_possible(row, staying).with_context(|| format!("{row:?}"))?;
            }
        }
    }
    let missing: Vec<_> = staying
        .processes
        .keys()
        .filter(|pid| !found.contains(pid))
        .collect();
    ensure!(missing.is_empty(), "missing processes: {missing:?}");

    let rows = read_table(guest, "threads", Selection::default())?;
    let mut found = HashSet::new();
    for row in &rows {
        let tid = unsigned(row, "tid").context("a row without a tid")?;
        ensure!(found.insert(tid), "thread {tid} is there twice: {row:?}");
    }
    let missing: Vec<_> = staying
        .threads
        .iter()
        .filter(|tid| !found.contains(tid))
        .collect();
    ensure!(missing.is_empty(), "missing threads: {missing:?}");
    Ok(brief)
}

fn busy(suite: Suite, vcpus: u32) -> Result<()> {
    let workload = Workload {
        processes: 100,
        ..Workload::rich()
    };
    let lab = secmon_lab::Guest::builder(suite)
        .vcpus(vcpus)
        .backing(Backing::File)
        .workload(workload)
        .boot()?;
    let (before, threads) = (lab.truth().processes()?, lab.truth().threads()?);
    let info = lab.truth().info()?;
    let opened = open::target(&format!("qemu:{}", lab.pid()))?;
    let guest = opened.guest();

    let agent = before.iter().find(|process| process.pid == info.agent_pid);
    let init = agent.and_then(|agent| agent.exe.clone());
    // Workers of the kernel may end meanwhile.
    let is_worker = |kernel_thread: bool, comm: &[u8]| {
        kernel_thread && comm.starts_with(b"kworker/") && !comm.starts_with(b"kworker/R-")
    };
    let staying = Staying {
        processes: before
            .iter()
            .filter(|process| !is_worker(process.kernel_thread, process.comm.as_bytes()))
            .map(|process| (process.pid as u64, process.comm.as_bytes().to_vec()))
            .collect(),
        threads: threads
            .iter()
            .filter(|thread| !is_worker(thread.kernel_thread, thread.comm.as_bytes()))
            .map(|thread| thread.tid as u64)
            .collect(),
        init: init.context("the agent's executable")?.as_bytes().to_vec(),
    };

    lab.truth().resume_busy()?;
    let mut listings = Vec::new();
    let start = Instant::now();
    while start.elapsed() < DURATION {
        listings.push(check(&guest, &staying)?);
    }
    let rounds = lab.truth().pause_busy()?;

    let diagnostics = guest.diagnostics().list();
    println!(
        "{suite:?}, {vcpus} vCPUs: {} listings, {rounds} rounds, {} brief processes seen, {} torn \
         reads, {} diagnostics",
        listings.len(),
        listings.iter().sum::<usize>(),
        guest.diagnostics().torn_reads(),
        diagnostics.len(),
    );
    for diagnostic in diagnostics.iter().take(10) {
        println!("  {diagnostic:?}");
    }
    ensure!(
        listings.len() >= LISTINGS,
        "only {} listings",
        listings.len()
    );
    ensure!(
        listings.iter().any(|brief| *brief > 0),
        "the guest was not busy"
    );
    Ok(())
}

#[test]
fn linux_5_10() -> Result<()> {
    busy(Suite::Bullseye, 1)
}

#[test]
fn linux_6_1() -> Result<()> {
    busy(Suite::Bookworm, 4)
}

#[test]
fn linux_6_12() -> Result<()> {
    busy(Suite::Trixie, 1)
}

#[test]
fn linux_7_2() -> Result<()> {
    busy(Suite::Sid, 4)
}

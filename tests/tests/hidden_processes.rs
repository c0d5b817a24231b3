//! Processes and threads that a rootkit takes out of the kernel's lists are
//! found, whichever lists these are; a guest that starts and ends processes
//! all the time has none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use secmon_detect::{Confirmation, Finding, Outcome, Report, Subject};
use secmon_guest::{Guest, Selection, Value};
use secmon_lab::{Backing, Suite, Workload};
use secmon_memory::VirtualAddress;
use secmon_tests::open::{self, Opened};
use secmon_tests::rows::{TableRow, read_table};

/// How long a busy guest is checked, if that makes enough checks.
const DURATION: Duration = Duration::from_secs(4);
/// Fewer checks than this would prove little.
const CHECKS: usize = 20;
/// How many bits of tasks are flipped, one at a time.
const FLIPS: usize = 300;
/// However slow the machine is.
const LONGEST: Duration = Duration::from_secs(120);

fn check(guest: &Guest) -> Result<Report> {
    let detector = secmon_detect::detector("processes").context("the detector")?;
    Ok(secmon_detect::check(
        guest,
        &[detector],
        Confirmation::default(),
    ))
}

fn clean(report: &Report) -> Result<()> {
    ensure!(
        report.findings.is_empty(),
        "a false alarm: {:?}",
        report.findings
    );
    Ok(())
}

/// A raw image that is edited, and where things lie in it.
struct Image {
    file: File,
    opened: Opened,
    /// By process id.
    processes: BTreeMap<u64, TableRow>,
    threads: Vec<TableRow>,
}

fn number(row: &TableRow, column: &str) -> Result<u64> {
    match row.get(column) {
        Some(Value::Unsigned(value) | Value::Address(value)) => Ok(*value),
        other => anyhow::bail!("{column} is {other:?}"),
    }
}

impl Image {
    fn open(path: &Path) -> Result<Self> {
        let opened = open::image(path)?;
        let rows = |table| read_table(&opened.guest(), table, Selection::default());
        let processes = rows("processes")?
            .into_iter()
            .map(|row| Ok((number(&row, "pid")?, row)))
            .collect::<Result<_>>()?;
        Ok(Self {
            file: OpenOptions::new().write(true).open(path)?,
            processes,
            threads: rows("threads")?,
            opened,
        })
    }

    fn task(&self, pid: u64) -> Result<u64> {
        let row = self.processes.get(&pid).context("no such process")?;
        number(row, "address")
    }

    fn offset(&self, structure: &str, member: &str) -> Result<u64> {
        let types = self.opened.kernel.profile.types()?;
        Ok(types.member(structure, member)?.offset)
    }

    fn read(&self, address: u64) -> Result<u64> {
        let space = &self.opened.kernel.space;
        Ok(space.read_u64(VirtualAddress::new(address))?)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let space = &self.opened.kernel.space;
        let place = space.translate(VirtualAddress::new(address))?.physical;
        self.file.write_all_at(bytes, place.as_u64())?;
        Ok(())
    }

    /// Takes a `list_head` out of its list and lets it point to itself.
    fn unlink(&self, node: u64) -> Result<()> {
        let (next, previous) = (self.read(node)?, self.read(node + 8)?);
        self.write(previous, &next.to_le_bytes())?;
        self.write(next + 8, &previous.to_le_bytes())?;
        self.write(node, &node.to_le_bytes())?;
        self.write(node + 8, &node.to_le_bytes())
    }

    /// As the kernel's `list_del` leaves a node: with pointers to nothing.
    fn poison(&self, node: u64) -> Result<()> {
        self.unlink(node)?;
        self.write(node, &0xdead_0000_0000_0100_u64.to_le_bytes())?;
        self.write(node + 8, &0xdead_0000_0000_0122_u64.to_le_bytes())
    }

    /// Takes a task from the id that leads to it.
    fn unhash(&self, task: u64) -> Result<()> {
        let pid = self.read(task + self.offset("task_struct", "thread_pid")?)?;
        self.write(pid + self.offset("pid", "tasks")?, &[0; 8])
    }

    fn member(&self, task: u64, member: &str) -> Result<u64> {
        Ok(task + self.offset("task_struct", member)?)
    }
}

/// The views that a finding names as lacking its subject.
fn missing(finding: &Finding) -> BTreeSet<&'static str> {
    let says = |what: &str| what.starts_with("it is not in");
    let lacking = finding.evidence.iter().filter(|said| says(&said.what));
    lacking.map(|said| said.view).collect()
}

fn number_of(subject: &Subject) -> Option<u64> {
    match subject {
        Subject::Process { pid, .. } => Some((*pid).into()),
        Subject::Thread { tid, .. } => Some((*tid).into()),
        _ => None,
    }
}

/// Hides processes of an image in several ways, each of which must be found,
/// with what is missing, and nothing else.
fn hide_in_image(path: &Path) -> Result<()> {
    let image = Image::open(path)?;
    let report = check(&image.opened.guest())?;
    clean(&report)?;
    ensure!(report.is_complete(), "{:?}", report.detectors);
    damage(&image, path)?;

    // Ordinary processes of one thread, which are children of the first one.
    let is_plain = |row: &&TableRow| {
        row.get("kernel_thread") == Some(&Value::Boolean(false))
            && row.get("ppid") == Some(&Value::Unsigned(1))
            && row.get("threads") == Some(&Value::Unsigned(1))
            && row.get("state") == Some(&Value::word("S"))
            && row
                .get("namespace_pids")
                .is_some_and(|pids| matches!(pids, Value::List(pids) if pids.len() == 1))
    };
    let plain: Vec<u64> = image
        .processes
        .values()
        .filter(is_plain)
        .map(|row| number(row, "pid"))
        .collect::<Result<_>>()?;
    let [unlisted, unhashed, poisoned, nowhere, forged, ungrouped, ..] = plain[..] else {
        anyhow::bail!("too few plain processes: {plain:?}");
    };
    let mut expected: BTreeMap<u64, (&str, BTreeSet<&str>)> = BTreeMap::new();

    image.unlink(image.member(image.task(unlisted)?, "tasks")?)?;
    expected.insert(unlisted, ("hidden_process", ["task_list"].into()));

    image.unhash(image.task(unhashed)?)?;
    expected.insert(unhashed, ("hidden_process", ["pid_table"].into()));

    image.poison(image.member(image.task(poisoned)?, "tasks")?)?;
    image.unhash(image.task(poisoned)?)?;
    let both = ["task_list", "pid_table"].into();
    expected.insert(poisoned, ("hidden_process", both));

    // Only its own task_struct is left of it.
    let task = image.task(nowhere)?;
    for list in ["tasks", "thread_node", "sibling", "cg_list"] {
        image.unlink(image.member(task, list)?)?;
    }
    image.unhash(task)?;
    let all = [
        "task_list",
        "thread_list",
        "pid_table",
        "children",
        "control_groups",
    ];
    expected.insert(nowhere, ("hidden_process", all.into()));

    let pid = image.member(image.task(forged)?, "pid")?;
    image.write(pid, &4_000_000_u32.to_le_bytes())?;

    image.unlink(image.member(image.task(ungrouped)?, "cg_list")?)?;
    expected.insert(ungrouped, ("unlisted_process", ["control_groups"].into()));

    let thread = image.threads.iter().find(|row| {
        let ids = number(row, "pid").ok().zip(number(row, "tid").ok());
        ids.is_some_and(|(pid, tid)| pid != tid)
    });
    let thread = thread.context("no process has threads")?;
    let tid = number(thread, "tid")?;
    image.unlink(image.member(number(thread, "address")?, "thread_node")?)?;
    expected.insert(tid, ("hidden_thread", ["thread_list"].into()));

    let guest = open::image(path)?.guest();
    let report = check(&guest)?;
    for finding in &report.findings {
        println!("{}: {}", finding.name, finding.summary);
        let number = number_of(&finding.subject).context("a subject that is no task")?;
        if finding.name == "forged_pid" {
            ensure!(finding.summary.contains(&forged.to_string()), "{finding:?}");
            expected.insert(number, ("forged_pid", BTreeSet::new()));
        }
        let Some((name, places)) = expected.remove(&number) else {
            anyhow::bail!("a false alarm: {finding:?}");
        };
        ensure!(finding.name == name, "{number}: {name} {finding:?}");
        ensure!(
            missing(finding) == places,
            "{number}: {places:?} {finding:?}"
        );
        // Its row as it was, with its executable.
        let row = finding.evidence.first().context("no evidence")?;
        let before = image.processes.get(&number);
        if let Some(Value::Text(exe)) = before.and_then(|row| row.get("exe")) {
            let told = row.row.iter().find(|(column, _)| *column == "exe");
            ensure!(told.is_some_and(|(_, told)| *told == Value::Text(exe.clone())));
        }
    }
    ensure!(expected.is_empty(), "not found: {expected:?}");
    ensure!(report.findings.len() == 7, "{}", report.findings.len());
    Ok(())
}

/// Whatever bits of tasks are wrong, each look ends.
fn damage(image: &Image, path: &Path) -> Result<()> {
    let tasks: Vec<u64> = image
        .threads
        .iter()
        .map(|row| number(row, "address"))
        .collect::<Result<_>>()?;
    // What the detector goes by; the second word of lists, too.
    let mut words = Vec::new();
    for member in [
        "pid",
        "exit_state",
        "usage",
        "signal",
        "group_leader",
        "real_parent",
        "thread_pid",
        "tasks",
        "thread_node",
        "children",
        "sibling",
        "pid_links",
        "cgroups",
        "cg_list",
        "se.group_node",
        "start_boottime",
    ] {
        let offset = image.offset("task_struct", member)? & !7;
        words.extend([offset, offset + 8]);
    }
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let (mut findings, mut incomplete) = (0, 0);
    for _ in 0..FLIPS {
        let task = tasks[next(tasks.len() as u64) as usize];
        let word = words[next(words.len() as u64) as usize];
        let address = VirtualAddress::new(task + word);
        let place = image.opened.kernel.space.translate(address)?.physical;
        let mut word = [0; 8];
        file.read_exact_at(&mut word, place.as_u64())?;
        let flipped = u64::from_le_bytes(word) ^ 1 << next(64);
        file.write_all_at(&flipped.to_le_bytes(), place.as_u64())?;
        let start = Instant::now();
        let report = check(&image.opened.guest())?;
        findings += report.findings.len();
        incomplete += usize::from(!report.is_complete());
        ensure!(
            start.elapsed() < LONGEST,
            "a look took {:?}",
            start.elapsed()
        );
        file.write_all_at(&word, place.as_u64())?;
    }
    println!("{FLIPS} flips: {findings} findings, {incomplete} looks not complete");
    clean(&check(&image.opened.guest())?)
}

fn hidden(suite: Suite, vcpus: u32) -> Result<()> {
    let workload = Workload {
        processes: 50,
        ..Workload::rich()
    };
    let lab = secmon_lab::Guest::builder(suite)
        .vcpus(vcpus)
        .backing(Backing::File)
        .workload(workload)
        .boot()?;
    let path = lab.folder().join("image");
    let ram = lab.ram_file().context("a RAM file")?;
    lab.while_stopped(|_| Ok(std::fs::copy(&ram, &path)?))?;
    hide_in_image(&path)?;

    let opened = open::target(&format!("qemu:{}", lab.pid()))?;
    let guest = opened.guest();
    let quiet = check(&guest)?;
    clean(&quiet)?;
    ensure!(quiet.is_complete(), "{:?}", quiet.detectors);
    lab.truth().resume_busy()?;
    let start = Instant::now();
    let (mut checks, mut complete, mut unconfirmed) = (0, 0, 0);
    while start.elapsed() < DURATION || (checks < CHECKS && start.elapsed() < LONGEST) {
        let report = check(&guest)?;
        clean(&report)?;
        checks += 1;
        complete += usize::from(report.is_complete());
        for detector in &report.detectors {
            unconfirmed += detector.unconfirmed.len();
            if let Outcome::NotChecked(reason) = &detector.outcome {
                println!("not checked: {reason}");
            }
        }
    }
    let rounds = lab.truth().pause_busy()?;
    println!(
        "{suite:?}, {vcpus} vCPUs: {checks} checks, {complete} complete, {unconfirmed} not \
         confirmed, {rounds} rounds"
    );
    ensure!(rounds > 0, "the guest was not busy");
    ensure!(checks >= CHECKS && complete * 2 > checks);
    Ok(())
}

#[test]
fn linux_5_10() -> Result<()> {
    hidden(Suite::Bullseye, 1)
}

#[test]
fn linux_6_1() -> Result<()> {
    hidden(Suite::Bookworm, 4)
}

#[test]
fn linux_6_12() -> Result<()> {
    hidden(Suite::Trixie, 1)
}

#[test]
fn linux_7_2() -> Result<()> {
    hidden(Suite::Sid, 4)
}

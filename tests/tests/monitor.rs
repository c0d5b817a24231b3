//! A monitoring VM with two guests of different kernels: every compared table,
//! asked through the channel, equals the guest's own truth; what a target does
//! is told; and the VM keeps to its size.

use std::collections::BTreeSet;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secmon_channel::KeyPair;
use secmon_guest::{Selection, TrustLevel, Value};
use secmon_lab::{
    Backing, Emulator, Guest, MonitorVm, Suite, Workload, appliance_image, build_appliance,
};
use secmon_memory::VirtualAddress;
use secmon_monitor::appliance::{Image, SIZE_LIMIT};
use secmon_monitor::protocol::{
    Answer, Check, CheckFinding, Client, DetectorResult, Finding, FindingKind, Notice, Pause,
    Place, Query, TargetState,
};
use secmon_tests::compare::{self, Truth};
use secmon_tests::open;
use secmon_tests::rows::TableRow;
use secmon_watch::Incident;

/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(240);
/// The VM's bound of memory in KiB.
const MEMORY_KIB: u64 = 128 << 10;

fn query(target: &str, table: &str, selection: &Selection) -> Query {
    Query {
        target: target.to_owned(),
        table: table.to_owned(),
        columns: None,
        pids: selection.pids.clone(),
        all_namespaces: selection.all_namespaces,
        limit: None,
        credit: 0,
        pause: Pause::None,
    }
}

/// The rows of a table as the tests have them from a guest.
fn rows(
    client: &mut Client,
    target: &str,
    table: &str,
    selection: &Selection,
) -> Result<Vec<TableRow>> {
    let known = secmon_guest::table(table).context("the table")?.columns();
    let mut rows = Vec::new();
    let end = client.query(query(target, table, selection), &mut |answer| {
        if let Answer::Rows(some) = answer {
            rows.extend(some.into_iter().map(|cells| -> TableRow {
                let names = known.iter().map(|column| column.name);
                names.zip(cells.into_iter().map(Value::from)).collect()
            }));
        }
        ControlFlow::Continue(())
    })?;
    if let Some(error) = end.error {
        bail!("table {table} of {target}: {error}");
    }
    ensure!(
        end.sent == rows.len() as u64,
        "{table}: {} rows sent",
        end.sent
    );
    Ok(rows)
}

/// Compares all tables; what is in motion between two truths may need another
/// attempt.
fn compare_tables(client: &mut Client, guest: &Guest) -> Result<()> {
    const ATTEMPTS: u32 = 3;
    let mut before = Truth::ask(guest)?;
    for attempt in 1..=ATTEMPTS {
        let readings = compare::read_all_by(&mut |table, selection| {
            rows(client, guest.name(), table, &selection)
        })?;
        let after = Truth::ask(guest)?;
        let differences = compare::differences(&before, &readings, &after)?;
        if differences.is_empty() {
            return Ok(());
        }
        println!("{}, attempt {attempt}: {differences:#?}", guest.name());
        before = after;
    }
    bail!("{}: tables differ from the guest's truth", guest.name())
}

/// Waits until the targets fit.
fn wait_for(client: &mut Client, what: &str, fits: impl Fn(&[TargetState]) -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let states: Vec<TargetState> = client.targets()?.into_iter().map(|t| t.state).collect();
        if fits(&states) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{what}: still {states:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Takes notices until a finding of this kind about the target.
fn wait_for_finding(client: &mut Client, target: &str, kind: FindingKind) -> Result<u64> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let notice = client
            .notice(Some(deadline))
            .with_context(|| format!("no {kind:?}"))?;
        if let Notice::Finding(finding) = notice
            && finding.kind == kind
            && finding.target.as_deref() == Some(target)
        {
            ensure!(finding.trust_level == TrustLevel::L1);
            return Ok(finding.sequence);
        }
    }
}

fn is_running(state: &TargetState) -> bool {
    matches!(state, TargetState::Running { .. })
}

#[test]
fn tables_from_inside_the_monitor_equal_the_truth() -> Result<()> {
    let image = appliance_image(Suite::Bookworm)?;
    let boot = |suite| {
        Guest::builder(suite)
            .backing(Backing::File)
            .workload(Workload::rich())
            .boot()
    };
    let guests = [boot(Suite::Bookworm)?, boot(Suite::Trixie)?];
    let [first, second] = &guests;
    let vm = MonitorVm::start_watching(Emulator::Installed, &image, &[first, second], &policy())?;
    let outcome = watch(&vm, first, second);
    outcome.with_context(|| format!("the monitor's console:\n{}", vm.console()))
}

/// One detector watches all the time; the others are asked.
fn policy() -> String {
    let others = secmon_detect::detectors()
        .iter()
        .map(|detector| detector.name())
        .filter(|name| *name != "processes");
    others.fold(
        "version = 1\nbudget = \"20%\"\n".to_owned(),
        |policy, name| policy + &format!("[detector.{name}]\nenabled = false\n"),
    )
}

/// Whether a finding of the monitor is that the detectors which watch the
/// target found a hidden process.
fn tells_of_hidden(finding: &Finding, target: &str) -> Result<bool> {
    if finding.kind != FindingKind::Watch || finding.target.as_deref() != Some(target) {
        return Ok(false);
    }
    let json = finding.incident.as_deref().context("no incident")?;
    let incident: Incident = serde_json::from_str(json)?;
    println!("told: {incident}");
    Ok(matches!(incident, Incident::Appeared { finding } if finding.name == "hidden_process"))
}

fn watch(vm: &MonitorVm, first: &Guest, second: &Guest) -> Result<()> {
    let mut client = vm.connect()?;
    wait_for(&mut client, "both start", |states| {
        states.iter().all(is_running)
    })?;
    let processes = rows(&mut client, first.name(), "ps", &Selection::default())?;
    println!(
        "{} processes {:.1} s after QEMU's start",
        processes.len(),
        vm.started.elapsed().as_secs_f32()
    );

    compare_tables(&mut client, first)?;
    // The first stands still while the second is compared.
    first.control().stop()?;
    compare_tables(&mut client, second)?;
    let status = client.status()?;
    println!("{:?}", status.heartbeat);
    ensure!(status.weaknesses.is_empty(), "{:?}", status.weaknesses);
    ensure!(status.heartbeat.memory_total_kib <= MEMORY_KIB);
    ensure!(status.heartbeat.findings_lost == 0 && status.heartbeat.restarts == 0);

    wait_for_finding(&mut client, first.name(), FindingKind::TargetStopped)?;
    first.control().resume()?;
    let last = wait_for_finding(&mut client, first.name(), FindingKind::TargetResumed)?;
    wait_for(&mut client, "both run", |states| {
        states.iter().all(is_running)
    })?;

    read_and_translate(&mut client, second.name())?;
    refusals(&mut client, second.name())?;
    checking(&mut client, second)?;
    let deadline = Some(Instant::now() + PATIENCE);
    let hidden = loop {
        if let Notice::Finding(finding) = client.notice(deadline)?
            && tells_of_hidden(&finding, second.name())?
        {
            break finding.sequence;
        }
    };
    cancelling(&mut client, second.name())?;

    // What was not acknowledged comes again to the next client, what was does
    // not; a stranger is not let in.
    client.acknowledge(last)?;
    client.status()?;
    drop(client);
    ensure!(
        vm.connect_as(&KeyPair::generate()?).is_err(),
        "a stranger came in"
    );
    let mut client = vm.connect()?;
    let deadline = Some(Instant::now() + PATIENCE);
    let (mut refused, mut again) = (false, false);
    while !refused || !again {
        if let Notice::Finding(finding) = client.notice(deadline)? {
            ensure!(finding.sequence > last, "told again: {finding:?}");
            refused |= finding.kind == FindingKind::ClientRefused;
            again |= finding.sequence == hidden;
        }
    }
    Ok(())
}

fn read_and_translate(client: &mut Client, target: &str) -> Result<()> {
    let place = Place::Symbol {
        name: "linux_banner".to_owned(),
        offset: 0,
    };
    let mut bytes = Vec::new();
    let end = client.read(target, place.clone(), 200_000, &mut |answer| {
        if let Answer::Bytes(_, piece) = answer {
            bytes.extend_from_slice(&piece);
        }
        ControlFlow::Continue(())
    })?;
    ensure!(
        end.sent == bytes.len() as u64 && bytes.len() == 200_000,
        "{end:?}"
    );
    ensure!(bytes.starts_with(b"Linux version "), "not the banner");
    let mut physical = None;
    client.translate(target, vec![place], &mut |answer| {
        if let Answer::Walk { end: Ok(end), .. } = answer {
            physical = Some(end.physical);
        }
        ControlFlow::Continue(())
    })?;
    let place = Place::Physical(physical.context("no translation")?);
    let mut again = Vec::new();
    client.read(target, place, 64, &mut |answer| {
        if let Answer::Bytes(_, piece) = answer {
            again.extend_from_slice(&piece);
        }
        ControlFlow::Continue(())
    })?;
    ensure!(again[..] == bytes[..64], "another place");
    Ok(())
}

fn refusals(client: &mut Client, target: &str) -> Result<()> {
    let nothing = &mut |_| ControlFlow::Continue(());
    let selection = Selection::default();
    for (query, word) in [
        (query("nobody", "ps", &selection), "nobody"),
        (query(target, "colours", &selection), "colours"),
    ] {
        let error = client.query(query, nothing).expect_err("refused");
        ensure!(error.to_string().contains(word), "{error}");
    }
    Ok(())
}

/// What the monitor's detectors find.
fn check(client: &mut Client, target: &str) -> Result<(Vec<CheckFinding>, DetectorResult)> {
    let check = Check {
        target: target.to_owned(),
        detectors: Some(vec!["processes".to_owned()]),
        credit: 0,
        pause: Pause::None,
    };
    let (mut findings, mut detectors) = (Vec::new(), Vec::new());
    let end = client.check(check, &mut |answer| {
        match answer {
            Answer::Found(finding) => findings.push(*finding),
            Answer::Looked(looked) => detectors = looked,
            _ => {}
        }
        ControlFlow::Continue(())
    })?;
    ensure!(end.error.is_none(), "{end:?}");
    ensure!(end.sent == findings.len() as u64, "{end:?}");
    ensure!(detectors.len() == 1, "{detectors:?}");
    let detector = detectors.remove(0);
    ensure!(detector.not_checked.is_none(), "{detector:?}");
    Ok((findings, detector))
}

/// A process that is taken out of the running guest's list is found from
/// inside the monitor, and nothing before.
fn checking(client: &mut Client, guest: &Guest) -> Result<()> {
    let (findings, detector) = check(client, guest.name())?;
    ensure!(findings.is_empty(), "a false alarm: {findings:?}");
    println!(
        "checked in {} microseconds, {} looks",
        detector.microseconds, detector.looks
    );
    let known = rows(client, guest.name(), "ps", &Selection::default())?;
    let role = guest.truth().info()?.roles;
    let pid = u64::try_from(*role.get("id-nobody").context("a process of nobody")?)?;
    let is_it = |row: &&TableRow| row.get("pid") == Some(&Value::Unsigned(pid));
    let row = known.iter().find(is_it).context("the process")?;
    let Some(Value::Address(task)) = row.get("address") else {
        bail!("no address: {row:?}");
    };
    hide(guest, VirtualAddress::new(*task))?;

    let hidden = rows(client, guest.name(), "ps", &Selection::default())?;
    ensure!(hidden.iter().all(|row| !is_it(&row)), "it is listed");
    let (findings, detector) = check(client, guest.name())?;
    let [finding] = findings.as_slice() else {
        bail!("not one: {findings:?}");
    };
    ensure!(finding.name == "hidden_process", "{finding:?}");
    ensure!(detector.looks >= 3, "not confirmed: {detector:?}");
    let told = &finding.evidence.first().context("evidence")?.row;
    for column in ["pid", "comm", "exe", "cmdline", "uid"] {
        let value = told.iter().find(|(name, _)| name == column);
        let value = value.map(|(_, cell)| Value::from(cell.clone()));
        ensure!(value.as_ref() == row.get(column), "{column}: {value:?}");
    }
    let unknown = Check {
        target: guest.name().to_owned(),
        detectors: Some(vec!["colours".to_owned()]),
        credit: 0,
        pause: Pause::None,
    };
    let refused = client.check(unknown, &mut |_| ControlFlow::Continue(()));
    ensure!(refused.is_err_and(|refusal| refusal.to_string().contains("colours")));
    Ok(())
}

/// Takes a task out of the list of processes, in the RAM of a guest that
/// stands still for it.
fn hide(guest: &Guest, task: VirtualAddress) -> Result<()> {
    let opened = open::target(&format!("qemu:{}", guest.pid()))?;
    let space = &opened.kernel.space;
    let types = opened.kernel.profile.types()?;
    let node = task.wrapping_add(types.member("task_struct", "tasks")?.offset);
    let ram = guest.ram_file().context("a RAM file")?;
    let ram = fs::OpenOptions::new().write(true).open(ram)?;
    let write = |place: VirtualAddress, pointer: VirtualAddress| -> Result<()> {
        // Below 2 GiB RAM lies in the file as in memory.
        let place = space.translate(place)?.physical.as_u64();
        Ok(ram.write_all_at(&pointer.as_u64().to_le_bytes(), place)?)
    };
    guest.while_stopped(|_| {
        let next = space.read_pointer(node)?;
        let previous = space.read_pointer(node.wrapping_add(8))?;
        write(previous, next)?;
        write(next.wrapping_add(8), previous)?;
        write(node, node)?;
        write(node.wrapping_add(8), node)
    })
}

/// A query whose client wants no more ends, and others go on.
fn cancelling(client: &mut Client, target: &str) -> Result<()> {
    let mut messages = 0;
    let symbols = query(target, "symbols", &Selection::default());
    let end = client.query(symbols, &mut |_| {
        messages += 1;
        ControlFlow::Break(())
    })?;
    ensure!(
        messages == 1 && end.sent < 50_000,
        "{messages} messages, {end:?}"
    );
    let limited = Query {
        limit: Some(3),
        columns: Some(vec!["pid".to_owned()]),
        ..query(target, "ps", &Selection::default())
    };
    ensure!(
        client
            .query(limited, &mut |_| ControlFlow::Continue(()))?
            .sent
            == 3
    );
    Ok(())
}

#[test]
fn an_image_is_the_same_bytes_each_time() -> Result<()> {
    let first = appliance_image(Suite::Bookworm)?;
    let folder = tempfile::tempdir()?;
    let second = build_appliance(Suite::Bookworm, folder.path())?;
    ensure!(first.digest == second.digest, "another digest");
    let names = |image: &Image| -> Result<BTreeSet<_>> {
        let entries: std::io::Result<Vec<_>> = fs::read_dir(&image.folder)?.collect();
        Ok(entries?
            .into_iter()
            .map(|entry| entry.file_name())
            .collect())
    };
    let files = names(&first)?;
    ensure!(files == names(&second)? && files.len() == 4, "{files:?}");
    for file in &files {
        let read = |image: &Image| fs::read(image.folder.join(file));
        ensure!(read(&first)? == read(&second)?, "{file:?} differs");
    }
    ensure!(first.bytes() <= SIZE_LIMIT, "{} bytes", first.bytes());
    let opened = Image::open(&first.folder)?;
    ensure!(opened == first, "it opens as another one");
    fs::write(second.initramfs(), b"changed")?;
    ensure!(
        Image::open(&second.folder).is_err(),
        "a change is not noticed"
    );
    Ok(())
}

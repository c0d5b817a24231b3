//! What no kernel does by itself, and what hides how a process came to its
//! rights: the credentials of another process, shared.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};
use secmon_guest::{Selection, Value};
use secmon_lab::{Backing, Guest, Suite, Workload};
use secmon_memory::VirtualAddress;
use secmon_tests::open;
use secmon_tests::rows::{TableRow, read_table};

fn number(row: &TableRow, column: &str) -> Result<u64> {
    match row.get(column) {
        Some(Value::Unsigned(value) | Value::Address(value)) => Ok(*value),
        Some(Value::Signed(value)) => Ok(u64::try_from(*value)?),
        other => anyhow::bail!("{column} is {other:?}"),
    }
}

/// The row of the credentials that the process uses, which must be one.
fn of_process(rows: &[TableRow], pid: u64) -> Result<&TableRow> {
    let uses = |row: &&TableRow| match row.get("pids") {
        Some(Value::List(pids)) => pids.contains(&Value::Unsigned(pid)),
        _ => false,
    };
    let found: Vec<_> = rows.iter().filter(uses).collect();
    match found[..] {
        [one] => Ok(one),
        _ => anyhow::bail!("process {pid} uses {} credentials", found.len()),
    }
}

#[test]
fn credentials_taken_from_another_process_show() -> Result<()> {
    let guest = Guest::builder(Suite::Trixie)
        .backing(Backing::File)
        .workload(Workload::rich())
        .boot()?;
    let file = guest.folder().join("image");
    let ram = guest.ram_file().context("a RAM file")?;
    guest.while_stopped(|_| Ok(std::fs::copy(&ram, &file)?))?;
    let opened = open::image(&file)?;
    let read = |table| read_table(&opened.guest(), table, Selection::default());

    let roles = guest.truth().info()?.roles;
    let pid = u64::try_from(*roles.get("id-nobody").context("a process of nobody")?)?;
    let credentials = read("credentials")?;
    let (root, nobody) = (of_process(&credentials, 1)?, of_process(&credentials, pid)?);
    ensure!(number(nobody, "uid")? == 65534 && number(root, "uid")? == 0);
    let alone = |pid: u64| Some(Value::from(vec![pid]));
    ensure!(nobody.get("pids") == alone(pid).as_ref(), "{nobody:?}");
    let tasks = number(root, "tasks")?;

    // As a rootkit gives away the rights of process 1.
    let processes = read("processes")?;
    let process = processes
        .iter()
        .find(|row| number(row, "pid").is_ok_and(|found| found == pid));
    let task = number(process.context("the process")?, "address")?;
    let image = OpenOptions::new().write(true).open(&file)?;
    for pointer in ["cred", "real_cred"] {
        let offset = opened
            .kernel
            .profile
            .types()?
            .member("task_struct", pointer)?;
        let place = VirtualAddress::new(task).wrapping_add(offset.offset);
        let place = opened.kernel.space.translate(place)?.physical;
        let stolen = number(root, "address")?.to_le_bytes();
        image.write_all_at(&stolen, place.as_u64())?;
    }

    let credentials = read("credentials")?;
    let shared = of_process(&credentials, pid)?;
    let both = Value::from(vec![1, pid]);
    ensure!(shared.get("pids") == Some(&both), "{shared:?}");
    ensure!(number(shared, "tasks")? == tasks + 1, "{shared:?}");
    ensure!(shared.get("address") == root.get("address"), "{shared:?}");
    let gone = credentials
        .iter()
        .all(|row| row.get("address") != nobody.get("address"));
    ensure!(gone, "credentials that nobody uses");
    let processes = read("processes")?;
    let process = processes
        .iter()
        .find(|row| number(row, "pid").is_ok_and(|found| found == pid));
    ensure!(number(process.context("the process")?, "uid")? == 0);
    Ok(())
}

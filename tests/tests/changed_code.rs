//! A page of a program that a process has of its own, with other bytes than
//! the program's file.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};
use secmon_guest::linux::user::UserMemory;
use secmon_guest::{Selection, Value};
use secmon_lab::Suite;
use secmon_memory::{AddressSpace, PAGE_SIZE, PhysicalAddress, VirtualAddress};
use secmon_tests::rows::{TableRow, read_table};
use secmon_tests::{images, open};

fn address(row: &TableRow, column: &str) -> Result<u64> {
    match row.get(column) {
        Some(Value::Unsigned(value) | Value::Address(value)) => Ok(*value),
        other => anyhow::bail!("{column} is {other:?}"),
    }
}

/// Where the page-table entry for `address` lies: four levels, 4 KiB pages.
fn entry_of(space: &AddressSpace, address: u64) -> Result<PhysicalAddress> {
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    let mut table = space.root().as_u64();
    for shift in [39, 30, 21] {
        let entry = PhysicalAddress::new(table + (address >> shift & 0x1ff) * 8);
        let mut bytes = [0; 8];
        space.memory().read(entry, &mut bytes)?;
        let entry = u64::from_le_bytes(bytes);
        ensure!(entry & 1 == 1 && entry & 0x80 == 0, "entry {entry:#x}");
        table = entry & FRAME;
    }
    Ok(PhysicalAddress::new(table + (address >> 12 & 0x1ff) * 8))
}

fn text_is(row: &TableRow, column: &str, wanted: &str) -> bool {
    row.get(column) == Some(&Value::from(wanted))
}

#[test]
fn a_page_of_code_that_was_replaced_shows() -> Result<()> {
    let file = images::quiet_file(Suite::Trixie)?;
    let opened = open::image(&file)?;
    let read = |table| read_table(&opened.guest(), table, Selection::default());
    ensure!(read("changed_code")?.is_empty(), "an untouched guest");

    // Two pages of the first process: one of its code, one of its stack.
    let maps = read("maps")?;
    let of_first = |row: &&TableRow| address(row, "pid").is_ok_and(|pid| pid == 1);
    let area = |wanted: fn(&TableRow) -> bool| {
        let mut areas = maps.iter().filter(of_first);
        areas.find(|row| wanted(row)).context("an area")
    };
    let code = area(|row| text_is(row, "permissions", "r-xp") && text_is(row, "type", "file"))?;
    let stack = area(|row| text_is(row, "type", "stack"))?;
    let guest = opened.guest();
    let processes = read("processes")?;
    let task = address(processes.first().context("a process")?, "address")?;
    let mm = opened.kernel.profile.types()?.member("task_struct", "mm")?;
    let mm = guest.pointer(VirtualAddress::new(task), &mm)?;
    let memory = UserMemory::new(&guest, mm)?;
    let space = memory.space();
    let present = |area: &TableRow| -> Result<u64> {
        let pages = address(area, "start")?..address(area, "end")?;
        pages
            .step_by(PAGE_SIZE as usize)
            .find(|page| space.translate(VirtualAddress::new(*page)).is_ok())
            .context("a page in memory")
    };
    let (code_page, stack_page) = (present(code)?, present(stack)?);

    let memory = space.memory();
    let (place, source) = (entry_of(space, code_page)?, entry_of(space, stack_page)?);
    let mut entry = [0; 8];
    memory.read(source, &mut entry)?;
    let image = OpenOptions::new().write(true).open(&file)?;
    image.write_all_at(&entry, place.as_u64())?;

    let changed = read("changed_code")?;
    ensure!(changed.len() == 1, "{changed:?}");
    let row = &changed[0];
    ensure!(
        address(row, "pid")? == 1 && address(row, "page")? == code_page,
        "{row:?}"
    );
    ensure!(row.get("path") == code.get("path"), "{row:?}");
    ensure!(row.get("address") == code.get("address"), "{row:?}");
    let count = address(row, "changed_bytes")?;
    ensure!((1..=PAGE_SIZE).contains(&count), "{row:?}");
    ensure!(row.get("original") != row.get("found"), "{row:?}");
    Ok(())
}

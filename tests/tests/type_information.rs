//! The kernel's type information: the table `types` is what another reader
//! finds in the guest's own files of it; without it, or with a damaged one,
//! tables say so, and with an ISF file made from the intact one they are what
//! they were.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use secmon_guest::{Selection, Table, Value, tables};
use secmon_lab::{Backing, Guest, Suite, Workload};
use secmon_memory::VirtualAddress;
use secmon_profile::{ProfileFrom, write_isf};
use secmon_tests::btf::{NamedType, Types};
use secmon_tests::open::{self, Opened};
use secmon_tests::rows::{TableRow, read_table};

fn boot(suite: Suite) -> Result<Guest> {
    let workload = Workload {
        processes: 20,
        ..Workload::rich()
    };
    Guest::builder(suite)
        .backing(Backing::File)
        .workload(workload)
        .boot()
}

/// A row of the table as the other reader has it.
fn named(row: &TableRow) -> Result<NamedType> {
    let text = |column| row.get(column).map(ToString::to_string).context("a column");
    let Some(Value::List(members)) = row.get("members") else {
        anyhow::bail!("no members: {row:?}");
    };
    Ok(NamedType {
        kind: text("kind")?,
        name: text("name")?,
        size: match row.get("size") {
            Some(Value::Unsigned(size)) => Some(*size),
            Some(Value::Null) => None,
            other => anyhow::bail!("a size of {other:?}"),
        },
        members: members.iter().map(ToString::to_string).collect(),
    })
}

/// What an enumerator is worth in the 32 bits of it that types without a mark
/// for signs keep.
fn without_sign(mut named: NamedType) -> NamedType {
    if named.kind == "enum" {
        for member in &mut named.members {
            if let Some((name, value)) = member.split_once(" = ")
                && let Ok(value) = value.parse::<i128>()
            {
                *member = format!("{name} = {}", value as u32);
            }
        }
    }
    named
}

fn compare_types(own: &[TableRow], theirs: &Types, whose: &str) -> Result<()> {
    let theirs = theirs.rows()?;
    for (own, theirs) in own.iter().zip(&theirs) {
        let own = named(own)?;
        // Before 6.0 no enumeration told whether it has a sign.
        let same = own == *theirs || without_sign(own.clone()) == without_sign(theirs.clone());
        ensure!(same, "{whose}: {own:#?}\nis to bpftool {theirs:#?}");
    }
    let (own, theirs) = (own.len(), theirs.len());
    ensure!(own == theirs, "{whose}: {own} types, to bpftool {theirs}");
    Ok(())
}

/// Every type of the kernel and of each module, against what bpftool reads in
/// the guest's `/sys/kernel/btf`.
fn types_are_the_guests_own(guest: &Guest, opened: &Opened) -> Result<()> {
    let rows = read_table(&opened.guest(), "types", Selection::default())?;
    let of = |module: Option<&str>| -> Vec<TableRow> {
        let module = module.map_or(Value::Null, Value::from);
        let of = rows.iter().filter(|row| row.get("module") == Some(&module));
        of.cloned().collect()
    };
    let base = guest.folder().join("vmlinux.btf");
    let blob = guest.truth().read_file("/sys/kernel/btf/vmlinux")?;
    std::fs::write(&base, &blob.0)?;
    let kernel = Types::read(&base, None)?;
    let own = of(None);
    ensure!(own.len() > 5_000, "only {} types", own.len());
    compare_types(&own, &kernel, "the kernel")?;

    let mut count = own.len();
    let mut with_types = 0;
    for module in guest.truth().modules()? {
        let name = module.name.as_str();
        let own = of(Some(name));
        let path = format!("/sys/kernel/btf/{name}");
        let blob = match guest.truth().read_file(&path) {
            Ok(blob) => blob,
            Err(error) => {
                let told = format!("{error:#}");
                ensure!(told.contains("No such file"), "{path}: {told}");
                ensure!(own.is_empty(), "{name} has no types");
                continue;
            }
        };
        let file = guest.folder().join("module.btf");
        std::fs::write(&file, &blob.0)?;
        let theirs = Types::read(&file, Some((&base, &kernel)))?;
        compare_types(&own, &theirs, name)?;
        count += own.len();
        with_types += 1;
    }
    ensure!(count == rows.len(), "types of modules that are not there");
    let types = opened.kernel.profile.types()?;
    ensure!(
        with_types > 0 || !types.has_type("btf_module"),
        "no module has types"
    );
    println!("{count} types, {with_types} modules with types of their own");
    Ok(())
}

/// A table, its rows or why there are none, and its diagnostics.
type Read = (
    &'static dyn Table,
    Result<Vec<TableRow>, String>,
    Vec<String>,
);

fn read_all(opened: &Opened) -> Vec<Read> {
    let read = |table: &&'static dyn Table| {
        let guest = opened.guest();
        let rows = read_table(&guest, table.name(), Selection::default());
        let told = guest.diagnostics().list();
        let told = told.iter().map(|told| format!("{told:?}")).collect();
        (*table, rows.map_err(|error| format!("{error:#}")), told)
    };
    tables().iter().map(read).collect()
}

/// Overwrites bytes of the kernel's image in a file with a guest's memory.
fn overwrite(file: &Path, opened: &Opened, at: VirtualAddress, bytes: &[u8]) -> Result<()> {
    let image = OpenOptions::new().write(true).open(file)?;
    // The image is one piece; all of 512 MiB lies below the first hole, so a
    // place in the file is a physical address.
    let place = opened.kernel.space.translate(at)?.physical;
    Ok(image.write_all_at(bytes, place.as_u64())?)
}

/// Tables that need no types.
const WITHOUT_TYPES: [&str; 4] = ["diagnostics", "info", "kmsg", "symbols"];

/// What is left without types: all of what needs none, and of the rest an
/// error that says what to do.
fn without_types(opened: &Opened, intact: &[Read]) -> Result<()> {
    ensure!(
        opened.kernel.profile.types().is_err(),
        "types in damaged BTF"
    );
    let own = &opened.kernel.profile;
    for (table, intact, _) in intact {
        let name = table.name();
        let intact = intact
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        let guest = opened.guest();
        let rows = read_table(&guest, name, Selection::default());
        if !WITHOUT_TYPES.contains(&name) {
            let error = match rows {
                Err(error) => format!("{error:#}"),
                Ok(rows) => anyhow::bail!("{name} has {} rows without types", rows.len()),
            };
            ensure!(error.contains("ISF file"), "{name}: {error}");
            continue;
        }
        let rows = rows?;
        match name {
            "kmsg" => {
                // The wall clock's time takes types, and so do callers' names.
                let told = guest.diagnostics().list();
                let told = told.iter().any(|told| told.reason.contains("caller_comm"));
                ensure!(told, "nothing is said of callers' names");
                ensure!(rows.len() == intact.len() && rows.len() > 50);
                for (found, intact) in rows.iter().zip(intact) {
                    let mut found = found.clone();
                    ensure!(
                        matches!(found.remove("time"), Some(Value::Unreadable(_))),
                        "{found:?}"
                    );
                    let mut intact = intact.clone();
                    intact.remove("time");
                    found.remove("caller_comm");
                    intact.remove("caller_comm");
                    ensure!(found == intact, "{found:?}, not {intact:?}");
                }
            }
            "symbols" => {
                let of_kernel = |row: &&TableRow| row.get("module") == Some(&Value::Null);
                let found = rows.iter().filter(of_kernel);
                ensure!(found.eq(intact.iter().filter(of_kernel)), "other symbols");
                let told = guest.diagnostics().list();
                let told = told.iter().any(|told| told.table == "symbols");
                ensure!(told, "nothing says that the modules' symbols are missing");
            }
            "info" => {
                // What is told at all is what the intact kernel tells.
                for (found, intact) in rows.iter().zip(intact) {
                    let told = !matches!(found.get("value"), Some(Value::Unreadable(_)));
                    let name = found.get("name").context("a name")?;
                    let needs_none = ["banner", "build_id", "page_levels", "kernel_base"]
                        .iter()
                        .any(|wanted| Value::from(*wanted) == *name);
                    ensure!(told || !needs_none, "{name} is not told");
                    ensure!(!told || found == intact, "{found:?}, not {intact:?}");
                }
                ensure!(rows.len() == intact.len(), "{} lines", rows.len());
            }
            _ => {
                let names = |table: &&str| -> bool {
                    rows.iter()
                        .any(|row| row.get("table") == Some(&Value::from(*table)))
                };
                let all: Vec<&str> = tables().iter().map(|table| table.name()).collect();
                let missing: Vec<_> = all.iter().filter(|name| !names(name)).collect();
                ensure!(
                    missing == [&"diagnostics"],
                    "nothing is said of {missing:?}"
                );
            }
        }
    }
    ensure!(
        own.banner().starts_with("Linux version "),
        "{}",
        own.banner()
    );
    Ok(())
}

/// An ISF file has no typedefs and no two types of one name, and a module's
/// types can't go on where it ends; the kernel's structures it has.
fn same_structures(wanted: &[TableRow], found: &[TableRow]) -> Result<()> {
    let structure = |row: &&TableRow| {
        let is = |kind: &str| row.get("kind") == Some(&Value::from(kind));
        is("struct") || is("union")
    };
    let name = |row: &TableRow| row.get("name").map(ToString::to_string);
    let mut first = BTreeMap::new();
    for row in wanted.iter().filter(structure) {
        if row.get("module") == Some(&Value::Null) {
            first.entry(name(row)).or_insert(row);
        }
    }
    for row in found.iter().filter(structure) {
        ensure!(row.get("module") == Some(&Value::Null), "{row:?}");
        if let Some(wanted) = first.remove(&name(row)) {
            for column in ["kind", "size"] {
                let (found, wanted) = (row.get(column), wanted.get(column));
                ensure!(found == wanted, "{row:?}, not of {wanted:?}");
            }
        }
    }
    ensure!(first.is_empty(), "missing: {:?}", first.keys());
    Ok(())
}

/// With a file in place of the kernel's own types, every table is as before.
fn with_isf(file: &Path, isf: &Path, intact: &[Read]) -> Result<()> {
    let opened = open::image_with_isf(file, isf)?;
    ensure!(opened.kernel.evidence.profile == ProfileFrom::Isf);
    for ((table, wanted, told), (_, found, still_told)) in intact.iter().zip(read_all(&opened)) {
        let name = table.name();
        let (Ok(wanted), Ok(found)) = (wanted, &found) else {
            anyhow::bail!(
                "{name}: {:?}, with the file {:?}",
                wanted.as_ref().err(),
                found.as_ref().err()
            );
        };
        match name {
            "types" => {
                same_structures(wanted, found)?;
                let modules = wanted
                    .iter()
                    .any(|row| row.get("module") != Some(&Value::Null));
                let told = still_told.iter().any(|told| told.contains("modules"));
                ensure!(told == modules, "{still_told:#?}");
                continue;
            }
            // It says that of the table types, and nothing else besides.
            "diagnostics" => {
                let of_types = |row: &&TableRow| row.get("table") == Some(&"types".into());
                let found = found.iter().filter(|row| !of_types(row));
                let same = found.eq(wanted.iter().filter(|row| !of_types(row)));
                ensure!(same, "not {wanted:#?}");
                continue;
            }
            _ => {}
        }
        // It tells the file from the memory.
        let found_by = Some(&Value::from("found_by"));
        for (wanted, found) in wanted.iter().zip(found) {
            ensure!(
                wanted == found || (name == "info" && found.get("name") == found_by),
                "{name}: {wanted:#?}\nwith the file {found:#?}"
            );
        }
        let rest = found.iter().skip(wanted.len()).take(5);
        ensure!(
            wanted.len() == found.len(),
            "{name}: {} rows, with the file {}: {:#?}",
            wanted.len(),
            found.len(),
            rest.collect::<Vec<_>>()
        );
        ensure!(
            *told == still_told,
            "{name}: {told:#?}, with the file {still_told:#?}"
        );
    }
    Ok(())
}

/// The image of a kernel whose types are not there, or not whole.
fn damaged(guest: &Guest) -> Result<()> {
    let file = guest.folder().join("image");
    let ram = guest.ram_file().context("a RAM file")?;
    guest.while_stopped(|_| Ok(std::fs::copy(&ram, &file)?))?;
    let intact = open::image(&file)?;
    let tables = read_all(&intact);

    let plain = guest.folder().join("kernel.json");
    write_isf(&intact.kernel, std::fs::File::create_new(&plain)?)?;
    let packed = guest.folder().join("kernel.json.xz");
    let status = Command::new("xz")
        .args(["-0", "--keep"])
        .arg(&plain)
        .status()
        .context("running xz, of Debian's package xz-utils")?;
    ensure!(status.success(), "xz: {status}");

    let symbol = |name: &str| intact.kernel.profile.symbols().address(name).context("BTF");
    let (start, stop) = (symbol("__start_BTF")?, symbol("__stop_BTF")?);
    // The kind of the first type, behind the header of 24 bytes.
    overwrite(&file, &intact, start.wrapping_add(24 + 7), &[0x7e])?;
    without_types(&open::image(&file)?, &tables)?;
    with_isf(&file, &packed, &tables)?;

    let length = stop.as_u64() - start.as_u64();
    overwrite(&file, &intact, start, &vec![0; length as usize])?;
    without_types(&open::image(&file)?, &tables)?;
    with_isf(&file, &plain, &tables)
}

fn check(suite: Suite) -> Result<()> {
    let guest = boot(suite)?;
    let live = open::target(&format!("qemu:{}", guest.pid()))?;
    types_are_the_guests_own(&guest, &live)?;
    damaged(&guest)
}

#[test]
fn linux_5_10() -> Result<()> {
    check(Suite::Bullseye)
}

#[test]
fn linux_6_1() -> Result<()> {
    check(Suite::Bookworm)
}

#[test]
fn linux_6_12() -> Result<()> {
    check(Suite::Trixie)
}

#[test]
fn linux_7_2() -> Result<()> {
    check(Suite::Sid)
}

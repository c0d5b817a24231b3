//! Every compared table equals the guest's own truth: four kernels, four- and
//! five-level paging, one and four vCPUs, live and from a dump.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use secmon_guest::{Selection, Value};
use secmon_lab::qmp::DumpFormat;
use secmon_lab::truth::{FileKind, OpenFile};
use secmon_lab::{Backing, Emulator, Guest, GuestBuilder, Kernel, Paging, Suite, Workload};
use secmon_profile::ProfileError;
use secmon_tests::compare::{self, Truth};
use secmon_tests::open::{self, Opened};
use secmon_tests::rows::{TableRow, read_table};

/// Fails with all differences, up to a number that can still be read.
fn expect_none(what: &str, differences: &[String]) -> Result<()> {
    const SHOWN: usize = 60;
    if differences.is_empty() {
        return Ok(());
    }
    let shown = differences
        .iter()
        .take(SHOWN)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join("\n  ");
    bail!("{what}: {} differences\n  {shown}", differences.len())
}

/// The kernel that was found, against what the guest says of it.
fn compare_kernel(opened: &Opened, guest: &Guest) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    let info = guest.truth().info()?;
    let kernel = &opened.kernel;
    if info.text_base != Some(kernel.image.virtual_base.as_u64()) {
        differences.push(format!(
            "_text is {:x?}, not {:x}",
            info.text_base, kernel.image.virtual_base
        ));
    }
    let build_id = kernel.profile.build_id().map(ToString::to_string);
    if info.build_id != build_id {
        differences.push(format!("build id is {:?}, not {build_id:?}", info.build_id));
    }
    if !kernel.conflicts.is_empty() {
        differences.push(format!(
            "conflicts in a clean guest: {:?}",
            kernel.conflicts
        ));
    }
    // Every symbol of the kernel itself, at its address.
    let symbols = kernel.profile.symbols();
    let mut theirs = 0;
    for symbol in guest
        .truth()
        .kallsyms()?
        .iter()
        .filter(|symbol| symbol.module.is_none())
    {
        theirs += 1;
        if !symbols
            .addresses(&symbol.name)
            .any(|address| address.as_u64() == symbol.address)
        {
            differences.push(format!(
                "symbol {} at {:x} is not there",
                symbol.name, symbol.address
            ));
        }
    }
    if theirs != symbols.len() {
        differences.push(format!("{} symbols, the guest has {theirs}", symbols.len()));
    }
    Ok(differences)
}

/// Every symbol of modules, as root in the guest reads it in /proc/kallsyms.
fn compare_module_symbols(opened: &Opened, guest: &Guest) -> Result<Vec<String>> {
    // What is no module has a name there too, and its symbols come and go.
    let is_module = |name: &str| name != "bpf" && !name.starts_with("__builtin__");
    // Where something traced functions when a module was loaded, its code for
    // the start, long given back, still has names there (`ftrace_mod_maps`).
    let modules = guest.truth().modules()?;
    let of_start = |module: &str, address: u64| {
        let module = modules.iter().find(|found| found.name == module);
        let sections = module.into_iter().flat_map(|module| &module.sections);
        let below = sections.filter(|(_, start)| **start <= address);
        let nearest = below.max_by_key(|(_, start)| **start);
        nearest.is_some_and(|(name, _)| name == ".init.text")
    };
    let mut balance = BTreeMap::<(String, String, u64, String), i32>::new();
    for symbol in guest.truth().kallsyms()? {
        if let Some(module) = symbol.module.filter(|module| is_module(module))
            && !of_start(&module, symbol.address)
        {
            let kind = symbol.kind.to_string();
            let key = (module, symbol.name, symbol.address, kind);
            *balance.entry(key).or_default() -= 1;
        }
    }
    ensure!(
        balance.len() > 1000,
        "the guest has only {} symbols of modules",
        balance.len()
    );
    for row in read_table(&opened.guest(), "symbols", Selection::default())? {
        let cell = |name| row.get(name).map(ToString::to_string).unwrap_or_default();
        if let Some(Value::Address(address)) = row.get("address")
            && row.get("module") != Some(&Value::Null)
        {
            let key = (cell("module"), cell("name"), *address, cell("kind"));
            *balance.entry(key).or_default() += 1;
        }
    }
    let different = balance.into_iter().filter(|(_, balance)| *balance != 0);
    Ok(different
        .map(|(key, balance)| match balance {
            ..0 => format!("symbol missing: {key:x?}"),
            _ => format!("symbol invented: {key:x?}"),
        })
        .collect())
}

/// What can be compared of a kernel that was built without types.
fn compare_without_types(opened: &Opened, guest: &Guest) -> Result<()> {
    let text = |row: &TableRow| row.get("text").map(ToString::to_string);
    let told = guest.truth().kmsg()?;
    let rows = read_table(&opened.guest(), "kmsg", Selection::default())?;
    let texts: Vec<_> = rows.iter().filter_map(text).collect();
    let mut theirs = told.iter().map(|message| message.text.to_string());
    let missing = theirs.find(|theirs| !texts.contains(theirs));
    ensure!(
        missing.is_none() && told.len() > 50,
        "the log lacks {missing:?}"
    );
    let error = read_table(&opened.guest(), "processes", Selection::default());
    let error = error.err().context("processes without types")?;
    let error = format!("{error:#}");
    ensure!(error.contains("ISF file"), "{error}");
    println!("built without BTF: only symbols and the log were compared");
    Ok(())
}

/// Fails unless the guest has files of each kind open on an overlay file
/// system, so that they were among what was compared.
fn expect_overlay(truth: &Truth) -> Result<()> {
    let overlay = |file: &&OpenFile| {
        let mut mounts = truth.mounts.iter();
        mounts.any(|mount| mount.fstype == "overlay" && mount.device == file.device)
    };
    for (kind, least) in [
        (FileKind::Regular, 6),
        (FileKind::Directory, 4),
        (FileKind::SymbolicLink, 1),
    ] {
        let of_kind = truth.files.iter().filter(overlay);
        let count = of_kind.filter(|file| file.kind == kind).count();
        ensure!(count >= least, "{count} {kind:?} open on an overlay");
    }
    Ok(())
}

/// How often the live tables are read. Truth is not told at one moment, so an
/// object that comes and goes between its parts can look wrong once; what is
/// wrong stays wrong.
const LIVE_ATTEMPTS: u32 = 3;

/// Compares the live tables; returns the last truth.
fn compare_live(live: &Opened, guest: &Guest) -> Result<Truth> {
    let mut before = Truth::ask(guest)?;
    for attempt in 1.. {
        let rows = compare::read_all(&live.guest())?;
        let after = Truth::ask(guest)?;
        let differences = compare::differences(&before, &rows, &after)?;
        if differences.is_empty() {
            return Ok(after);
        }
        if attempt == LIVE_ATTEMPTS {
            expect_none("live", &differences)?;
        }
        println!("live, attempt {attempt}: {differences:#?}");
        before = after;
    }
    unreachable!("the last attempt returns")
}

fn compare(builder: GuestBuilder) -> Result<()> {
    let guest = builder
        .backing(Backing::File)
        .workload(Workload::rich())
        .boot()?;

    let live = open::target(&format!("qemu:{}", guest.pid()))?;
    expect_none("the kernel", &compare_kernel(&live, &guest)?)?;
    if let Err(ProfileError::NoBtf) = live.kernel.profile.types() {
        return compare_without_types(&live, &guest);
    }
    expect_none(
        "symbols of modules",
        &compare_module_symbols(&live, &guest)?,
    )?;
    let between = compare_live(&live, &guest)?;
    expect_overlay(&between)?;

    let core = guest.folder().join("core");
    guest.while_stopped(|control| control.dump(&core, DumpFormat::Elf))?;
    let after = Truth::ask(&guest)?;
    let dump = open::image(&core)?;
    let dumped = dump.guest();
    let rows = compare::read_all(&dumped)?;
    expect_none(
        "from a dump",
        &compare::differences(&between, &rows, &after)?,
    )?;
    // References are counted before they are used and after: at no moment of
    // a sound guest is there one too many.
    let diagnostics = dumped.diagnostics().list().into_iter();
    let wrong = diagnostics.filter(|told| told.table == "files");
    let wrong: Vec<_> = wrong.map(|told| format!("{told:?}")).collect();
    expect_none("diagnostics of a sound guest", &wrong)
}

macro_rules! configurations {
    ($($name:ident: $emulator:ident, $suite:ident, $paging:ident, $vcpus:literal;)*) => {
        $(
            #[test]
            fn $name() -> Result<()> {
                compare(
                    Guest::builder(Suite::$suite)
                        .emulator(Emulator::$emulator)
                        .paging(Paging::$paging)
                        .vcpus($vcpus),
                )
            }
        )*
    };
}

// Debian builds its 5.10 without five-level paging.
configurations! {
    linux_5_10_four_levels_1_vcpu: Installed, Bullseye, FourLevel, 1;
    linux_5_10_four_levels_4_vcpus: Installed, Bullseye, FourLevel, 4;
    linux_6_1_four_levels_1_vcpu: Installed, Bookworm, FourLevel, 1;
    linux_6_1_four_levels_4_vcpus: Installed, Bookworm, FourLevel, 4;
    linux_6_1_five_levels_1_vcpu: Installed, Bookworm, FiveLevel, 1;
    linux_6_1_five_levels_4_vcpus: Installed, Bookworm, FiveLevel, 4;
    linux_6_12_four_levels_1_vcpu: Installed, Trixie, FourLevel, 1;
    linux_6_12_four_levels_4_vcpus: Installed, Trixie, FourLevel, 4;
    linux_6_12_five_levels_1_vcpu: Installed, Trixie, FiveLevel, 1;
    linux_6_12_five_levels_4_vcpus: Installed, Trixie, FiveLevel, 4;
    linux_7_2_four_levels_1_vcpu: Installed, Sid, FourLevel, 1;
    linux_7_2_four_levels_4_vcpus: Installed, Sid, FourLevel, 4;
    linux_7_2_five_levels_1_vcpu: Installed, Sid, FiveLevel, 1;
    linux_7_2_five_levels_4_vcpus: Installed, Sid, FiveLevel, 4;
    linux_6_12_on_qemu_10: Backports, Trixie, FourLevel, 1;
}

/// Where kernels lie that other distributions build: a folder for each, into
/// which its packages were unpacked (`dpkg-deb --extract`).
const OTHER_KERNELS: &str = "SECMON_KERNELS";

/// Further kernels, of whichever version and distribution. No archive that
/// every machine reaches has them, so this runs where somebody fetched them:
/// docs/kernels.md says how.
#[test]
#[ignore = "compares the kernels unpacked below $SECMON_KERNELS"]
fn other_kernels() -> Result<()> {
    let folder = std::env::var_os(OTHER_KERNELS)
        .with_context(|| format!("{OTHER_KERNELS} names no folder; see docs/kernels.md"))?;
    let mut roots = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        roots.push(entry?.path());
    }
    roots.sort();
    ensure!(!roots.is_empty(), "{folder:?} holds no kernels");
    let mut failed = Vec::new();
    for root in roots {
        let kernel = Kernel::unpacked(&root)?;
        let release = kernel.release().to_owned();
        match compare(Guest::builder(Suite::Trixie).kernel(kernel)) {
            Ok(()) => println!("{release}: equal"),
            Err(error) => {
                println!("{release}: {error:#}");
                failed.push(release);
            }
        }
    }
    ensure!(failed.is_empty(), "different: {}", failed.join(", "));
    Ok(())
}

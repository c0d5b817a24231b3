//! Each specimen does what it says, as the guest itself shows, and takes it
//! back; and no module of one loads where the lab does not say that it may.

use anyhow::{Context as _, Result, ensure};
use secmon_lab::specimens::{self, Active, How, Specimen};
use secmon_lab::{Guest, Kernel, Suite};

fn each(suite: Suite) -> Result<()> {
    let kernel = Kernel::fetch(suite)?;
    let mut builder = Guest::builder(suite).kernel(kernel.clone());
    if Specimen::of(suite).any(Specimen::needs_modules) {
        builder = builder.specimens(specimens::modules(suite, &kernel)?);
    }
    let guest = builder.boot()?;
    let mut failed = Vec::new();
    let mut count = 0;
    for specimen in Specimen::of(suite).filter(|one| !matches!(one.how, How::MemoryEdit(_))) {
        count += 1;
        if let Err(error) = one(&guest, specimen) {
            failed.push(format!("{}: {error:#}", specimen.name));
        }
        let alive = guest.truth().user_has_process(0);
        let log = || std::fs::read_to_string(guest.serial_log()).unwrap_or_default();
        alive.with_context(|| format!("after {}: {failed:#?}\n{}", specimen.name, log()))?;
    }
    ensure!(failed.is_empty(), "{suite}: {failed:#?}");
    println!("{suite}: {count} specimens");
    Ok(())
}

fn one(guest: &Guest, specimen: &Specimen) -> Result<()> {
    let mut active = Active::start(guest, specimen)?;
    let outcome = active.check_shown(true);
    active.take_back()?;
    let outcome = outcome.and_then(|()| match specimen.how {
        How::Module(_) => active.check_shown(false),
        _ => Ok(()),
    });
    active.end()?;
    outcome
}

#[test]
fn linux_6_1() -> Result<()> {
    each(Suite::Bookworm)
}

#[test]
fn linux_6_12() -> Result<()> {
    each(Suite::Trixie)
}

#[test]
fn no_module_loads_without_the_mark() -> Result<()> {
    let suite = Suite::Trixie;
    let kernel = Kernel::fetch(suite)?;
    let folder = specimens::modules(suite, &kernel)?;
    let guest = Guest::builder(suite)
        .kernel(kernel)
        .specimens(&folder)
        .unmarked()
        .boot()?;
    let mut count = 0;
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str());
        let name = name.context("a name")?;
        let refused = guest.truth().load_module(name, "", &[]);
        let error = refused.err().with_context(|| format!("{name} loads"))?;
        let error = format!("{error:#}");
        ensure!(error.contains("not permitted"), "{name}: {error}");
        count += 1;
    }
    ensure!(count > 20, "{count} modules");
    Ok(())
}

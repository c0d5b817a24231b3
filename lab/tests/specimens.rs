//! No specimen's module loads where the lab does not say that it may. That
//! each does what it says is shown where detectors look for them.

use anyhow::{Context as _, Result, ensure};
use secmon_lab::specimens;
use secmon_lab::{Guest, Kernel, Suite};

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

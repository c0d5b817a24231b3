//! `secmon monitor build`: makes what a monitoring VM starts from.

use std::io::Write as _;

use anyhow::{Context, Result};
use secmon_monitor::appliance::{self, KernelSource};

use super::arguments::BuildArguments;
use crate::listing;

/// Builds the image and says what it is.
pub fn build(arguments: &BuildArguments) -> Result<()> {
    let BuildArguments {
        output,
        kernel,
        modules,
        kernel_package,
        binary,
        ..
    } = arguments;
    let kernel = match (kernel, modules, kernel_package) {
        (Some(image), Some(modules), _) => KernelSource::Files {
            image: image.clone(),
            modules: modules.clone(),
        },
        (_, _, Some(package)) => KernelSource::Package(package.clone()),
        _ => KernelSource::Archive,
    };
    let binary = match binary {
        Some(binary) => binary.clone(),
        None => std::env::current_exe().context("finding this program's own file")?,
    };
    // Before minutes of work.
    #[cfg(feature = "verify")]
    let confidential = super::confidential::Launch::of(&arguments.confidential)?;
    let image = appliance::build(&kernel, &binary, output)?;
    let mut out = listing::stdout()?;
    writeln!(out, "image    {}", image.folder.display())?;
    writeln!(out, "kernel   {}", image.manifest.kernel_release)?;
    writeln!(out, "modules  {}", image.manifest.modules.join(" "))?;
    writeln!(out, "size     {} KiB", image.bytes() >> 10)?;
    writeln!(out, "digest   sha256:{}", image.digest)?;
    #[cfg(feature = "verify")]
    if let Some(launch) = confidential {
        writeln!(out, "launch   {}", launch.measurement(&image)?)?;
    }
    out.flush()?;
    Ok(())
}

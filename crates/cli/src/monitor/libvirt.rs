//! `secmon monitor libvirt-xml`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use secmon_monitor::launch::command_line::{Accelerator, memory_for};
use secmon_monitor::launch::libvirt::{MonitorDomain, TargetRam, convert};
use secmon_monitor::launch::run_directory::RunDirectory;
use secmon_monitor::launch::state::TargetState;
use secmon_monitor::launch::{MonitorName, gates, status, target};

use super::arguments::LibvirtArguments;
use super::the_one;
use crate::report::Reporter;

/// The most of a definition that is read.
const MAX_BYTES: u64 = 4 << 20;

/// Writes what was asked for to stdout, and what to know of it to stderr.
pub fn libvirt_xml(arguments: &LibvirtArguments, reporter: Reporter) -> Result<()> {
    let xml = match &arguments.convert {
        Some(file) => converted(file, reporter)?,
        None => of_monitor(&the_one(arguments.name.as_ref())?)?,
    };
    let mut out = io::stdout().lock();
    out.write_all(xml.as_bytes())?;
    Ok(out.flush()?)
}

fn converted(file: &Path, reporter: Reporter) -> Result<String> {
    let reading = || format!("reading {}", file.display());
    let mut text = String::new();
    let input: Box<dyn Read> = if file == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        Box::new(File::open(file).with_context(reading)?)
    };
    // One byte more, so that what is too long is told and not cut.
    let mut limited = input.take(MAX_BYTES + 1);
    limited.read_to_string(&mut text).with_context(reading)?;
    let conversion = convert(&text)?;
    if conversion.changes.is_empty() {
        reporter.warn("nothing was changed: the domain's RAM is shared already");
    }
    for line in conversion.changes.iter().chain(&conversion.notes) {
        reporter.warn(line);
    }
    Ok(conversion.xml)
}

/// The definition of a monitor that was set up here.
fn of_monitor(name: &MonitorName) -> Result<String> {
    let status = status::read(name)?;
    let Some(settings) = status.settings else {
        bail!("monitor {name} was not set up to its end: bring it down, and up again");
    };
    let targets = status
        .state
        .targets
        .iter()
        .map(|(target, state)| match state {
            TargetState::Watched { file, ram_size, .. } if Path::new(file).is_absolute() => {
                Ok(TargetRam {
                    file: file.into(),
                    size: target::device_size(*ram_size),
                })
            }
            TargetState::Watched { .. } => bail!(
                "{target} keeps its RAM in a memfd, which has no path that a definition could name"
            ),
            other => bail!("{target} is not watched now: {other}"),
        });
    let targets: Vec<TargetRam> = targets.collect::<Result<_>>()?;
    let mapped = targets.iter().map(|target| target.size).sum();
    let domain = MonitorDomain {
        name: format!("secmon-monitor-{name}"),
        domain_type: match settings.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "qemu",
        },
        memory_mib: memory_for(settings.memory_mib, mapped),
        kernel: settings.kernel.clone(),
        initramfs: settings.initramfs.clone(),
        kernel_arguments: settings.kernel_arguments.clone(),
        configuration: status.folder.join("configuration.json"),
        channels: RunDirectory::of(name)?.channel_sockets(),
        targets,
        gates: gates::ports(&RunDirectory::of(name)?, &settings.gates),
    };
    Ok(domain.to_xml())
}

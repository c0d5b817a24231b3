//! `secmon monitor`, and targets that a monitor is asked about.

pub mod arguments;
mod attach;
mod build;
#[cfg(feature = "verify")]
mod confidential;
mod libvirt;
pub mod remote;
mod status;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use secmon_guest::{Kind, Value};
use secmon_monitor::appliance::{Image, KERNEL_ARGUMENTS};
use secmon_monitor::launch::connect::{ConnectError, Connection, connect};
use secmon_monitor::launch::run_directory::RunDirectory;
use secmon_monitor::launch::target::TargetName;
use secmon_monitor::launch::up::{self, AbsentTargets, GateUse, Origin, Up, UpOptions};
use secmon_monitor::launch::{self, MonitorName};

use crate::arguments::{Common, Format};
use crate::listing::{self, column};
use crate::report::{Advise, Reporter};
use arguments::{MonitorCommand, UpArguments};

/// The RAM of a monitoring VM, in MiB.
const MEMORY_MIB: u32 = 128;

/// What the monitoring VM's kernel is told besides what its image says: the
/// timer's check compares interrupts with the processor's speed, and panics on
/// a host that is too loaded to emulate both evenly.
const KERNEL_ARGUMENT: &str = "no_timer_check";

/// Where an image is looked for if none is named.
const IMAGES: [&str; 3] = [
    "secmon-appliance",
    "/var/lib/secmon/appliance",
    "/usr/lib/secmon/appliance",
];

/// A target behind a monitor, `monitor:NAME` or `monitor:NAME/TARGET`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The monitor.
    pub monitor: MonitorName,
    /// The target, as the monitor calls it; its only one if none is named.
    pub target: Option<String>,
}

/// Begins a conversation with a monitor; says so when others must end theirs
/// first.
pub fn connect_or_wait(
    name: &MonitorName,
    patience: Duration,
    reporter: Reporter,
) -> Result<Connection, ConnectError> {
    connect(name, Instant::now() + patience, &mut |left| {
        reporter.warn(format_args!(
            "as many others as can at once talk to monitor {name}; waiting up to {} s for one to end",
            left.as_secs()
        ));
    })
}

/// Takes a target's name apart if it is one behind a monitor.
pub fn address(text: &str) -> Option<Result<Address>> {
    let rest = text.strip_prefix("monitor:")?;
    let (monitor, target) = match rest.split_once('/') {
        Some((monitor, target)) => (monitor, Some(target.to_owned())),
        None => (rest, None),
    };
    let advice = "write monitor:NAME or monitor:NAME/TARGET; `secmon monitor status` lists them";
    let monitor = monitor.parse().advise(advice);
    if target.as_deref() == Some("") {
        return Some(Err(anyhow!("{text:?} names no target of its monitor")).advise(advice));
    }
    Some(monitor.map(|monitor| Address { monitor, target }))
}

/// The commands by which the program becomes one of a monitor's processes.
pub fn hidden(command: &OsStr, arguments: &mut impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let argument =
        |arguments: &mut dyn Iterator<Item = OsString>| arguments.next().unwrap_or_default();
    let error: anyhow::Error = if command == launch::START_COMMAND {
        let plan = argument(arguments);
        launch::starter::become_qemu(Path::new(&plan)).into()
    } else if command == launch::SUPERVISE_COMMAND {
        let name = argument(arguments).to_string_lossy().into_owned();
        match name.parse::<MonitorName>() {
            Ok(name) => match launch::supervisor::supervise(&name) {
                Err(error) => error.into(),
            },
            Err(error) => error.into(),
        }
    } else if command == launch::GATE_COMMAND {
        let plan = argument(arguments);
        launch::gate_starter::become_gate(Path::new(&plan), crate::gate::part).into()
    } else {
        return None;
    };
    Reporter::default().error(&error);
    Some(ExitCode::from(2))
}

/// `secmon monitor …`.
pub fn run(command: &MonitorCommand, common: &Common, reporter: Reporter) -> Result<()> {
    match command {
        MonitorCommand::Build(arguments) => build::build(arguments),
        MonitorCommand::Up(arguments) => up(arguments, common.format, reporter),
        MonitorCommand::Status { name } => status::status(name.as_ref(), common, reporter),
        MonitorCommand::Attach { name } => {
            attach::attach(&the_one(name.as_ref())?, common, reporter)
        }
        MonitorCommand::LibvirtXml(arguments) => libvirt::libvirt_xml(arguments, reporter),
        MonitorCommand::Down { name } => down(&the_one(name.as_ref())?),
    }
}

/// The monitor that is named, or the only one.
fn the_one(name: Option<&MonitorName>) -> Result<MonitorName> {
    if let Some(name) = name {
        return Ok(name.clone());
    }
    let mut names = RunDirectory::names()?;
    match (names.pop(), names.len()) {
        (Some(name), 0) => Ok(name),
        (None, _) => Err(anyhow!("no monitor runs here"))
            .advise("start one with `secmon monitor up --target qemu:NAME`"),
        (Some(last), _) => {
            names.push(last);
            let names: Vec<&str> = names.iter().map(MonitorName::as_str).collect();
            Err(anyhow!("there are several monitors"))
                .advise(format!("name one of {}", names.join(", ")))
        }
    }
}

fn up(arguments: &UpArguments, format: Format, reporter: Reporter) -> Result<()> {
    let boot = boot(arguments)?;
    let targets: Result<Vec<TargetName>, _> =
        arguments.target.iter().map(|text| text.parse()).collect();
    let targets = targets.advise("`secmon targets` lists the QEMUs that run here")?;
    let name = match &arguments.name {
        Some(name) => name.clone(),
        None => default_name(&targets)?,
    };
    let options = UpOptions {
        name,
        targets,
        absent: if arguments.wait {
            AbsentTargets::Awaited
        } else {
            AbsentTargets::Refused
        },
        program: arguments.qemu.clone(),
        accelerator: arguments.accelerator.map(Into::into),
        kernel: canonical(&boot.kernel)?,
        initramfs: canonical(&boot.initramfs)?,
        memory_mib: MEMORY_MIB,
        kernel_arguments: boot.arguments,
        policy: match &arguments.policy {
            Some(path) => Some(crate::policy::read(path)?.1),
            None => None,
        },
        gates: if arguments.no_gate {
            GateUse::None
        } else {
            let logs = arguments.gate_logs.as_deref().map(std::path::absolute);
            GateUse::Granting {
                files: arguments.grants.clone(),
                logs: logs.transpose().context("the folder of the gates' logs")?,
            }
        },
    };
    let up = up::up(&options)?;
    show_up(&options.name, &up, format, reporter)
}

/// What a monitoring VM boots.
struct Boot {
    kernel: PathBuf,
    initramfs: PathBuf,
    arguments: String,
}

fn boot(arguments: &UpArguments) -> Result<Boot> {
    if let (Some(kernel), Some(initramfs)) = (&arguments.kernel, &arguments.initramfs) {
        return Ok(Boot {
            kernel: kernel.clone(),
            initramfs: initramfs.clone(),
            arguments: format!("{KERNEL_ARGUMENTS} {KERNEL_ARGUMENT}"),
        });
    }
    let found = || {
        IMAGES
            .map(PathBuf::from)
            .into_iter()
            .find(|path| path.is_dir())
    };
    let Some(folder) = arguments.image.clone().or_else(found) else {
        return Err(anyhow!("there is no image of the monitoring VM here")).advise(
            "make one with `secmon monitor build`, or name its folder with --image or SECMON_APPLIANCE",
        );
    };
    let image = Image::open(&folder)
        .with_context(|| format!("the monitoring VM's image {}", folder.display()))?;
    Ok(Boot {
        kernel: image.kernel(),
        initramfs: image.initramfs(),
        arguments: kernel_arguments(&image),
    })
}

/// What the kernel of a monitoring VM with this image is told.
fn kernel_arguments(image: &Image) -> String {
    format!("{} {KERNEL_ARGUMENT}", image.manifest.kernel_arguments)
}

fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).with_context(|| format!("looking for {}", path.display()))
}

/// The first target's name, as far as it can name a monitor.
fn default_name(targets: &[TargetName]) -> Result<MonitorName> {
    let first = targets.first().map(TargetName::short);
    let name = first.unwrap_or_default().parse();
    name.advise("name the monitor with --name")
}

fn show_up(name: &MonitorName, up: &Up, format: Format, reporter: Reporter) -> Result<()> {
    let what = match up.origin {
        Origin::Started => "was started",
        Origin::Found => "runs already; nothing was changed",
        Origin::Recovered => "has a new supervisor; its VM went on",
        Origin::Replaced => "has a new supervisor; its VM did not run, and another VM was started",
    };
    let pid = up.processes.machine.map(|machine| machine.pid);
    reporter.note(format_args!("the monitoring VM is process {pid:?}"));
    if format == Format::Table {
        println!("Monitor {name} {what}. It has these rights:");
        for rights in up.rights(name) {
            let shown = |text: &str| crate::output::escape::message(text).into_owned();
            println!("  {}: {}", rights.target, shown(&rights.memory));
            println!("    through its gate: {}", shown(&rights.gate));
        }
        println!(
            "Ask it with `secmon -t monitor:{name} ps`, end it with `secmon monitor down {name}`."
        );
        return Ok(());
    }
    let columns = [
        column("monitor", Kind::Text, "Its name"),
        column("target", Kind::Text, "A target"),
        column(
            "rights",
            Kind::Text,
            "What it may do to the target's memory",
        ),
        column(
            "gate",
            Kind::Text,
            "What it may do through the target's gate",
        ),
    ];
    let rows = up.rights(name).into_iter().map(|rights| {
        vec![
            Value::from(name.as_str()),
            Value::from(rights.target),
            Value::from(rights.memory),
            Value::from(rights.gate),
        ]
    });
    Ok(listing::show(&columns, format, rows)?)
}

fn down(name: &MonitorName) -> Result<()> {
    let down = up::down(name)?;
    for (what, pid) in &down.ended {
        println!("ended: {what}, process {pid}");
    }
    if !down.left.is_empty() {
        let left: Vec<String> = down
            .left
            .iter()
            .map(|(what, pid)| format!("{what} (process {pid})"))
            .collect();
        bail!("could not be ended: {}", left.join(", "));
    }
    println!("Monitor {name} is ended.");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_behind_a_monitor_has_its_form() {
        let parse = |text: &str| address(text).map(|address| address.map_err(|e| e.to_string()));
        assert_eq!(parse("qemu:web1"), None);
        let web1: MonitorName = "web1".parse().expect("a name");
        let expected = |target: Option<&str>| Address {
            monitor: web1.clone(),
            target: target.map(str::to_owned),
        };
        assert_eq!(parse("monitor:web1"), Some(Ok(expected(None))));
        assert_eq!(parse("monitor:web1/a/b"), Some(Ok(expected(Some("a/b")))));
        for bad in ["monitor:", "monitor:/x", "monitor:web1/", "monitor:a b"] {
            assert!(matches!(parse(bad), Some(Err(_))), "{bad}");
        }
    }
}

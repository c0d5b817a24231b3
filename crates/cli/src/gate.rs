//! `secmon gate`: runs a gate over a target, checks its files.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use secmon_channel::KeyPair;
use secmon_gate::configuration::Configuration;
use secmon_gate::grants::Grants;
use secmon_gate::log::{self, Report};
use secmon_gate::protocol::LogHead;
use secmon_gate::supervisor::{self, Part};
use secmon_platform::qemu::{QemuProcess, find};

use crate::report::{Advise, Reporter};

/// The exit status if a log is not as it was written.
const TAMPERED: i32 = 1;

pub const EXAMPLES: &str = "\
A grant file:
  version = 1
  target = \"web1\"

  [[monitor]]
  name = \"watcher\"
  key = \"6f1c…\"                     # its public key, 64 hexadecimal digits
  rights = [\"observe\", \"pause\"]    # \"observe\" alone where nothing is said

  [monitor.limits]                  # all of them have defaults
  stops_per_second = 10

Rights:
  observe   the target's state and RAM layout (its memory needs no gate)
  pause     stop it for moments
  trace     breakpoints, single steps, read registers
  respond   stop it for good, switch its network off, dump its memory, reset, end it
  control   write registers and memory

Examples:
  secmon gate new-key web1.key
  secmon gate check-grants web1.toml
  secmon -t qemu:web1 gate --grants web1.toml --key web1.key --socket gate.sock \\
      --log log/web1.log --user secmon
  secmon gate verify-log log/web1.log --head 812:5d0c…

The gate holds the target's QMP socket, and its gdbstub's if there is one; give the target a
QMP socket of its own for the gate. Whatever ends the gate, the target goes on running within
a second.";

/// Arguments of `secmon gate`.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct GateArguments {
    #[command(subcommand)]
    pub command: Option<GateCommand>,

    #[command(flatten)]
    pub run: RunArguments,
}

/// What a gate is run with.
#[derive(Args, Clone, Debug)]
pub struct RunArguments {
    /// Which monitor may do what, see below
    #[arg(long, value_name = "FILE")]
    pub grants: Option<PathBuf>,

    /// The gate's secret key, made by `secmon gate new-key`
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,

    /// Where monitors connect: a UNIX socket that is made here
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Log every use here; the folder must be the gate's own
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// Run as this user, if started by root
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,

    /// The target's QMP socket, where it is not to be found by -t
    #[arg(long, value_name = "PATH")]
    pub qmp: Option<PathBuf>,

    /// The target's gdbstub socket, where it is not to be found by -t
    #[arg(long, value_name = "PATH")]
    pub gdb: Option<PathBuf>,

    /// The folder that dumps are written to; without it there are none
    #[arg(long, value_name = "DIR")]
    pub dumps: Option<PathBuf>,

    /// Begin a new log file at this size (K, M, G may follow)
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = crate::location::parse_length)]
    pub log_size: u64,

    /// Keep this many earlier log files
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..10_000))]
    pub log_files: u32,
}

/// What else there is to do with a gate's files.
#[derive(Clone, Debug, Subcommand)]
pub enum GateCommand {
    /// Check a log: what was changed, dropped, moved or cut off
    ///
    /// Says the log's last record (its head). A log that was cut short, or
    /// written anew from some record on, shows only against a head that was kept
    /// elsewhere: give it with --head. The gate tells its head to monitors in
    /// every status answer. Exit status 1 if the log is not as it was written.
    VerifyLog {
        /// The log; its earlier files FILE.1, FILE.2, … are read as well
        log: PathBuf,

        /// A record that was kept elsewhere, as SEQUENCE:HASH
        #[arg(long, value_name = "SEQUENCE:HASH", value_parser = parse_head)]
        head: Option<LogHead>,
    },

    /// Check a grant file and show what it means
    CheckGrants {
        /// The file
        grants: PathBuf,
    },

    /// Make a secret key in a new file and show its public key
    NewKey {
        /// The file
        file: PathBuf,
    },
}

fn parse_head(text: &str) -> Result<LogHead, String> {
    let advice = "write SEQUENCE:HASH, the hash with 64 hexadecimal digits";
    let (sequence, hash) = text.split_once(':').ok_or(advice)?;
    let fits = hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    let sequence = sequence.parse().map_err(|_| advice)?;
    fits.then(|| LogHead {
        sequence,
        hash: hash.to_ascii_lowercase(),
    })
    .ok_or(advice.to_owned())
}

/// The program as one of a gate's processes, if it was started as that.
pub fn hidden(command: &OsStr, arguments: &mut impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let stdin = std::io::stdin();
    if command == Part::Keeper.command() {
        return Some(secmon_gate::keeper::run(stdin));
    }
    if command != Part::Gate.command() {
        return None;
    }
    let argument = arguments.next().unwrap_or_default();
    let control = stdin.as_fd().try_clone_to_owned();
    Some(match (argument.to_str(), control) {
        (Some(argument), Ok(control)) => secmon_gate::gate::run(argument, control),
        _ => ExitCode::from(crate::ERROR),
    })
}

/// The command for a part of a gate.
pub fn part(part: Part) -> std::io::Result<Command> {
    let program = std::env::current_exe()?;
    // A gate's own user may not be able to enter the folder of the program,
    // which runs already.
    let reachable = rustix::fs::access(&program, rustix::fs::Access::EXEC_OK).is_ok();
    let mut command = if reachable {
        Command::new(program)
    } else {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("secmon");
        command
    };
    command.arg(part.command());
    Ok(command)
}

/// `secmon gate`.
pub fn gate(arguments: &GateArguments, target: Option<&str>, reporter: Reporter) -> Result<()> {
    match &arguments.command {
        Some(GateCommand::VerifyLog { log, head }) => verify_log(log, head.as_ref(), reporter),
        Some(GateCommand::CheckGrants { grants }) => check_grants(grants),
        Some(GateCommand::NewKey { file }) => new_key(file),
        None => run(&arguments.run, target).map(|never| match never {}),
    }
}

fn run(arguments: &RunArguments, target: Option<&str>) -> Result<Infallible> {
    let needed = |value: &Option<PathBuf>, option: &str| {
        let path = value
            .as_ref()
            .with_context(|| format!("a gate needs --{option}"))
            .advise("`secmon gate --help` has an example")?;
        absolute(path)
    };
    let grants = needed(&arguments.grants, "grants")?;
    let key = needed(&arguments.key, "key")?;
    let socket = needed(&arguments.socket, "socket")?;
    let log = needed(&arguments.log, "log")?;
    // What is wrong with it is said before anything is done.
    Grants::read(&grants).map_err(|error| anyhow!("{}: {error}", grants.display()))?;
    let process = match (target, &arguments.qmp) {
        (Some(target), _) => Some(running(target)?),
        (None, Some(_)) => None,
        (None, None) => {
            return Err(anyhow!("no target"))
                .advise("name it with -t qemu:NAME, or its sockets with --qmp and --gdb");
        }
    };
    let qmp = match (&arguments.qmp, &process) {
        (Some(path), _) => absolute(path)?,
        (None, Some(process)) => free_monitor(process)?,
        (None, None) => bail!("no target"),
    };
    let gdb = match (&arguments.gdb, &process) {
        (Some(path), _) => Some(absolute(path)?),
        (None, Some(process)) => stub(process)?,
        (None, None) => None,
    };
    let configuration = Configuration {
        grants,
        key,
        qmp,
        gdb,
        socket,
        log,
        log_bytes: arguments.log_size,
        log_files: arguments.log_files,
        dumps: arguments.dumps.as_deref().map(absolute).transpose()?,
        user: arguments.user.clone(),
    };
    Ok(supervisor::run(&configuration, part)?)
}

/// The processes of a gate must find their files wherever they are started.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| path.display().to_string())
}

fn running(target: &str) -> Result<QemuProcess> {
    let selector = target
        .strip_prefix("qemu:")
        .with_context(|| format!("a gate is for running QEMUs, not for {target:?}"))
        .advise("name one with -t qemu:NAME; `secmon targets` lists them")?;
    Ok(find(&selector.parse()?)?)
}

/// A QMP socket that nobody uses.
fn free_monitor(process: &QemuProcess) -> Result<PathBuf> {
    let free = process.monitors.iter().find(|monitor| !monitor.busy);
    match free {
        Some(monitor) => resolved(&monitor.path),
        None => Err(anyhow!(
            "QEMU process {} has no QMP socket that nobody else uses",
            process.id.pid
        ))
        .advise("start it with `-qmp unix:PATH,server=on,wait=off`, one for the gate alone"),
    }
}

fn stub(process: &QemuProcess) -> Result<Option<PathBuf>> {
    process.gdb_socket().as_deref().map(resolved).transpose()
}

/// A path that needs no `/proc`, which a confined process does not see.
fn resolved(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).with_context(|| path.display().to_string())
}

fn verify_log(path: &Path, head: Option<&LogHead>, reporter: Reporter) -> Result<()> {
    let report = log::verify(path, head).with_context(|| path.display().to_string())?;
    let Report {
        first,
        head: last,
        records,
        torn_lines,
        torn_tail,
        faults,
        files,
    } = report;
    for fault in &faults {
        reporter.warn(fault);
    }
    if let Some(torn) = &torn_tail {
        reporter.warn(format_args!(
            "the last line is cut short after {} bytes: a gate was killed while it wrote, or somebody cut it",
            torn.bytes
        ));
    }
    match (first, last) {
        (Some(first), Some(last)) => {
            println!("files    {}", files.len());
            println!("records  {records}, from {first} to {}", last.sequence);
            if first > 1 {
                println!("         earlier ones were removed when files were changed");
            }
            if torn_lines > 0 {
                println!("torn     {torn_lines} lines, noted by the gate that was started next");
            }
            println!("head     {}:{}", last.sequence, last.hash);
        }
        _ => println!("no record"),
    }
    if !faults.is_empty() || torn_tail.is_some() {
        std::process::exit(TAMPERED);
    }
    println!("the log is as it was written");
    Ok(())
}

fn check_grants(path: &Path) -> Result<()> {
    let grants = Grants::read(path).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    println!("target {}", grants.target);
    for grant in &grants.monitors {
        let rights: Vec<&str> = grant.rights.iter().map(|right| right.name()).collect();
        println!("monitor {}  {}", grant.name, rights.join(" "));
        println!("  key {}", grant.key);
        let limits = &grant.limits;
        println!(
            "  requests {}/s, stops {}/s, lease {} ms, longest stop {} ms, silence {} ms, breakpoints {}",
            limits.requests_per_second,
            limits.stops_per_second,
            limits.lease_milliseconds,
            limits.longest_stop_milliseconds,
            limits.silence_milliseconds,
            limits.breakpoints
        );
    }
    Ok(())
}

fn new_key(path: &Path) -> Result<()> {
    let pair = KeyPair::generate()?;
    pair.write_new(path)?;
    println!("{}", pair.public());
    Ok(())
}

//! The listings that are compared, and how each tool is asked for them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::truth::{Expected, Row, Truth, plain_path, socket, text};

/// Where everything lies.
pub struct Setup {
    /// The raw image.
    pub image: PathBuf,
    /// The same memory as an ELF core with VMCOREINFO, for drgn.
    pub core: PathBuf,
    /// A folder with the ISF file, for volatility3.
    pub symbols: PathBuf,
    /// A kernel image with debug information, for drgn; or why there is none.
    pub debug_image: Result<PathBuf, String>,
    /// Our own program.
    pub secmon: PathBuf,
    /// The Python that has the peers.
    pub python: PathBuf,
    /// The folder of their scripts.
    pub scripts: PathBuf,
    /// The program with memflow in it.
    pub memflow: PathBuf,
    /// For caches.
    pub scratch: PathBuf,
}

/// Whether a tool finds its cache of symbols filled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Caches {
    /// It starts with none.
    Cold,
    /// An earlier run filled it.
    Warm,
    /// It has none.
    None,
}

type Rows = fn(&[u8]) -> Result<Vec<Row>>;

/// A tool that can do the job.
pub struct Contestant {
    /// The tool.
    pub tool: &'static str,
    /// What it is asked for.
    pub how: &'static str,
    /// The state of its caches.
    pub caches: Caches,
    /// Makes its command, given an empty or filled cache folder.
    command: fn(&Setup, &Path, &'static str) -> Command,
    /// Takes its output apart.
    pub rows: Rows,
}

impl Contestant {
    /// The command of one run.
    pub fn command(&self, setup: &Setup, cache: &Path) -> Command {
        (self.command)(setup, cache, self.how)
    }
}

/// A listing that several tools make.
pub struct Job {
    /// Its name.
    pub title: &'static str,
    /// What is compared with the guest's truth.
    pub compared: &'static str,
    /// The truth.
    pub expected: Expected,
    /// Who makes it; the first is what the others are measured by.
    pub contestants: Vec<Contestant>,
    /// Who does not, and why.
    pub absent: Vec<(&'static str, String)>,
}

fn secmon(setup: &Setup, cache: &Path, how: &'static str) -> Command {
    let mut command = Command::new(&setup.secmon);
    command
        .arg("-t")
        .arg(format!("file:{}", setup.image.display()))
        .arg("--cache-dir")
        .arg(cache)
        .args(how.split(' '))
        .args(["--format", "json"]);
    command
}

fn volatility(setup: &Setup, cache: &Path, how: &'static str) -> Command {
    let mut command = Command::new(setup.python.with_file_name("vol"));
    command
        .args(["-q", "--offline", "-r", "json", "--cache-path"])
        .arg(cache)
        .arg("--symbol-dirs")
        .arg(&setup.symbols)
        .arg("-f")
        .arg(&setup.image)
        .arg(how);
    command
}

fn drgn(setup: &Setup, _cache: &Path, how: &'static str) -> Command {
    let mut command = Command::new(&setup.python);
    command
        .arg(setup.scripts.join("drgn_list.py"))
        .arg(&setup.core)
        .args(&setup.debug_image)
        .arg(how);
    command
}

/// The rows of a JSON array.
fn parse(output: &[u8], row: impl Fn(&Value) -> Option<Row>) -> Result<Vec<Row>> {
    // Volatility writes an empty line before its array.
    let values: Vec<Value> =
        serde_json::from_slice(output).context("the output is no JSON array")?;
    Ok(values.iter().filter_map(row).collect())
}

fn processes(output: &[u8]) -> Result<Vec<Row>> {
    parse(output, |row| {
        let value = |parent: &str, name: &str| {
            Some(format!("{} {}", text(&row[parent])?, text(&row[name])?))
        };
        Some(match row.get("PID") {
            Some(pid) => Row {
                key: pid.to_string(),
                value: value("PPID", "COMM"),
            },
            None => Row {
                key: text(&row["pid"])?,
                value: value("ppid", "comm"),
            },
        })
    })
}

fn arguments(output: &[u8]) -> Result<Vec<Row>> {
    let joined = |value: &Value| -> Option<String> {
        let words: Option<Vec<_>> = value.as_array()?.iter().map(text).collect();
        Some(words?.join(" "))
    };
    parse(output, |row| {
        Some(match row.get("PID") {
            Some(pid) => Row {
                key: pid.to_string(),
                value: text(&row["ARGS"]),
            },
            None => Row {
                key: text(&row["pid"])?,
                value: joined(&row["cmdline"]).or_else(|| joined(&row["arguments"])),
            },
        })
    })
}

fn modules(output: &[u8]) -> Result<Vec<Row>> {
    parse(output, |row| {
        let name = text(&row["name"]).or_else(|| text(&row["Module Name"]))?;
        Some(Row {
            key: name,
            value: None,
        })
    })
}

fn files(output: &[u8]) -> Result<Vec<Row>> {
    parse(output, |row| {
        let (pid, descriptor, path) = match row.get("PID") {
            // It lists threads, too, which can have files of their own.
            Some(pid) if Some(pid) != row.get("TID") => return None,
            Some(pid) => (pid, &row["FD"], &row["Path"]),
            None => (&row["pid"], &row["fd"], &row["path"]),
        };
        Some(Row {
            key: format!("{pid} {descriptor}"),
            value: text(path).map(|path| plain_path(&path)),
        })
    })
}

fn sockets(output: &[u8]) -> Result<Vec<Row>> {
    parse(output, |row| {
        let (protocol, state, key) = match row.get("Proto") {
            Some(protocol) => {
                let mut protocol = text(protocol)?.to_lowercase();
                if row["Family"] == "AF_INET6" {
                    protocol.push('6');
                }
                let key = socket(
                    &protocol,
                    row,
                    ["Source Addr", "Source Port"],
                    ["Destination Addr", "Destination Port"],
                    "NetNS",
                );
                (protocol, text(&row["State"]), key?)
            }
            // What a process has open: not connections that wait out their end.
            None if row["has_file"] != true => return None,
            None => {
                let protocol = text(&row["protocol"])?;
                let key = socket(
                    &protocol,
                    row,
                    ["local_address", "local_port"],
                    ["remote_address", "remote_port"],
                    "namespace",
                );
                (protocol, text(&row["state"]), key?)
            }
        };
        Some(Row {
            key,
            value: state.filter(|_| protocol.starts_with("tcp")),
        })
    })
}

/// All listings.
pub fn jobs(setup: &Setup, truth: &Truth) -> Vec<Job> {
    use Caches::{Cold, Warm};
    let contestant = |tool, how, caches, rows: Rows| Contestant {
        tool,
        how,
        caches,
        command: match tool {
            "SecMon" => secmon,
            "volatility3" => volatility,
            _ => drgn,
        },
        rows,
    };
    let job =
        |title, compared, expected, rows: Rows, who: &[(&'static str, &'static str, Caches)]| Job {
            title,
            compared,
            expected,
            contestants: who
                .iter()
                .map(|(tool, how, caches)| contestant(tool, how, *caches, rows))
                .collect(),
            absent: vec![(
                "memflow",
                "it knows no Linux guest; its systems are Windows only".to_owned(),
            )],
        };
    let mut jobs = vec![
        job(
            "Processes",
            "pid; parent and name of user processes",
            truth.processes(),
            processes,
            &[
                ("SecMon", "ps", Cold),
                ("SecMon", "ps", Warm),
                ("volatility3", "linux.pslist", Cold),
                ("volatility3", "linux.pslist", Warm),
                ("drgn", "processes", Caches::None),
            ],
        ),
        job(
            "Command lines",
            "pid; the words",
            truth.arguments(),
            arguments,
            &[
                ("SecMon", "ps --columns pid,cmdline", Warm),
                ("volatility3", "linux.psaux", Warm),
                ("drgn", "arguments", Caches::None),
            ],
        ),
        job(
            "Modules",
            "name",
            truth.modules(),
            modules,
            &[
                ("SecMon", "modules", Warm),
                ("volatility3", "linux.lsmod", Warm),
                ("drgn", "modules", Caches::None),
            ],
        ),
        job(
            "Open files",
            "pid and descriptor; path of what has one",
            truth.files(),
            files,
            &[
                ("SecMon", "files", Warm),
                ("volatility3", "linux.lsof", Warm),
                ("drgn", "files", Caches::None),
            ],
        ),
        job(
            "TCP and UDP sockets that a process has open",
            "both ends, namespace; state of TCP",
            truth.sockets(),
            sockets,
            &[
                ("SecMon", "sockets --all-namespaces", Warm),
                ("volatility3", "linux.sockstat", Warm),
            ],
        ),
    ];
    if let Some(sockets) = jobs.last_mut() {
        let reason = "none of its helpers lists sockets with their addresses";
        sockets.absent.push(("drgn", reason.to_owned()));
    }
    if let Err(reason) = &setup.debug_image {
        for job in &mut jobs {
            let before = job.contestants.len();
            job.contestants
                .retain(|contestant| contestant.tool != "drgn");
            if job.contestants.len() < before {
                job.absent.push(("drgn", reason.clone()));
            }
        }
    }
    jobs
}

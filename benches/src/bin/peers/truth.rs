//! What a listing should hold, by the guest's own words, and how a tool's rows
//! compare with it.
//!
//! The guest told its truth just before and just after the moment of the image.
//! What is in both must be listed; what is listed must be in one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// A row of a listing: what tells it apart, and what it says; `None` where it
/// says nothing, or nothing that can be compared.
pub struct Row {
    /// What tells it from other rows.
    pub key: String,
    /// What it says.
    pub value: Option<String>,
}

/// One telling: key to value.
type Telling = BTreeMap<String, Option<String>>;

/// What a listing should hold.
pub struct Expected {
    before: Telling,
    after: Telling,
}

/// How a tool's rows compare with it.
#[derive(Clone, Default)]
pub struct Verdict {
    /// Distinct rows listed.
    pub rows: usize,
    /// What the guest has and the tool does not list.
    pub missing: Vec<String>,
    /// What the tool lists and the guest does not have.
    pub invented: Vec<String>,
    /// Rows that say something else than the guest.
    pub wrong: Vec<String>,
    /// Rows that say openly that they can't tell.
    pub unread: usize,
}

impl Verdict {
    /// Whether nothing but what the guest says was listed, all of it.
    pub fn is_right(&self) -> bool {
        self.missing.is_empty() && self.invented.is_empty() && self.wrong.is_empty()
    }
}

impl Expected {
    /// Compares a tool's rows.
    pub fn judge(&self, rows: Vec<Row>) -> Verdict {
        let mut verdict = Verdict::default();
        let mut seen = BTreeSet::new();
        for row in rows {
            if !seen.insert(row.key.clone()) {
                continue;
            }
            let told = [self.before.get(&row.key), self.after.get(&row.key)];
            let told: Vec<_> = told.into_iter().flatten().collect();
            if told.is_empty() {
                verdict.invented.push(row.key);
                continue;
            }
            let told: Vec<_> = told.into_iter().flatten().collect();
            match &row.value {
                _ if told.is_empty() => {}
                None => verdict.unread += 1,
                Some(value) if told.contains(&value) => {}
                Some(value) => {
                    let right = told.first().copied().cloned().unwrap_or_default();
                    verdict
                        .wrong
                        .push(format!("{}: {value:?}, not {right:?}", row.key));
                }
            }
        }
        verdict.rows = seen.len();
        verdict.missing = self
            .before
            .keys()
            .filter(|key| self.after.contains_key(*key) && !seen.contains(*key))
            .cloned()
            .collect();
        verdict
    }

    /// How many rows must be there.
    pub fn certain(&self) -> usize {
        let both = |key: &&String| self.after.contains_key(*key);
        self.before.keys().filter(both).count()
    }
}

/// Both tellings.
pub struct Truth {
    before: Value,
    after: Value,
}

impl Truth {
    /// Reads the two files beside the image.
    ///
    /// # Errors
    /// If one can't be read.
    pub fn read(folder: &Path) -> Result<Self> {
        let read = |name| -> Result<Value> {
            let path = folder.join(name);
            let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
            serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
        };
        Ok(Self {
            before: read("truth.json")?,
            after: read("truth-after.json")?,
        })
    }

    fn expected(&self, tell: impl Fn(&Value) -> Telling) -> Expected {
        Expected {
            before: tell(&self.before),
            after: tell(&self.after),
        }
    }

    /// The kernel's release.
    ///
    /// # Errors
    /// If the truth doesn't say.
    pub fn release(&self) -> Result<String> {
        let release = text(&self.before["info"]["uname"][2]);
        release.context("the truth names no kernel release")
    }

    /// Processes: the parent and the name. A kernel thread's name differs
    /// between `/proc` and the task: not compared.
    pub fn processes(&self) -> Expected {
        self.expected(|truth| {
            let process = |row: &Value| {
                let value = match row["kernel_thread"].as_bool() {
                    Some(false) => text(&row["comm"]).map(|name| {
                        let parent = &row["ppid"];
                        format!("{parent} {name}")
                    }),
                    _ => None,
                };
                (row["pid"].to_string(), value)
            };
            rows(truth, "processes").map(process).collect()
        })
    }

    /// Command lines of processes, their words joined by spaces.
    pub fn arguments(&self) -> Expected {
        self.expected(|truth| {
            let process = |row: &Value| {
                let words = row["cmdline"].as_array();
                let words: Option<Vec<_>> = words.into_iter().flatten().map(text).collect();
                let value = words
                    .filter(|words| !words.is_empty())
                    .map(|words| words.join(" "));
                (row["pid"].to_string(), value)
            };
            rows(truth, "processes").map(process).collect()
        })
    }

    /// Names of modules.
    pub fn modules(&self) -> Expected {
        self.expected(|truth| {
            let name = |row: &Value| Some((text(&row["name"])?, None));
            rows(truth, "modules").filter_map(name).collect()
        })
    }

    /// Open files: the path of what has one. Tools name pipes, sockets and the
    /// like as they please: not compared.
    pub fn files(&self) -> Expected {
        self.expected(|truth| {
            let file = |row: &Value| {
                let key = format!("{} {}", row["pid"], row["fd"]);
                let value = text(&row["path"])
                    .filter(|path| path.starts_with('/') && row["kind"] != "memfd")
                    .map(|path| plain_path(&path));
                (key, value)
            };
            rows(truth, "files").map(file).collect()
        })
    }

    /// TCP and UDP sockets that a process has open: the state of TCP ones.
    pub fn sockets(&self) -> Expected {
        self.expected(|truth| {
            let held: BTreeSet<String> = rows(truth, "files")
                .filter_map(|row| text(&row["link"]))
                .collect();
            rows(truth, "sockets")
                .filter(|row| held.contains(&format!("socket:[{}]", row["inode"])))
                .filter_map(|row| {
                    let protocol = text(&row["protocol"])?;
                    let key = socket(
                        &protocol,
                        row,
                        ["local_address", "local_port"],
                        ["remote_address", "remote_port"],
                        "namespace",
                    )?;
                    let state = text(&row["state_name"]).filter(|_| protocol.starts_with("tcp"));
                    Some((key, state))
                })
                .collect()
        })
    }
}

fn rows<'a>(truth: &'a Value, section: &str) -> impl Iterator<Item = &'a Value> {
    truth[section].as_array().into_iter().flatten()
}

/// A string or a number as text; `None` for bytes that are not UTF-8.
pub fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// A path without what tools add to it.
pub fn plain_path(path: &str) -> String {
    let path = path.trim_start();
    path.strip_suffix(" (deleted)").unwrap_or(path).to_owned()
}

/// What tells an internet socket apart, if it is bound.
pub fn socket(
    protocol: &str,
    row: &Value,
    local: [&str; 2],
    remote: [&str; 2],
    namespace: &str,
) -> Option<String> {
    if !["tcp", "tcp6", "udp", "udp6"].contains(&protocol) {
        return None;
    }
    let end = |[address, port]: [&str; 2]| -> Option<(String, String)> {
        let address: IpAddr = text(&row[address])?.parse().ok()?;
        Some((address.to_string(), text(&row[port])?))
    };
    let ((local, local_port), (remote, remote_port)) = (end(local)?, end(remote)?);
    let namespace = &row[namespace];
    (local_port != "0").then(|| {
        format!("{protocol} {local} {local_port} {remote} {remote_port} in namespace {namespace}")
    })
}

//! The arguments of `secmon watch` and `secmon findings`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use secmon_watch::policy::Budget;

use crate::respond::GateOptions;

/// What the help of `watch` says at its end.
pub const EXAMPLES: &str = "\
Examples:
  secmon -t qemu:web1 watch                                    a line for each change
  secmon -t qemu:web1 watch --policy web1.toml --store web1.db
  secmon -t monitor:web1 watch --store web1.db --ndjson -      what the monitoring VM finds
  secmon -t qemu:web1 watch --policy web1.toml --gate gate.sock --gate-key 6f1c… --key operator.key
  secmon -t qemu:web1 watch --syslog udp://log:514 --otlp http://collector:4318
  secmon watch --check-policy web1.toml                        is the file right?
  secmon findings --store web1.db                              what is stored

A policy says which detectors look how often, what is reported, what is excepted until when and
why, and what is done about findings: docs/policy.md. Without one all detectors look, in 5% of a
core, and nothing is done. What acts on the target needs its gate (--gate, --gate-key, --key, as for
`secmon respond`); a monitoring VM uses its own.

It ends with SIGINT or SIGTERM, and then says what it did.

Exit status:
  0  no alarm (an attack or a suspicion) was seen
  1  an alarm was seen, whether it is still there or not
  2  an error: the target can't be watched, the policy is wrong, the store can't be opened";

/// Arguments of `secmon watch`.
#[derive(Args, Clone, Debug)]
pub struct WatchArguments {
    /// What looks how often, what is excepted, what is done: docs/policy.md
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,

    /// Only say whether this policy is right
    #[arg(long, value_name = "FILE", conflicts_with_all = ["policy", "store", "ndjson"])]
    pub check_policy: Option<PathBuf>,

    /// Print the JSON schema of policies
    #[arg(long, conflicts_with_all = ["policy", "store", "ndjson", "check_policy"])]
    pub schema: bool,

    /// The share of one core that watching may use, whatever the policy says
    #[arg(long, value_name = "PERCENT")]
    pub budget: Option<Budget>,

    /// The kernel's own file, or a folder with it, as for `secmon check`;
    /// where none is found, the kernel is compared with its state at the first look
    #[arg(short, long, value_name = "FILE", env = "SECMON_KERNEL")]
    pub kernel: Option<PathBuf>,

    /// Keep findings and events in this SQLite database
    #[arg(long, value_name = "FILE")]
    pub store: Option<PathBuf>,

    /// Append each event as a JSON object to this file; - is stdout
    #[arg(long, value_name = "FILE")]
    pub ndjson: Option<PathBuf>,

    /// Send each event to this syslog server: udp://HOST:PORT, tcp://HOST:PORT, unix:/dev/log
    #[arg(long, value_name = "ADDRESS")]
    pub syslog: Vec<secmon_export::syslog::Address>,

    /// Send each event to this OpenTelemetry collector, as logs: http://HOST:4318 or https://…
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,

    /// A header that the collector wants
    #[arg(long, value_name = "NAME=VALUE", requires = "otlp", value_parser = parse_header)]
    pub otlp_header: Vec<(String, String)>,

    /// Certificates (PEM) of the authorities that vouch for the collector
    #[arg(long, value_name = "FILE", requires = "otlp")]
    pub otlp_ca: Option<PathBuf>,

    #[command(flatten)]
    pub gate: GateOptions,

    /// End after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,

    /// The process that looks: takes its policy from stdin, writes events
    #[arg(long, hide = true)]
    pub engine: bool,
}

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// What the help of `findings` says at its end.
pub const FINDINGS_EXAMPLES: &str = "\
Examples:
  secmon findings --store web1.db                       all, the latest told last
  secmon findings --store web1.db --state open --since 1h
  secmon findings --store web1.db --events --format ndjson

A finding is open, gone, or unknown: the watch ended while it was there and has not found it
again since.

Exit status:
  0  done
  2  an error";

/// Arguments of `secmon findings`.
#[derive(Args, Clone, Debug)]
pub struct FindingsArguments {
    /// The database that `secmon watch --store` wrote
    #[arg(long, value_name = "FILE")]
    pub store: PathBuf,

    /// Only what was told since then: 90s, 5m, 2h, 7d ago, or milliseconds since 1970
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    pub since: Option<Since>,

    /// Only of these detectors
    #[arg(short, long = "detector", value_name = "NAME", value_delimiter = ',')]
    pub detectors: Vec<String>,

    /// Only findings of this state
    #[arg(long, value_enum)]
    pub state: Option<State>,

    /// Each event instead of each finding
    #[arg(long, conflicts_with_all = ["detectors", "state"])]
    pub events: bool,
}

/// What has become of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum State {
    /// It was there when it was last looked for
    Open,
    /// It is not there any more
    Gone,
    /// The watch ended while it was there, and has not found it again since
    Unknown,
}

/// A moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// So many milliseconds ago.
    Ago(u64),
    /// So many milliseconds after 1970-01-01T00:00:00Z.
    At(u64),
}

fn parse_since(text: &str) -> Result<Since, String> {
    if let Ok(moment) = text.parse() {
        return Ok(Since::At(moment));
    }
    let interval = secmon_watch::policy::Interval::try_from(text.to_owned())?;
    let milliseconds = interval.duration().as_millis();
    Ok(Since::Ago(u64::try_from(milliseconds).unwrap_or(u64::MAX)))
}

//! `secmon respond`: acts on a target through its gate.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::{Args, Subcommand};
use secmon_channel::{Descriptor, KeyPair, PublicKey, Stream};
use secmon_gate::client::GateClient;
use secmon_memory::VirtualAddress;
use secmon_respond::{Connect, Line, Session as GateSession, Victim, Work};
use serde_json::json;

use crate::arguments::Format;
use crate::report::Advise;
use crate::session::Session;

/// How long a session with a gate may take to begin.
const BEGIN: Duration = Duration::from_secs(10);

pub const EXAMPLES: &str = "\
Examples:
  secmon gate new-key operator.key      # its public key goes into the grant file
  secmon respond --gate gate.sock --gate-key 6f1c… --key operator.key pause
  secmon respond --gate gate.sock --gate-key 6f1c… --key operator.key disconnect
  secmon -t qemu:web1 respond --gate gate.sock --gate-key 6f1c… --key operator.key kill 812

Rights that the gate's grant file has to give to this key:
  pause, resume, disconnect, connect, dump   respond
  kill                                       trace and control; the target needs a gdbstub

`kill` has the guest's own kernel send SIGKILL: one of its processors is stopped where the kernel
may call any function, and calls `send_sig` before it goes on. What the process holds is let go of
as always. Nothing is written unless the task, its id, its start and the processor's state are as
expected. A guest whose kernel was changed may ignore it, which is said. The gate's log has each use.

Exit status: 0 done, 2 refused or failed, with the reason.";

/// Arguments of `secmon respond`.
#[derive(Args, Clone, Debug)]
pub struct RespondArguments {
    #[command(flatten)]
    pub gate: GateOptions,

    #[command(subcommand)]
    pub action: RespondAction,
}

/// How a gate is reached, by whom.
#[derive(Args, Clone, Debug)]
pub struct GateOptions {
    /// The gate's socket
    #[arg(long, value_name = "SOCKET")]
    pub gate: Option<PathBuf>,

    /// The gate's public key: what `secmon gate new-key` showed, or a file with it
    #[arg(long, value_name = "KEY")]
    pub gate_key: Option<String>,

    /// The own secret key, made by `secmon gate new-key`
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
}

/// What is to be done.
#[derive(Clone, Debug, Subcommand)]
pub enum RespondAction {
    /// Let the target stand still until somebody lets it run
    Pause,
    /// Let it run again
    Resume,
    /// Take the link from its network devices
    Disconnect {
        /// QEMU's names of the devices; all of them if none is named
        devices: Vec<String>,
    },
    /// Give them their link again
    Connect {
        /// QEMU's names of the devices; all of them if none is named
        devices: Vec<String>,
    },
    /// Have its memory written into the folder that the gate was given for dumps
    Dump {
        /// The file's name; one of the time if none is given
        name: Option<String>,
    },
    /// Have the guest's kernel end a process
    Kill {
        /// Its id in the guest's initial pid namespace
        pid: u32,
        /// Its `task_struct`, where it is hidden from the list of processes
        #[arg(long, value_name = "0xADDRESS", value_parser = parse_address)]
        task: Option<VirtualAddress>,
        /// When it was started, in nanoseconds since the guest's boot, as findings tell it
        #[arg(long, value_name = "NANOSECONDS")]
        started: Option<u64>,
    },
}

fn parse_address(text: &str) -> Result<VirtualAddress, String> {
    let digits = text.strip_prefix("0x").ok_or("write 0x…")?;
    u64::from_str_radix(digits, 16)
        .map(VirtualAddress::new)
        .map_err(|error| error.to_string())
}

impl GateOptions {
    /// How sessions are begun; the keys are read now.
    pub fn connect(&self) -> Result<Connect> {
        fn needed<'a, T>(value: &'a Option<T>, option: &str) -> Result<&'a T> {
            value
                .as_ref()
                .with_context(|| format!("acting on a target needs --{option}"))
                .advise("`secmon respond --help` has an example")
        }
        let socket = needed(&self.gate, "gate")?.clone();
        let own = KeyPair::read(needed(&self.key, "key")?)?;
        let gate = public_key(needed(&self.gate_key, "gate-key")?)?;
        Ok(Box::new(move || {
            connect(&socket, &own, &gate).map_err(|error| format!("{error:#}"))
        }))
    }
}

fn connect(socket: &Path, own: &KeyPair, gate: &PublicKey) -> Result<GateClient> {
    let stream = UnixStream::connect(socket).and_then(Descriptor::new);
    let stream = stream.with_context(|| format!("connecting to {}", socket.display()))?;
    let stream: Arc<dyn Stream> = Arc::new(stream);
    GateClient::connect(&stream, own, gate, BEGIN).with_context(|| {
        format!(
            "{}: no session with the gate; are its key and its grant for the key {} right?",
            socket.display(),
            own.public()
        )
    })
}

/// A public key, or a file with one.
fn public_key(text: &str) -> Result<PublicKey> {
    if let Ok(key) = text.parse() {
        return Ok(key);
    }
    let read = std::fs::read_to_string(text);
    let read = read.with_context(|| format!("--gate-key {text}: no key, and no file"))?;
    let parsed = read.trim().parse();
    parsed.map_err(|_| anyhow!("--gate-key {text}: the file holds no key of 64 hexadecimal digits"))
}

/// `secmon respond`.
pub fn respond(session: &Session<'_>, arguments: &RespondArguments, format: Format) -> Result<()> {
    // Before this process gives up its right to make sockets.
    let mut line = GateSession::begin(arguments.gate.connect()?)?;
    let (action, work): (&str, Work) = match &arguments.action {
        RespondAction::Pause => ("pause", secmon_respond::pause_work()),
        RespondAction::Resume => ("resume", secmon_respond::resume_work()),
        RespondAction::Disconnect { devices } => (
            "disconnect",
            secmon_respond::disconnect_work(devices.clone()),
        ),
        RespondAction::Connect { devices } => {
            ("connect", secmon_respond::connect_work(devices.clone()))
        }
        RespondAction::Dump { name } => {
            let name = name.clone();
            let name = name.unwrap_or_else(|| secmon_respond::dump_name("dump"));
            ("dump", secmon_respond::dump_work(name))
        }
        RespondAction::Kill { pid, task, started } => {
            crate::fault::install();
            let source = session.open()?;
            let guest = Arc::new(session.guest_alone(&source)?);
            let mut victim = match task {
                Some(task) => Victim::at(&guest, *task)?,
                None => Victim::find(&guest, *pid)?,
            };
            // What is there is compared with it in the stopped guest.
            victim.started = started.unwrap_or(victim.started);
            if victim.pid != *pid {
                return Err(anyhow!("at {} is process {}", victim.task, victim.pid))
                    .advise("`secmon ps` and `secmon check` show both");
            }
            let done = line.run(secmon_respond::kill_work(guest, victim))?;
            source.finish()?;
            tell("kill", &done, format);
            return Ok(());
        }
    };
    let done = line.run(work)?;
    tell(action, &done, format);
    Ok(())
}

fn tell(action: &str, done: &str, format: Format) {
    match format {
        Format::Json | Format::Ndjson => println!("{}", json!({"action": action, "done": done})),
        _ => println!("{done}"),
    }
}

//! A small client of QEMU's machine protocol, for making images and for
//! comparing with the hypervisor's own view.
//!
//! The lab has a monitor of its own, over an inherited socket that has no
//! name; a guest's public QMP socket ([`crate::Guest::qmp_socket`]) stays
//! free for what is tested.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// How long a command may take; a dump of a large guest takes seconds.
const TIMEOUT: Duration = Duration::from_secs(180);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

/// The formats that `dump-guest-memory` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DumpFormat {
    /// An ELF core of physical memory.
    Elf,
    /// An ELF core with the guest's page tables applied (`paging=true`).
    ElfPaging,
    /// kdump-compressed with zlib (QEMU's flattened form).
    KdumpZlib,
    /// kdump-compressed with LZO; Debian's QEMU is built without.
    KdumpLzo,
    /// kdump-compressed with snappy; Debian's QEMU is built without.
    KdumpSnappy,
}

impl Qmp {
    /// Connects to a monitor's socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        Self::new(stream)
    }

    /// Takes a connected stream through the greeting.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let greeting = qmp.line().context("no greeting from QEMU's monitor")?;
        if greeting.get("QMP").is_none() {
            bail!("not a QEMU monitor: {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns its result.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        let stream = self.stream.get_mut();
        writeln!(stream, "{request}").with_context(|| format!("cannot send {command}"))?;
        loop {
            let mut reply = self
                .line()
                .with_context(|| format!("no answer to {command}"))?;
            if let Some(error) = reply.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(result) = reply.get_mut("return") {
                return Ok(result.take());
            }
            // Anything else is an event, which nobody waits for here.
        }
    }

    /// Runs a command of the human monitor and returns its text.
    pub fn human(&mut self, line: &str) -> Result<String> {
        self.human_of(0, line)
    }

    /// Runs a command of the human monitor about one vCPU. The monitor's own
    /// `cpu` command would not last: each call has a monitor of its own.
    fn human_of(&mut self, vcpu: u32, line: &str) -> Result<String> {
        let arguments = json!({"command-line": line, "cpu-index": vcpu});
        let reply = self.execute("human-monitor-command", &arguments)?;
        match reply.as_str() {
            Some(text) => Ok(text.replace('\r', "")),
            None => bail!("{line}: no text but {reply}"),
        }
    }

    /// Stops all vCPUs.
    pub fn stop(&mut self) -> Result<()> {
        self.execute("stop", &json!({})).map(drop)
    }

    /// Lets the vCPUs go on.
    pub fn resume(&mut self) -> Result<()> {
        self.execute("cont", &json!({})).map(drop)
    }

    /// The run state (`running`, `paused`, `internal-error`, …).
    pub fn status(&mut self) -> Result<String> {
        let reply = self.execute("query-status", &json!({}))?;
        let status = reply.get("status").and_then(Value::as_str);
        Ok(status.context("query-status without a status")?.to_owned())
    }

    /// Writes the guest's memory to a file.
    pub fn dump(&mut self, to: &Path, format: DumpFormat) -> Result<()> {
        let mut arguments = json!({
            "paging": format == DumpFormat::ElfPaging,
            "protocol": format!("file:{}", to.display()),
        });
        let name = match format {
            DumpFormat::Elf | DumpFormat::ElfPaging => None,
            DumpFormat::KdumpZlib => Some("kdump-zlib"),
            DumpFormat::KdumpLzo => Some("kdump-lzo"),
            DumpFormat::KdumpSnappy => Some("kdump-snappy"),
        };
        if let Some(name) = name {
            arguments["format"] = json!(name);
        }
        self.execute("dump-guest-memory", &arguments).map(drop)
    }

    /// The guest physical address of a virtual one on a vCPU (0 is the
    /// first), in the address space that the vCPU is in; none if unmapped.
    pub fn guest_physical(&mut self, vcpu: u32, address: u64) -> Result<Option<u64>> {
        let text = self.human_of(vcpu, &format!("gva2gpa {address:#x}"))?;
        match text.trim().strip_prefix("gpa: ") {
            Some(physical) => {
                let digits = physical.trim_start_matches("0x");
                Ok(Some(u64::from_str_radix(digits, 16)?))
            }
            None if text.contains("Unmapped") => Ok(None),
            None => bail!("gva2gpa {address:#x}: {text}"),
        }
    }

    /// `info registers` of one vCPU.
    pub fn registers(&mut self, vcpu: u32) -> Result<String> {
        self.human_of(vcpu, "info registers")
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            bail!("QEMU closed the monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

//! A monitoring VM whose program was replaced.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use secmon_hostile::{Command as Wanted, Progress, Reply, Report, STOP};
use secmon_lab::{Guest, Kernel, Suite, static_binary, static_secmon};
use secmon_monitor::appliance::{Entry, Initramfs};
use serde_json::Value;

/// The monitor's name.
const NAME: &str = "hostile";
/// The longest line that may be a report.
const LONGEST_LINE: usize = 1 << 20;
/// How long an attempt, or the boot, may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The modules that the hostile program has: those of a monitor, and all that
/// might find a way out. One that a kernel does not have is left out.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "qemu_fw_cfg",
    "virtio_net",
    "virtio_blk",
    "virtio_scsi",
    "vsock",
    "vmw_vsock_virtio_transport",
    "vmw_vsock_vmci_transport",
    "9p",
    "9pnet_virtio",
    "virtiofs",
    "af_packet",
    "msr",
    "uio",
    "uio_pci_generic",
    "vfio",
    "vfio-pci",
    "nvme",
    "ena",
    "ixgbevf",
    "virtio_rng",
    "virtio_balloon",
    "hv_netvsc",
];

/// A monitoring VM with the hostile program; it ends with this value.
pub struct HostileVm {
    folder: tempfile::TempDir,
    secmon: PathBuf,
    next: u64,
}

impl HostileVm {
    /// Starts one beside a target, as `secmon monitor up` does for any other.
    ///
    /// # Errors
    /// If the programs do not build or the launcher does not start it.
    pub fn start(target: &Guest) -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("hostile/Cargo.toml");
        let secmon = static_secmon()?;
        let program = static_binary(&manifest, "secmon-hostile")?;
        // Short, as sockets' paths are bounded.
        let folder = tempfile::Builder::new().prefix("iso").tempdir_in("/tmp")?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let kernel = Kernel::fetch(Suite::Bookworm)?;
        let initramfs = folder.path().join("initramfs");
        fs::write(&initramfs, packed(&kernel, &fs::read(program)?)?)?;
        let vm = Self {
            folder,
            secmon,
            next: 0,
        };
        let target = format!("qemu:{}", target.name());
        let mut words = vec!["monitor", "up", "--target", &target, "--name", NAME];
        let (kernel, initramfs) = (kernel.image(), initramfs.display().to_string());
        let kernel = kernel.display().to_string();
        words.extend(["--kernel", &kernel, "--initramfs", &initramfs]);
        // A processor stops a VM that stores to read-only memory by an
        // instruction that KVM can't finish in its place, a vector's for
        // instance: the attempts would end there, denied and untold.
        words.extend(["--accelerator", "tcg"]);
        let output = vm.secmon(&words)?;
        ensure!(
            output.status.success(),
            "secmon monitor up: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(vm)
    }

    /// Runs `secmon`.
    ///
    /// # Errors
    /// If it can't be run.
    pub fn secmon(&self, words: &[&str]) -> Result<Output> {
        Ok(self.command(words).output()?)
    }

    /// A command for `secmon`, where this monitor is found.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.secmon);
        command
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .env("XDG_STATE_HOME", self.folder.path())
            .args(words);
        command
    }

    /// A file of the monitor's folder.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("secmon").join(NAME).join(name)
    }

    /// A document of the monitor's folder.
    #[must_use]
    pub fn json(&self, name: &str) -> Value {
        let text = fs::read(self.file(name)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// What the gate's processes wrote, and its log's end.
    #[must_use]
    pub fn gate_log(&self, target: &Guest) -> String {
        let log = format!("secmon/gates/{NAME}/{}/gate.log", target.name());
        fs::read_to_string(self.folder.path().join(log)).unwrap_or_default()
    }

    /// The process numbers of the target's gate: its supervisor, the gate
    /// itself, its keeper. It takes a moment until all are there.
    ///
    /// # Errors
    /// If there is none for a long time.
    pub fn gate(&self) -> Result<[u64; 3]> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = &self.json("state.json")["gates"][0];
            let supervisor = self.json("processes.json")["gates"][0]["process"]["pid"].as_u64();
            let processes = [supervisor, state["gate"].as_u64(), state["keeper"].as_u64()];
            if let [Some(supervisor), Some(gate), Some(keeper)] = processes {
                return Ok([supervisor, gate, keeper]);
            }
            ensure!(Instant::now() < deadline, "no gate: {state}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The monitor's console, the older half as well.
    #[must_use]
    pub fn console(&self) -> String {
        let read = |name| fs::read(self.file(name)).unwrap_or_default();
        let mut bytes = read("console.log.old");
        bytes.extend(read("console.log"));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// QEMU's end of the channel.
    ///
    /// # Errors
    /// If nobody listens for a long time.
    pub fn channel(&self) -> Result<UnixStream> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(self.file("channel.sock")) {
                Ok(stream) => return Ok(stream),
                Err(error) => ensure!(Instant::now() < deadline, "the channel: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has an attempt made, and waits for what comes of it.
    ///
    /// # Errors
    /// If it could not be made.
    pub fn attempt(&mut self, name: &str, argument: &Value) -> Result<Report> {
        let (mut conversation, number) = self.send(name, argument)?;
        let report = conversation.report(number);
        report.with_context(|| format!("{name}; the console:\n{}", self.console()))
    }

    /// Has an attempt begun that goes on until [`finish`](Self::finish).
    /// Meanwhile nobody is connected to the channel.
    ///
    /// # Errors
    /// If it does not begin.
    pub fn begin(&mut self, name: &str, argument: &Value) -> Result<u64> {
        let (mut conversation, number) = self.send(name, argument)?;
        match conversation.next(number)? {
            Progress::Begins => Ok(number),
            other => bail!("{name}: {other:?}"),
        }
    }

    /// Ends an attempt that was begun.
    ///
    /// # Errors
    /// If it could not be made.
    pub fn finish(&mut self, name: &str, number: u64) -> Result<Report> {
        let mut conversation = Conversation(BufReader::new(self.channel()?));
        conversation.0.get_mut().write_all(STOP)?;
        let report = conversation.report(number);
        report.with_context(|| format!("{name}; the console:\n{}", self.console()))
    }

    fn send(&mut self, name: &str, argument: &Value) -> Result<(Conversation, u64)> {
        self.next += 1;
        let wanted = Wanted {
            number: self.next,
            attempt: name.to_owned(),
            argument: argument.clone(),
        };
        let mut line = serde_json::to_vec(&wanted)?;
        line.insert(0, b'\n');
        line.push(b'\n');
        let mut stream = self.channel()?;
        stream.write_all(&line)?;
        Ok((Conversation(BufReader::new(stream)), self.next))
    }
}

/// What the program says.
struct Conversation(BufReader<UnixStream>);

impl Conversation {
    /// The next of an attempt's lines, past whatever else comes.
    fn next(&mut self, number: u64) -> Result<Progress> {
        let deadline = Instant::now() + PATIENCE;
        self.0
            .get_ref()
            .set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut line = Vec::new();
        loop {
            ensure!(Instant::now() < deadline, "nothing after {PATIENCE:?}");
            let limit = LONGEST_LINE.saturating_sub(line.len()) as u64;
            match (&mut self.0).take(limit).read_until(b'\n', &mut line) {
                Ok(0) if limit > 0 => bail!("QEMU closed the channel"),
                Ok(_) => {
                    let reply: Option<Reply> = serde_json::from_slice(&line).ok();
                    line.clear();
                    if let Some(reply) = reply.filter(|reply| reply.number == number) {
                        return Ok(reply.progress);
                    }
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn report(&mut self, number: u64) -> Result<Report> {
        loop {
            match self.next(number)? {
                Progress::Begins => {}
                Progress::Done(report) => return Ok(report),
                Progress::Failed(reason) => bail!("it could not be made: {reason}"),
            }
        }
    }
}

impl Drop for HostileVm {
    fn drop(&mut self) {
        let _ = self.secmon(&["monitor", "down", NAME]);
    }
}

/// The initial file system: the program, and the modules in the order in which
/// they load.
fn packed(kernel: &Kernel, program: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Initramfs::new();
    for folder in ["dev", "lib", "lib/modules", "proc", "sys", "tmp"] {
        archive.add(folder, Entry::Folder)?;
    }
    archive.add("dev/console", Entry::CharacterDevice(5, 1))?;
    archive.add("init", Entry::Program(program))?;
    for (index, module) in kernel.modules(MODULES)?.iter().enumerate() {
        let name = format!("lib/modules/{index:02}-{}.ko", module.name);
        archive.add(&name, Entry::File(&module.object))?;
    }
    Ok(archive.finish()?)
}

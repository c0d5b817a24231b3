//! A host for monitors, for tests: a folder of its own, and `secmon` run in it.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use secmon_channel::{Descriptor, KeyPair, PublicKey, Stream};
use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{Answer, Refusal, Request, TargetState};
use secmon_lab::{Acceleration, Emulator, Guest};
use serde_json::Value;

/// How long anything may take on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A host for monitors: a run directory, and what their VMs boot.
pub struct Host {
    pub folder: tempfile::TempDir,
    /// The options of `monitor up` that name what is booted.
    boots: Vec<String>,
}

impl Host {
    /// Monitors here do nothing.
    pub fn new(kernel: &Path) -> Self {
        let mut host = Self::empty();
        host.make_initramfs();
        let initramfs = host.folder.path().join("initramfs");
        host.boots = vec!["--kernel".to_owned(), kernel.display().to_string()];
        host.boots.push("--initramfs".to_owned());
        host.boots.push(initramfs.display().to_string());
        host
    }

    /// Monitors here are the appliance's.
    pub fn with_image(image: &Path) -> Self {
        let mut host = Self::empty();
        host.boots = vec!["--image".to_owned(), image.display().to_string()];
        host
    }

    fn empty() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("sm")
            .tempdir_in("/tmp")
            .expect("a folder");
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), open).expect("permissions");
        Self {
            boots: Vec::new(),
            folder,
        }
    }

    /// The options of `monitor up` that name this QEMU, put where the
    /// monitor's own user can reach it.
    pub fn qemu(&self, emulator: Emulator) -> Vec<String> {
        if emulator == Emulator::Installed {
            return Vec::new();
        }
        let program = emulator.program().expect("QEMU");
        let root = program.ancestors().nth(3).expect("its tree");
        let tree = self.folder.path().join("qemu");
        let copied = Command::new("cp").arg("-a").args([root, &tree]).status();
        assert!(copied.expect("cp").success());
        let program = tree.join("usr/bin/qemu-system-x86_64");
        vec!["--qemu".to_owned(), program.display().to_string()]
    }

    /// An initial file system whose process 1 sleeps.
    fn make_initramfs(&self) {
        let root = self.folder.path().join("root");
        fs::create_dir_all(root.join("bin")).expect("a folder");
        fs::copy("/bin/busybox", root.join("bin/busybox"))
            .expect("busybox: apt-get install busybox-static");
        let script = "#!/bin/busybox sh\n/bin/busybox echo ready\nwhile :; do /bin/busybox sleep 1000; done\n";
        fs::write(root.join("init"), script).expect("a script");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(root.join("init"), executable).expect("permissions");
        let status = Command::new("sh")
            .arg("-c")
            .arg("find . | cpio --quiet -o -H newc > ../initramfs")
            .current_dir(&root)
            .status()
            .expect("cpio: apt-get install cpio");
        assert!(status.success());
    }

    pub fn secmon(&self, words: &[&str]) -> Output {
        self.command(words).output().expect("secmon")
    }

    pub fn up(&self, target: &str, more: &[&str]) -> Output {
        let mut words = vec!["monitor", "up", "--target", target, "--name", "m"];
        words.extend(self.boots.iter().map(String::as_str));
        // The lab knows already what works here.
        words.extend(["--accelerator", Acceleration::usable().name()]);
        words.extend(more);
        self.secmon(&words)
    }

    pub fn json(&self, file: &str) -> Value {
        let path = self.folder.path().join("secmon/m").join(file);
        let text = fs::read(&path).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub fn pid(&self, process: &str) -> Option<u64> {
        self.json("processes.json")[process]["pid"].as_u64()
    }

    /// The process numbers of the gate of the only target: supervisor, gate,
    /// keeper; none while one of them is missing or has just died.
    pub fn gate(&self) -> Option<[u64; 3]> {
        let state = &self.json("state.json")["gates"][0];
        let supervisor = self.json("processes.json")["gates"][0]["process"]["pid"].as_u64();
        let pids = [
            supervisor?,
            state["gate"].as_u64()?,
            state["keeper"].as_u64()?,
        ];
        pids.iter().all(|pid| is_alive(*pid)).then_some(pids)
    }

    /// A session with the gate, as the monitor would have it.
    pub fn as_monitor(&self) -> GateClient {
        let folder = self.folder.path().join("secmon/m");
        let own = KeyPair::read(&folder.join("monitor.key")).expect("a key");
        self.gate_client(&own).expect("a session")
    }

    /// A session with the gate of the only target.
    pub fn gate_client(&self, own: &KeyPair) -> Result<GateClient, ClientError> {
        let folder = self.folder.path().join("secmon/m");
        let gate: PublicKey = self.json("settings.json")["gates"][0]["key"]
            .as_str()
            .and_then(|key| key.parse().ok())
            .expect("a key");
        let socket = UnixStream::connect(folder.join("gate-0.sock")).expect("the gate listens");
        let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(socket).expect("a stream"));
        GateClient::connect(&stream, own, &gate, PATIENCE)
    }

    pub fn gate_log(&self, target: &str) -> String {
        let path = format!("secmon/gates/m/{target}/gate.log");
        self.folder.path().join(path).display().to_string()
    }

    /// Whether what is written down is what the running supervisor saw.
    pub fn is_fresh(&self) -> bool {
        let own = self.json("state.json")["supervisor"]["pid"].as_u64();
        own.is_some_and(is_alive) && own == self.pid("supervisor")
    }

    /// How often the VM was started again.
    pub fn restarts(&self) -> u64 {
        self.json("state.json")["restarts"].as_u64().unwrap_or(0)
    }

    /// The state of the only target.
    pub fn target(&self) -> String {
        self.target_at(0)
    }

    /// The state of the target in this slot.
    pub fn target_at(&self, slot: usize) -> String {
        let state = self.json("state.json");
        state["targets"][slot][1]["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// `secmon`, to be started.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secmon"));
        command
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .env("XDG_STATE_HOME", self.folder.path())
            .args(words);
        command
    }

    pub fn wait(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            assert!(
                Instant::now() < deadline,
                "{what}: not within {PATIENCE:?}\n{}",
                self.json("state.json")
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.folder.path().join("secmon/m/console.log");
            let log = fs::read(log).unwrap_or_default();
            eprintln!("{}", self.json("state.json"));
            eprintln!("{}", String::from_utf8_lossy(&log));
        }
        let _ = self.secmon(&["monitor", "down", "m"]);
    }
}

/// A console on the monitor, and the lines that it shows.
pub struct Attached {
    pub child: Child,
    lines: Receiver<String>,
}

impl Attached {
    pub fn new(host: &Host) -> Self {
        let mut child = host
            .command(&["monitor", "attach", "m"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("secmon");
        let output = child.stdout.take().expect("an output");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// Types a line.
    pub fn say(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("an input");
        writeln!(input, "{line}").expect("it listens");
    }

    /// Takes lines up to one with this in it; gives all of them.
    pub fn wait_for(&self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut said = String::new();
        while !said.contains(part) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => said = said + &line + "\n",
                Err(error) => panic!("no {part:?}: {error}\n{said}"),
            }
        }
        said
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn succeeded(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

pub fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn kill(pid: u64) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(status.expect("kill").success(), "process {pid}");
    // A signal is sent at once and takes effect in its own time.
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn is_alive(pid: u64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

pub fn field(pid: u64, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find(|line| line.starts_with(name));
    line.unwrap_or_default()
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_owned()
}

pub fn rustix_is_root() -> bool {
    field(u64::from(std::process::id()), "Uid:") == "0"
}

/// The guest runs, and its own clock goes on.
pub fn assert_runs(guest: &Guest) {
    let uptime = || {
        let text = guest.truth().read_file("/proc/uptime").expect("it answers");
        let text = String::from_utf8_lossy(text.as_bytes()).into_owned();
        let seconds = text.split(' ').next().and_then(|text| text.parse().ok());
        seconds.unwrap_or(0.0_f64)
    };
    let first = uptime();
    assert!(first > 0.0 && uptime() >= first);
}

/// What is asked of a gate.
pub fn ask(client: &mut GateClient, request: Request) -> Result<Answer, Refusal> {
    match client.ask(request, PATIENCE) {
        Ok(answer) => Ok(answer),
        Err(ClientError::Refused(refusal)) => Err(refusal),
        Err(ClientError::Channel(error)) => panic!("{error}"),
    }
}

/// Asks until the gate has found the target's QEMU.
pub fn run_state(client: &mut GateClient) -> TargetState {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask(client, Request::Status) {
            Ok(Answer::Status(status)) if status.state == TargetState::Gone => {
                assert!(Instant::now() < deadline, "the target is not found");
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(Answer::Status(status)) => return status.state,
            other => panic!("{other:?}"),
        }
    }
}

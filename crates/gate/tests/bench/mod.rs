//! A target, a gate over it and monitors, all real processes.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use secmon_channel::{Descriptor, KeyPair, PublicKey, Session, Stream};
use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::configuration::Configuration;
use secmon_gate::protocol::{
    Answer, Breakpoint, BreakpointKind, Event, ROLE, Refusal, Request, Status, TargetState,
};
use secmon_gate::supervisor::{self, Part};
use secmon_gate::{gate, keeper};
use tempfile::TempDir;

/// For what must happen on any machine, however slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The parts that this program plays for itself; to be called first in `main`.
pub fn play_part() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let part = arguments.next()?;
    let argument = arguments.next();
    let stdin = || {
        let stdin = std::io::stdin();
        stdin.as_fd().try_clone_to_owned().expect("a descriptor")
    };
    Some(match (part.as_str(), argument) {
        ("play-gate", Some(argument)) => gate::run(&argument, stdin()),
        ("play-keeper", None) => keeper::run(stdin()),
        ("play-supervisor", Some(argument)) => {
            let configuration = serde_json::from_str(&argument).expect("a configuration");
            let Err(error) = supervisor::run(&configuration, part_command);
            eprintln!("{error}");
            ExitCode::from(2)
        }
        ("play-monitor", Some(argument)) => play_monitor(&argument),
        _ => return None,
    })
}

fn part_command(part: Part) -> std::io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(match part {
        Part::Gate => "play-gate",
        Part::Keeper => "play-keeper",
    });
    Ok(command)
}

/// A QEMU that runs its firmware: a clock ticks at 0x46c, 18 times a second,
/// counted by the handler of the timer's interrupt.
pub struct Target {
    child: Child,
    folder: TempDir,
}

impl Target {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let child = Self::qemu(folder.path());
        let target = Self { child, folder };
        target.wait_until_it_ticks();
        target
    }

    fn qemu(folder: &Path) -> Child {
        // A QEMU must not outlive a test that was killed.
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-display", "none", "-nodefaults", "-m", "64", "-smp", "2"])
            .args([
                "-object",
                "memory-backend-file,id=m,size=64M,mem-path=ram,share=on",
            ])
            .args(["-machine", "pc,memory-backend=m,accel=tcg"])
            .args(["-netdev", "user,id=net0,restrict=on"])
            .args(["-device", "virtio-net-pci,netdev=net0,romfile="])
            .args(["-qmp", "unix:qmp,server=on,wait=off"])
            .args(["-chardev", "socket,id=gdb,path=gdb,server=on,wait=off"])
            .args(["-gdb", "chardev:gdb"])
            // For the test itself.
            .args(["-qmp", "unix:operator,server=on,wait=off"])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.join("errors")).expect("a file"))
            .spawn()
            .expect("setpriv (package util-linux) and qemu-system-x86_64 (package qemu-system-x86)")
    }

    fn wait_until_it_ticks(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.path("ram").exists() || self.ticks() < 3 {
            assert!(
                Instant::now() < deadline,
                "no firmware: {}",
                std::fs::read_to_string(self.path("errors")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn ram(&self) -> std::fs::File {
        std::fs::File::open(self.path("ram")).expect("the RAM file")
    }

    pub fn ticks(&self) -> u32 {
        ticks(&self.ram())
    }

    /// Where the timer's interrupt is handled: executed at each tick.
    pub fn timer_handler(&self) -> Breakpoint {
        let mut vector = [0; 4];
        self.ram().read_exact_at(&mut vector, 8 * 4).expect("RAM");
        let [low, high, segment_low, segment_high] = vector;
        let offset = u64::from(u16::from_le_bytes([low, high]));
        let segment = u64::from(u16::from_le_bytes([segment_low, segment_high]));
        Breakpoint {
            address: segment * 16 + offset,
            kind: BreakpointKind::Execute,
            length: 1,
        }
    }

    /// The operator's own monitor.
    pub fn operator(&self) -> secmon_platform::qemu::QmpClient {
        secmon_platform::qemu::QmpClient::connect(&self.path("operator"), PATIENCE)
            .expect("QEMU answers")
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Another QEMU at the same sockets.
    pub fn restart(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(self.path("ram"));
        self.child = Self::qemu(self.folder.path());
        self.wait_until_it_ticks();
    }

    pub fn runs_within(&self, patience: Duration) -> bool {
        let before = self.ticks();
        let deadline = Instant::now() + patience;
        while self.ticks() == before {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.kill();
    }
}

fn ticks(ram: &std::fs::File) -> u32 {
    let mut bytes = [0; 4];
    ram.read_exact_at(&mut bytes, 0x46c).expect("RAM");
    u32::from_le_bytes(bytes)
}

/// Watches the target's clock from outside and measures its longest stall.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Duration>>,
}

impl Watch {
    pub fn begin(target: &Target) -> Self {
        let ram = target.ram();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            let (mut last, mut changed) = (ticks(&ram), Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(2));
                let now = ticks(&ram);
                longest = longest.max(changed.elapsed());
                if now != last {
                    (last, changed) = (now, Instant::now());
                }
            }
            longest
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    pub fn longest_stall(mut self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("once");
        thread.join().expect("no panic")
    }
}

/// A gate's processes and files.
pub struct Gate {
    pub supervisor: Child,
    folder: TempDir,
    key: PublicKey,
    monitors: Vec<(String, KeyPair)>,
}

impl Gate {
    /// Starts a gate; each monitor with its rights, as the grant file has
    /// them, and its limits.
    pub fn start(target: &Target, monitors: &[(&str, &str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let key = KeyPair::generate().expect("a key");
        key.write_new(&folder.path().join("key")).expect("written");
        std::fs::create_dir(folder.path().join("log")).expect("a folder");
        std::fs::create_dir(folder.path().join("dumps")).expect("a folder");
        let mut grants = "version = 1\ntarget = \"firmware\"\n".to_owned();
        let mut pairs = Vec::new();
        for (name, rights, limits) in monitors {
            let pair = KeyPair::generate().expect("a key");
            grants.push_str(&format!(
                "[[monitor]]\nname = \"{name}\"\nkey = \"{}\"\nrights = [{rights}]\n\
                 [monitor.limits]\n{limits}\n",
                pair.public()
            ));
            pairs.push(((*name).to_owned(), pair));
        }
        std::fs::write(folder.path().join("grants.toml"), grants).expect("written");
        let mut gate = Self {
            supervisor: Command::new("true").spawn().expect("runs"),
            folder,
            key: key.public(),
            monitors: pairs,
        };
        let _ = gate.supervisor.wait();
        let configuration = gate.configuration(target);
        gate.supervisor = gate.run(&configuration);
        gate
    }

    pub fn configuration(&self, target: &Target) -> Configuration {
        Configuration {
            grants: self.path("grants.toml"),
            key: self.path("key"),
            qmp: target.path("qmp"),
            gdb: Some(target.path("gdb")),
            socket: self.path("socket"),
            log: self.path("log/log"),
            log_bytes: 64 << 20,
            log_files: 3,
            dumps: Some(self.path("dumps")),
            // The tests' own user: QEMU's sockets are theirs.
            user: Some(whoami()),
        }
    }

    pub fn run(&self, configuration: &Configuration) -> Child {
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(std::env::current_exe().expect("this program"))
            .arg("play-supervisor")
            .arg(serde_json::to_string(configuration).expect("JSON"))
            .stdin(Stdio::null())
            .spawn()
            .expect("runs")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn connect(&self) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.path("socket"))
    }

    fn pair(&self, name: &str) -> &KeyPair {
        let found = self.monitors.iter().find(|(monitor, _)| monitor == name);
        &found.expect("a monitor").1
    }

    /// A session, once the gate is ready for it.
    pub fn monitor(&self, name: &str) -> Monitor {
        connect(&self.path("socket"), self.pair(name), &self.key)
    }

    /// A session without a client, to send anything over.
    pub fn raw_session(&self, name: &str) -> Session {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let stream = self.connect().and_then(Descriptor::new);
            let stream: Arc<dyn Stream> = Arc::new(stream.expect("a connection"));
            let patience = Some(Instant::now() + PATIENCE);
            match Session::initiate(&stream, self.pair(name), &self.key, ROLE, patience) {
                Ok(session) => return session,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Tries another gate with a key that it does not know; it is refused.
    pub fn monitor_of_other(&self, other: &Gate, name: &str) {
        let stream = other.connect().and_then(Descriptor::new);
        let stream: Arc<dyn Stream> = Arc::new(stream.expect("a connection"));
        let client = GateClient::connect(&stream, self.pair(name), &other.key, PATIENCE);
        assert!(client.is_err(), "a foreign key was taken");
    }

    /// As [`run`](Self::run), with files that can't grow beyond so many bytes.
    pub fn run_with_file_limit(&self, configuration: &Configuration, bytes: u32) -> Child {
        Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "prlimit",
                &format!("--fsize={bytes}"),
            ])
            .arg(std::env::current_exe().expect("this program"))
            .arg("play-supervisor")
            .arg(serde_json::to_string(configuration).expect("JSON"))
            .stdin(Stdio::null())
            .spawn()
            .expect("runs")
    }

    /// A monitor in a process of its own, to be killed, in this state.
    pub fn monitor_process(&self, name: &str, state: &str, breakpoint: Breakpoint) -> Child {
        let argument = serde_json::json!({
            "socket": self.path("socket"),
            "own": *self.pair(name).secret().to_hex(),
            "gate": self.key.to_string(),
            "state": state,
            "breakpoint": breakpoint,
        });
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(std::env::current_exe().expect("this program"))
            .args(["play-monitor", &argument.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("runs");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n", "in state {state}");
        child
    }

    /// The process that plays a part now.
    pub fn pid(&self, part: &str) -> Option<u32> {
        let pid = self.supervisor.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        children.ok()?.split_whitespace().find_map(|child| {
            let line = std::fs::read(format!("/proc/{child}/cmdline")).ok()?;
            let argument = line.split(|byte| *byte == 0).nth(1)?;
            (argument == part.as_bytes()).then(|| child.parse().ok())?
        })
    }

    pub fn kill(&mut self, part: &str) {
        if part == "play-supervisor" {
            let _ = self.supervisor.kill();
            let _ = self.supervisor.wait();
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(pid) = self.pid(part) {
                kill(pid);
                return;
            }
            assert!(Instant::now() < deadline, "no {part}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log/log")).unwrap_or_default()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = self.supervisor.kill();
        let _ = self.supervisor.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

pub fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process")).expect("a process");
    let _ = kill_process(pid, Signal::KILL);
}

fn whoami() -> String {
    let id = Command::new("id").arg("-un").output().expect("id runs");
    String::from_utf8_lossy(&id.stdout).trim().to_owned()
}

/// A monitor's session.
pub struct Monitor(pub GateClient);

fn connect(socket: &Path, own: &KeyPair, gate: &PublicKey) -> Monitor {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let result = UnixStream::connect(socket)
            .and_then(Descriptor::new)
            .map_err(|error| error.to_string())
            .and_then(|stream| {
                let stream: Arc<dyn Stream> = Arc::new(stream);
                GateClient::connect(&stream, own, gate, PATIENCE).map_err(|error| error.to_string())
            });
        match result {
            Ok(client) => return Monitor(client),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Monitor {
    #[allow(
        clippy::needless_pass_by_value,
        reason = "requests are made where they are asked"
    )]
    pub fn ask(&mut self, request: Request) -> Result<Answer, Refusal> {
        match self.0.ask(request.clone(), PATIENCE) {
            Ok(answer) => Ok(answer),
            Err(ClientError::Refused(refusal)) => Err(refusal),
            Err(ClientError::Channel(error)) => panic!("{error} on {request:?}"),
        }
    }

    #[allow(
        clippy::needless_pass_by_value,
        reason = "requests are made where they are asked"
    )]
    pub fn done(&mut self, request: Request) {
        let answer = self.ask(request.clone());
        assert_eq!(answer, Ok(Answer::Done), "{request:?}");
    }

    pub fn status(&mut self) -> Status {
        match self.ask(Request::Status) {
            Ok(Answer::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until the target is in a state.
    pub fn wait_for(&mut self, wanted: impl Fn(&TargetState) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.status().state;
            if wanted(&state) {
                return;
            }
            assert!(Instant::now() < deadline, "{state:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The next event that is wanted, others aside.
    pub fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(event) = self.0.event(Duration::from_millis(200)).expect("a session")
                && wanted(&event)
            {
                return event;
            }
            assert!(Instant::now() < deadline, "no such event");
            let _ = self.ask(Request::Heartbeat);
        }
    }
}

/// A monitor that brings the target into a state, says so, and keeps it there
/// until it is killed or loses what it holds.
fn play_monitor(argument: &str) -> ExitCode {
    let argument: serde_json::Value = serde_json::from_str(argument).expect("JSON");
    let text = |name: &str| argument[name].as_str().expect("text").to_owned();
    let own = KeyPair::from_secret(text("own").parse().expect("a key")).expect("a key");
    let gate: PublicKey = text("gate").parse().expect("a key");
    let breakpoint: Breakpoint =
        serde_json::from_value(argument["breakpoint"].clone()).expect("a breakpoint");
    let mut monitor = connect(Path::new(&text("socket")), &own, &gate);
    monitor.wait_for(|state| *state != TargetState::Gone);
    let ready = || {
        println!("ready");
        std::io::stdout().flush().expect("a reader");
    };
    let pause = Request::Pause {
        lease_milliseconds: 500,
    };
    let extend = Request::Extend {
        lease_milliseconds: 500,
    };
    // However it goes on, it ends with its session; the test kills it or the
    // gate.
    let keep =
        |monitor: &mut Monitor, request: &Request| monitor.0.ask(request.clone(), PATIENCE).is_ok();
    match text("state").as_str() {
        "free" => {
            ready();
            while keep(&mut monitor, &Request::Heartbeat) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        "paused" => {
            monitor.ask(pause).expect("allowed");
            ready();
            while keep(&mut monitor, &extend) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        "breakpoint" => {
            monitor.done(Request::SetBreakpoint(breakpoint));
            monitor.event(|event| matches!(event, Event::Stopped { .. }));
            ready();
            while keep(&mut monitor, &extend) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        "armed" => {
            let mut far = breakpoint;
            far.address = 0xdead_0000;
            monitor.done(Request::SetBreakpoint(far));
            ready();
            while keep(&mut monitor, &Request::Heartbeat) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        "stepping" => {
            monitor.ask(pause).expect("allowed");
            ready();
            while keep(&mut monitor, &Request::Step { vcpu: 0 }) {}
        }
        "command" => {
            ready();
            while keep(&mut monitor, &pause) {
                // Lost already, if the keeper has just died.
                let _ = monitor.ask(Request::Resume);
            }
        }
        other => panic!("no state {other}"),
    }
    ExitCode::SUCCESS
}

//! The launcher, with real QEMUs: what a monitor's QEMU may do, what happens
//! when something dies, and that the target goes on in every case.
//!
//! The monitoring VMs here run nothing that answers; what a monitor says is
//! tested with its appliance.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_channel::{Descriptor, KeyPair, PublicKey, Stream};
use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{Answer, Refusal, Request, Right, TargetState};
use secmon_lab::{Acceleration, Backing, Emulator, Guest, QmpAccess, Suite};
use serde_json::Value;

/// How long anything may take on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(120);

/// A host for monitors: a run directory, and a VM that does nothing.
struct Host {
    folder: tempfile::TempDir,
    kernel: PathBuf,
}

impl Host {
    fn new(kernel: &Path) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("sm")
            .tempdir_in("/tmp")
            .expect("a folder");
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), open).expect("permissions");
        let host = Self {
            kernel: kernel.to_owned(),
            folder,
        };
        host.make_initramfs();
        host
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

    fn secmon(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_secmon"))
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .env("XDG_STATE_HOME", self.folder.path())
            .args(words)
            .output()
            .expect("secmon")
    }

    fn up(&self, target: &str, more: &[&str]) -> Output {
        let kernel = self.kernel.display().to_string();
        let initramfs = self.folder.path().join("initramfs").display().to_string();
        let mut words = vec!["monitor", "up", "--target", target, "--name", "m"];
        words.extend(["--kernel", &kernel, "--initramfs", &initramfs]);
        // The lab knows already what works here.
        words.extend(["--accelerator", Acceleration::usable().name()]);
        words.extend(more);
        self.secmon(&words)
    }

    fn json(&self, file: &str) -> Value {
        let path = self.folder.path().join("secmon/m").join(file);
        let text = fs::read(&path).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn pid(&self, process: &str) -> Option<u64> {
        self.json("processes.json")[process]["pid"].as_u64()
    }

    /// The process numbers of the gate of the only target: supervisor, gate,
    /// keeper; none while one of them is missing or has just died.
    fn gate(&self) -> Option<[u64; 3]> {
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
    fn as_monitor(&self) -> GateClient {
        let folder = self.folder.path().join("secmon/m");
        let own = KeyPair::read(&folder.join("monitor.key")).expect("a key");
        let gate: PublicKey = self.json("settings.json")["gates"][0]["key"]
            .as_str()
            .and_then(|key| key.parse().ok())
            .expect("a key");
        let socket = UnixStream::connect(folder.join("gate-0.sock")).expect("the gate listens");
        let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(socket).expect("a stream"));
        GateClient::connect(&stream, &own, &gate, PATIENCE).expect("a session")
    }

    fn gate_log(&self, target: &str) -> String {
        let path = format!("secmon/gates/m/{target}/gate.log");
        self.folder.path().join(path).display().to_string()
    }

    /// How often the VM was started again.
    fn restarts(&self) -> u64 {
        self.json("state.json")["restarts"].as_u64().unwrap_or(0)
    }

    /// The state of the only target.
    fn target(&self) -> String {
        let state = self.json("state.json");
        state["targets"][0][1]["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    fn wait(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
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
        let _ = self.secmon(&["monitor", "down", "m"]);
    }
}

fn succeeded(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn kill(pid: u64) {
    let status = Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(status.expect("kill").success(), "process {pid}");
    // A signal is sent at once and takes effect in its own time.
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_alive(pid: u64) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

fn field(pid: u64, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find(|line| line.starts_with(name));
    line.unwrap_or_default()
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_owned()
}

/// Nothing but reading: the target's file is open for reading and mapped so,
/// and QEMU has neither root nor the way back to it.
fn assert_confined(pid: u64, ram: &str) {
    let mut open = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("its files")
        .flatten()
    {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if target != Path::new(ram) {
            continue;
        }
        let number = entry.file_name().into_string().expect("a number");
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        assert_eq!(flags.map(|flags| flags & 3), Some(0), "O_RDONLY: {info}");
        open += 1;
    }
    assert!(open > 0, "{ram} is open");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
    let mapped: Vec<&str> = maps.lines().filter(|line| line.ends_with(ram)).collect();
    assert!(!mapped.is_empty());
    for line in mapped {
        assert!(line.contains(" r--s "), "{line}");
    }
    assert_eq!(field(pid, "Seccomp:"), "2");
    assert_eq!(field(pid, "NoNewPrivs:"), "1");
    if rustix_is_root() {
        assert_ne!(field(pid, "Uid:"), "0");
        assert_eq!(field(pid, "CapEff:"), "0000000000000000");
        assert_eq!(field(pid, "CapPrm:"), "0000000000000000");
    }
}

fn rustix_is_root() -> bool {
    field(u64::from(std::process::id()), "Uid:") == "0"
}

fn boot(name: &str, mib: u32) -> Guest {
    Guest::builder(Suite::Bookworm)
        .name(name)
        .memory_mib(mib)
        .boot()
        .expect("a guest")
}

/// The guest runs, and its own clock goes on.
fn assert_runs(guest: &Guest) {
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
fn ask(client: &mut GateClient, request: Request) -> Result<Answer, Refusal> {
    match client.ask(request, PATIENCE) {
        Ok(answer) => Ok(answer),
        Err(ClientError::Refused(refusal)) => Err(refusal),
        Err(ClientError::Channel(error)) => panic!("{error}"),
    }
}

/// Asks until the gate has found the target's QEMU.
fn run_state(client: &mut GateClient) -> TargetState {
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

/// Gate and keeper have no more rights than they need, and a user of their
/// own.
fn assert_gate_confined([supervisor, gate, keeper]: [u64; 3], machine: u64) {
    for pid in [gate, keeper] {
        assert_eq!(field(pid, "Seccomp:"), "2");
    }
    for pid in [supervisor, gate, keeper] {
        assert_eq!(field(pid, "NoNewPrivs:"), "1");
        if rustix_is_root() {
            let user = field(pid, "Uid:");
            assert!(user != "0" && user != field(machine, "Uid:"), "{user}");
            assert_eq!(field(pid, "CapEff:"), "0000000000000000");
            assert_eq!(field(pid, "CapPrm:"), "0000000000000000");
        }
    }
}

const PAUSE: Request = Request::Pause {
    lease_milliseconds: 100,
};

/// How often each process is killed.
fn rounds() -> u32 {
    let rounds = std::env::var("SECMON_KILL_ROUNDS").ok();
    rounds.and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

#[test]
fn a_monitor_comes_up_survives_and_goes() {
    // No power of two, so that its file is extended while it runs.
    let guest = boot("launcher-target", 384);
    let host = Host::new(&guest.kernel().image());
    let target = "qemu:launcher-target";

    let said = succeeded(&host.up(target, &[]));
    assert!(said.contains("observe: read its 384 MiB"), "{said}");
    let machine = host.pid("machine").expect("a VM");
    let ram = host.json("state.json")["targets"][0][1]["file"]
        .as_str()
        .expect("a file")
        .to_owned();
    assert_eq!(fs::metadata(&ram).expect("the file").len(), 512 << 20);
    assert_confined(machine, &ram);
    assert_runs(&guest);

    // Its gate: nothing is granted but to observe.
    assert!(
        said.contains("through its gate: observe alone")
            && said.contains("not pause, trace, respond, control"),
        "{said}"
    );
    host.wait("a gate", |host| host.gate().is_some());
    assert_gate_confined(host.gate().expect("a gate"), machine);
    let mut monitor = host.as_monitor();
    assert_eq!(run_state(&mut monitor), TargetState::Running);
    assert_eq!(ask(&mut monitor, PAUSE), Err(Refusal::Denied(Right::Pause)));
    drop(monitor);

    // Again: nothing happens. Another target: refused.
    let said = succeeded(&host.up(target, &[]));
    assert!(said.contains("runs already"), "{said}");
    assert_eq!(host.pid("machine"), Some(machine));
    let error = refused(&host.up("qemu:other", &["--wait"]));
    assert!(error.contains("--name"), "{error}");

    for _ in 0..rounds() {
        // The VM dies: another one. Its number is written down before it runs,
        // the count of restarts when it does.
        let machine = host.pid("machine").expect("a VM");
        let restarts = host.restarts();
        kill(machine);
        host.wait("another VM", |host| {
            host.pid("machine")
                .is_some_and(|pid| pid != machine && is_alive(pid))
                && host.restarts() > restarts
                && host.target() == "watched"
        });
        assert_runs(&guest);

        // A process of the gate dies: another one, and it is told.
        for victim in 0..3 {
            let gate = host.gate().expect("a gate");
            kill(gate[victim]);
            host.wait("another gate", |host| {
                host.gate().is_some_and(|now| now[victim] != gate[victim])
            });
            assert_runs(&guest);
        }
        let gate = host.gate();

        // The supervisor dies: the VM goes on, and the next supervisor takes it.
        let (supervisor, machine) = (host.pid("supervisor"), host.pid("machine"));
        let supervisor = supervisor.expect("a supervisor");
        kill(supervisor);
        let status = succeeded(&host.secmon(&["monitor", "status", "m", "--format", "json"]));
        let status: Value = serde_json::from_str(&status).expect("JSON");
        let died = status[0]["supervisor"].as_str().expect("a text");
        assert!(died.contains("died"), "{died}");
        let said = succeeded(&host.up(target, &[]));
        assert!(said.contains("its VM went on"), "{said}");
        assert_eq!(host.pid("machine"), machine);
        host.wait("the target again", |host| host.target() == "watched");
        assert_eq!(host.gate(), gate, "the gate goes on");
        assert_confined(machine.expect("a VM"), &ram);
        assert_runs(&guest);
    }

    // The target ends and another one of its name starts.
    let gate = host.gate().expect("a gate");
    drop(guest);
    host.wait("the target's end", |host| host.target() == "absent");
    let guest = boot("launcher-target", 384);
    host.wait("the new target", |host| host.target() == "watched");
    host.wait("a VM", |host| host.pid("machine").is_some_and(is_alive));
    host.wait("its gate", |host| {
        host.gate().is_some_and(|now| now != gate)
    });
    assert!(gate.iter().all(|pid| !is_alive(*pid)));
    assert_eq!(run_state(&mut host.as_monitor()), TargetState::Running);
    assert_runs(&guest);

    // All that was started ends, also without its supervisor.
    let processes = ["supervisor", "machine"].map(|process| host.pid(process).expect("a process"));
    let gate = host.gate().expect("a gate");
    kill(processes[0]);
    succeeded(&host.secmon(&["monitor", "down", "m"]));
    assert!(processes.iter().chain(&gate).all(|pid| !is_alive(*pid)));
    assert!(!host.folder.path().join("secmon/m").exists());
    assert_runs(&guest);
    let error = refused(&host.secmon(&["monitor", "down", "m"]));
    assert!(error.contains("there is no monitor m"), "{error}");
    // What was done through the gates is still known.
    let log = host.gate_log("launcher-target");
    let said = succeeded(&host.secmon(&["gate", "verify-log", &log]));
    assert!(said.contains("as it was written"), "{said}");
    let log = fs::read_to_string(&log).expect("a log");
    assert!(log.contains("\"outcome\":\"denied\""), "{log}");
}

#[test]
fn qemu_10_takes_the_same() {
    let guest = Guest::builder(Suite::Bookworm)
        .name("launcher-memfd")
        .backing(Backing::Memfd)
        .emulator(Emulator::Backports)
        .boot()
        .expect("a guest");
    let host = Host::new(&guest.kernel().image());
    // Where the monitor's own user can reach it.
    let program = Emulator::Backports.program().expect("QEMU 10");
    let root = program.ancestors().nth(3).expect("its tree");
    let tree = host.folder.path().join("qemu");
    let copied = Command::new("cp").arg("-a").args([root, &tree]).status();
    assert!(copied.expect("cp").success());
    let program = tree.join("usr/bin/qemu-system-x86_64");
    let program = program.display().to_string();
    let grants = host.folder.path().join("grants.toml");
    let text = "version = 1\ntarget = \"launcher-memfd\"\n[[monitor]]\nname = \"m\"\nrights = [\"pause\"]\n";
    fs::write(&grants, text.replace("launcher-memfd", "other")).expect("written");
    let grants = grants.display().to_string();
    let with_grants = ["--qemu", &program, "--grants", &grants];
    let error = refused(&host.up("qemu:launcher-memfd", &with_grants));
    assert!(error.contains("over target \"other\""), "{error}");
    fs::write(&grants, text).expect("written");
    let said = succeeded(&host.up("qemu:launcher-memfd", &with_grants));
    assert!(
        said.contains("its gate: observe, pause; not trace"),
        "{said}"
    );
    let state = host.json("state.json");
    let file = state["targets"][0][1]["file"].as_str().expect("a file");
    assert!(file.starts_with("/memfd:"), "{state}");
    assert_confined(host.pid("machine").expect("a VM"), file);
    assert_runs(&guest);

    // What is granted is done, and undone.
    let mut monitor = host.as_monitor();
    run_state(&mut monitor);
    assert!(matches!(
        ask(&mut monitor, PAUSE),
        Ok(Answer::Paused { .. })
    ));
    let deadline = Instant::now() + PATIENCE;
    while ask(&mut monitor, Request::Resume) == Ok(Answer::Done) {
        // The lease ended, or it was let run: it runs either way.
        assert!(Instant::now() < deadline);
    }
    let stop = ask(&mut monitor, Request::Stop);
    assert_eq!(stop, Err(Refusal::Denied(Right::Respond)));
    assert_eq!(run_state(&mut monitor), TargetState::Running);
    drop(monitor);
    succeeded(&host.secmon(&["monitor", "down", "m"]));
    assert_runs(&guest);
}

#[test]
fn what_can_not_be_watched_is_told_with_what_to_change() {
    let guest = Guest::builder(Suite::Bookworm)
        .name("launcher-plain")
        .memory_mib(256)
        .backing(Backing::Plain)
        .qmp(QmpAccess::None)
        .boot()
        .expect("a guest");
    let host = Host::new(&guest.kernel().image());
    let error = refused(&host.up("qemu:launcher-plain", &[]));
    assert!(
        error.contains("-object memory-backend-memfd,id=ram,size=256M"),
        "{error}"
    );
    assert!(error.contains("<access mode='shared'/>"), "{error}");
    assert!(!host.folder.path().join("secmon/m").exists());
    let error = refused(&host.up("qemu:launcher-nobody", &[]));
    assert!(error.contains("no running QEMU"), "{error}");
    let said = succeeded(&host.up("qemu:launcher-nobody", &["--wait"]));
    assert!(said.contains("as soon as it starts"), "{said}");
}

#[test]
fn a_target_whose_qmp_is_not_free_is_watched_without_a_gate() {
    let guest = Guest::builder(Suite::Bookworm)
        .name("launcher-held")
        .boot()
        .expect("a guest");
    let host = Host::new(&guest.kernel().image());
    let socket = guest.qmp_socket().expect("a socket");
    let holder = secmon_platform::qemu::QmpClient::connect(&socket, PATIENCE).expect("greeted");
    let said = succeeded(&host.up("qemu:launcher-held", &[]));
    let path = socket.display().to_string();
    assert!(
        said.contains("in use by another client") && said.contains(&path),
        "{said}"
    );
    // It is taken once it is free.
    drop(holder);
    host.wait("a gate", |host| host.gate().is_some());
    let said = succeeded(&host.secmon(&["monitor", "status", "m", "--format", "json"]));
    let status: Value = serde_json::from_str(&said).expect("JSON");
    let gate = status[0]["gate"].as_str().expect("a text");
    assert!(gate.contains("running") && gate.contains(&path), "{gate}");
    assert_runs(&guest);
}

//! The built program on a guest that runs: what it shows is what the guest
//! says of itself, and a paused guest always runs again.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use secmon_lab::{Backing, Guest, QmpAccess, Suite, Workload};
use serde_json::Value;

struct Watched {
    guest: Guest,
    cache: tempfile::TempDir,
}

impl Watched {
    fn boot(backing: Backing, workload: Workload) -> Self {
        let guest = Guest::builder(Suite::Bookworm)
            .backing(backing)
            .qmp(QmpAccess::Socket)
            .workload(workload)
            .boot()
            .expect("the lab boots a guest");
        let cache = tempfile::tempdir().expect("a folder");
        Self { guest, cache }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_secmon"));
        command
            .env_remove("NO_COLOR")
            .env("SECMON_TARGET", format!("qemu:{}", self.guest.pid()))
            .env("SECMON_CACHE_DIR", self.cache.path())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("secmon runs")
    }

    /// The rows of a command, which must succeed.
    #[track_caller]
    fn rows(&self, arguments: &[&str]) -> Vec<Value> {
        let arguments = [arguments, &["--format", "json"]].concat();
        let output = self.run(&arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn is_running(&self) -> bool {
        self.guest.control().status().expect("QMP answers") == "running"
    }

    #[track_caller]
    fn wait_for(&self, running: bool) {
        let patience = Instant::now() + Duration::from_secs(20);
        while self.is_running() != running {
            assert!(Instant::now() < patience, "running stays {}", !running);
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Processes by id, without what comes and goes in a quiet guest.
fn processes(watched: &Watched) -> BTreeMap<i64, String> {
    let processes = watched.guest.truth().processes().expect("the truth");
    processes
        .into_iter()
        .filter(|process| !process.kernel_thread)
        .filter_map(|process| Some((process.pid.into(), process.comm.as_str()?.to_owned())))
        .collect()
}

#[test]
fn a_guest_is_shown_as_it_is() {
    let watched = Watched::boot(Backing::Plain, Workload::small());

    let targets = watched.rows(&["targets"]);
    let pid = u64::from(watched.guest.pid());
    let this = targets.iter().find(|row| row["pid"] == pid);
    let this = this.expect("the guest is among the targets");
    assert_eq!(this["name"], watched.guest.name());
    assert_eq!(this["problem"], Value::Null);
    assert_eq!(this["ram"], 512_u64 << 20);

    let truth = processes(&watched);
    let shown: BTreeMap<i64, String> = watched
        .rows(&["ps", "-c", "pid,comm", "-w", "kernel_thread=false"])
        .iter()
        .map(|row| {
            let name = row["comm"].as_str().expect("a name");
            (row["pid"].as_i64().expect("a number"), name.to_owned())
        })
        .collect();
    assert_eq!(shown, truth);

    let one = watched.rows(&["ps", "--pid", "1"]);
    assert_eq!(one.len(), 1);
    assert_eq!(one[0]["pid"], 1);
    let newest = watched.rows(&["ps", "--sort", "pid:desc", "--limit", "3"]);
    let pids: Vec<i64> = newest
        .iter()
        .filter_map(|row| row["pid"].as_i64())
        .collect();
    assert!(
        pids.len() == 3 && pids.is_sorted_by(|a, b| a > b),
        "{pids:?}"
    );

    // The banner by symbol, and the same bytes where it is translated to.
    let banner = watched.run(&["read", "linux_banner", "--raw", "-l", "64"]);
    assert!(banner.stdout.starts_with(b"Linux version "), "{banner:?}");
    let walk = watched.rows(&["translate", "linux_banner"]);
    let last = walk.last().expect("entries");
    assert_eq!(last["executable"], false);
    let physical = last["physical"].as_str().expect("an address");
    let same = watched.run(&["read", &format!("phys:{physical}"), "--raw", "-l", "64"]);
    assert_eq!(same.stdout, banner.stdout);

    // A process's own memory: its program starts as every program does.
    let maps = watched.rows(&["maps", "--pid", "1", "-w", "path=/init", "-w", "offset=0"]);
    let start = maps[0]["start"].as_str().expect("an address");
    let program = watched.run(&["read", &format!("1:{start}"), "--raw", "-l", "4"]);
    assert_eq!(program.stdout, b"\x7fELF", "{program:?}");

    let lines = String::from_utf8(watched.run(&["ps", "--format", "ndjson"]).stdout);
    assert!(lines.expect("UTF-8").lines().count() > truth.len());
    let unknown = watched.run(&["translate", "no_such_symbol"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(watched.is_running());
}

#[test]
fn a_dump_is_the_guest_as_it_was() {
    let watched = Watched::boot(Backing::File, Workload::small());
    let truth = processes(&watched);
    let folder = tempfile::tempdir().expect("a folder");
    for kind in ["raw", "lime", "elf"] {
        let path = folder.path().join(kind);
        let text = path.to_str().expect("UTF-8");
        let rows = watched.rows(&["--pause", "dump", "--as", kind, text]);
        assert!(watched.is_running());
        assert_eq!(rows[0]["unreadable"], 0);
        let sum = Command::new("sha256sum")
            .arg(&path)
            .output()
            .expect("sha256sum runs");
        let sum = String::from_utf8(sum.stdout).expect("UTF-8");
        assert_eq!(sum.split(' ').next(), rows[0]["sha256"].as_str());
        let target = format!("file:{text}");
        let processes: BTreeMap<i64, String> = watched
            .rows(&["-t", &target, "ps", "-w", "kernel_thread=false"])
            .iter()
            .filter_map(|row| Some((row["pid"].as_i64()?, row["comm"].as_str()?.to_owned())))
            .collect();
        assert_eq!(processes, truth, "{kind}");
        let again = watched.run(&["dump", "--as", kind, text]);
        assert_eq!(
            again.status.code(),
            Some(2),
            "an existing file is left alone"
        );
        std::fs::remove_file(Path::new(text)).expect("it is there");
    }
    the_kernel_is_written_for_other_tools(&watched, folder.path());
}

fn the_kernel_is_written_for_other_tools(watched: &Watched, folder: &Path) {
    let path = folder.join("guest.json");
    let text = path.to_str().expect("UTF-8");
    let written = watched.run(&["isf", text]);
    assert!(written.status.success(), "{written:?}");
    let document = std::fs::read(&path).expect("the document");
    let parsed: Value = serde_json::from_slice(&document).expect("JSON");
    let task = &parsed["symbols"]["init_task"];
    assert_eq!(task["type"]["name"], "task_struct");
    assert!(parsed["user_types"]["task_struct"]["fields"]["comm"].is_object());
    let shown = watched.run(&["isf"]);
    assert_eq!(shown.stdout, document, "stdout gets the same");
    let again = watched.run(&["isf", text]);
    assert_eq!(again.status.code(), Some(2), "an existing file stays");
}

#[test]
fn a_paused_guest_always_runs_again() {
    let watched = Watched::boot(Backing::Plain, Workload::small());
    watched.rows(&["--pause", "ps"]);
    assert!(watched.is_running());

    // An error after the pause, and a reader that goes away.
    let output = watched.run(&["--pause", "read", "0x10"]);
    assert_eq!(output.status.code(), Some(2));
    watched.wait_for(true);

    // Killed in the middle: a pipe that nobody reads holds it there.
    let mut child = watched
        .command(&["--pause", "read", "phys:0", "-l", "100M"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("secmon runs");
    watched.wait_for(false);
    child.kill().expect("it still runs");
    child.wait().expect("it ends");
    watched.wait_for(true);

    // Its own limit.
    let mut child = watched
        .command(&[
            "--pause",
            "--pause-limit",
            "1",
            "read",
            "phys:0",
            "-l",
            "100M",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("secmon runs");
    watched.wait_for(false);
    watched.wait_for(true);
    let output = child.stdout.take().map(std::io::read_to_string);
    assert!(output.is_some());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("--pause-limit"), "{said}");
    assert!(watched.is_running());
}

#[test]
fn hostile_names_stay_names() {
    let watched = Watched::boot(Backing::File, Workload::rich());
    let truth = watched.guest.truth().processes().expect("the truth");
    let odd = truth
        .iter()
        .filter(|process| {
            process
                .comm
                .as_bytes()
                .iter()
                .any(|byte| !(b' '..=b'~').contains(byte))
        })
        .count();
    assert!(odd > 0, "the workload has odd names");
    for format in ["table", "csv", "json", "ndjson"] {
        let output = watched.run(&["ps", "-c", "all", "--format", format]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let text = String::from_utf8(output.stdout).expect("UTF-8 whatever the guest's bytes");
        let acting = text.chars().find(|c| c.is_control() && *c != '\n');
        assert_eq!(acting, None, "{format}");
    }
    let all = watched.rows(&["ps"]);
    let pids: Vec<i64> = all.iter().filter_map(|row| row["pid"].as_i64()).collect();
    for process in truth.iter().filter(|process| !process.kernel_thread) {
        assert!(pids.contains(&process.pid.into()), "{process:?}");
    }
}

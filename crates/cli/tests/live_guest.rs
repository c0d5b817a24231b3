//! The built program on a guest that runs: what it shows is what the guest
//! says of itself, and a paused guest always runs again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions as OpenOptionsOfFile};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use secmon_guest::linux::task;
use secmon_lab::{Backing, Guest, QmpAccess, Suite, Workload};
use secmon_memory::VirtualAddress;
use secmon_platform::target::{OpenOptions, Target};
use secmon_profile::{Cache, FindOptions, Kernel};
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
    let checked = watched.run(&["check", "--detector", "processes", "-v"]);
    assert_eq!(checked.status.code(), Some(0), "{checked:?}");
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
    what_hides_is_found(&watched, folder.path());
    the_kernel_is_compared_with_its_file(&watched, folder.path());
}

/// A process of an image that is edited as a rootkit edits its kernel.
struct Victim {
    file: File,
    kernel: Kernel,
    task: VirtualAddress,
}

impl Victim {
    fn find(image: &Path, pid: u64) -> Self {
        let target: Target = format!("file:{}", image.display())
            .parse()
            .expect("a target");
        let opened = target.open(&OpenOptions::default()).expect("an image");
        let options = FindOptions {
            cache: Cache::Off,
            ..FindOptions::default()
        };
        let kernel = secmon_profile::find(&opened.memory, &options).expect("a kernel");
        let guest = secmon_guest::Guest::new(kernel.clone());
        let mut tasks = task::leaders(&guest, "processes").expect("the list");
        let task = tasks.find(|task| u64::from(task.tgid) == pid);
        let task = task.expect("the process").address;
        Self {
            file: OpenOptionsOfFile::new()
                .write(true)
                .open(image)
                .expect("the file"),
            kernel,
            task,
        }
    }

    fn member(&self, structure: &str, member: &str) -> u64 {
        let types = self.kernel.profile.types().expect("types");
        types.member(structure, member).expect("the member").offset
    }

    fn read(&self, place: VirtualAddress) -> VirtualAddress {
        self.kernel.space.read_pointer(place).expect("memory")
    }

    fn write(&self, place: VirtualAddress, pointer: u64) {
        let physical = self.kernel.space.translate(place).expect("a page").physical;
        let written = self
            .file
            .write_all_at(&pointer.to_le_bytes(), physical.as_u64());
        written.expect("it is written");
    }

    /// Out of the list of processes, as `list_del_init` does it.
    fn unlink(&self) {
        let node = self.task.wrapping_add(self.member("task_struct", "tasks"));
        let (next, previous) = (self.read(node), self.read(node.wrapping_add(8)));
        self.write(previous, next.as_u64());
        self.write(next.wrapping_add(8), previous.as_u64());
        self.write(node, node.as_u64());
        self.write(node.wrapping_add(8), node.as_u64());
    }

    /// Its id leads to nothing.
    fn unhash(&self) {
        let pid = self.member("task_struct", "thread_pid");
        let pid = self.read(self.task.wrapping_add(pid));
        self.write(pid.wrapping_add(self.member("pid", "tasks")), 0);
    }
}

/// Processes of an image that are taken out of a list are found, with all that
/// the tables know of them, and the exit status tells.
fn what_hides_is_found(watched: &Watched, folder: &Path) {
    let image = folder.join("checked");
    let path = image.to_str().expect("UTF-8");
    watched.rows(&["--pause", "dump", path]);
    let target = format!("file:{path}");
    let check = |more: &[&str]| {
        let arguments = [&["-t", &target, "check", "--detector", "processes"], more].concat();
        watched.run(&arguments)
    };
    let clean = check(&[]);
    let said = String::from_utf8_lossy(&clean.stderr);
    assert_eq!(clean.status.code(), Some(0), "{said}");
    assert!(said.contains("nothing found"), "{said}");

    let user_processes = [
        "-t",
        &target,
        "ps",
        "-w",
        "kernel_thread=false",
        "-w",
        "ppid=1",
    ];
    let processes = watched.rows(&user_processes);
    let [unlinked, unhashed, ..] = processes.as_slice() else {
        panic!("too few processes: {processes:?}");
    };
    let pid = |row: &Value| row["pid"].as_u64().expect("a number");
    Victim::find(&image, pid(unlinked)).unlink();
    Victim::find(&image, pid(unhashed)).unhash();
    let listed = watched.rows(&user_processes);
    assert!(
        listed.iter().all(|row| pid(row) != pid(unlinked)),
        "it is hidden from ps"
    );

    let found = check(&["--format", "json"]);
    assert_eq!(found.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&found.stdout).expect("JSON");
    assert_eq!(found["trust_level"], "L0");
    let findings = found["findings"].as_array().expect("findings");
    assert_eq!(findings.len(), 2, "{findings:?}");
    for (row, missing) in [(unlinked, "task_list"), (unhashed, "pid_table")] {
        let of_row = |finding: &&Value| finding["subject"]["pid"] == row["pid"];
        let finding = findings.iter().find(of_row).expect("it is found");
        assert_eq!(finding["name"], "hidden_process");
        assert_eq!(finding["technique"], "T1014");
        assert_eq!(finding["trust_level"], "L0");
        let evidence = finding["evidence"].as_array().expect("evidence");
        for column in ["pid", "comm", "exe", "cmdline", "uid", "address"] {
            assert_eq!(evidence[0]["row"][column], row[column], "{column}");
        }
        let says = |view: &str, words: &str| {
            let mut of_view = evidence.iter().filter(|said| said["view"] == view);
            of_view.any(|said| {
                said["what"]
                    .as_str()
                    .is_some_and(|what| what.contains(words))
            })
        };
        assert!(says(missing, "is not in"), "{evidence:?}");
        assert!(says("slab", "is in"), "{evidence:?}");
    }
    let detector = &found["detectors"][0];
    assert_eq!(detector["checked"], true);
    assert!(
        detector["milliseconds"]
            .as_f64()
            .is_some_and(|time| time > 0.0)
    );

    let lines = check(&["--format", "ndjson"]);
    let lines = String::from_utf8(lines.stdout).expect("UTF-8");
    let kinds: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["type"].clone())
        .collect();
    assert_eq!(kinds, ["finding", "finding", "detector"]);
    let rows = check(&["--format", "csv"]);
    assert_eq!(rows.status.code(), Some(1));
    let rows = String::from_utf8(rows.stdout).expect("UTF-8");
    assert_eq!(rows.lines().count(), 3, "{rows}");
    assert!(
        rows.lines()
            .skip(1)
            .all(|row| row.starts_with("high,attack,hidden_process,"))
    );
    let shown = check(&["--timings"]);
    let said = String::from_utf8_lossy(&shown.stderr);
    assert!(said.contains("in one look"), "{said}");
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

/// The kernel is compared with its own file, found among others by its build
/// id; a changed byte is shown as instructions, another kernel's file refused.
fn the_kernel_is_compared_with_its_file(watched: &Watched, folder: &Path) {
    let image = folder.join("compared");
    let path = image.to_str().expect("UTF-8");
    watched.rows(&["--pause", "dump", path]);
    let kernels = folder.join("kernels");
    std::fs::create_dir(&kernels).expect("a folder");
    for (suite, name) in [(Suite::Trixie, "vmlinuz-0"), (Suite::Bookworm, "vmlinuz-1")] {
        let kernel = secmon_lab::Kernel::fetch(suite).expect("a kernel");
        std::fs::copy(kernel.image(), kernels.join(name)).expect("it is copied");
    }
    let target = format!("file:{path}");
    let check = |kernel: &Path, format: &str| {
        let kernel = kernel.to_str().expect("UTF-8");
        watched.run(&[
            "-t",
            &target,
            "check",
            "--detector",
            "kernel_image",
            "--kernel",
            kernel,
            "--format",
            format,
        ])
    };
    let clean = check(&kernels, "table");
    let said = String::from_utf8_lossy(&clean.stderr);
    assert_eq!(clean.status.code(), Some(0), "{said}");
    assert!(said.contains("nothing found"), "{said}");
    let other = check(&kernels.join("vmlinuz-0"), "table");
    let said = String::from_utf8_lossy(&other.stderr);
    assert_eq!(other.status.code(), Some(2), "{said}");
    assert!(said.contains("build id"), "{said}");

    let states = folder.join("states");
    let baseline = format!("--baseline={}", states.to_str().expect("UTF-8"));
    let by_state = || {
        let detector = ["check", "--detector", "kernel_image", "--format", "json"];
        watched.run(&[&["-t", &target][..], &detector, &[&baseline]].concat())
    };
    let names = |output: &Output| -> Vec<String> {
        let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let findings = found["findings"].as_array().expect("findings").iter();
        findings.map(|one| one["name"].to_string()).collect()
    };
    let first = by_state();
    let said = String::from_utf8_lossy(&first.stderr);
    assert!(said.contains("for the first time"), "{said}");
    assert_eq!(first.status.code(), Some(0), "{said}");
    assert_eq!(names(&first), ["\"first_state\""]);

    let victim = Victim::find(&image, 1);
    let symbols = victim.kernel.profile.symbols();
    let place = symbols.address("cap_capable").expect("a function");
    let place = place.wrapping_add(12);
    victim.write(place, victim.read(place).as_u64() ^ 4);
    let found = check(&kernels, "json");
    assert_eq!(found.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&found.stdout).expect("JSON");
    let findings = found["findings"].as_array().expect("findings");
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(findings[0]["name"], "changed_code");
    assert_eq!(findings[0]["subject"]["symbol"], "cap_capable+0xc");
    let shown = |evidence: usize| findings[0]["evidence"][evidence]["row"]["instructions"].as_str();
    let (before, after) = (shown(0).expect("text"), shown(1).expect("text"));
    assert!(!before.is_empty() && before != after, "{before} / {after}");

    let later = by_state();
    let said = String::from_utf8_lossy(&later.stderr);
    assert_eq!(later.status.code(), Some(1), "{said}");
    assert!(!said.contains("for the first time"), "{said}");
    assert!(names(&later).contains(&"\"changed_code\"".to_owned()));
    let kept: Vec<_> = std::fs::read_dir(&states).expect("a folder").collect();
    let [Ok(kept)] = kept.as_slice() else {
        panic!("one state, of one boot: {kept:?}");
    };
    // What is damaged is no reason to begin anew.
    let mut bytes = std::fs::read(kept.path()).expect("a file");
    bytes.pop();
    std::fs::write(kept.path(), bytes).expect("written");
    let damaged = by_state();
    let said = String::from_utf8_lossy(&damaged.stderr);
    assert_eq!(damaged.status.code(), Some(2), "{said}");
    assert!(said.contains("damaged"), "{said}");
}

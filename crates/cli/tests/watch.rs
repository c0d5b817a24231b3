//! `secmon watch` on a guest that runs: what hides is told once and stored, the
//! guest's end is noticed and the next one picked up, and the exit status says
//! what was seen.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use secmon_guest::linux::task;
use secmon_lab::{Backing, Guest, QmpAccess, Suite, Workload};
use secmon_platform::target::{OpenOptions, Target};
use secmon_profile::{Cache, FindOptions};
use serde_json::Value;

/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(240);

fn secmon(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secmon"));
    command
        .env_remove("SECMON_TARGET")
        .args(arguments)
        .stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    secmon(arguments).output().expect("secmon runs")
}

fn boot(name: &str) -> Guest {
    Guest::builder(Suite::Bookworm)
        .name(name)
        .backing(Backing::File)
        .qmp(QmpAccess::Socket)
        .workload(Workload::small())
        .boot()
        .expect("the lab boots a guest")
}

/// Takes the process with this name out of the list of processes, and gives its
/// id.
fn hide(guest: &Guest, comm: &str) -> u32 {
    let target: Target = format!("qemu:{}", guest.pid()).parse().expect("a target");
    let opened = target.open(&OpenOptions::default()).expect("it is open");
    let options = FindOptions {
        cache: Cache::Off,
        ..FindOptions::default()
    };
    let kernel = secmon_profile::find(&opened.memory, &options).expect("a kernel");
    let types = kernel.profile.types().expect("types");
    let offset = types.member("task_struct", "tasks").expect("tasks").offset;
    let watched = secmon_guest::Guest::new(kernel.clone());
    let mut tasks = task::leaders(&watched, "processes").expect("the list");
    let victim = tasks
        .find(|task| task.comm() == comm.as_bytes())
        .expect("the process");
    let node = victim.address.wrapping_add(offset);
    let ram = fs::OpenOptions::new()
        .write(true)
        .open(guest.ram_file().expect("a RAM file"))
        .expect("it is open");
    let space = &kernel.space;
    let write = |place, pointer: u64| {
        let physical = space.translate(place).expect("a page").physical;
        ram.write_all_at(&pointer.to_le_bytes(), physical.as_u64())
            .expect("it is written");
    };
    guest
        .while_stopped(|_| {
            let next = space.read_pointer(node).expect("next");
            let previous = space.read_pointer(node.wrapping_add(8)).expect("previous");
            write(previous, next.as_u64());
            write(next.wrapping_add(8), previous.as_u64());
            write(node, node.as_u64());
            write(node.wrapping_add(8), node.as_u64());
            Ok(())
        })
        .expect("the guest stands still and runs again");
    victim.tgid
}

/// A watch and its events.
struct Watch {
    child: Child,
    events: PathBuf,
}

impl Watch {
    /// Waits for an event that fits.
    #[track_caller]
    fn wait_for(&mut self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let events = self.events();
            if let Some(event) = events.iter().find(|event| fits(event)) {
                return event.clone();
            }
            assert!(Instant::now() < deadline, "no {what}: {events:#?}");
            let ended = self.child.try_wait().expect("its status");
            assert!(ended.is_none(), "it ended: {ended:?}, {events:#?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.events).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_target(change: &'static str) -> impl Fn(&Value) -> bool {
    move |event| event["event"] == "target" && event["change"] == change
}

#[test]
fn a_guest_is_watched_through_its_life() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (policy, store, events) = (path("policy.toml"), path("store.db"), path("events"));
    // One detector looks, as often as it can; another has nothing to look at.
    let others: String = secmon_detect::detectors()
        .iter()
        .map(|detector| detector.name())
        .filter(|name| *name != "processes")
        .map(|name| format!("[detector.{name}]\nenabled = false\n"))
        .collect();
    let text = format!(
        "version = 1\nbudget = \"100%\"\n{others}\
         [[response]]\nactions = [\"alert\", \"pause\"]\n"
    );
    fs::write(&policy, text).expect("written");
    let name = format!("watched-{}", std::process::id());
    let target = format!("qemu:{name}");
    let guest = boot(&name);
    let child = secmon(&["-t", &target, "watch", "--policy", &policy])
        .args(["--store", &store, "--ndjson", &events])
        .stdout(Stdio::null())
        .spawn()
        .expect("secmon runs");
    let mut watch = Watch {
        child,
        events: folder.path().join("events"),
    };
    watch.wait_for("kernel", is_target("started"));

    let processes = guest.truth().processes().expect("the truth");
    let victim = processes
        .iter()
        .find(|process| !process.kernel_thread && process.pid > 1)
        .and_then(|process| process.comm.as_str())
        .expect("a process");
    let pid = hide(&guest, victim);
    let appeared = watch.wait_for("finding", |event| {
        event["event"] == "appeared" && event["finding"]["name"] == "hidden_process"
    });
    assert_eq!(appeared["finding"]["subject"]["pid"], pid);
    assert_eq!(appeared["trust_level"], "L0");
    watch.wait_for("alert", |event| {
        event["event"] == "action_done" && event["action"] == "alert"
    });
    let refused = watch.wait_for("refusal", |event| event["event"] == "action_refused");
    assert!(
        refused["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("gate"))
    );
    // What was shown is stored, and can be read meanwhile.
    let open = stored(&store);
    assert_eq!(open, [("hidden_process".to_owned(), "open".to_owned())]);

    drop(guest);
    watch.wait_for("end", is_target("gone"));
    let guest = boot(&name);
    let started = |events: &[Value]| {
        events
            .iter()
            .filter(|event| is_target("started")(event))
            .count()
    };
    let deadline = Instant::now() + PATIENCE;
    while started(&watch.events()) < 2 {
        assert!(Instant::now() < deadline, "{:#?}", watch.events());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(stored(&store)[0].1, "gone");

    let process = Pid::from_child(&watch.child);
    kill_process(process, Signal::TERM).expect("it runs");
    let status = watch.child.wait().expect("its status");
    assert_eq!(status.code(), Some(1), "an alarm was seen");
    let events = watch.events();
    let last = events.last().expect("events");
    assert_eq!(last["event"], "stopped", "{last}");
    let told = events.iter().filter(|event| event["event"] == "appeared");
    assert_eq!(told.count(), 1, "only changes are told: {events:#?}");
    let kept = run(&[
        "findings", "--store", &store, "--events", "--format", "json",
    ]);
    let kept: Vec<Value> = serde_json::from_slice(&kept.stdout).expect("JSON");
    assert_eq!(kept.len(), events.len());
    drop(guest);
}

/// Names and states of what is stored.
fn stored(store: &str) -> Vec<(String, String)> {
    let output = run(&["findings", "--store", store, "--format", "json"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    findings
        .iter()
        .map(|found| (text(&found["finding"]["name"]), text(&found["state"])))
        .collect()
}

#[test]
fn what_is_wrong_is_said_before_anything_is_done() {
    let folder = tempfile::tempdir().expect("a folder");
    let said = |arguments: &[&str]| {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let write = |name: &str, text: &str| -> PathBuf {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("written");
        path
    };
    let text = |path: &Path| path.display().to_string();
    let wrong = text(&write("wrong.toml", "version = 1\nbudgt = \"5%\"\n"));
    let error = said(&["watch", "--check-policy", &wrong]);
    assert!(
        error.contains("wrong.toml:2:1: ") && error.contains("`budget`"),
        "{error}"
    );
    let error = said(&["-t", "qemu:none", "watch", "--policy", &wrong]);
    assert!(error.contains("wrong.toml:2:1: "), "{error}");
    let right = text(&write("right.toml", "version = 1\n"));
    let output = run(&["watch", "--check-policy", &right]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let image = text(&write("image", &"\0".repeat(1 << 20)));
    let target = format!("file:{image}");
    let error = said(&["-t", &target, "watch"]);
    assert!(error.contains("secmon check"), "{error}");
    let error = said(&["findings", "--store", &wrong]);
    assert!(error.contains("wrong.toml"), "{error}");
}

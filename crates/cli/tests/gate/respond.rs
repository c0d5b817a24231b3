//! `secmon respond` over a gate and real guests: each action does what it says
//! to the guest, and nothing without its right.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use secmon_lab::{Guest, QmpAccess, Suite, Workload};
use serde_json::Value;

use crate::{Ended, PATIENCE, own_user, secmon, text};

/// A guest, its gate, and who may do what there.
struct Watched {
    guest: Guest,
    folder: tempfile::TempDir,
    gate_key: String,
    _gate: Ended,
}

/// The rights of the keys that the tests use; each key's file has its name.
const KEYS: [(&str, &str); 3] = [
    ("all", r#""trace", "respond", "control""#),
    ("responder", r#""pause", "trace", "respond""#),
    ("observer", ""),
];

impl Watched {
    fn boot(suite: Suite, vcpus: u32, workload: Workload) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path();
        let stub = format!("unix:{}/gdb,server=on,wait=off", path.display());
        let guest = Guest::builder(suite)
            .vcpus(vcpus)
            .memory_mib(256)
            .qmp(QmpAccess::Socket)
            .workload(workload)
            .qemu_argument("-gdb")
            .qemu_argument(stub)
            .boot()
            .expect("the lab boots a guest");
        let made = secmon(path, &["gate", "new-key", "gate.key"]);
        assert!(made.status.success(), "{}", text(&made.stderr));
        let gate_key = text(&made.stdout).trim().to_owned();
        let mut grants = "version = 1\ntarget = \"web1\"\n".to_owned();
        for (name, rights) in KEYS {
            let made = secmon(path, &["gate", "new-key", name]);
            assert!(made.status.success(), "{}", text(&made.stderr));
            grants.push_str(&format!(
                "[[monitor]]\nname = \"{name}\"\nkey = \"{}\"\nrights = [{rights}]\n",
                text(&made.stdout).trim()
            ));
        }
        std::fs::write(path.join("grants.toml"), grants).expect("written");
        for made in ["log", "dumps"] {
            std::fs::create_dir(path.join(made)).expect("a folder");
        }
        let gate = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_secmon")])
            .args(["-t", &format!("qemu:{}", guest.pid()), "gate"])
            .args(["--grants", "grants.toml", "--key", "gate.key"])
            .args(["--socket", "gate.sock", "--log", "log/web1.log"])
            .args(["--dumps", "dumps", "--user", &own_user()])
            .current_dir(path)
            .stdin(Stdio::null())
            .spawn()
            .expect("setpriv (package util-linux)");
        let watched = Self {
            guest,
            gate_key,
            _gate: Ended(gate),
            folder,
        };
        watched.wait_until("the gate has found its target", || {
            watched.log().contains("QEMU is connected")
        });
        watched
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log/web1.log")).unwrap_or_default()
    }

    #[track_caller]
    fn wait_until(&self, what: &str, mut reached: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !reached() {
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn secmon(&self, arguments: &[&str]) -> Output {
        let target = format!("qemu:{}", self.guest.pid());
        let cache = self.path().join("cache").display().to_string();
        let common = ["-t", &target, "--cache-dir", &cache];
        secmon(self.path(), &[&common, arguments].concat())
    }

    fn respond(&self, key: &str, action: &[&str]) -> Output {
        let gate = ["respond", "--gate", "gate.sock", "--gate-key"];
        let keys = [self.gate_key.as_str(), "--key", key];
        self.secmon(&[&gate, &keys[..], action].concat())
    }

    #[track_caller]
    fn done(&self, action: &[&str]) -> String {
        let output = self.respond("all", action);
        assert!(
            output.status.success(),
            "{action:?}: {}\n{}",
            text(&output.stderr),
            self.log()
        );
        text(&output.stdout)
    }

    #[track_caller]
    fn refused(&self, key: &str, action: &[&str]) -> String {
        let output = self.respond(key, action);
        assert_eq!(output.status.code(), Some(2), "{action:?}");
        text(&output.stderr)
    }

    /// The guest's own processes that run: id and name.
    fn processes(&self) -> BTreeMap<i32, String> {
        let processes = self.guest.truth().processes().expect("the truth");
        processes
            .into_iter()
            .filter(|process| !process.kernel_thread && process.state != 'Z')
            .map(|process| {
                let name = process.comm.as_str().unwrap_or_default().to_owned();
                (process.pid, name)
            })
            .collect()
    }

    fn is_running(&self) -> bool {
        self.guest.control().status().expect("QMP answers") == "running"
    }

    /// Ends each of these by name, and sees that all others go on.
    fn kill_each(&self, names: &[&str]) {
        let mut before = self.processes();
        for name in names {
            let pid = before.iter().find(|(_, found)| found == name);
            let pid = *pid.unwrap_or_else(|| panic!("no {name} in {before:?}")).0;
            let said = self.done(&["kill", &pid.to_string()]);
            assert!(said.contains("was ended"), "{name}: {said}");
            before.remove(&pid);
            let after = self.processes();
            for neighbour in &before {
                assert!(
                    after.contains_key(neighbour.0),
                    "{neighbour:?} ended with {name}"
                );
            }
            assert!(!after.contains_key(&pid), "{name} runs");
        }
    }

    fn log_is_sound(&self) {
        let verified = self.secmon(&["gate", "verify-log", "log/web1.log"]);
        assert!(verified.status.success(), "{}", text(&verified.stderr));
    }
}

#[test]
fn each_action_does_what_it_says_and_nothing_without_its_right() {
    let watched = Watched::boot(Suite::Bookworm, 2, Workload::rich());
    let before = watched.processes();
    let plain = before.iter().find(|(_, name)| *name == "plain-3");
    let plain = plain.expect("a plain process").0.to_string();

    // Nobody without a right does anything.
    for (key, action, right) in [
        ("observer", &["pause"][..], "Respond"),
        ("observer", &["resume"], "Respond"),
        ("observer", &["disconnect"], "Respond"),
        ("observer", &["dump", "x.elf"], "Respond"),
        ("observer", &["kill", &plain], "Control"),
        ("responder", &["kill", &plain], "Control"),
    ] {
        let said = watched.refused(key, action);
        assert!(said.contains(right), "{key} {action:?}: {said}");
    }
    assert!(watched.is_running());
    assert!(
        watched
            .processes()
            .contains_key(&plain.parse().expect("a number"))
    );
    assert_eq!(watched.log().matches("\"outcome\":\"denied\"").count(), 6);
    let none = watched.respond("nobody", &["pause"]);
    assert_eq!(none.status.code(), Some(2));

    // The guest's clock stands until somebody lets it go on: whoever stopped it
    // has ended long before.
    watched.done(&["pause"]);
    assert!(!watched.is_running());
    let uptime = || {
        let read = watched.secmon(&["read", "jiffies_64", "-l", "8", "--raw"]);
        assert!(read.status.success(), "{}", text(&read.stderr));
        read.stdout
    };
    let stood = uptime();
    assert_eq!(uptime(), stood);
    watched.done(&["resume"]);
    watched.wait_until("the guest's clock goes on", || uptime() != stood);

    // The carrier, as the guest sees it.
    let carrier = || {
        let interfaces = watched.guest.truth().interfaces().expect("the truth");
        let mut outer = interfaces.iter().filter(|interface| {
            let name = interface.name.as_str().unwrap_or_default();
            name.starts_with("eth") || name.starts_with("en")
        });
        // IFF_LOWER_UP
        outer.next().expect("an interface").flags & 0x1_0000 != 0
    };
    assert!(carrier());
    let said = watched.done(&["disconnect"]);
    assert!(said.contains("virtio-net-pci"), "{said}");
    watched.wait_until("the carrier is lost", || !carrier());
    watched.done(&["connect"]);
    watched.wait_until("the carrier is there", carrier);

    // A dump that shows the same processes.
    watched.done(&["dump", "evidence.elf"]);
    let again = watched.refused("all", &["dump", "evidence.elf"]);
    assert!(again.contains("evidence.elf"), "{again}");
    let shown = secmon(
        watched.path(),
        &[
            "-t",
            "file:dumps/evidence.elf",
            "--no-cache",
            "ps",
            "-c",
            "pid",
            "-w",
            "kernel_thread=false",
            "--format",
            "json",
        ],
    );
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    let shown: Vec<Value> = serde_json::from_slice(&shown.stdout).expect("JSON");
    let shown: Vec<i64> = shown.iter().filter_map(|row| row["pid"].as_i64()).collect();
    for pid in before.keys() {
        assert!(shown.contains(&i64::from(*pid)), "{pid} is not in the dump");
    }

    // Whatever it does: sleeps, is stopped, waits for its child.
    watched.kill_each(&["plain-3", "stopped", "vfork-parent", "busy-processes"]);
    for (pid, why) in [("1", "panic"), ("2", "kernel"), ("99999", "no process")] {
        let said = watched.refused("all", &["kill", pid]);
        assert!(said.contains(why), "{pid}: {said}");
    }
    assert!(watched.is_running());
    watched.log_is_sound();
    for logged in ["\"stop\"", "\"start\"", "\"link\"", "\"dump\"", "\"alter\""] {
        assert!(watched.log().contains(logged), "{logged}");
    }
}

#[test]
fn the_kernels_of_all_suites_end_a_process_that_they_are_made_to() {
    for (suite, vcpus) in [(Suite::Bullseye, 1), (Suite::Trixie, 4), (Suite::Sid, 2)] {
        let watched = Watched::boot(suite, vcpus, Workload::small());
        watched.kill_each(&["plain-4", "plain-0"]);
        assert!(watched.is_running());
        watched.log_is_sound();
    }
}

//! The launcher, with real QEMUs: what a monitor's QEMU may do, what happens
//! when something dies, and that the target goes on in every case.
//!
//! The monitoring VMs here run nothing that answers; what a monitor says is
//! tested with its appliance.

mod host;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Instant;

use host::{
    Host, PATIENCE, ask, assert_runs, field, is_alive, kill, refused, run_state, rustix_is_root,
    succeeded,
};
use secmon_gate::protocol::{Answer, Refusal, Request, Right, TargetState};
use secmon_lab::{Backing, Emulator, Guest, QmpAccess, Suite};
use secmon_platform::qemu::QmpClient;
use serde_json::Value;

/// The inode of the target's RAM: a monitoring VM's own has the same name, if
/// both are memfds.
fn inode(guest: &Guest, ram: &str) -> u64 {
    let files = fs::read_dir(format!("/proc/{}/fd", guest.pid())).expect("its files");
    let file = files
        .flatten()
        .map(|entry| entry.path())
        .find(|path| fs::read_link(path).is_ok_and(|file| file == Path::new(ram)));
    let file = fs::metadata(file.expect("the target has its RAM open"));
    file.expect("its inode").ino()
}

/// Nothing but reading: the target's file is open for reading and mapped so,
/// and QEMU has neither root nor the way back to it.
fn assert_confined(pid: u64, ram: &str, guest: &Guest) {
    let inode = inode(guest, ram);
    let mut open = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("its files")
        .flatten()
    {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let of_target = fs::metadata(entry.path()).is_ok_and(|file| file.ino() == inode);
        if target != Path::new(ram) || !of_target {
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
    let mapped: Vec<&str> = maps
        .lines()
        .filter(|line| {
            line.ends_with(ram) && line.split_whitespace().nth(4) == Some(&inode.to_string())
        })
        .collect();
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

fn boot(name: &str, mib: u32) -> Guest {
    Guest::builder(Suite::Bookworm)
        .name(name)
        .memory_mib(mib)
        .boot()
        .expect("a guest")
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
    assert_confined(machine, &ram, &guest);
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
        host.wait("its gate", |host| host.gate().is_some());
        let gate = host.gate();
        kill(machine);
        host.wait("another VM", |host| {
            host.pid("machine")
                .is_some_and(|pid| pid != machine && is_alive(pid))
                && host.restarts() > restarts
                && host.target() == "watched"
        });
        assert_eq!(host.gate(), gate, "the gate needs no monitor");
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
        assert_eq!(host.pid("machine"), machine, "the VM goes on");
        assert_confined(machine.expect("a VM"), &ram, &guest);
        assert_runs(&guest);
    }

    taken_over_before_it_runs(&host, target);
    assert_runs(&guest);

    // The target ends and another one of its name starts.
    host.wait("its gate", |host| host.gate().is_some());
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

/// What the monitor's QEMU says that its VM does, while nobody else asks.
fn machine_state(host: &Host) -> Option<String> {
    let socket = host.folder.path().join("secmon/m/qmp.sock");
    let mut client = QmpClient::connect(&socket, PATIENCE).ok()?;
    client.status().ok().map(|state| state.status)
}

/// The supervisor dies while it starts the VM, which stands still then: the
/// next one brings a VM to run.
fn taken_over_before_it_runs(host: &Host, target: &str) {
    const ATTEMPTS: u32 = 20;
    for attempt in 1.. {
        assert!(attempt <= ATTEMPTS, "the supervisor was never quick enough");
        let machine = host.pid("machine").expect("a VM");
        let supervisor = host.pid("supervisor").expect("a supervisor");
        kill(machine);
        // The least that can be waited for: its number is written down.
        let deadline = Instant::now() + PATIENCE;
        while host.pid("machine").is_none_or(|pid| pid == machine) {
            assert!(Instant::now() < deadline, "no other VM");
        }
        kill(supervisor);
        let state = machine_state(host);
        let there = host.pid("machine");
        let begun = boots(host);
        let said = succeeded(&host.up(target, &[]));
        host.wait("the target again", |host| {
            host.is_fresh() && host.target() == "watched"
        });
        if state.as_deref() == Some("prelaunch") {
            assert!(said.contains("another VM was started"), "{said}");
            assert_ne!(host.pid("machine"), there);
            host.wait("a VM that runs", |host| boots(host) > begun);
            return;
        }
    }
}

/// How often a monitoring VM's guest has come to its process 1.
fn boots(host: &Host) -> usize {
    let log = host.folder.path().join("secmon/m/console.log");
    let text = fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&text).matches("ready").count()
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
    let qemu = host.qemu(Emulator::Backports);
    let grants = host.folder.path().join("grants.toml");
    let text = "version = 1\ntarget = \"launcher-memfd\"\n[[monitor]]\nname = \"m\"\nrights = [\"pause\"]\n";
    fs::write(&grants, text.replace("launcher-memfd", "other")).expect("written");
    let grants = grants.display().to_string();
    let mut with_grants = vec!["--grants", &grants];
    with_grants.extend(qemu.iter().map(String::as_str));
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
    assert_confined(host.pid("machine").expect("a VM"), file, &guest);
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
    let holder = QmpClient::connect(&socket, PATIENCE).expect("greeted");
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

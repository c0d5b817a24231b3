//! A monitor of several targets, as a user has it: the appliance, started by
//! `secmon monitor up`. One target comes late and is plugged in; several clients
//! ask at once; a target that shortens its RAM file takes nobody with it.

mod host;

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use host::{Attached, Host, PATIENCE, assert_runs, refused, succeeded};
use secmon_lab::{Backing, Guest, Suite, appliance_image};
use secmon_monitor::protocol::CHANNELS;
use serde_json::Value;

fn boot(name: &str, backing: Backing) -> Guest {
    Guest::builder(Suite::Bookworm)
        .name(name)
        .memory_mib(256)
        .backing(backing)
        .boot()
        .expect("a guest")
}

/// Waits until the monitor says that the target in this slot runs.
fn wait_until_seen(host: &Host, slot: usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = succeeded(&host.secmon(&["monitor", "status", "m", "--format", "json"]));
        let status: Value = serde_json::from_str(&said).expect("JSON");
        let state = status[slot]["state"].as_str().unwrap_or_default();
        if state.starts_with("running") {
            return;
        }
        assert!(Instant::now() < deadline, "slot {slot}: {status}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A listing through the monitor has process 1.
fn assert_lists(host: &Host, target: &str) {
    let words = ["-t", target, "ps", "--format", "json"];
    let rows = succeeded(&host.secmon(&words));
    let rows: Value = serde_json::from_str(&rows).expect("JSON");
    let first = rows.as_array().and_then(|rows| rows.first());
    assert_eq!(
        first.map(|row| &row["pid"]),
        Some(&Value::from(1)),
        "{rows}"
    );
}

#[test]
fn targets_come_and_go_and_clients_ask_at_once() {
    let image = appliance_image(Suite::Bookworm).expect("an image");
    let first = boot("several-1", Backing::File);
    let host = Host::with_image(&image.folder);
    let more = ["--target", "qemu:several-2", "--wait"];
    succeeded(&host.up("qemu:several-1", &more));
    wait_until_seen(&host, 0);
    assert_eq!(host.target_at(1), "absent");
    let machine = host.pid("machine");
    several_clients(&host);

    // The second one starts: plugged into the VM that runs, and seen.
    let second = boot("several-2", Backing::Memfd);
    host.wait("the second target", |host| host.target_at(1) == "watched");
    wait_until_seen(&host, 1);
    assert_lists(&host, "monitor:m/several-2");
    assert_lists(&host, "monitor:m/several-1");
    assert_eq!(host.pid("machine"), machine, "the VM goes on");
    // To the first one nothing has happened.
    let mut attached = Attached::new(&host);
    let said = attached.wait_for("several-2: Linux version");
    assert!(!said.contains("several-1: Linux version"), "{said}");
    attached.say("tables");
    attached.wait_for("processes");

    // It goes: whoever talks hears that the monitor looks at its targets anew.
    drop(second);
    host.wait("the second's end", |host| host.target_at(1) == "absent");
    // Waiting for the process would close its input, which ends it, too.
    host.wait("the console's end", |_| {
        let status = attached.child.try_wait().expect("a process");
        status.is_some_and(|status| status.code() == Some(2))
    });
    wait_until_seen(&host, 0);
    assert_lists(&host, "monitor:m/several-1");
    assert_eq!(host.pid("machine"), machine, "the VM goes on");

    a_shortened_file(&host, first);
}

/// As many as there are channels talk at once; one more waits for its turn.
fn several_clients(host: &Host) {
    // The first is told what nobody has taken yet.
    let first = Attached::new(host);
    first.wait_for("several-1: Linux version");
    let others = (2..CHANNELS).map(|_| Attached::new(host));
    let mut attached: Vec<Attached> = others.chain([first]).collect();
    for console in &mut attached {
        console.say("ps --limit 1");
        console.wait_for("/init");
    }
    assert_lists(host, "monitor:m/several-1");
    // Each is read at once: one whose output nobody takes keeps its channel.
    std::thread::scope(|scope| {
        let listings = [(); 3].map(|()| {
            scope.spawn(|| host.secmon(&["-t", "monitor:m/several-1", "ps", "-f", "json"]))
        });
        for listing in listings {
            let output = listing.join().expect("no panic");
            assert!(succeeded(&output).contains("/init"));
        }
    });
    // With one more console there is no channel left.
    let mut last = Attached::new(host);
    last.say("ps --limit 1");
    last.wait_for("/init");
    let mut waiting = host
        .command(&["-t", "monitor:m/several-1", "ps"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("secmon");
    let mut errors = BufReader::new(waiting.stderr.take().expect("an output"));
    let mut said = String::new();
    errors.read_line(&mut said).expect("a line");
    assert!(said.contains("waiting up to"), "{said}");
    drop(last);
    let output = waiting.wait_with_output().expect("it ends");
    assert!(succeeded(&output).contains("/init"));
}

/// The target's file is shortened while the VM reads it.
fn a_shortened_file(host: &Host, first: Guest) {
    let other = boot("several-2", Backing::Memfd);
    host.wait("another second target", |host| {
        host.target_at(1) == "watched"
    });
    wait_until_seen(host, 1);
    let machine = host.pid("machine");
    // Its own QEMU touches nothing of it meanwhile, as a hostile one would not.
    first.control().stop().expect("stopped");
    let ram = first.ram_file().expect("a file");
    let file = File::options().write(true).open(ram).expect("the file");
    file.set_len(1 << 20).expect("shortened");
    host.wait("another VM", |host| {
        host.pid("machine") != machine && host.target_at(1) == "watched"
    });
    // The other target is seen by the VM that was started anew, and stays.
    wait_until_seen(host, 1);
    let machine = host.pid("machine");
    assert_lists(host, "monitor:m/several-2");
    assert_eq!(host.target_at(0), "refused");
    let said = succeeded(&host.secmon(&["monitor", "status", "m"]));
    assert!(said.contains("was shortened"), "{said}");
    // By emulation QEMU dies of it; with KVM it would stop the VM.
    assert!(
        said.contains("SIGBUS") || said.contains("internal-error"),
        "{said}"
    );
    // Made as long again it is not trusted.
    file.set_len(256 << 20).expect("lengthened");
    let looked = host.json("state.json")["updated"].as_u64();
    host.wait("another look", |host| {
        host.json("state.json")["updated"].as_u64() > looked.map(|at| at + 5)
    });
    assert_eq!(host.target_at(0), "refused");
    assert_eq!(host.pid("machine"), machine);
    let error = refused(&host.secmon(&["-t", "monitor:m/several-1", "ps"]));
    assert!(error.contains("several-1"), "{error}");
    drop(first);
    // Its QEMU is another one now.
    let _first = boot("several-1", Backing::File);
    host.wait("the first again", |host| host.target_at(0) == "watched");
    wait_until_seen(host, 0);
    assert_lists(host, "monitor:m/several-1");
    assert_runs(&other);
}

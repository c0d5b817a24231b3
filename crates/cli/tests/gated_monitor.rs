//! A monitor that uses its gate, as a user has it: the appliance beside a real
//! guest, started by `secmon monitor up`, with QEMU 7.2 and 10.0.

mod host;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use host::{Attached, Host, PATIENCE, assert_runs, refused, succeeded};
use secmon_lab::{Backing, Emulator, Guest, Suite, appliance_image};
use serde_json::{Value, json};

fn status(host: &Host) -> Value {
    let said = succeeded(&host.secmon(&["monitor", "status", "m", "--format", "json"]));
    let status: Value = serde_json::from_str(&said).expect("JSON");
    status[0].clone()
}

/// Waits until the monitor says of its target, by its gate's word, what is
/// wanted.
fn wait_for(host: &Host, wanted: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = status(host);
        let said = status["run_state"].as_str().unwrap_or_default();
        if said.contains(wanted) {
            return status;
        }
        assert!(Instant::now() < deadline, "not {wanted:?}: {status}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A guest and its monitor; then what `--pause` needs and does.
fn pause_through_the_gate(emulator: Emulator, name: &str) {
    let image = appliance_image(Suite::Bookworm).expect("an image");
    let guest = Guest::builder(Suite::Bookworm)
        .name(name)
        .backing(Backing::File)
        .emulator(emulator)
        .boot()
        .expect("a guest");
    // The image's folder may be its maker's alone.
    let host = Host::with_image(&image.folder);
    let qemu = host.qemu(emulator);
    let target = format!("qemu:{name}");
    let paused = ["-t", "monitor:m", "--pause", "ps", "--format", "json"];

    // Nothing is granted but to observe.
    if emulator == Emulator::Installed {
        let said = succeeded(&host.up(&target, &[]));
        assert!(said.contains("observe alone"), "{said}");
        wait_for(&host, "running; granted: observe");
        let error = refused(&host.secmon(&paused));
        assert!(
            error.contains("no right \"pause\"") && error.contains("gate-0/grants.toml"),
            "{error}"
        );
        // What its operator does to it is seen.
        guest.control().stop().expect("stopped");
        wait_for(&host, "standing still (paused)");
        guest.control().resume().expect("running");
        wait_for(&host, "running; granted");
        succeeded(&host.secmon(&["monitor", "down", "m"]));
    }

    let grants = host.folder.path().join("grants.toml");
    let text = format!(
        "version = 1\ntarget = \"{name}\"\n[[monitor]]\nname = \"m\"\nrights = [\"pause\"]\n"
    );
    fs::write(&grants, text).expect("written");
    let grants = grants.display().to_string();
    let mut options = vec!["--grants", &grants];
    options.extend(qemu.iter().map(String::as_str));
    let said = succeeded(&host.up(&target, &options));
    assert!(said.contains("observe, pause; not trace"), "{said}");
    wait_for(&host, "running; granted: observe, pause");
    // Leases of half a second may end before a slow machine extends them; that
    // is told, and asking again is what a user does.
    let deadline = Instant::now() + PATIENCE;
    let rows = loop {
        let output = host.secmon(&paused);
        if output.status.success() {
            break succeeded(&output);
        }
        let error = refused(&output);
        assert!(
            error.contains("went on while it was read") && Instant::now() < deadline,
            "{error}"
        );
    };
    let rows: Value = serde_json::from_str(&rows).expect("JSON");
    let init = rows.as_array().and_then(|rows| rows.first());
    assert_eq!(init.map(|row| &row["pid"]), Some(&Value::from(1)), "{rows}");
    assert_runs(&guest);
    if emulator == Emulator::Installed {
        // Nobody has touched it, and its guard says so.
        let rounds = ["--rounds", "3", "--deadline", "60000", "--format", "json"];
        let mut guard = vec!["guard", "--monitor", "m"];
        guard.extend(rounds);
        let said = succeeded(&host.secmon(&guard));
        assert!(said.contains("\"findings\":0"), "{said}");
        // Migrated away, which fails at the other end.
        let to = json!({"uri": "exec:cat > /dev/null"});
        let asked = guest.control().execute("migrate", &to);
        asked.expect("QEMU migrates it");
        wait_for(&host, "standing still (postmigrate)");
        guest.control().resume().expect("running");
        let said = Attached::new(&host).wait_for("was migrated away");
        assert!(said.contains(name), "{said}");
    }
    let status = wait_for(&host, "running; granted");

    // What was done and what was refused is in the log, up to the record that
    // the monitor knows.
    let log = status["gate_log"].as_str().expect("a log").to_owned();
    let head = status["gate_head"].as_str().expect("a head");
    let verified = host.secmon(&["gate", "verify-log", &log, "--head", head]);
    assert!(succeeded(&verified).contains("as it was written"));
    let log = fs::read_to_string(Path::new(&log)).expect("a log");
    for (part, times) in [
        ("\"request\":{\"pause\"", 1),
        ("\"request\":\"resume\"", 1),
        (
            "\"outcome\":\"denied\"",
            usize::from(emulator == Emulator::Installed),
        ),
    ] {
        assert!(log.matches(part).count() >= times, "{part} in\n{log}");
    }
    succeeded(&host.secmon(&["monitor", "down", "m"]));
    assert_runs(&guest);
}

#[test]
fn a_monitor_pauses_what_it_was_granted_to_pause() {
    pause_through_the_gate(Emulator::Installed, "gated");
}

#[test]
fn a_monitor_pauses_with_qemu_10() {
    pause_through_the_gate(Emulator::Backports, "gated-10");
}

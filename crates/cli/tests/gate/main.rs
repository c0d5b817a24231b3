//! `secmon gate` as a user runs it, over a real QEMU.

mod respond;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_channel::{Descriptor, KeyPair, PublicKey, Stream};
use secmon_gate::client::{ClientError, GateClient};
use secmon_gate::protocol::{Answer, Refusal, Request, Right, TargetState};

const PATIENCE: Duration = Duration::from_secs(60);

/// A process that does not outlive the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn secmon(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_secmon"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn own_user() -> String {
    let id = Command::new("id").arg("-un").output().expect("id runs");
    text(&id.stdout).trim().to_owned()
}

#[test]
fn a_gate_is_made_run_asked_and_its_log_verified() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    let name = format!("secmon-gate-test-{}", std::process::id());
    // A QEMU must not outlive a test that was killed.
    let _qemu = Ended(
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-name", &name])
            .args(["-display", "none", "-nodefaults", "-m", "32"])
            .args(["-qmp", "unix:qmp,server=on,wait=off"])
            .args(["-gdb", "unix:gdb,server=on,wait=off"])
            .current_dir(folder)
            .stdin(Stdio::null())
            .spawn()
            .expect(
                "setpriv (package util-linux) and qemu-system-x86_64 (package qemu-system-x86)",
            ),
    );
    let deadline = Instant::now() + PATIENCE;
    while !folder.join("qmp").exists() || !folder.join("gdb").exists() {
        assert!(Instant::now() < deadline, "QEMU did not start");
        std::thread::sleep(Duration::from_millis(20));
    }

    let made = secmon(folder, &["gate", "new-key", "key"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let gate: PublicKey = text(&made.stdout).trim().parse().expect("a key");
    let again = secmon(folder, &["gate", "new-key", "key"]);
    assert_eq!(again.status.code(), Some(2), "a key is not written over");

    let own = KeyPair::generate().expect("a key");
    let grants = format!(
        "version = 1\ntarget = \"web1\"\n[[monitor]]\nname = \"watcher\"\nkey = \"{}\"\nrights = [\"pause\"]\n",
        own.public()
    );
    std::fs::write(folder.join("grants.toml"), &grants).expect("written");
    let checked = secmon(folder, &["gate", "check-grants", "grants.toml"]);
    assert!(text(&checked.stdout).contains("monitor watcher  observe pause"));
    std::fs::write(
        folder.join("wrong.toml"),
        grants.replace("\"pause\"", "\"own\""),
    )
    .expect("written");
    let checked = secmon(folder, &["gate", "check-grants", "wrong.toml"]);
    assert_eq!(checked.status.code(), Some(2));
    assert!(
        text(&checked.stderr).contains("line 6"),
        "{}",
        text(&checked.stderr)
    );

    std::fs::create_dir(folder.join("log")).expect("a folder");
    let target = format!("qemu:{name}");
    let supervisor = Ended(
        Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                env!("CARGO_BIN_EXE_secmon"),
                "-t",
                &target,
                "gate",
            ])
            .args([
                "--grants",
                "grants.toml",
                "--key",
                "key",
                "--socket",
                "gate.sock",
            ])
            .args(["--log", "log/web1.log", "--user", &own_user()])
            .current_dir(folder)
            .stdin(Stdio::null())
            .spawn()
            .expect("it runs"),
    );
    let deadline = Instant::now() + PATIENCE;
    let mut client = loop {
        let stream = UnixStream::connect(folder.join("gate.sock")).and_then(Descriptor::new);
        if let Ok(stream) = stream {
            let stream: Arc<dyn Stream> = Arc::new(stream);
            break GateClient::connect(&stream, &own, &gate, PATIENCE).expect("a session");
        }
        assert!(Instant::now() < deadline, "the gate did not start");
        std::thread::sleep(Duration::from_millis(20));
    };
    let status = loop {
        match client.ask(Request::Status, PATIENCE) {
            Ok(Answer::Status(status)) if status.state != TargetState::Gone => break status,
            Ok(_) => assert!(Instant::now() < deadline, "the target is not found"),
            Err(error) => panic!("{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.target, "web1");
    assert_eq!(status.rights, [Right::Observe, Right::Pause]);
    assert!(status.gdb, "the stub is found on QEMU's command line");
    let denied = client.ask(Request::Quit, PATIENCE);
    assert!(matches!(
        denied,
        Err(ClientError::Refused(Refusal::Denied(Right::Respond)))
    ));
    drop(client);
    drop(supervisor);

    let head = format!("{}:{}", status.log_head.sequence, status.log_head.hash);
    let verified = secmon(
        folder,
        &["gate", "verify-log", "log/web1.log", "--head", &head],
    );
    assert!(verified.status.success(), "{}", text(&verified.stderr));
    let log = std::fs::read_to_string(folder.join("log/web1.log")).expect("a log");
    std::fs::write(
        folder.join("log/web1.log"),
        log.replacen("\"denied\"", "\"allowed\"", 1),
    )
    .expect("written");
    let verified = secmon(folder, &["gate", "verify-log", "log/web1.log"]);
    assert_eq!(verified.status.code(), Some(1));
    assert!(
        text(&verified.stderr).contains("was changed"),
        "{}",
        text(&verified.stderr)
    );
    let cut: String = log.split_inclusive('\n').take(1).collect();
    std::fs::write(folder.join("log/web1.log"), cut).expect("written");
    let verified = secmon(
        folder,
        &["gate", "verify-log", "log/web1.log", "--head", &head],
    );
    assert!(
        text(&verified.stderr).contains("cut off"),
        "{}",
        text(&verified.stderr)
    );
}

#[test]
fn a_gate_says_what_it_lacks() {
    let folder = tempfile::tempdir().expect("a folder");
    let lacking = secmon(folder.path(), &["gate"]);
    assert_eq!(lacking.status.code(), Some(2));
    assert!(text(&lacking.stderr).contains("--grants"));
    let wrong = secmon(folder.path(), &["gate", "verify-log", "none"]);
    assert_eq!(wrong.status.code(), Some(2));
}

//! The reader in a guest is asked what programs there are told, through the
//! built program: nothing is found in a sound guest, however busy, and what a
//! rootkit's hooks keep from `ps`, `ls` and `/proc` is.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use secmon_lab::specimens;
use secmon_lab::{Guest, Kernel, Suite, Workload};
use serde_json::Value;

/// What a check finds: the names, and the document.
fn check(guest: &Guest, socket: &Path, cache: &Path, folders: Option<&str>) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secmon"));
    command
        .env("SECMON_TARGET", format!("qemu:{}", guest.pid()))
        .env("SECMON_CACHE_DIR", cache)
        .args(["check", "--detector", "lies", "--format", "json"])
        .arg("--reader")
        .arg(socket)
        .stdin(Stdio::null());
    if let Some(folders) = folders {
        command.args(["--reader-folders", folders]);
    }
    let output = command.output().expect("secmon runs");
    let said = String::from_utf8_lossy(&output.stderr);
    let document: Value = serde_json::from_slice(&output.stdout).expect(&said);
    let detector = &document["detectors"][0];
    assert_eq!(detector["detector"], "lies");
    assert_eq!(detector["checked"], true, "{detector}\n{said}");
    let findings = document["findings"].as_array().expect("findings").clone();
    let expected = i32::from(!findings.is_empty());
    assert_eq!(output.status.code(), Some(expected), "{findings:#?}");
    findings
}

/// The findings' names, if each has this number among its subject's parts or
/// in its summary.
fn names_about(findings: &[Value], number: &str) -> BTreeSet<String> {
    let about = |finding: &&Value| {
        let subject = finding["subject"].to_string();
        subject.contains(number) || finding["summary"].to_string().contains(number)
    };
    assert!(findings.iter().all(|one| about(&one)), "{findings:#?}");
    let names = findings.iter().map(|finding| &finding["name"]);
    names
        .map(|name| name.as_str().expect("a name").to_owned())
        .collect()
}

#[test]
fn what_programs_are_not_told_is_found() {
    let kernel = Kernel::fetch(Suite::Bookworm).expect("a kernel");
    let modules = specimens::modules(Suite::Bookworm, &kernel).expect("modules");
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("reader");
    let workload = Workload {
        processes: 20,
        ..Workload::rich()
    };
    let guest = Guest::builder(Suite::Bookworm)
        .kernel(kernel)
        .specimens(modules)
        .tools()
        .workload(workload)
        .qemu_argument("-chardev")
        .qemu_argument(format!(
            "socket,id=reader,path={},server=on,wait=off",
            socket.display()
        ))
        .qemu_argument("-device")
        .qemu_argument("virtserialport,chardev=reader,name=org.secmon.reader")
        .boot()
        .expect("a guest");
    let truth = guest.truth();
    truth.start_role("reader").expect("the reader");
    let check = |folders| check(&guest, &socket, folder.path(), folders);

    let nothing: &[Value] = &[];
    assert_eq!(check(None), nothing, "a quiet guest");
    truth.resume_busy().expect("busy");
    assert_eq!(check(None), nothing, "a busy guest");
    truth.pause_busy().expect("quiet");

    // Kept from who lists /proc.
    let pid = truth.start_role("ordinary").expect("a process")[0];
    let load = |module: &str, parameters: String, symbols: &[&str]| {
        let loaded = truth.load_module(module, &parameters, symbols);
        loaded.expect("the module loads");
    };
    let listing = ["proc_root_operations"];
    load("proc_listing", format!("hide={pid}"), &listing);
    let names = names_about(&check(Some("/proc")), &pid.to_string());
    let expected = ["file_not_told", "process_not_told"].map(str::to_owned);
    assert_eq!(names, expected.into());
    truth.unload_module("proc_listing").expect("unloaded");

    // Kept from who reads /proc/net/tcp.
    let sockets = truth.sockets().expect("sockets");
    let listening = sockets
        .iter()
        .find(|socket| socket.protocol == "tcp" && socket.state_name.as_deref() == Some("LISTEN"));
    let port = listening
        .and_then(|socket| socket.local_port)
        .expect("a port");
    load("tcp_listing", format!("hide={port}"), &["tcp4_seq_ops"]);
    let names = names_about(&check(None), &port.to_string());
    assert_eq!(names, BTreeSet::from(["port_not_told".to_owned()]));
    truth.unload_module("tcp_listing").expect("unloaded");

    // Told, and in no list.
    load("process_unlinked", format!("pid={pid}"), &[]);
    let names = names_about(&check(None), &pid.to_string());
    assert_eq!(names, BTreeSet::from(["process_not_there".to_owned()]));
    truth.unload_module("process_unlinked").expect("unloaded");
    assert_eq!(check(None), nothing, "as before");
}

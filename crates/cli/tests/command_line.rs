//! The built program as its users meet it, where no guest is needed.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// A command with nothing of the user's environment in it.
fn secmon(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secmon"));
    command.args(arguments);
    for name in [
        "SECMON_TARGET",
        "SECMON_CACHE_DIR",
        "XDG_CACHE_HOME",
        "NO_COLOR",
    ] {
        command.env_remove(name);
    }
    command.env("HOME", env!("CARGO_TARGET_TMPDIR"));
    command.stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    secmon(arguments).output().expect("secmon runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Asserts that the run failed as errors do: status 2, nothing on stdout, and
/// a message that says all of `said`.
#[track_caller]
fn assert_error(output: &Output, said: &[&str]) {
    let message = stderr(output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert_eq!(stdout(output), "", "{message}");
    for words in said {
        assert!(message.contains(words), "{words:?} is not in: {message}");
    }
    assert!(!message.contains("panicked"), "{message}");
}

#[test]
fn help_teaches() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    let help = stdout(&help);
    for words in [
        "Usage: secmon -t TARGET COMMAND",
        "Examples:",
        "Exit status:",
        "SECMON_TARGET",
        "NO_COLOR",
        "  kmsg ",
        "  read ",
        "  tables ",
    ] {
        assert!(help.contains(words), "{words:?} is not in:\n{help}");
    }
    assert!(!help.contains("__"), "hidden commands stay hidden");
    let short = run(&["-h"]);
    assert!(stdout(&short).len() < help.len());
    assert_eq!(stdout(&run(&["help"])), help);
}

#[test]
fn no_command_says_what_there_is() {
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("Usage: secmon"));
}

#[test]
fn table_commands_list_their_columns() {
    let help = stdout(&run(&["kmsg", "--help"]));
    for words in ["sequence (number)", "time (time)", "--columns", "--filter"] {
        assert!(help.contains(words), "{words:?} is not in:\n{help}");
    }
    assert_eq!(
        stdout(&run(&["dmesg", "--help"])).lines().count(),
        help.lines().count()
    );
}

#[test]
fn detectors_are_listed_without_a_target() {
    let output = run(&["check", "--list", "--format", "json"]);
    assert!(output.status.success());
    let listed: serde_json::Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    let listed = listed.as_array().expect("rows");
    let processes = listed.iter().find(|row| row["name"] == "processes");
    assert_eq!(processes.expect("it is there")["techniques"][0], "T1014");
    let output = run(&["-t", "file:x", "check", "--detector", "proceses"]);
    assert_error(&output, &["proceses", "processes"]);
}

#[test]
fn an_unknown_command_names_its_like() {
    assert_error(&run(&["tabels"]), &["tabels", "tables"]);
}

#[test]
fn a_missing_target_says_what_to_do() {
    assert_error(&run(&["kmsg"]), &["no target", "-t", "SECMON_TARGET"]);
}

#[test]
fn bad_targets_are_named() {
    assert_error(&run(&["-t", "disk:x", "kmsg"]), &["disk", "file:PATH"]);
    assert_error(&run(&["-t", "plain", "kmsg"]), &["plain", "qemu:plain"]);
    assert_error(
        &run(&["-t", "file:/nonexistent/image", "kmsg"]),
        &["/nonexistent/image", "No such file"],
    );
    assert_error(
        &run(&["-t", "file:/", "kmsg"]),
        &["file /", "neither a file"],
    );
    assert_error(
        &run(&["-t", "qemu:no such guest", "kmsg"]),
        &["no such guest"],
    );
    let mut by_environment = secmon(&["kmsg"]);
    by_environment.env("SECMON_TARGET", "file:/nonexistent/other");
    assert_error(
        &by_environment.output().expect("secmon runs"),
        &["/nonexistent/other"],
    );
}

#[test]
fn unknown_columns_are_named_before_anything_is_opened() {
    let target = ["-t", "file:/nonexistent/image", "kmsg"];
    let with = |more: &[&str]| run(&[&target[..], more].concat());
    assert_error(
        &with(&["--columns", "levle"]),
        &["kmsg", "levle", "did you mean level?"],
    );
    assert_error(&with(&["--sort", "text:up"]), &["text:up"]);
    assert_error(&with(&["--sort", "txet"]), &["did you mean text?"]);
    assert_error(&with(&["--filter", "level~("]), &["regular expression"]);
    assert_error(&with(&["--filter", "level"]), &["level", "condition"]);
    assert_error(&with(&["--pid", "1"]), &["--pid", "kmsg"]);
    assert_error(&with(&["--format", "yaml"]), &["yaml", "ndjson"]);
    assert_error(&with(&["--format", "markdown"]), &["markdown", "tables"]);
}

fn file(folder: &Path, name: &str, content: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, content).expect("a file");
    format!("file:{}", path.display())
}

#[test]
fn files_without_a_kernel_are_clear_errors() {
    let folder = tempfile::tempdir().expect("a folder");
    let empty = file(folder.path(), "empty", b"");
    assert_error(&run(&["-t", &empty, "kmsg"]), &["empty"]);
    let text = file(
        folder.path(),
        "text",
        "not an image\n".repeat(900).as_bytes(),
    );
    assert_error(&run(&["-t", &text, "kmsg"]), &["kernel"]);
    let zeros = file(folder.path(), "zeros", &vec![0; 8 << 20]);
    assert_error(&run(&["-t", &zeros, "kmsg"]), &["kernel"]);
    let cut = file(folder.path(), "cut", b"\x7fELF\x02\x01\x01");
    assert_error(&run(&["-t", &cut, "kmsg"]), &["cut"]);
    let disk = file(folder.path(), "disk", b"QFI\xfb0000000000000000");
    assert_error(&run(&["-t", &disk, "kmsg"]), &["qcow2"]);
}

#[test]
fn hostile_file_names_do_not_reach_the_terminal() {
    let output = run(&["-t", "file:/nonexistent/\x1b[31m\u{202e}", "kmsg"]);
    assert_error(&output, &["\\x1b[31m\\u{202e}"]);
}

#[test]
fn stated_layouts_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = file(folder.path(), "image", &vec![0; 1 << 20]);
    for layout in ["nonsense", "0-0x100000000", "0x1000-0x0"] {
        assert_error(
            &run(&["-t", &image, "--layout", layout, "kmsg"]),
            &["layout"],
        );
    }
}

#[test]
fn physical_memory_is_read_without_a_kernel() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut content = vec![0; 64 << 10];
    content[0x1000..0x1010].copy_from_slice(b"hello \x1b[31mworld");
    let image = file(folder.path(), "image", &content);
    let read =
        |more: &[&str]| run(&[&["-t", &image, "read", "phys:0x1000", "-l", "16"], more].concat());

    let hex = read(&[]);
    assert!(hex.status.success(), "{}", stderr(&hex));
    assert_eq!(
        stdout(&hex),
        "0000000000001000: 6865 6c6c 6f20 1b5b 3331 6d77 6f72 6c64  hello .[31mworld\n"
    );
    assert_eq!(read(&["--raw"]).stdout, b"hello \x1b[31mworld");
    let json: serde_json::Value =
        serde_json::from_slice(&read(&["--format", "json"]).stdout).expect("JSON");
    assert_eq!(json[0]["address"], "0x1000");
    assert_eq!(json[0]["bytes"], "68656c6c6f201b5b33316d776f726c64");
    let target = folder.path().join("out");
    let written = read(&["--output", target.to_str().expect("UTF-8")]);
    assert!(written.status.success(), "{}", stderr(&written));
    let image_path = image.trim_start_matches("file:");
    let over_itself = read(&["--output", image_path]);
    assert_error(&over_itself, &["exists", "choose another name"]);
    assert_eq!(std::fs::read(image_path).expect("untouched"), content);
    assert_eq!(
        std::fs::read(&target).expect("written"),
        b"hello \x1b[31mworld"
    );
}

#[test]
fn reading_past_the_end_shows_what_there_is_and_fails() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = file(folder.path(), "image", &vec![7; 8 << 10]);
    let read =
        |more: &[&str]| run(&[&["-t", &image, "read", "phys:0x1ff0", "-l", "64"], more].concat());
    let hex = read(&[]);
    assert_eq!(hex.status.code(), Some(2));
    assert_eq!(stdout(&hex).lines().count(), 1);
    assert!(stderr(&hex).contains("0x2000"), "{}", stderr(&hex));
    let json = read(&["--format", "json"]);
    assert_eq!(json.status.code(), Some(2));
    let rows: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON all the same");
    assert_eq!(rows[1]["bytes"], serde_json::Value::Null);
    assert!(rows[1]["unreadable"]["bytes"].is_string());
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = file(folder.path(), "image", &vec![0; 8 << 20]);
    let mut child = secmon(&["-t", &image, "read", "phys:0", "--length", "8M"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("secmon runs");
    let mut first = [0; 10];
    let mut pipe = child.stdout.take().expect("piped");
    pipe.read_exact(&mut first).expect("something comes");
    drop(pipe);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(stderr(&output), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn tables_are_described_in_every_format() {
    let json: Vec<serde_json::Value> =
        serde_json::from_slice(&run(&["tables", "--format", "json"]).stdout).expect("JSON");
    assert!(json.iter().any(|table| table["name"] == "kmsg"));
    let columns: Vec<serde_json::Value> =
        serde_json::from_slice(&run(&["tables", "kmsg", "--format", "json"]).stdout).expect("JSON");
    assert!(columns.iter().any(|column| column["column"] == "text"));
    let csv = run(&["tables", "dmesg", "--format", "csv"]);
    let records = csv::Reader::from_reader(&csv.stdout[..])
        .into_records()
        .count();
    assert_eq!(records, columns.len());
    let lines = stdout(&run(&["tables", "--format", "ndjson"]));
    assert_eq!(lines.lines().count(), json.len());
    let markdown = stdout(&run(&["tables", "--format", "markdown"]));
    for table in &json {
        let name = table["name"].as_str().expect("a name");
        assert!(markdown.contains(&format!("\n## {name}\n")), "{name}");
    }
    assert_error(&run(&["tables", "kmesg"]), &["kmesg", "did you mean kmsg"]);
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success());
        let script = stdout(&output);
        for word in ["kmsg", "translate", "columns", "SECMON"] {
            let found = script.to_lowercase().contains(&word.to_lowercase());
            assert!(found, "{word} is not in the {shell} script");
        }
    }
    assert_error(&run(&["completions", "tcsh"]), &["tcsh", "bash"]);
}

#[test]
fn bash_accepts_its_completions() {
    let script = run(&["completions", "bash"]).stdout;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("secmon.bash");
    std::fs::write(&path, script).expect("a file");
    let check = "source \"$1\" && COMP_WORDS=(secmon tab) COMP_CWORD=1 && \
                 _secmon secmon tab secmon && echo \"${COMPREPLY[@]}\"";
    let output = Command::new("bash")
        .args(["--norc", "-c", check, "bash"])
        .arg(&path)
        .output()
        .expect("bash runs (install bash)");
    assert_eq!(stdout(&output).trim(), "tables", "{}", stderr(&output));
}

#[test]
fn man_pages_are_written() {
    let page = stdout(&run(&["man"]));
    assert!(page.contains(".TH secmon 1"), "{page}");
    let folder = tempfile::tempdir().expect("a folder");
    let pages = folder.path().join("man1");
    let output = run(&["man", "--output", pages.to_str().expect("UTF-8")]);
    assert!(output.status.success(), "{}", stderr(&output));
    let read = |name: &str| std::fs::read_to_string(pages.join(name)).expect(name);
    assert!(read("secmon.1").contains("SECMON_TARGET"));
    assert!(read("secmon-kmsg.1").contains("sequence"));
    assert!(read("secmon-read.1").contains("phys:"));
    let file = pages.join("secmon.1");
    assert_error(
        &run(&["man", "--output", file.to_str().expect("UTF-8")]),
        &["not a folder"],
    );
}

#[test]
fn an_image_that_shrinks_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = file(folder.path(), "image", &vec![1; 16 << 20]);
    let mut child = secmon(&["-t", &image, "read", "phys:0", "--raw", "--length", "16M"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("secmon runs");
    // It now waits for its reader, long before the end of the image.
    let mut pipe = child.stdout.take().expect("piped");
    pipe.read_exact(&mut [0; 1]).expect("something comes");
    std::fs::File::create(folder.path().join("image")).expect("cut to nothing");
    let mut rest = Vec::new();
    pipe.read_to_end(&mut rest).expect("what was read before");
    assert!(rest.len() < 16 << 20);
    let output = child.wait_with_output().expect("it ends");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("became shorter while it was read"), "{said}");
}

#[test]
fn a_full_disk_is_an_error() {
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("Linux has it");
    let output = secmon(&["tables"])
        .stdout(full)
        .output()
        .expect("secmon runs");
    assert_error(&output, &["No space left"]);
}

#[test]
fn dumps_hold_the_memory_and_are_confined_to_their_folder() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut content = vec![0; 4 << 20];
    content[0x12345..0x12350].copy_from_slice(b"some memory");
    let image = file(folder.path(), "image", &content);
    let outputs = folder.path().join("dumps");
    std::fs::create_dir(&outputs).expect("a folder");
    for kind in ["raw", "lime", "elf"] {
        let path = outputs.join(kind);
        let path = path.to_str().expect("UTF-8");
        let written = run(&["-t", &image, "dump", path, "--as", kind, "--format", "json"]);
        assert!(written.status.success(), "{}", stderr(&written));
        let rows: serde_json::Value = serde_json::from_slice(&written.stdout).expect("JSON");
        assert_eq!(rows[0]["unreadable"], 0);
        let sum = Command::new("sha256sum")
            .arg(path)
            .output()
            .expect("sha256sum runs");
        assert!(stdout(&sum).starts_with(rows[0]["sha256"].as_str().expect("a sum")));
        let dump = format!("file:{path}");
        let back = run(&["-t", &dump, "read", "phys:0x12345", "-l", "11", "--raw"]);
        assert_eq!(back.stdout, b"some memory", "{kind}: {}", stderr(&back));
        let again = run(&["-t", &image, "dump", path, "--as", kind]);
        assert_error(&again, &["exists"]);
    }
    assert_error(
        &run(&["-t", &image, "dump", "/nonexistent/x/dump"]),
        &["/nonexistent/x"],
    );
}

#[test]
fn options_win_over_the_environment() {
    let folder = tempfile::tempdir().expect("a folder");
    let image = file(folder.path(), "image", &vec![0; 1 << 20]);
    let mut command = secmon(&["--no-cache", "-t", &image, "read", "phys:0", "-l", "1"]);
    command.env("SECMON_CACHE_DIR", folder.path().join("cache"));
    command.env("SECMON_TARGET", "file:/nonexistent/other");
    let output = command.output().expect("secmon runs");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!folder.path().join("cache").exists());
}

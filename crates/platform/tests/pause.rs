//! A paused guest always runs again: also when the process that paused it, or
//! the one that holds the pause for it, is killed.
//!
//! This test has a `main` of its own. Run again with an argument it is the
//! watcher of a pause, or a program that holds one until it is killed.

mod machine;

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use machine::Machine;
use rustix::process::{Pid, Signal, kill_process};
use secmon_platform::qemu::{
    Pause, PauseError, PauseMethod, ProcessId, QmpClient, pause::watch_main,
};

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(role) if role == "watch" => watch_main(arguments),
        Some(role) if role == "hold" => hold(arguments),
        _ => {
            let tests: [(&str, fn()); 7] = [
                ("a_pause_ends_with_its_guard", a_pause_ends_with_its_guard),
                (
                    "a_killed_program_leaves_a_running_guest",
                    a_killed_program_leaves_a_running_guest,
                ),
                (
                    "a_killed_watcher_leaves_a_running_guest",
                    a_killed_watcher_leaves_a_running_guest,
                ),
                (
                    "a_watcher_ignores_the_usual_signals",
                    a_watcher_ignores_the_usual_signals,
                ),
                (
                    "a_stopped_guest_stays_stopped",
                    a_stopped_guest_stays_stopped,
                ),
                ("a_limit_ends_a_pause", a_limit_ends_a_pause),
                ("what_others_resume_stays_so", what_others_resume_stays_so),
            ];
            for (name, test) in tests {
                test();
                println!("test {name} ... ok");
            }
            ExitCode::SUCCESS
        }
    }
}

fn watcher() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.arg("watch");
    command
}

/// Holds a pause until killed: its method comes as `qmp PATH` or `signal PID`.
fn hold(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let kind = arguments.next().expect("a kind");
    let value = arguments.next().expect("a value");
    let method = if kind == "qmp" {
        PauseMethod::Qmp(value.into())
    } else {
        let pid = value.to_str().and_then(|pid| pid.parse().ok());
        PauseMethod::Signal(ProcessId::of(pid.expect("a number")).expect("a process"))
    };
    let _pause = Pause::begin(&method, LIMIT, watcher()).expect("a pause");
    println!("paused");
    std::io::stdout().flush().expect("a reader");
    std::thread::sleep(LIMIT);
    ExitCode::FAILURE
}

/// Running firmware, which counts timer ticks at 0x46c.
fn machine(with_qmp: bool) -> (Machine, PauseMethod) {
    let arguments: &[&str] = if with_qmp {
        &["-m", "128", "-qmp", "unix:q,server,nowait"]
    } else {
        &["-m", "128"]
    };
    let mut machine = Machine::start(arguments);
    machine.run_firmware();
    machine.command("cont");
    let method = if with_qmp {
        PauseMethod::Qmp(machine.path("q"))
    } else {
        PauseMethod::Signal(ProcessId::of(machine.pid()).expect("a process"))
    };
    (machine, method)
}

fn ticks(machine: &Machine) -> Vec<u8> {
    use secmon_memory::PhysicalAddress;
    use secmon_platform::qemu::{QemuOptions, QmpUse, Selector, open};
    let options = QemuOptions {
        qmp: QmpUse::Never,
        ..QemuOptions::default()
    };
    let target = open(&Selector::Pid(machine.pid()), &options).expect("a target");
    let mut bytes = vec![0; 4];
    target
        .memory
        .read(PhysicalAddress::new(0x46c), &mut bytes)
        .expect("memory");
    bytes
}

/// Whether the guest's clock moves within `patience`.
fn runs_within(machine: &Machine, patience: Duration) -> bool {
    let before = ticks(machine);
    let deadline = Instant::now() + patience;
    while ticks(machine) == before {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// A tick is 55 ms.
fn stands_still(machine: &Machine) -> bool {
    !runs_within(machine, Duration::from_millis(400))
}

const SECOND: Duration = Duration::from_secs(1);

fn a_pause_ends_with_its_guard() {
    for with_qmp in [true, false] {
        let (machine, method) = machine(with_qmp);
        assert!(runs_within(&machine, SECOND));
        let pause = Pause::begin(&method, LIMIT, watcher()).expect("a pause");
        assert_eq!(pause.already_stopped(), None);
        assert!(stands_still(&machine));
        pause.end().expect("resumed");
        assert!(runs_within(&machine, SECOND));
        let pause = Pause::begin(&method, LIMIT, watcher()).expect("a pause");
        assert!(stands_still(&machine));
        drop(pause);
        assert!(runs_within(&machine, SECOND));
    }
}

fn a_killed_program_leaves_a_running_guest() {
    for with_qmp in [true, false] {
        let (machine, method) = machine(with_qmp);
        let mut holder = Command::new(std::env::current_exe().expect("this program"));
        holder.arg("hold");
        match &method {
            PauseMethod::Qmp(path) => holder.arg("qmp").arg(path),
            PauseMethod::Signal(process) => holder.arg("signal").arg(process.pid.to_string()),
        };
        let mut holder = holder.stdout(Stdio::piped()).spawn().expect("a program");
        let output = holder.stdout.take().expect("its output");
        let line = BufReader::new(output).lines().next();
        assert_eq!(line.expect("a line").expect("text"), "paused");
        assert!(stands_still(&machine));
        holder.kill().expect("killed");
        assert!(runs_within(&machine, SECOND), "{method:?}");
        holder.wait().expect("reaped");
    }
}

/// The watcher's process, a child of this one.
fn watcher_pid() -> Pid {
    let children = format!("/proc/self/task/{}/children", std::process::id());
    let children = std::fs::read_to_string(children).expect("children");
    children
        .split_ascii_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .find(|pid: &i32| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            command.split(|byte| *byte == 0).nth(1) == Some(b"watch")
        })
        .and_then(Pid::from_raw)
        .expect("a watcher")
}

fn a_killed_watcher_leaves_a_running_guest() {
    for with_qmp in [true, false] {
        let (machine, method) = machine(with_qmp);
        let pause = Pause::begin(&method, LIMIT, watcher()).expect("a pause");
        kill_process(watcher_pid(), Signal::KILL).expect("killed");
        assert!(stands_still(&machine));
        pause.end().expect("resumed all the same");
        assert!(runs_within(&machine, SECOND), "{method:?}");
    }
}

fn a_watcher_ignores_the_usual_signals() {
    let (machine, method) = machine(true);
    let pause = Pause::begin(&method, LIMIT, watcher()).expect("a pause");
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        kill_process(watcher_pid(), signal).expect("signalled");
    }
    assert!(stands_still(&machine));
    pause.end().expect("it still holds the pause");
    assert!(runs_within(&machine, SECOND));
}

fn a_stopped_guest_stays_stopped() {
    let (mut machine, method) = machine(true);
    machine.command("stop");
    let pause = Pause::begin(&method, LIMIT, watcher()).expect("a pause");
    assert_eq!(pause.already_stopped(), Some("paused"));
    pause.end().expect("an end");
    assert!(stands_still(&machine));
    let mut client = QmpClient::connect(&machine.path("q"), LIMIT).expect("QMP is free");
    assert_eq!(client.status().expect("a state").status, "paused");
}

fn a_limit_ends_a_pause() {
    for with_qmp in [true, false] {
        let (machine, method) = machine(with_qmp);
        let limit = Duration::from_millis(700);
        let pause = Pause::begin(&method, limit, watcher()).expect("a pause");
        assert!(stands_still(&machine));
        std::thread::sleep(limit);
        assert!(runs_within(&machine, SECOND));
        let outcome = pause.end();
        assert!(
            matches!(outcome, Err(PauseError::LimitReached(_))),
            "{outcome:?}"
        );
    }
}

fn what_others_resume_stays_so() {
    for with_qmp in [true, false] {
        let (mut machine, method) = machine(with_qmp);
        let pause = Pause::begin(&method, LIMIT, watcher()).expect("a pause");
        if with_qmp {
            machine.command("cont");
        } else {
            let pid = Pid::from_raw(machine.pid() as i32).expect("a process");
            kill_process(pid, Signal::CONT).expect("continued");
        }
        assert!(runs_within(&machine, SECOND));
        let outcome = pause.end();
        assert!(
            matches!(outcome, Err(PauseError::ResumedByOthers)),
            "{outcome:?}"
        );
    }
    // A program that never becomes a watcher is no pause.
    let (machine, method) = machine(true);
    let outcome = Pause::begin(&method, LIMIT, Command::new("true"));
    assert!(
        matches!(outcome, Err(PauseError::Watcher(_))),
        "{outcome:?}"
    );
    assert!(runs_within(&machine, SECOND));
}
